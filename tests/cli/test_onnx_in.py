"""An ONNX file is a MODEL of the commands, and what was made of it needs it no more."""

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
    """The digits network in float, as an ONNX file that does not say how its images are prepared."""
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
    # How images are prepared stays with the user.
    done = cli("evaluate", file, "--data", digits)
    assert done.code == 1 and "does not say how its images are prepared: give --resize" in done.stderr
    moved = model.rename(model.with_name("moved.onnx"))
    try:
        done = cli("evaluate", file, "--data", digits, *PREPARATION)
        assert done.code == 0, done.stderr
        done = cli("calibrate", file, "--data", digits, "--out", tmp_path / "c.safetensors", *PREPARATION)
        assert done.code == 1 and "which is not there: name it with --reference" in done.stderr
        done = cli("evaluate", file, "--reference", moved, "--data", digits, *PREPARATION)
        assert done.code == 0, done.stderr
    finally:
        moved.rename(model)


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
