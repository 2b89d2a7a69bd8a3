"""The demo computes the figures that it shows, writes the files that it names, and works without matplotlib."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dsconv
from dsconv import demo_run
from dsconv.demo import load_digits


def test_demo_writes_a_file_and_a_picture_and_its_figures(dsconv_cli: Callable[..., Any], tmp_path: Path) -> None:
    done = dsconv_cli("demo", "--out", tmp_path / "new" / "folder", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["demo.png", "digits_resnet-w4a8.safetensors"]

    images, labels = load_digits("test")
    assert figures["images"] == len(images) == 540
    assert figures["reloaded_equal"] is True
    qmodel = dsconv.load(figures["file"])
    with torch.inference_mode():
        # The preprocessing is known, and therefore also the noise.
        network = dsconv.zoo.build("dsconv/digits_resnet")
        assert torch.equal(qmodel(images), dsconv.quantize(network)(images))

    again = dsconv.compare(network, qmodel, [(images, labels)])
    default = figures["settings"]["default W4A8"]
    assert default["top1"] == again.top1 and default["agreement"] == again.agreement
    assert default["kl"] == pytest.approx(again.kl)
    assert default["file_bytes"] == Path(figures["file"]).stat().st_size
    assert figures["float32"]["top1"] == again.reference.top1 > 98.5

    paper, w4, w3, w2 = figures["settings"].values()
    assert paper["activation_sign"] == "extra" and paper["activation_bits"] == 4
    assert w4["top1"] >= figures["float32"]["top1"] - 0.5
    assert w4["logit_sqnr_db"] > w3["logit_sqnr_db"] > w2["logit_sqnr_db"]
    assert figures["float32"]["file_bytes"] > w4["file_bytes"] > w3["file_bytes"] > w2["file_bytes"]

    with Image.open(figures["picture"]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.fixture
def one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use only the preset ``paper``, which takes the least time."""
    for name in ("paper W4A4", "default W3A8", "default W2A8"):
        monkeypatch.delitem(demo_run.SETTINGS, name)
    monkeypatch.setitem(demo_run.SETTINGS, "default W4A8", dsconv.QuantConfig.preset("paper"))


@pytest.mark.usefixtures("one_setting")
def test_demo_without_matplotlib(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("demo", "--out", tmp_path)
    assert done.code == 0, done.stderr
    assert "No picture: matplotlib is not installed: pip install 'dsconv[report]'" in done.stdout
    assert "540 handwritten digits" in done.stdout and "executed by: float simulation" in done.stdout
    assert "bitwise the same" in done.stdout and "float32" in done.stdout
    assert os.listdir(tmp_path) == ["digits_resnet-w4a8.safetensors"]


@pytest.mark.usefixtures("one_setting")
def test_a_second_demo_replaces_the_first(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "demo.png").write_text("old")
    (tmp_path / "digits_resnet-w4a8.safetensors").write_text("old")
    done = cli("demo", "--out", tmp_path)
    assert done.code == 0, done.stderr
    assert Image.open(tmp_path / "demo.png").format == "PNG"
    assert dsconv.load(tmp_path / "digits_resnet-w4a8.safetensors")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.usefixtures("one_setting")
def test_a_picture_that_fails_half_way_leaves_the_old_one(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: object, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    (tmp_path / "demo.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    done = cli("demo", "--out", tmp_path)
    assert done.code == 1 and "No space left on device" in done.stderr
    assert (tmp_path / "demo.png").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["demo.png", "digits_resnet-w4a8.safetensors"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_demo_in_a_place_that_is_no_folder(place: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli("demo", "--out", tmp_path / place)
    assert done.code == 1 and not done.stdout
    assert done.stderr.startswith(f"error: {tmp_path / place}: not a folder that can be written to")
    assert os.listdir(tmp_path) == ["file"]
