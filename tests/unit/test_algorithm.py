"""The algorithm of a layer: allowed values, selection, and support in the rest of the package."""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv import LayerConfig, QuantConfig
from dsconv.backends import simulate
from dsconv.conversion import model_info
from dsconv.errors import ConfigError, FileFormatError, ModelError
from dsconv.io.checkpoint import read_tensors
from dsconv.layers import algorithm, layer
from dsconv.numerics import InputMoments
from dsconv.ops import native, packing

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")
WINOGRAD = LayerConfig(block_size=16, activation_bits=8, algorithm="winograd")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(24, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def algorithms(qmodel: nn.Module) -> dict[str, str]:
    return {name: module.config.algorithm for name, module in qmodel.named_modules() if hasattr(module, "vqk")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: dsconv.nn.DSConv2d(8, 8, 5, config=WINOGRAD),
        lambda: dsconv.nn.DSConv2d(8, 8, 3, stride=2, config=WINOGRAD),
        lambda: dsconv.nn.DSConv2d(8, 8, 3, dilation=2, config=WINOGRAD),
        lambda: dsconv.nn.DSConv2d(8, 8, 3, groups=2, config=WINOGRAD),
        lambda: dsconv.nn.DSConv1d(8, 8, 3, config=WINOGRAD),
        lambda: dsconv.nn.DSConvTranspose2d(8, 8, 3, config=WINOGRAD),
        lambda: dsconv.nn.DSLinear(8, 8, config=WINOGRAD),
    ],
)
def test_layers_that_cannot_have_winograd_say_so(make: Any) -> None:
    with pytest.raises(ConfigError, match="winograd is for 3x3 convolutions of stride and dilation 1 and one group"):
        make()


@pytest.mark.parametrize("settings", [{"blocks": "flat"}, {"activation_bits": None}])
def test_settings_that_cannot_go_with_winograd_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be combined with"):
        LayerConfig(algorithm="winograd", **settings)
    assert not LayerConfig(algorithm="auto", **settings).allows_winograd


def test_an_error_about_the_algorithm_names_the_layer() -> None:
    config = QuantConfig(overrides={"6": {"algorithm": "winograd"}})
    with pytest.raises(ModelError, match="layer '6': algorithm: winograd is for"):
        dsconv.quantize(network(), config)


def test_auto_is_winograd_where_a_layer_can_have_it_and_it_is_near() -> None:
    found = algorithms(dsconv.quantize(network(), QuantConfig.preset("default", algorithm="auto")))
    assert found == {"0": "direct", "3": "winograd", "6": "direct", "8": "winograd", "11": "direct"}


def test_auto_leaves_direct_what_would_get_much_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "MOST_NOISE_DB", 0.0)
    config = QuantConfig(algorithm="auto", weight_bits=8, activation_bits=8)
    assert set(algorithms(dsconv.quantize(network(), config)).values()) == {"direct"}


@torch.no_grad()
def test_the_choice_follows_the_noise_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(64, 32, 3, padding=1), torch.randn(1, 64, 12, 12).relu()
    config = LayerConfig(weight_bits=8, activation_bits=8, block_size=64, algorithm="auto")
    error = {}
    for name in ("direct", "winograd"):
        other = dsconv.nn.DSConv2d.from_float(conv, config.model_copy(update={"algorithm": name}))
        error[name] = (other(x) - conv(x)).square().sum().item()
    noise = 10 * math.log10(error["winograd"] / error["direct"])
    monkeypatch.setattr(layer, "noise_like", lambda *_: x)
    made = dsconv.nn.DSConv2d.from_float(conv, config)
    for most, expected in ((noise - 0.01, "direct"), (noise + 0.01, "winograd"), (noise - 0.01, "direct")):
        monkeypatch.setattr(layer, "MOST_NOISE_DB", most)
        made.quantize_(conv.weight)
        assert made.config.algorithm == expected
        other = dsconv.nn.DSConv2d.from_float(conv, made.config)
        assert torch.equal(made(x), other(x))
        with dsconv.ops.simulated():
            assert torch.equal(made(x), other(x))


@pytest.mark.parametrize(
    ("direct", "winograd", "expected"),
    [(1, 10, 20), (1, math.nan, math.inf), (math.inf, 1, math.inf), (0, 0, 0), (0, 1, math.inf), (1, 0, 0)],
)
def test_noise_that_is_not_finite_is_too_much(direct: float, winograd: float, expected: float) -> None:
    outputs = (torch.full((1, 2), value) for value in (0.0, direct, winograd))
    assert algorithm.added_noise_db(*outputs) == expected


@needs_extension
def test_auto_packs_a_layer_once_by_each_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, pack = list[str](), packing.pack

    def counted(*given: Any, **named: Any) -> Any:
        packed.append(given[3].algorithm)
        return pack(*given, **named)

    monkeypatch.setattr(packing, "pack", counted)
    conv, config = nn.Conv2d(16, 24, 3), LayerConfig(block_size=16, activation_bits=8, algorithm="auto")
    made = dsconv.nn.DSConv2d.from_float(conv, config)
    with torch.inference_mode():
        made(torch.randn(1, 16, 5, 5))
    assert packed == ["direct", "winograd"] and made.config.algorithm == "winograd"


def simulated(made: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(), dsconv.ops.simulated():
        y: Tensor = made(x)
        return y


def test_the_simulation_rounds_a_weight_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, round_winograd = list[Tensor](), simulate.round_winograd

    def counted(w: Tensor, block_size: int) -> Any:
        rounded.append(w)
        return round_winograd(w, block_size)

    monkeypatch.setattr(simulate, "round_winograd", counted)
    made = dsconv.nn.DSConv2d.from_float(nn.Conv2d(16, 8, 3, bias=False), WINOGRAD)
    x = torch.randn(2, 16, 6, 6)
    y = simulated(made, x)
    assert torch.equal(simulated(made, x), y) and len(rounded) == 1
    with torch.no_grad():
        made.kds.mul_(2)
    assert torch.equal(simulated(made, x), 2 * y) and len(rounded) == 2
    made.kds = made.kds / 2
    assert torch.equal(simulated(made, x), y) and len(rounded) == 3
    made.load_state_dict({**made.state_dict(), "kds": -made.kds})
    assert torch.equal(simulated(made, x), -y) and len(rounded) == 4
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.vqk.zero_()
    assert not simulated(other, x).any() and simulated(made, x).any() and len(rounded) == 5
    made.config = made.config.model_copy(update={"algorithm": "direct"})
    simulated(made, x)
    assert len(rounded) == 5
    # Gradients can use the weights that inference mode cached.
    made.config = WINOGRAD
    made(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None and len(rounded) == 5


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_simulation_takes_the_weight_that_it_keeps(strict: bool) -> None:
    made, x = dsconv.nn.DSConv2d.from_float(nn.Conv2d(16, 8, 3), WINOGRAD), torch.randn(2, 16, 6, 6)
    y = simulated(made, x)
    with torch.no_grad(), dsconv.ops.simulated():
        program = torch.export.export(made, (x,), strict=strict)
    assert torch.equal(program.module()(x), y)


def test_a_file_does_not_hold_what_the_simulation_keeps() -> None:
    made = dsconv.nn.DSConv2d.from_float(nn.Conv2d(16, 8, 3), WINOGRAD)
    simulated(made, torch.randn(1, 16, 5, 5))
    assert made._simulated_weights is not None
    again = pickle.loads(pickle.dumps(made))
    assert again._simulated_weights is None and len(pickle.dumps(made)) < 16 * 8 * 16 * 4
    assert made.pack_()._simulated_weights is None


def test_what_stands_for_inputs_has_their_moments() -> None:
    mean, variance = torch.tensor([[0.5, -0.3] * 200]), torch.tensor([[0.2, 0.8] * 200])
    x = algorithm.noise_like(InputMoments(mean, variance), 400, torch.device("cpu"))
    second = x.square().mean((0, 2, 3)).view(-1, 2).mean(0)
    torch.testing.assert_close(second, torch.tensor([0.45, 0.89]), rtol=0.1, atol=0)
    assert x[:, ::2].min() == 0 and x[:, 1::2].min() < 0
    assert algorithm.noise_like(None, 4, torch.device("cpu")).min() == 0


@needs_extension
def test_compiled_networks_have_the_bits_of_their_layers() -> None:
    qnet = dsconv.quantize(network(), QuantConfig.preset("default", algorithm="auto"))
    for size in ((1, 3, 9, 12), (3, 3, 8, 8), (2, 3, 21, 230)):
        x = torch.randn(size).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            assert torch.equal(dsconv.compile(qnet, x)(x), qnet(x))
    operators = [step.operator for step in dsconv.compile(qnet, torch.randn(1, 3, 8, 8)).plan.steps]
    assert operators.count("dsconv.conv2d (winograd)") == 2 and operators.count("dsconv.conv2d") == 2


def test_summaries_name_it() -> None:
    table = dsconv.summary(dsconv.quantize(network(), QuantConfig.preset("default", algorithm="auto")))
    assert [row.algorithm for row in table.layers] == ["direct", "winograd", "direct", "winograd", "direct"]
    assert str(table).count("8 winograd") == 2


def stored_version(path: Path) -> str:
    return read_tensors(path, "dsconv", "file", "write it again")[0]["format_version"]


def test_files_say_what_was_chosen(tmp_path: Path) -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    qnet = dsconv.quantize(net, QuantConfig.preset("default", algorithm="auto", small_layers=None))
    path = dsconv.save(qnet, tmp_path / "net.safetensors")
    again = dsconv.load(path, net)
    assert algorithms(again) == algorithms(qnet) and stored_version(path) == "3"
    with torch.inference_mode():
        assert torch.equal(again(x), qnet(x))


def test_files_without_it_are_as_older_versions_read_them(tmp_path: Path) -> None:
    direct = QuantConfig.preset("default", algorithm="direct", small_layers=None)
    path = dsconv.save(dsconv.quantize(network(), direct), tmp_path / "net.safetensors")
    entries, _ = read_tensors(path, "dsconv", "file", "write it again")
    assert entries["format_version"] == "2" and "algorithm" not in entries["config"] + entries["settings"]


@pytest.mark.parametrize(
    "changes", [{"overrides": {"3": {"algorithm": "direct"}}}, {"first_layer": {"algorithm": "direct"}}]
)
def test_files_whose_config_names_it_for_some_layers_are_not_for_older_versions(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = dsconv.save(dsconv.quantize(network(), QuantConfig(**changes)), tmp_path / "net.safetensors")
    assert stored_version(path) == "3"
    assert algorithms(dsconv.load(path, network()))["3"] == "direct"


def test_files_with_it_are_refused_by_models_whose_layers_cannot_have_it(tmp_path: Path) -> None:
    qnet = dsconv.quantize(network(), QuantConfig.preset("default", algorithm="auto"))
    path = dsconv.save(qnet, tmp_path / "net.safetensors")
    other = network()
    other[3] = nn.Conv2d(16, 24, 3, padding=1, stride=2)
    with pytest.raises(FileFormatError, match="layer '3': the model has another layer than the file: algorithm"):
        dsconv.load(path, other)


def test_a_file_that_has_not_chosen_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qnet = dsconv.quantize(network(), QuantConfig.preset("default", algorithm="auto"))
    qnet[3].config = qnet[3].config.model_copy(update={"algorithm": "auto"})
    path = dsconv.save(qnet, tmp_path / "net.safetensors")
    with pytest.raises(FileFormatError, match="algorithm is 'auto'"):
        dsconv.load(path, network())


@pytest.mark.parametrize("reloaded", [False, True])
def test_calibration_chooses_again_by_images(reloaded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net, images = network(), torch.randn(32, 3, 8, 8)
    config = QuantConfig.preset("default", overrides={"8": {"algorithm": "direct"}})
    qnet = dsconv.quantize(net, config)
    assert algorithms(qnet) == {"0": "direct", "3": "winograd", "6": "direct", "8": "direct", "11": "direct"}
    if reloaded:
        qnet = dsconv.load(dsconv.save(qnet, tmp_path / "net.safetensors"), network())
    seen = []
    rule = layer.added_noise_db

    def look(expected: Tensor, *others: Tensor) -> float:
        seen.append(expected.shape)
        return rule(expected, *others)

    monkeypatch.setattr(layer, "added_noise_db", look)
    assert algorithms(dsconv.calibrate(qnet, net, images)) == algorithms(qnet)
    # One layer has the choice, and is measured on four images.
    assert seen == [(4, 24, 8, 8)]
    monkeypatch.setattr(layer, "added_noise_db", lambda *_: 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # if the given network is kept
        calibrated = dsconv.calibrate(qnet, net, images)
    kept = model_info(calibrated).calibration.kept
    assert algorithms(calibrated)["3"] == {"calibrated": "direct", "given": "winograd"}[kept]
    assert algorithms(qnet)["3"] == "winograd"


def test_calibration_adaptation_and_sensitivity_see_it() -> None:
    net, images = network(), torch.randn(64, 3, 8, 8)
    qnet = dsconv.quantize(net, QuantConfig.preset("default", algorithm="auto"))
    calibrated = dsconv.calibrate(qnet, net, images)
    assert algorithms(calibrated) == algorithms(qnet)
    adapted = dsconv.adapt(qnet, net, images, recipe={"steps": 2, "batch_size": 8})
    assert algorithms(adapted) == algorithms(qnet)
    choices = ({}, {"algorithm": "auto"}, {"algorithm": "direct"})
    trials = dsconv.sensitivity(net, "default", choices=choices, images=images[:8]).trials
    assert len(trials) == 15 and all(math.isfinite(trial.kl) for trial in trials)


@pytest.mark.parametrize("style", ["qdq", "function", "int8"])
def test_files_for_other_runtimes_have_direct_layers_that_are_near(style: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra dsconv[onnx]")
    qnet, x = dsconv.quantize(network(), QuantConfig.preset("default", algorithm="auto")), torch.randn(4, 3, 8, 8)
    path = dsconv.export_onnx(qnet, x, tmp_path / "net.onnx", style, images=x if style == "int8" else None)
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        expected = qnet(x)
    assert (torch.from_numpy(y) - expected).norm() < 0.05 * expected.norm()


def test_weights_are_trained_through_it() -> None:
    made = dsconv.nn.DSConv2d.from_float(nn.Conv2d(16, 8, 3, padding=1), WINOGRAD).train()
    weight = made.conv_weight().clone().requires_grad_()
    vars(made)["_shadow"] = lambda: weight
    x: Tensor = torch.randn(2, 16, 6, 6, requires_grad=True)
    made(x).square().sum().backward()
    assert weight.grad is not None and x.grad is not None
    other = weight.detach().clone().requires_grad_()
    nn.functional.conv2d(x.detach(), other, made.bias, padding=1).square().sum().backward()
    assert other.grad is not None
    assert (weight.grad - other.grad).norm() < 0.1 * other.grad.norm()


def test_blocks_without_kernels_do_not_choose_it() -> None:
    assert set(algorithms(dsconv.quantize(network(), QuantConfig.preset("default", block_size=12))).values()) == {
        "direct"
    }


@needs_extension
def test_weights_that_two_steps_read_count_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    once, twice = (nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), Twice())
    plans = [
        dsconv.compile(
            dsconv.quantize(net.eval(), QuantConfig.preset("default", first_layer=None)), torch.ones(1, 16, 6, 6)
        ).plan
        for net in (once, twice)
    ]
    assert len(plans[1].steps) == 2 and plans[0].weight_bytes == plans[0].steps[0].weight_bytes
    assert plans[1].weight_bytes <= plans[0].weight_bytes + 4 * 16  # each step has its own bias
