"""Results do not depend on the process's default dtype and default device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv.data import Preprocess, synthetic_images
from dsconv.numerics import quantize_activation, quantize_weight, reference_conv
from dsconv.ops import native


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    """Set the default dtype and device of new tensors within the context."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


OTHER = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "meta": {"device": "meta"},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        *(nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.SiLU()),
        *(nn.Conv2d(32, 32, 3, groups=32, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 40, 1, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(40, 10),
    )
    return nn.Sequential(*layers).eval()


NET, TRANSPOSED, X = network(), nn.ConvTranspose2d(3, 5, 2), torch.randn(16, 3, 12, 12)


@torch.inference_mode()
def run(model: nn.Module) -> list[Tensor]:
    y = model(X)
    assert isinstance(y, Tensor)
    return [y, *(value.detach().clone() for value in model.state_dict().values())]


def compiled() -> list[Tensor]:
    qmodel = dsconv.quantize(NET, "w4a4")
    with torch.inference_mode():
        return [dsconv.compile(qmodel, X[:1])(X)]


def loaded(folder: Path) -> list[Tensor]:
    """Return tensors loaded from a file, with a model and by the name of an architecture."""
    file = dsconv.save(dsconv.quantize(NET, "paper"), folder / "net.safetensors")
    digits = dsconv.save(
        dsconv.quantize(dsconv.zoo.build("dsconv/digits_resnet"), "paper"), folder / "digits.safetensors"
    )
    with torch.inference_mode():
        return [*run(dsconv.load(file, NET)), dsconv.load(digits)(dsconv.demo.load_digits()[0][:5])]


def numerics(_: Path) -> list[Tensor]:
    made: list[Tensor] = []
    for options in ({"scale": "kl"}, {"rule": "refined"}, {"rule": "paper"}):
        made += quantize_weight(NET[0].weight.detach(), 4, 2, **options)
    mantissa, exponent = quantize_activation(X, 4, 2)
    return [*made, mantissa, exponent, *reference_conv(mantissa, exponent, made[0], made[1], 2)]


STEPS: dict[str, Callable[[Path], list[Tensor]]] = {
    "quantize": lambda _: run(dsconv.quantize(NET)),
    "quantize to flattened blocks with a shift": lambda _: run(
        dsconv.quantize(NET, {"block_size": 16, "blocks": "flat", "weight_shift": True})
    ),
    "float activations": lambda _: run(dsconv.quantize(NET, {"activation_bits": None})),
    "transposed": lambda _: run(dsconv.nn.DSConvTranspose2d.from_float(TRANSPOSED)),
    "fold": lambda _: run(dsconv.fold_batchnorm(dsconv.quantize(NET))),
    "compile": lambda _: compiled(),
    "save and load": loaded,
    "calibrate": lambda _: run(dsconv.calibrate(dsconv.quantize(NET, "paper"), NET, X)),
    "numerics": numerics,
    "synthetic images": lambda _: [synthetic_images(2, Preprocess.imagenet(size=16))],
}

# Under the defaults of PyTorch, once for all others.
EXPECTED: dict[Callable[[Path], list[Tensor]], list[Tensor]] = {}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_other_defaults_give_the_same_bits(
    step: Callable[[Path], list[Tensor]], other: dict[str, object], tmp_path: Path
) -> None:
    if native.extension() is None and step is STEPS["compile"]:
        pytest.skip("the extension dsconv._C is not built")
    if step not in EXPECTED:
        EXPECTED[step] = step(tmp_path)
    with defaults(**other):
        found = step(tmp_path)
    expected = EXPECTED[step]
    assert [(t.dtype, t.device) for t in found] == [(t.dtype, t.device) for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
