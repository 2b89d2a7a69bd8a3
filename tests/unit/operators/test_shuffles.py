"""Shuffles are steps of compiled networks."""

from typing import Any

import pytest
import torch
from program_cases import conv, steps_of
from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("behind", [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Identity()])
def test_pixel_shuffle(factor: int, behind: nn.Module) -> None:
    up, last = nn.PixelShuffle(factor), behind.eval()
    found = steps_of(lambda m, x: m.last(m.up(m.a(x))), (3, 5, 7), a=conv(3, 4 * factor**2), up=up, last=last)
    assert found.count("pixel_shuffle") == 1 and not any("aten" in name for name in found)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_unshuffle_of_the_input_and_of_what_a_layer_makes(factor: int) -> None:
    inputs = 3 * factor**2

    def run(m: Any, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(m.b(m.a(F.pixel_unshuffle(x, factor))), 2)

    found = steps_of(run, (3, 4 * factor, 2 * factor), a=conv(inputs, 16), b=conv(16, 5))
    assert found == ["pixel_unshuffle", "conv2d+", "conv2d", "pixel_unshuffle"]


def views(x: Tensor, groups: int, how: str) -> Tensor:
    n, channels, height, width = x.shape
    x = x.view(n, groups, channels // groups, height, width)
    x = x.permute(0, 2, 1, 3, 4) if how == "permute" else x.transpose(1, 2)
    if how == "contiguous":
        return x.contiguous().view(n, -1, height, width)
    return x.reshape(n, channels, height, width) if how != "flatten" else x.flatten(1, 2)


@pytest.mark.parametrize("how", ["module", "permute", "contiguous", "flatten", "transpose"])
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_channel_shuffle_however_it_is_written(how: str, groups: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(m.shuffle(y) if how == "module" else views(y, groups, how))

    found = steps_of(run, a=conv(3, 48), b=conv(48, 8), shuffle=nn.ChannelShuffle(groups))
    assert found == ["conv2d", "channel_shuffle", "map+", "conv2d"]


def test_other_views_are_no_channel_shuffle() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, 2, c // 2, h, w)
        return m.a(y.transpose(2, 3).reshape(n, c, h, w)) + m.a(y.transpose(1, 2).reshape(n, c, w, h).mT)

    assert "channel_shuffle" not in steps_of(run, (8, 6, 4), a=conv(8, 8))


def test_a_unit_of_a_shufflenet() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        for _ in range(2):
            first, second = y.chunk(2, 1)
            y = views(torch.cat([first, F.relu(m.b(second))], 1), 2, "contiguous")
        return m.c(y)

    unit = ["map+", "conv2d", "map", "channel_shuffle"]
    found = steps_of(run, each_isa=True, a=conv(3, 64), b=conv(32, 32, 1), c=conv(64, 8))
    assert found == ["conv2d", *unit, *unit, "map+", "conv2d"]


def test_the_extension_refuses_loops_that_do_not_fit() -> None:
    module = native.extension()
    one: Any = module.Program("scalar")  # type: ignore[union-attr]

    def tensor(c: int, h: int, w: int) -> int:
        return int(one.values(0, 0, 0, (c, h, w), (c * h * w, 1, w * c, c)))

    source, lines = tensor(6, 2, 3), one.values(0, 0, 0, (6, 2, 3), (36, 6, 3, 1))
    loops = [(2, 0, 1, 0, 0, 1, 0), (3, 0, 0, 1, 0, 0, 1), (6, 1, 0, 0, 1, 0, 0)]
    one.rearrange(source, loops, tensor(6, 2, 3))
    one.rearrange(lines, loops, tensor(6, 2, 3))
    far = 2**62
    for args in (
        (source, loops, lines),
        (source, loops, tensor(6, 2, 2)),
        (source, loops, tensor(6, 3, 2)),
        (source, loops[:2], tensor(6, 2, 3)),
        (source, [], tensor(6, 2, 3)),
        (source, [*loops[:2], (6, 2, 0, 0, 1, 0, 0)], tensor(6, 2, 3)),
        (source, [*loops[:2], (6, -1, 0, 0, 1, 0, 0)], tensor(6, 2, 3)),
        (source, [*loops[:2], (6, far, 0, 0, 1, 0, 0)], tensor(6, 2, 3)),
        (source, [*loops[:2], (-6, 1, 0, 0, 1, 0, 0)], tensor(6, 2, 3)),
        (source, [*loops, (far, 0, 0, 0, 0, 0, 0)], tensor(6, 2, 3)),
    ):
        with pytest.raises(ValueError, match="rearrange"):
            one.rearrange(*args)
