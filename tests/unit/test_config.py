"""Settings: accepted values, merging, and the presets."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsconv.config import LayerConfig, QuantConfig, as_config
from dsconv.errors import ConfigError, MissingExtraError
from dsconv.names import PRESETS

plain = {
    "weight_bits": st.integers(2, 8),
    "activation_bits": st.none() | st.integers(2, 8),
    "block_size": st.integers(1, 512),
    "weight_rule": st.sampled_from(["paper", "refined", "balanced"]),
    "weight_shift": st.booleans(),
    "activation_sign": st.sampled_from(["adaptive", "extra", "included"]),
    "kds_dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
    "blocks": st.sampled_from(["tap", "flat"]),
}
fields = st.fixed_dictionaries({}, optional=plain)
settings_ = st.none() | st.just("float") | fields
configs = st.builds(
    lambda general, special: {**general, **special},
    fields,
    st.fixed_dictionaries(
        {},
        optional={
            "first_layer": settings_,
            "depthwise": settings_,
            "last_layer": settings_,
            "linear": settings_,
            "small_layers": settings_,
            "overrides": st.dictionaries(st.text(max_size=8), settings_, max_size=3),
        },
    ),
)


@given(configs)
def test_a_config_survives_serialization(data: dict[str, Any]) -> None:
    config = QuantConfig(**data)
    assert QuantConfig.from_json(config.to_json()) == config
    assert QuantConfig(**config.to_dict()) == config
    assert QuantConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert list(QuantConfig.from_json(config.to_json()).overrides) == list(config.overrides)
    assert as_config(data) == config


@given(configs, st.sampled_from(["conv", "linear"]), *[st.booleans()] * 4)
def test_later_settings_win(
    data: dict[str, Any], kind: str, first: bool, last: bool, depthwise: bool, small: bool
) -> None:
    config = QuantConfig(**data)
    expected: dict[str, Any] | None = {name: getattr(config, name) for name in LayerConfig.model_fields}
    in_float = False
    for applies, settings in (
        (kind == "linear", config.linear),
        (small, config.small_layers),
        (depthwise, config.depthwise),
        (first, config.first_layer),
        (last, config.last_layer),
        *((pattern == "name", settings) for pattern, settings in config.overrides.items()),
    ):
        if applies and settings is not None:
            in_float = settings == "float"
            expected |= {} if in_float else settings
    if any(character in pattern for pattern in config.overrides for character in "*?["):
        return
    layer = config.layer("name", kind=kind, first=first, last=last, depthwise=depthwise, small=small)
    assert layer == (None if in_float else LayerConfig(**expected))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight_bits": 9}, "weight_bits: .*less than or equal to 8, got 9"),
        ({"weight_bits": 1}, "weight_bits: .*greater than or equal to 2, got 1"),
        ({"weight_bits": 4.0}, "weight_bits: .*valid integer, got 4.0"),
        ({"weight_bits": "4"}, "weight_bits: .*valid integer, got '4'"),
        ({"weight_bits": True}, "weight_bits: .*valid integer, got True"),
        ({"weight_bits": None}, "weight_bits: .*valid integer, got None"),
        ({"activation_bits": 1}, "activation_bits: .*got 1"),
        ({"block_size": 0}, "block_size: .*greater than or equal to 1, got 0"),
        ({"block_size": -32}, "block_size: .*got -32"),
        ({"weight_rule": "best"}, "weight_rule: .*'paper', 'refined' or 'balanced', got 'best'"),
        ({"weight_scale": "l1"}, "weight_scale: .*'l2' or 'kl', got 'l1'"),
        ({"activation_sign": "both"}, "activation_sign: .*got 'both'"),
        ({"kds_dtype": "float64"}, "kds_dtype: .*got 'float64'"),
        ({"blocks": "row"}, "blocks: .*got 'row'"),
        ({"weight_shift": True, "weight_scale": "kl"}, "weight_shift is fitted by least squares"),
        ({"bits": 4}, "bits: unknown setting; known are weight_bits, activation_bits"),
        ({"weight_bits": 1, "block_size": 0}, "weight_bits: .*; block_size: .*"),
    ],
)
def test_an_unusable_value_is_named_in_one_paragraph(data: dict[str, Any], message: str) -> None:
    for config_type in (LayerConfig, QuantConfig):
        with pytest.raises(ConfigError, match=message) as caught:
            config_type(**data)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"first_layer": {"weight_bits": 9}}, "first_layer.*weight_bits.*got 9"),
        ({"last_layer": {"bits": 8}}, "last_layer.*bits: unknown setting"),
        ({"depthwise": "none"}, "depthwise.*got 'none'"),
        ({"linear": 8}, "linear.*got 8"),
        ({"overrides": {"layer4.*": {"block_size": 0}}}, "overrides.*block_size.*got 0"),
        ({"overrides": {"layer4.*": "off"}}, "overrides.*got 'off'"),
        ({"overrides": ["layer4.*"]}, "overrides.*got"),
    ],
)
def test_an_unusable_special_setting_says_where(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        QuantConfig(**data)
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_after_merging_name_the_layer() -> None:
    config = QuantConfig(weight_shift=True, overrides={"conv*": {"weight_scale": "kl"}})
    assert config.layer("fc") is not None
    with pytest.raises(ConfigError, match=r"layer 'conv1': .*weight_shift is fitted by least squares"):
        config.layer("conv1")


def test_overrides_are_patterns_that_apply_in_order() -> None:
    config = QuantConfig(
        overrides={
            "layer4.*": {"weight_bits": 3, "block_size": 16},
            "*.conv?": {"weight_bits": 5},
            "layer4.1.*": "float",
        }
    )
    assert (config.layer("layer4.0.conv1").weight_bits, config.layer("layer4.0.conv1").block_size) == (5, 16)
    assert config.layer("layer4.0.downsample").weight_bits == 3
    assert config.layer("layer4.1.conv1") is None
    assert config.layer("layer3.0.conv1").weight_bits == 5
    assert config.layer("Layer4.0").weight_bits == 4


def test_a_later_setting_brings_a_layer_back_from_float() -> None:
    config = QuantConfig(linear="float", last_layer={"weight_bits": 8})
    assert config.layer("fc", kind="linear") is None
    assert config.layer("fc", kind="linear", last=True).weight_bits == 8


def test_paper_is_the_published_method_and_nothing_else() -> None:
    config = QuantConfig.preset("paper")
    published = LayerConfig(
        weight_bits=4,
        activation_bits=4,
        block_size=32,
        weight_rule="paper",
        weight_scale="l2",
        weight_shift=False,
        activation_sign="extra",
        kds_dtype="float32",
        blocks="tap",
    )
    assert config.layer() == config.layer(depthwise=True) == config.layer(last=True) == published
    assert config.layer(first=True) == published.model_copy(update={"activation_bits": None})
    assert config.layer(kind="linear") is None and config.layer(kind="linear", last=True) is None


def test_default_is_four_bit_weights_and_eight_bit_mantissas() -> None:
    config = QuantConfig.preset("default")
    assert as_config(None) == config
    for layer in (config.layer(), config.layer(kind="linear", last=True)):
        assert (layer.weight_bits, layer.activation_bits, layer.blocks) == (4, 8, "tap")
    first, depthwise = config.layer(first=True), config.layer(depthwise=True)
    assert (first.weight_bits, first.activation_bits, first.blocks, first.kds_dtype) == (8, 8, "flat", "float32")
    assert (depthwise.weight_bits, depthwise.activation_bits, depthwise.blocks) == (8, None, "flat")


def test_depthwise_layers_of_three_dimensions_have_mantissas_unless_others_have_none() -> None:
    config = QuantConfig.preset("default", overrides={"x": {"activation_bits": None}})
    depthwise = config.layer(depthwise=True)
    assert config.layer(depthwise=True, volume=True) == depthwise.model_copy(update={"activation_bits": 8})
    assert config.layer("x", depthwise=True, volume=True) == depthwise
    assert config.layer(volume=True) == config.layer()
    weights_only = QuantConfig(activation_bits=None)
    assert weights_only.layer(depthwise=True, volume=True) == weights_only.layer(depthwise=True)
    in_float = QuantConfig(depthwise="float")
    assert in_float.layer(depthwise=True, volume=True) is None


def test_yaml_says_what_json_says(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs the extra 'yaml'")
    configs = [QuantConfig.preset(name) for name in PRESETS]
    configs.append(QuantConfig(overrides={"layer4.*": {"weight_bits": 2}, "fc": "float", "0": None}))
    for config in configs:
        assert QuantConfig.from_yaml(yaml.safe_dump(config.to_dict())) == config
        assert QuantConfig.from_yaml(config.to_json()) == config  # JSON is also YAML
        for name, text in {"a.json": config.to_json(), "a.yaml": yaml.dump(config.to_dict())}.items():
            (tmp_path / name).write_text(text)
            assert QuantConfig.from_file(tmp_path / name) == config


WRONG_YAML = {
    "weight_bits: 3\nblock_size: 16\nweight_bits: 4": "line 3: the name 'weight_bits' occurs twice",
    "overrides:\n  fc: float\n  fc: float": "line 3: the name 'fc' occurs twice",
    "weight_bit: 3": "weight_bit: unknown setting; known are weight_bits",
    "first_layer: {weight_bit: 3}": "first_layer: weight_bit: unknown setting",
    "weight_bits: nine": "weight_bits: ",
    "weight_bits: .nan": "line 1: .nan is not a number in JSON",
    "overrides:\n  0: float": "line 2: expected a name, got 0: put it in quotes",
    "overrides:\n  [a, b]: float": "line 2: expected a name, got a sequence",
    "overrides: {on: float}": "line 1: expected a name, got on: put it in quotes",
    "kds_dtype: 2020-01-01": "line 1: 2020-01-01 is a date",
    "overrides: {*.conv: float}": "line 1: while scanning an alias: ",
    "linear: &a {weight_bits: 8}\nlast_layer: *a": "line 2: *a is an alias",
    "linear: !!python/object/apply:os.system [ls]": "line 1: the tag tag:yaml.org,2002:python/object/apply:os.system",
    "- weight_bits: 3": "expected names and values in YAML",
    "": "expected names and values in YAML",
    "weight_bits: 3\n---\nweight_bits: 4": "line 2: ",
    "weight_bits: [3": "line 1: ",
    "a: " + "[" * 100 + "]" * 100: "nested deeper than 64 levels",
    "\x00": "",
}


@pytest.mark.parametrize("text", WRONG_YAML)
def test_wrong_yaml_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="needs the extra 'yaml'")
    with pytest.raises(ConfigError) as error:
        QuantConfig.from_yaml(text)
    assert WRONG_YAML[text] in str(error.value)
    file = tmp_path / "mine.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        QuantConfig.from_file(file)
    assert str(error.value).startswith(f"{file}: ") and WRONG_YAML[text] in str(error.value)


def test_without_pyyaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "a.yaml").write_text("weight_bits: 3")
    with pytest.raises(MissingExtraError, match=r"pip install 'dsconv\[yaml\]'"):
        QuantConfig.from_file(tmp_path / "a.yaml")
    (tmp_path / "a.json").write_text('{"weight_bits": 3}')
    assert QuantConfig.from_file(tmp_path / "a.json").weight_bits == 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described_and_can_be_changed(name: str) -> None:
    assert f"``{name}``" in QuantConfig.preset.__doc__
    changed = QuantConfig.preset(name, weight_bits=3, overrides={"x": "float"})
    assert changed.weight_bits == 3 and changed.overrides == {"x": "float"}
    unchanged = QuantConfig.preset(name).to_dict()
    assert changed.to_dict() == unchanged | {"weight_bits": 3, "overrides": {"x": "float"}}


def test_an_unknown_preset_lists_those_there_are() -> None:
    for attempt in (lambda: QuantConfig.preset("papper"), lambda: as_config("papper")):
        with pytest.raises(ConfigError, match=r"preset: expected one of default, paper, .*, got 'papper'"):
            attempt()


@pytest.mark.parametrize("wrong", [4, ["paper"], object()])
def test_something_else_than_a_config_is_an_error(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="config: expected a QuantConfig, a dictionary or the name of a preset"):
        as_config(wrong)


@pytest.mark.parametrize("text", ["", "{", "[]", "4", "null", '"paper"', '{"weight_bits": 99}'])
def test_text_that_is_not_a_config_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig.from_json(text)
    assert "\n" not in str(caught.value)


def test_configs_do_not_share_what_can_be_changed() -> None:
    mine = QuantConfig(first_layer={"weight_bits": 8})
    for config in (QuantConfig(), QuantConfig.preset("paper"), QuantConfig.preset("default"), mine):
        config.first_layer["weight_bits"] = 2
        config.overrides["x"] = "float"
    assert QuantConfig().first_layer["weight_bits"] == 8 and not QuantConfig().overrides
    assert "weight_bits" not in QuantConfig.preset("paper").first_layer
    assert QuantConfig.preset("default").first_layer["weight_bits"] == 8


def test_a_config_cannot_be_changed_by_accident() -> None:
    config = QuantConfig()
    with pytest.raises(Exception, match="frozen"):
        config.weight_bits = 3


def test_the_representation_shows_what_differs_and_can_be_evaluated() -> None:
    config = QuantConfig(weight_bits=3, overrides={"fc": "float"})
    assert repr(config) == "QuantConfig(weight_bits=3, overrides={'fc': 'float'})"
    assert eval(repr(config)) == config
