"""Models by name: sources, weights, and errors for invalid names."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn as tnn

import dsconv
from dsconv import zoo
from dsconv.errors import DSConvError, MissingExtraError, ModelError

FILE = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

def tiny(width=4):
    return Tiny(width)

def number():
    return 4

def broken():
    raise KeyError("no such thing")

constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_models.py"
    path.write_text(FILE)
    return path


def test_every_kind_of_name(file: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra dsconv[zoo]")
    for name, kind in (
        ("torchvision/resnet18", "ResNet"),
        ("timm/mobilenetv3_small_050", "MobileNetV3"),
        ("dsconv/digits_resnet", "DigitsResNet"),
        (f"{file}:tiny", "Tiny"),
    ):
        model = zoo.build(name, weights="random")
        assert type(model).__name__ == kind and not model.training
        assert model.dsconv_architecture == name


def test_arguments_follow_the_name(file: Path) -> None:
    assert zoo.build("torchvision/resnet18?num_classes=5", weights="random").fc.out_features == 5
    assert zoo.build("timm/resnet18?num_classes=7&in_chans=1", weights="random").conv1.in_channels == 1
    assert zoo.build(f"{file}:tiny?width=6").conv.out_channels == 6


def test_images_are_prepared_as_the_model_says() -> None:
    preprocess = zoo.preprocess_of(zoo.build("torchvision/resnet18", weights="random"))
    assert preprocess is not None and preprocess.mean == (0.485, 0.456, 0.406)
    assert zoo.preprocess_of(tnn.Conv2d(3, 4, 3)) is None
    quantized = dsconv.quantize(zoo.build("dsconv/digits_resnet"))
    assert zoo.preprocess_of(quantized) == zoo.preprocess_of(zoo.build("dsconv/digits_resnet"))


def test_a_model_of_a_file_can_be_quantized_and_copied(file: Path) -> None:
    model = zoo.build(f"{file}:tiny")
    assert dsconv.quantize(model)(torch.randn(1, 3, 5, 5)).shape == (1, 4)


def fails(name: str, error: type[Exception] = ModelError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        zoo.build(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("torchvision/resnet19", "did you mean .*resnet18"),
        ("timm/resnet19", "resnet18"),
        ("dsconv/digits", "digits_resnet"),
    ],
)
def test_a_name_that_does_not_exist_suggests_those_that_do(name: str, suggestion: str) -> None:
    with pytest.raises(ModelError, match=suggestion) as caught:
        zoo.build(name)
    assert "has no model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "", "keras/resnet50", "/", "file.py", "C:resnet"])
def test_something_else_than_a_name_says_what_is_expected(name: str) -> None:
    assert "expected torchvision/NAME, timm/NAME, dsconv/NAME, path/to/file.py:factory or path/to/model.onnx" in fails(
        name
    )


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18?colour=red",
        "torchvision/resnet18?num_classes=many",
        "torchvision/resnet18?num_classes=-1",
        "torchvision/vit_b_16?image_size=17",
        "torchvision/resnet18?weights=DEFAULT",
        "timm/resnet18?colour=red",
        "timm/vit_tiny_patch16_224?img_size=0",
        "timm/resnet18?checkpoint_path=weights.pth",
        "timm/resnet18?pretrained=true",
        "dsconv/digits_resnet?num_classes=5",
    ],
)
def test_arguments_that_do_not_fit_are_an_error_of_the_model(name: str) -> None:
    assert name.partition("?")[0].rpartition("/")[2] in fails(name, weights="random")


def test_arguments_that_contradict_trained_weights_are_an_error_of_the_model() -> None:
    assert "num_classes" in fails("torchvision/resnet18?num_classes=5")


def test_arguments_without_values_are_an_error() -> None:
    assert "expected arguments as NAME?key=value&key=value" in fails("torchvision/resnet18?&")


def test_a_file_that_does_not_work_says_why(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.py"):
        zoo.build("none.py:tiny")
    assert "has no model 'tini': did you mean tiny" in fails(f"{file}:tini")
    assert "has no model 'constant'" in fails(f"{file}:constant")
    assert "expected a torch.nn.Module, number() returned a int" in fails(f"{file}:number")
    assert "broken() failed: KeyError" in fails(f"{file}:broken")
    assert "tiny() failed: TypeError" in fails(f"{file}:tiny?depth=3")
    file.write_text("import nothing_of_this_name")
    assert "cannot be imported: ModuleNotFoundError" in fails(f"{file}:tiny")
    file.write_text("def (")
    with pytest.raises(ModelError, match="cannot be imported: SyntaxError"):
        zoo.build(f"{file}:tiny")


@pytest.mark.parametrize(("library", "package"), [("torchvision", "torchvision"), ("timm", "timm")])
def test_a_missing_extra_is_named(library: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    message = fails(f"{library}/resnet18", MissingExtraError)
    assert message == f"{package} is not installed: pip install 'dsconv[zoo]'"


def test_a_broken_installation_is_not_taken_for_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(Exception, match="yaml"):
        zoo.build("timm/resnet18")


@pytest.fixture
def state(file: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return zoo.build(f"{file}:tiny").state_dict()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [(".safetensors", None), (".pth", None), (".pt", "state_dict"), (".bin", "model_state_dict"), (".pth", "model")],
)
def test_weights_of_a_file_are_loaded(
    suffix: str, wrap: str | None, prefix: str, file: Path, state: dict[str, torch.Tensor]
) -> None:
    path = file.with_suffix(suffix)
    named: Any = {prefix + name: value for name, value in state.items()}
    if suffix == ".safetensors":
        save_file(named, path)
    else:
        torch.save({wrap: named, "epoch": 3} if wrap else named, path)
    loaded = zoo.build(f"{file}:tiny", weights=path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_half_precision_weights_are_widened(file: Path, state: dict[str, torch.Tensor]) -> None:
    path = file.with_suffix(".safetensors")
    save_file({name: value.half() for name, value in state.items()}, path)
    loaded = zoo.build(f"{file}:tiny", weights=path).state_dict()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, state[n].half().float()) for n, value in loaded.items()
    )


def test_weights_that_do_not_fit_name_what_differs(file: Path, state: dict[str, torch.Tensor]) -> None:
    path = file.with_suffix(".safetensors")
    save_file({"conv.weight": state["conv.weight"], "other": torch.zeros(2)}, path)
    message = fails(f"{file}:tiny", weights=path)
    assert "do not fit Tiny" in message and "conv.bias" in message and "other" in message
    save_file(state, path)
    assert "size mismatch for conv.weight" in fails(f"{file}:tiny?width=5", weights=path)


class Trap:
    def __reduce__(self) -> Any:
        return open, ("was-run", "w")


@pytest.mark.parametrize(
    "contents",
    [
        [torch.zeros(3)],
        torch.zeros(3),
        4,
        {"a": 3},
        {"state_dict": [1]},
        {0: torch.zeros(3)},
        {"model": Trap()},
        Trap(),
    ],
)
def test_weights_that_are_no_state_dictionary_are_an_error(
    contents: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    path = file.with_suffix(".pth")
    torch.save(contents, path)
    with pytest.raises(ModelError, match=r"weights .*my_models\.pth"):
        zoo.build(f"{file}:tiny", weights=path)
    assert not Path("was-run").exists()


def test_a_broken_file_of_weights_is_an_error(file: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = file.with_suffix(suffix)
        path.write_bytes(b"not weights at all")
        with pytest.raises(ModelError, match="expected safetensors, or a state dictionary"):
            zoo.build(f"{file}:tiny", weights=path)


def test_a_missing_file_of_weights_is_an_error_before_the_model_is_built(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            zoo.build("torchvision/no_such_model", weights=path)


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("<urlopen error> no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(sys.modules["torchvision.models._api"], "load_state_dict_from_url", offline)
    message = fails("torchvision/resnet18")
    assert "no network" in message and "pass a file of weights, or 'random'" in message


def test_only_models_of_libraries_are_registered() -> None:
    for name in ("torchvision/resnet18", "timm/resnet18?num_classes=3", "dsconv/digits_resnet"):
        assert zoo.is_registered(name)
    for name in (
        "file.py:factory",
        "timm/file.py:factory",
        "torchvision/../a.py:f?x=1",
        "other/resnet18",
        "resnet18",
        "",
    ):
        assert not zoo.is_registered(name)


def test_errors_are_those_of_dsconv() -> None:
    assert issubclass(ModelError, DSConvError) and issubclass(MissingExtraError, ImportError)
