"""Pads, crops and nearest neighbours are steps of compiled networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from program_cases import conv, steps_of
from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

PADS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.ZeroPad2d((1, 2, 3, 0)),
    nn.ZeroPad2d((1, -2, -3, 2)),
    nn.ConstantPad2d(1, -1.5),
    nn.ConstantPad2d((0, 1, 0, 1), float("-inf")),
    nn.ReflectionPad2d((1, 2, 3, 4)),
    nn.ReplicationPad2d((4, 3, 2, 1)),
    nn.CircularPad2d((2, 1, 0, 3)),
    lambda x: F.pad(x, (2, 1)),
    lambda x: F.pad(x, (2, 1, 0, 3), value=0.1),
)


@pytest.mark.parametrize("pad", PADS)
def test_pads_of_the_input_and_between_layers(pad: Callable[[Tensor], Tensor]) -> None:
    found = steps_of(lambda m, x: m.c(pad(m.b(m.a(pad(x))))), (3, 7, 9), a=conv(3, 16), b=conv(16, 8), c=conv(8, 3))
    assert found.count("pad") + found.count("pad+") == 2 and not any("aten" in name for name in found)


NEAREST: tuple[dict[str, Any], ...] = (
    {"scale_factor": 2},
    {"scale_factor": (3, 1)},
    {"scale_factor": 1.7},
    {"scale_factor": 0.6, "recompute_scale_factor": True},
    {"size": (13, 5)},
    {"size": 1},
)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("given", NEAREST)
def test_nearest_neighbours(mode: str, given: dict[str, Any]) -> None:
    found = steps_of(
        lambda m, x: (y := F.interpolate(m.a(x), mode=mode, **given), m.b(y)), (3, 7, 9), a=conv(3, 24), b=conv(24, 8)
    )
    name = "upsample_nearest2d" if mode == "nearest" else "upsample_nearest_exact2d"
    assert found == ["conv2d", f"{name}+", "conv2d"]


def test_a_step_that_feeds_layers_alone_writes_mantissas_alone() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(F.interpolate(m.a(x), scale_factor=2))

    assert steps_of(run, each_isa=True, a=conv(3, 64), b=conv(64, 8)) == ["conv2d", "upsample_nearest2d+", "conv2d"]


def test_parts_of_rows_and_columns() -> None:
    def focus(m: Any, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return m.a(torch.cat(parts, 1))

    found = steps_of(focus, (3, 8, 6), a=conv(12, 8))
    assert found == ["crop", "crop", "crop", "crop", "conv2d"]
    assert steps_of(lambda m, x: m.a(x)[:, :, 1:-1, 2:5], a=conv(3, 8)) == ["conv2d", "crop"]


def test_joined_with_what_was_there() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        up = F.interpolate(F.max_pool2d(y, 2, 2), size=y.shape[-2:])
        return m.b(torch.cat([up, y], 1))

    assert steps_of(run, a=conv(3, 64), b=conv(128, 8)) == [
        "conv2d+", "aten.max_pool2d", "upsample_nearest2d+", "conv2d"
    ]  # fmt: skip


def test_pads_of_channels_are_pytorchs() -> None:
    found = steps_of(lambda m, x: m.a(F.pad(x, (0, 0, 0, 0, 1, -1))) + F.pad(x, (0, 0, 0, 0, 2, 3)), a=conv(3, 8))
    assert found.count("aten.pad") == 2


def test_the_extension_refuses_pixels_that_are_not_there() -> None:
    module = native.extension()
    one: Any = module.Program("scalar")  # type: ignore[union-attr]

    def tensor(c: int, h: int, w: int) -> int:
        return int(one.values(0, 0, 0, (c, h, w), (c * h * w, 1, w * c, c)))

    source, made = tensor(8, 2, 3), tensor(8, 3, 1)
    outputs = (made, -1, [], 0, 0.0, 0.0)
    one.pick(source, [0, -1, 1], [2], 0.5, outputs)
    for rows, columns, to in (
        ([0, 1], [2], outputs),
        ([0, 1, 2], [2], outputs),
        ([0, 1, -2], [2], outputs),
        ([0, 1, 1], [3], outputs),
        ([], [2], outputs),
        ([0, 1, 1], [], outputs),
        ([0, 1, 1], [2**62], outputs),
        ([0, 1, 1], [2], (made, made, [], 0, 0.0, 0.0)),
        ([0, 1, 1], [2], (made, -1, [], 1, 0.0, 0.0)),
        ([0, 1, 1], [2], (tensor(8, 3, 2), -1, [], 0, 0.0, 0.0)),
    ):
        with pytest.raises(ValueError, match=r"pick|outputs|residual"):
            one.pick(source, rows, columns, 0.5, to)
