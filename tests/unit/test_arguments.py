"""Arguments of an unexpected type: an error of dsconv in one short paragraph that names the argument."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dsconv
from dsconv import strict_json, zoo
from dsconv.errors import ConfigError, DSConvError, ModelError
from dsconv.report import gather, write_report

NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
QNET = dsconv.quantize(NET, dsconv.QuantConfig(first_layer=None))
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WRONG = {"None": None, "list": [NET], "array": np.zeros((1, 3, 8, 8)), "number": 3, "class": nn.Conv2d}

MODELS: dict[str, Callable[[Any], Any]] = {
    "quantize: model": dsconv.quantize,
    "save: qmodel": lambda wrong: dsconv.save(wrong, "never-written"),
    "summary: model": dsconv.summary,
    "fold_batchnorm: qmodel": dsconv.fold_batchnorm,
    "compile: qmodel": lambda wrong: dsconv.compile(wrong, X),
    "profile: model": lambda wrong: dsconv.profile(wrong, X),
    "evaluate: model": lambda wrong: dsconv.evaluate(wrong, X),
    "compare: reference": lambda wrong: dsconv.compare(wrong, QNET, X),
    "compare: qmodel": lambda wrong: dsconv.compare(NET, wrong, X),
    "tradeoff: networks": lambda wrong: dsconv.tradeoff({"one": wrong}, NET, X),
    "sensitivity: model": lambda wrong: dsconv.sensitivity(wrong, images=X),
    "search: model": lambda wrong: dsconv.search(wrong, budget=4.5, images=X),
    "optimize: model": lambda wrong: dsconv.optimize(wrong, X),
    "calibrate: qmodel": lambda wrong: dsconv.calibrate(wrong, NET, X),
    "calibrate: reference": lambda wrong: dsconv.calibrate(QNET, wrong, X),
    "adapt: student": lambda wrong: dsconv.adapt(wrong, NET, X),
    "adapt: teacher": lambda wrong: dsconv.adapt(QNET, wrong, X),
    "bench: reference": lambda wrong: dsconv.bench(wrong, QNET, X, against=[]),
    "bench: qmodel": lambda wrong: dsconv.bench(NET, wrong, X, against=[]),
    "report: qmodel": gather,
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "load: path": dsconv.load,
    "save: path": lambda wrong: dsconv.save(QNET, wrong),
    "evaluate: images": lambda wrong: dsconv.evaluate(NET, wrong),
    "compare: images": lambda wrong: dsconv.compare(NET, QNET, wrong),
    "calibrate: images": lambda wrong: dsconv.calibrate(QNET, NET, wrong),
    "adapt: images": lambda wrong: dsconv.adapt(QNET, NET, wrong),
    "optimize: images": lambda wrong: dsconv.optimize(NET, [wrong]),
    "bench: images": lambda wrong: dsconv.bench(NET, QNET, wrong, against=[]),
    "write_report: path": lambda wrong: write_report(wrong, QNET, runs=0),
    "build: name": zoo.build,
    "from_json: text": dsconv.QuantConfig.from_json,
    "preset: name": dsconv.QuantConfig.preset,
    "weights": lambda wrong: zoo.build("dsconv/digits_resnet", weights=wrong),
}


def refused(call: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises((DSConvError, TypeError)) as caught:
        call(wrong)
    message = str(caught.value)
    assert isinstance(caught.value, DSConvError) or "expected" in message
    assert len(message) < 600 and "\n" not in message


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_network_is_refused(name: str, kind: str) -> None:
    refused(MODELS[name], WRONG[kind])


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_kind_is_refused(name: str, kind: str) -> None:
    refused(OTHERS[name], WRONG[kind])


@pytest.mark.parametrize("optional", ["load", "report", "tradeoff"])
def test_what_is_no_network_is_refused_where_none_is_needed(optional: str, tmp_path: Any) -> None:
    path = dsconv.save(QNET, tmp_path / "net.safetensors")
    calls: dict[str, Callable[[Any], Any]] = {
        "load": lambda wrong: dsconv.load(path, wrong),
        "report": lambda wrong: gather(QNET, reference=wrong, runs=0),
        "tradeoff": lambda wrong: dsconv.tradeoff({"a": QNET}, wrong, X),
    }
    for kind in ("list", "array", "number"):
        refused(calls[optional], WRONG[kind])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a": ' * 90 + "1" + "}" * 90, "nested deeper"),
        ('{"weight_bits": 3, "weight_bits": 4}', "'weight_bits' occurs twice"),
        ('{"block_size": NaN}', "NaN"),
        ('{"block_size": -Infinity}', "Infinity"),
        ('{"block_size": 1e999}', "too large"),
        ('{"block_size": 1' + "0" * 5000 + "}", "digits"),
        ('{"overrides": {"\\ud800": null}}', "surrogate"),
        ('{"self": 1}', "self: unknown setting"),
        ('{"cls": 1, "data": 2}', "cls: unknown setting"),
        ('{"' + "x" * 100_000 + '": 1}', "unknown setting"),
        ('{"overrides": {"fc": {"self": 1}}}', "self: unknown setting"),
        ('{"block_size": 1' + "0" * 1000 + "}", "block_size"),
        ("\x00", "JSON"),
    ],
)
def test_a_config_that_is_none_is_an_error_in_a_few_words(text: str, reason: str) -> None:
    config = None
    with pytest.raises(ConfigError, match=reason) as caught:
        config = dsconv.QuantConfig.from_json(text).layer("fc")
    assert config is None and len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    ["width=" + "[" * 100_000, "width=8&width=9", "self=1", "a={", "width=1e999&name=2", "%FF=1&%ED%A0%80=%FF"],
)
def test_arguments_of_a_model_that_are_none_are_an_error_in_a_few_words(arguments: str) -> None:
    with pytest.raises(ModelError) as caught:
        zoo.build(f"dsconv/digits_resnet?{arguments}", weights="random")
    assert "\n" not in str(caught.value)


def test_strict_json_reads_what_json_is() -> None:
    text = ' {"a": [1, 2.5, "\\u00e9\\ud83d\\ude00[{"], "b": null} '
    assert strict_json.loads(text) == {"a": [1, 2.5, "é😀[{"], "b": None}
    assert strict_json.loads(b'"\xc3\xa9"') == "é"
    with pytest.raises(ValueError, match="utf-8"):
        strict_json.loads(b'"\xff"')


def test_images_out_of_range_are_said_to_be_too_large() -> None:
    images = torch.randn(64, 3, 8, 8) * 1e30
    with pytest.raises(ModelError, match=r"overflow float32.*e\+3") as caught:
        dsconv.adapt(QNET, NET, images, recipe={"steps": 1, "batch_size": 8})
    assert "None" not in str(caught.value)


def test_names_of_any_bytes_are_in_a_page(tmp_path: Any) -> None:
    pytest.importorskip("jinja2", reason="needs the extra dsconv[report]")
    page = write_report(tmp_path / "a.html", QNET, name=os.fsdecode(b"\xff.png"), runs=0)
    assert "\\udcff.png" in page.read_text("utf-8")
