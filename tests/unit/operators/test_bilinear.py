"""Bilinear interpolation is a step of compiled networks, with PyTorch's bits."""

from typing import Any

import pytest
import torch
from program_cases import Net, conv, steps_of
from torch import Tensor
from torch.nn import functional as F

import dsconv
from dsconv.compilation.operators import bilinear
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

SIZES: tuple[dict[str, Any], ...] = (
    {"scale_factor": 2},
    {"scale_factor": 1.7},
    {"scale_factor": (0.6, 3)},
    {"scale_factor": 1.7, "recompute_scale_factor": True},
    {"size": (13, 5)},
    {"size": (1, 1)},
    {"size": (90, 77)},
)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("given", SIZES)
@pytest.mark.parametrize("channels", [3, 21])
def test_has_pytorchs_bits(channels: int, given: dict[str, Any], corners: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.interpolate(m.a(x), mode="bilinear", align_corners=corners, **given)

    assert steps_of(run, (3, 7, 9), a=conv(3, channels)) == ["conv2d", "upsample_bilinear2d"]


def test_it_quantizes_what_a_layer_reads() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(torch.cat([F.interpolate(F.max_pool2d(y, 3), (9, 9), mode="bilinear"), y[:, 32:]], 1))

    found = steps_of(run, each_isa=True, a=conv(3, 64), b=conv(96, 8))
    assert found == ["conv2d", "aten.max_pool2d", "upsample_bilinear2d", "map", "map+", "conv2d"]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("size", "corners"), [((11, 4), False), ((9, 4), False), ((5, 9), True)])
def test_numbers_that_are_not_finite(size: tuple[int, int], corners: bool, value: float) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.a(F.interpolate(x, size, mode="bilinear", align_corners=corners)) + 0

    qmodel = dsconv.quantize(Net(run, a=conv(3, 8)))
    x = torch.randn(2, 3, 9, 9)
    x[0, 1, 4, 4] = value
    with torch.inference_mode():
        assert torch.equal(dsconv.compile(qmodel, x)(x).isfinite(), qmodel(x).isfinite())


def test_pytorch_interpolates_where_no_order_has_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilinear, "_order", lambda *_: None)

    def run(m: Any, x: Tensor) -> Tensor:
        return F.interpolate(m.a(x), scale_factor=2, mode="bilinear")

    assert steps_of(run, a=conv(3, 8)) == ["conv2d", "aten.upsample_bilinear2d"]


def test_the_extension_refuses_places_that_are_not_there() -> None:
    module = native.extension()
    one: Any = module.Program("scalar")  # type: ignore[union-attr]

    def tensor(c: int, h: int, w: int) -> int:
        return int(one.values(0, 0, 0, (c, h, w), (c * h * w, 1, w * c, c)))

    source, outputs = tensor(8, 2, 3), (tensor(8, 1, 1), -1, [], 0, 0.0, 0.0)
    row, column = (0, 1, 0.5, 0.5), (2, 2, 1.0, 0.0)
    one.interpolate(source, [row], [column], 4, 0, 1, outputs)
    lines = one.values(0, 0, 0, (8, 2, 3), (48, 6, 3, 1))
    for args in (
        (source, [], [column], 4, 0, 1, outputs),
        (source, [column], [column], 4, 0, 1, outputs),
        (source, [row], [(2, 3, 1.0, 0.0)], 4, 0, 1, outputs),
        (source, [row], [(-1, 2, 1.0, 0.0)], 4, 0, 1, outputs),
        (source, [row], [column], 9, 0, 1, outputs),
        (source, [row], [column], -1, 0, 1, outputs),
        (source, [row], [column], 4, 3, 1, outputs),
        (source, [row], [column, column], 4, 0, 1, outputs),
        (lines, [row], [column], 4, 0, 1, outputs),
    ):
        with pytest.raises(ValueError, match=r"interpolate|outputs|first"):
            one.interpolate(*args)
