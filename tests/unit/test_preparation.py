"""Preprocessing is an attribute of the network, which is copied to all networks and files made from it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import dsconv
from dsconv import zoo
from dsconv.conversion import model_info
from dsconv.data import ImageFolder, Preprocess
from dsconv.errors import ConfigError, ModelError
from dsconv.io import describe

STATED = Preprocess(resize=(8, 8), mean=(0.9, 0.8, 1.0), std=0.5, scale=2, channels="bgr", interpolation="nearest")


def plain() -> nn.Module:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 10, 3), *head)
    net(torch.randn(32, 3, 8, 8))  # for the statistics of images with the preprocessing STATED
    return net.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    pixels = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return folder


def test_what_quantize_is_told_travels_with_all_that_is_made_from_the_network(tmp_path: Path, photos: Path) -> None:
    qnet = dsconv.quantize(plain(), "w4a4", preprocess=STATED)
    file = dsconv.save(qnet, tmp_path / "a.safetensors")
    loaded = dsconv.load(file, plain())
    calibrated = dsconv.calibrate(loaded, plain(), photos)
    made = {
        "loaded": loaded,
        "folded": dsconv.fold_batchnorm(loaded),
        "calibrated": calibrated,
        "adapted": dsconv.adapt(calibrated, plain(), photos, recipe={"steps": 1, "batch_size": 4}),
        "quantized again": dsconv.quantize(loaded),
    }
    assert {name: zoo.preprocess_of(model) for name, model in made.items()} == dict.fromkeys(made, STATED)
    for name, model in made.items():
        again = dsconv.load(dsconv.save(model, tmp_path / f"{name}.safetensors"), plain())
        assert zoo.preprocess_of(again) == STATED, name
    header, _ = describe(file)
    assert header.preprocess == STATED.model_dump(mode="json")


def test_the_preparation_of_the_images_of_a_calibration_goes_with_the_result(photos: Path) -> None:
    qnet = dsconv.quantize(plain())
    assert zoo.preprocess_of(qnet) is None
    for images, given in ((photos, STATED), (ImageFolder(photos, STATED), None)):
        assert zoo.preprocess_of(dsconv.calibrate(qnet, plain(), images, preprocess=given)) == STATED
    assert zoo.preprocess_of(dsconv.calibrate(qnet, plain(), torch.randn(16, 3, 8, 8))) is None
    assert zoo.preprocess_of(qnet) is None  # its argument does not change


def test_a_network_in_a_folder_of_the_hub_keeps_it(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
    dsconv.nn.DSConvModel(dsconv.quantize(plain(), preprocess=STATED)).save_pretrained(tmp_path)
    loaded = dsconv.nn.DSConvModel.from_pretrained(tmp_path, model=plain())
    assert loaded.preprocess == zoo.preprocess_of(loaded) == STATED
    assert json.loads((tmp_path / "config.json").read_text())["preprocess"] == STATED.model_dump(mode="json")
    assert str(STATED) in (tmp_path / "README.md").read_text()


def test_an_onnx_file_says_it_and_is_evaluated_with_it(tmp_path: Path, photos: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra 'onnx'")
    from dsconv.onnx import OnnxNetwork

    x = torch.zeros(1, 3, 8, 8)
    qnet = dsconv.quantize(plain(), preprocess=STATED)
    network = OnnxNetwork(dsconv.export_onnx(qnet, x, tmp_path / "a.onnx", "float"))
    assert network.preprocess == zoo.preprocess_of(network) == STATED
    assert dsconv.compare(qnet, network, photos).images == 20
    unknown = dsconv.export_onnx(dsconv.quantize(plain()), x, tmp_path / "b.onnx", "float")
    assert OnnxNetwork(unknown).preprocess is None


def test_ranges_of_noise_are_not_guessed_in_silence(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra 'onnx'")
    qnet = dsconv.quantize(plain())
    with pytest.warns(UserWarning, match=r"does not state its preprocessing.*Pass images"):
        dsconv.export_onnx(qnet, torch.zeros(1, 3, 8, 8), tmp_path / "a.onnx", "int8")
    zoo.set_preprocess(qnet, STATED)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not state its preprocessing")
        dsconv.export_onnx(qnet, torch.zeros(1, 3, 8, 8), tmp_path / "a.onnx", "int8")


def test_a_compiled_network_says_what_its_model_says(photos: Path) -> None:
    pytest.importorskip("dsconv._C", reason="the extension dsconv._C is not built")
    fast = dsconv.compile(dsconv.quantize(plain(), preprocess=STATED).eval(), torch.zeros(1, 3, 8, 8))
    assert zoo.preprocess_of(fast) == STATED
    assert dsconv.evaluate(fast, photos).images == 20


def test_a_report_says_how_its_images_were_prepared(photos: Path) -> None:
    pytest.importorskip("jinja2", reason="needs the extra 'report'")
    from dsconv.report import gather
    from dsconv.report.page import page

    found = gather(dsconv.quantize(plain(), preprocess=STATED), images=photos, runs=0)
    assert found.preprocess == STATED and found.to_dict()["preprocess"] == STATED.model_dump(mode="json")
    assert f"Preprocessing of images: {STATED}." in page(found)


@pytest.mark.parametrize("own", [STATED, STATED.model_dump()])
def test_an_attribute_of_the_model_offers_it(own: Any) -> None:
    net = plain()
    net.preprocess = own
    assert zoo.preprocess_of(net) == zoo.preprocess_of(dsconv.quantize(net)) == STATED
    info = model_info(dsconv.quantize(net))
    assert info is not None and info.preprocess == STATED.model_dump(mode="json")


def test_fields_that_are_given_are_laid_over_what_is_known() -> None:
    net = plain()
    given = {"crop": (6, 6), "mean": 0}
    assert zoo.preprocess_of(dsconv.quantize(net, preprocess=given)) == Preprocess(**given)
    zoo.set_preprocess(net, STATED)
    changed = Preprocess(**{**STATED.model_dump(), **given})
    qnet = dsconv.quantize(net, preprocess=given)
    assert zoo.preprocess_of(qnet) == changed and zoo.preprocess_of(net) == STATED
    assert zoo.preprocess_of(dsconv.quantize(net, preprocess=Preprocess(crop=4))) == Preprocess(crop=4)
    zoo.set_preprocess(qnet, {"crop": None, "mean": STATED.mean})
    assert zoo.preprocess_of(qnet) == STATED


@pytest.mark.parametrize("wrong", [{"size": 224}, {"mean": (1, 2)}, 224, nn.Identity()])
def test_what_is_no_preparation_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"Preprocess cannot use|preprocess: expected"):
        dsconv.quantize(plain(), preprocess=wrong)
    with pytest.raises(ConfigError, match=r"Preprocess cannot use|preprocess: expected"):
        zoo.set_preprocess(plain(), wrong)


def test_another_thing_of_that_name_is_none() -> None:
    class Net(nn.Sequential):
        def preprocess(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert zoo.preprocess_of(Net(nn.Conv2d(3, 4, 3))) is None


def test_a_model_of_timm_keeps_its_own_however_it_was_made() -> None:
    timm = pytest.importorskip("timm", reason="needs the extra 'zoo'")
    net = timm.create_model("resnet10t", num_classes=3)
    expected = Preprocess.from_timm(net)
    assert zoo.preprocess_of(net) == zoo.preprocess_of(dsconv.quantize(net, "paper")) == expected
    net.pretrained_cfg["crop_mode"] = "border"  # which a Preprocess cannot express
    assert zoo.preprocess_of(net) is None is zoo.preprocess_of(dsconv.quantize(net, "paper"))


FILES = {
    "of the file": "preprocess = dsconv.data.Preprocess(crop=9)\ndef make(): return nn.Conv2d(3, 4, 3)\n",
    "a dictionary": "preprocess = {'crop': 9}\ndef make(): return nn.Conv2d(3, 4, 3)\n",
    "of the model": (
        "preprocess = {'crop': 7}\n"
        "def make():\n    net = nn.Conv2d(3, 4, 3)\n    net.preprocess = {'crop': 9}\n    return net\n"
    ),
    "of the zoo": (
        "def make():\n    net = dsconv.zoo.build('dsconv/digits_resnet')\n"
        "    dsconv.zoo.set_preprocess(net, dsconv.data.Preprocess(crop=9))\n    return net\n"
    ),
    "none": "def preprocess(x): return x\ndef make(): return nn.Conv2d(3, 4, 3)\n",
}


@pytest.mark.parametrize("offer", FILES)
def test_a_file_of_models_offers_it(offer: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import dsconv\nfrom torch import nn\n" + FILES[offer])
    expected = None if offer == "none" else Preprocess(crop=9)
    assert zoo.preprocess_of(zoo.build(f"{tmp_path}/mine.py:make")) == expected


def test_a_wrong_offer_of_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\npreprocess = {'size': 3}\ndef make(): return nn.ReLU()\n")
    with pytest.raises(ModelError, match=r"mine\.py:make.*size"):
        zoo.build(f"{tmp_path}/mine.py:make")


def test_the_text_of_a_number_is_the_number() -> None:
    assert "mean 104.00698793,116.66876762,122.67891434" in str(
        Preprocess(mean=(104.00698793, 116.66876762, 122.67891434))
    )


@pytest.mark.parametrize("field", Preprocess.model_fields)
def test_the_text_of_a_preparation_tells_all_of_its_fields(field: str) -> None:
    assert f"{field} " in str(STATED)
    assert str(STATED) == (
        "resize 8x8, crop none, interpolation nearest, channels bgr, scale 2, mean 0.9,0.8,1, std 0.5"
    )
