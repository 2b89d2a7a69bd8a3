"""Bilinear interpolation, and the order of its sums."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from dsconv.backends import lowering
from dsconv.backends.base import Executable
from dsconv.compilation.layouts import are_pixels, lies_in_lines
from dsconv.compilation.operators.operator import Ids, Lowering, Step, of_images, register
from dsconv.compilation.operators.views import changes_nothing
from dsconv.compilation.values import Value
from dsconv.ops import arguments_of

Between = tuple[int, int, float, float]
"""Two rows or columns, and their weights."""
Order = tuple[int, int, int]
"""The number of channels that PyTorch sums up on vectors, and the orders of the sums of these and of the others."""

_LINES, _ABOVE_FIRST, _BELOW_FIRST = range(3)


@dataclass(eq=False, kw_only=True)
class Bilinear(Step):
    """Pixels between ``rows`` and ``columns`` of the source."""

    source: Value
    rows: list[Between]
    columns: list[Between]
    order: Order
    name: ClassVar[str | None] = "dsconv.upsample_bilinear2d"

    def sources(self) -> Iterator[Value]:
        yield self.source

    def add(self, to: Executable, ids: Ids) -> None:
        to.interpolate(ids.value(self.source), self.rows, self.columns, *self.order, self.uses(ids))


def places(size: int, result: int, corners: bool, scale: float | None) -> list[Between]:
    """Return between which rows, or columns, of ``size`` those of the result lie, as PyTorch computes it in float32.

    >>> places(2, 4, False, None)
    [(0, 1, 1.0, 0.0), (0, 1, 0.75, 0.25), (0, 1, 0.25, 0.75), (1, 1, 0.75, 0.25)]
    """
    if result == size:
        # A copy: the next row has no part in it, not even where it is not finite.
        return [(i, i, 1.0, 0.0) for i in range(size)]
    index = np.arange(result, dtype=np.float32)
    if corners:
        at = index * (np.float32(size - 1) / np.float32(result - 1) if result > 1 else np.float32(0))
    else:
        step = np.float32(1 / scale) if scale else np.float32(size) / np.float32(result)
        # The product and the sum are rounded once: both are exact in float64.
        half = np.float64(step) * (index + np.float32(0.5)).astype(np.float64) - 0.5
        at = np.maximum(half.astype(np.float32), np.float32(0))
    one = np.minimum(at.astype(np.int64), size - 1)
    other = np.minimum(one + 1, size - 1)
    weight = np.clip(at - one.astype(np.float32), np.float32(0), np.float32(1))
    both = (one, other, np.float32(1) - weight, weight)
    return list(zip(*(each.tolist() for each in both), strict=True))


def _bilinear(lowering: Lowering, node: fx.Node) -> Step | None:
    source, result = lowering.value(node.args[0]), lowering.value(node)
    if source is None or result is None or not of_images(lowering, node):
        return None
    given: dict[str, Any] = arguments_of(node.target, node.args, node.kwargs)
    recorded = source.node.meta
    pixels = not lies_in_lines(source.node) and are_pixels(recorded["sizes"], recorded["strides"])
    if len(node.all_input_nodes) > 1 or not (pixels or lies_in_lines(source.node)):
        return None
    scales = given.get("scale_factors") or (given.get("scales_h"), given.get("scales_w"))
    found = _found(source.size, result.size[1:], given["align_corners"], tuple(scales), pixels)
    if found is None:
        return None
    rows, columns, order = found
    source.in_float = result.direct = True
    return Bilinear(node=node, result=result, source=source, rows=rows, columns=columns, order=order)


def _found(
    size: tuple[int, int, int],
    out: tuple[int, int],
    corners: bool,
    scales: tuple[float | None, ...],
    pixels: bool,
) -> tuple[list[Between], list[Between], Order] | None:
    """Return places, and the order of sums that has PyTorch's bits for images in that layout; None where none has."""
    rows, columns = (
        places(have, want, corners, scale) for have, want, scale in zip(size[1:], out, scales, strict=True)
    )
    backend, _ = lowering()
    order = _order(size, out, corners, scales, pixels, backend.describe())
    return None if order is None else (rows, columns, order)


@cache
def _order(
    size: tuple[int, int, int],
    out: tuple[int, int],
    corners: bool,
    scales: tuple[float | None, ...],
    pixels: bool,
    backend: str,
) -> Order | None:
    """Find the order by trying, so that another PyTorch with another one goes unharmed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, *size), generator=generator, dtype=torch.float32, device="cpu")
    if pixels:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = torch.ops.aten.upsample_bilinear2d.default(x, out, corners, *scales)
    rows, columns = (
        places(have, want, corners, scale) for have, want, scale in zip(size[1:], out, scales, strict=True)
    )
    tried: list[Order] = [(0, _LINES, _LINES)]
    tried += [(size[0] // lanes * lanes, _BELOW_FIRST, _ABOVE_FIRST) for lanes in (8, 16, 4, 1)]
    tried.append((0, _ABOVE_FIRST, _ABOVE_FIRST))
    return next((order for order in tried if torch.equal(_made(x, rows, columns, order), expected)), None)


def _made(x: Tensor, rows: list[Between], columns: list[Between], order: Order) -> Tensor:
    """The interpolation of one image."""
    _, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    size = (channels, len(rows), len(columns))
    made = torch.empty((1, *size), dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    _, program = lowering()
    source = program.values(1, 0, 0, (channels, height, width), (x.numel(), 1, width * channels, channels))
    result = program.values(2, 0, 0, size, (made.numel(), 1, size[2] * channels, channels))
    program.interpolate(source, rows, columns, *order, (result, -1, [], 0, 0.0, 0.0))
    program.run(1, [0, x.data_ptr(), made.data_ptr()], 0, 1, 0)
    return made


register("aten", "upsample_bilinear2d", returns="new", by_image=True, equals_input=changes_nothing, lower=_bilinear)
