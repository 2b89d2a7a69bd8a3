"""An ONNX file is a MODEL of the commands, and files made from it do not need it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import torch

import dsconv
from dsconv import zoo

PREPARATION = ("--channels", "gray", "--resize", 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the digits network in float, as an ONNX file that does not state its preprocessing."""
    import onnx

    qnet = dsconv.quantize(zoo.build("dsconv/digits_resnet"))
    path = tmp_path_factory.mktemp("model") / "digits.onnx"
    made = onnx.load(dsconv.export_onnx(qnet, torch.zeros(1, 1, 8, 8), path, "float"))
    del made.metadata_props[:]
    onnx.save(made, path)
    return path


def test_an_onnx_file_is_quantized_and_evaluated(
    cli: Callable[..., Any], model: Path, tmp_path: Path, digits: Path
) -> None:
    file = tmp_path / "net.safetensors"
    done = cli("quantize", model, "--out", file)
    assert done.code == 0, done.stderr
    assert "layer3.downsample.0" in done.stdout
    # The user still has to give the preprocessing.
    done = cli("evaluate", file, "--data", digits)
    assert done.code == 1 and "does not state the preprocessing of its images: give --resize" in done.stderr
    moved = model.rename(model.with_name("moved.onnx"))
    try:
        done = cli("evaluate", file, "--data", digits, *PREPARATION)
        assert done.code == 0, done.stderr
        done = cli("calibrate", file, "--data", digits, "--out", tmp_path / "c.safetensors", *PREPARATION)
        assert done.code == 1 and "which does not exist: name it with --reference" in done.stderr
        done = cli("evaluate", file, "--reference", moved, "--data", digits, *PREPARATION)
        assert done.code == 0, done.stderr
    finally:
        moved.rename(model)


class Captioned(torch.nn.Module):
    """Network of an image and tokens, with a table that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words = torch.nn.Conv2d(3, 64, 3), torch.nn.Embedding(5, 64)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = self.body(image).relu().mean((2, 3))
        return seen, seen + (self.words(tokens) + places).mean(1)


def captioned() -> torch.nn.Module:
    return Captioned().eval()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a network with three inputs, as an ONNX file."""
    example = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(6, 64))
    path = tmp_path_factory.mktemp("several") / "captioned.onnx"
    return dsconv.export_onnx(dsconv.quantize(captioned()), example, path, "float")


def test_an_onnx_file_says_what_bench_runs_it_on(cli: Callable[..., Any], several: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx

    file = tmp_path / "captioned.safetensors"
    assert cli("quantize", several, "--out", file).code == 0
    options = ("--against", "torch,onnxruntime", "--turns", 2, "--batch-size", "1,3", "--json")
    sizes = {"image": [3, 8, 8], "tokens": [6], "places": [6, 64]}
    for source in (several, file):
        done = cli("bench", source, *options)
        assert done.code == 0, done.stderr
        (found,) = json.loads(done.stdout)["networks"]
        assert found["input_shapes"] == sizes and found["calibration"] == "8 random samples", done.stderr
        assert not [why for name, why in found["not_run"].items() if "ONNX Runtime" in name], found["not_run"]
    model = onnx.load(several)
    model.graph.input.append(onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, [1]))
    onnx.save(model, tmp_path / "text.onnx")
    done = cli("bench", tmp_path / "text.onnx", *options)
    assert done.code == 1 and "its input 'text' has dtype object, which PyTorch does not support" in done.stderr
    # Free sizes are named.
    model = onnx.load(several)
    for given, places in zip(model.graph.input, ((2, 3), (1,), (0,)), strict=True):
        for place in places:
            given.type.tensor_type.shape.dim[place].dim_param = "length" if len(places) == 1 else f"size_{place}"
    free = tmp_path / "free.onnx"
    onnx.save(model, free)
    done = cli("bench", free, *options)
    assert done.code == 1 and "dimension 3 of its input 'image' is free: give --size" in done.stderr
    done = cli("bench", free, *options, "--size", "9x6")
    assert done.code == 0, done.stderr
    (found,) = json.loads(done.stdout)["networks"]
    assert found["input_shapes"] == {**sizes, "image": [3, 9, 6]}, done.stderr


def test_an_image_of_an_onnx_file_has_the_size_that_the_file_says(cli: Callable[..., Any], model: Path) -> None:
    options = ("--against", "torch", "--turns", 2, "--json")
    (found,) = json.loads(cli("bench", model, *options).stdout)["networks"]
    assert found["input_shape"] == [1, 8, 8] and not found["input_shapes"]
    (found,) = json.loads(cli("bench", model, *options, "--size", "1x9x9").stdout)["networks"]
    assert found["input_shape"] == [1, 9, 9]


def test_bench_of_another_network_of_several_inputs_names_the_python_function(
    cli: Callable[..., Any], several: Path, digits: Path
) -> None:
    done = cli("bench", f"{Path(__file__)}:captioned", "--size", 8)
    assert done.code == 1 and "takes more than images, image, tokens, places: an ONNX file describes" in done.stderr
    assert "call dsconv.bench in Python on dsconv.Inputs(image, tokens, places)" in " ".join(done.stderr.split())
    done = cli("bench", several, "--data", digits, "--resize", 8)
    assert done.code == 1 and "leave out --data" in done.stderr


def test_a_file_that_is_none_is_told_at_once(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("quantize", tmp_path / "none.onnx", "--out", tmp_path / "net.safetensors")
    assert done.code == 1 and "there is no file" in done.stderr
    (tmp_path / "text.onnx").write_text("no model")
    done = cli("quantize", tmp_path / "text.onnx", "--out", tmp_path / "net.safetensors")
    assert done.code == 1 and "not a complete ONNX file" in done.stderr


def test_the_extra_is_named_where_it_is_missing(
    cli: Callable[..., Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else found(name, *rest))
    done = cli("quantize", model, "--out", tmp_path / "net.safetensors")
    assert done.code == 1 and "pip install 'dsconv[onnx]'" in done.stderr
