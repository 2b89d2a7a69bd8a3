"""Bilinear interpolation, and the order of its sums."""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.layouts import lies_in_lines, lies_in_pixels
from dsconv.compilation.operators.operator import Ids, Lowering, OfOne, Step, of_images, register
from dsconv.compilation.operators.trying import alone, backend, made, noise
from dsconv.compilation.operators.views import changes_nothing
from dsconv.ops import arguments_of

Between = tuple[int, int, float, float]
"""Two rows or columns, and their weights."""
Order = tuple[int, int, int]
"""Number of channels that PyTorch sums in vectors, and the orders of the sums of these and of the others."""

_LINES, _ABOVE_FIRST, _BELOW_FIRST = range(3)
_OWN_ORDER: Order = (0, _LINES, _LINES)
MOST_OF_SMALL = 128
# Rows and columns for trials of the other kernel: the first whose results are above or below that limit.
_ABOVE, _BELOW = ((48, 48), (512, 16), (2048, 32)), ((5, 5), (2, 2), (1, 1))


@dataclass(eq=False, kw_only=True)
class Bilinear(OfOne):
    """Interpolated pixels between rows and columns of the source.

    Attributes:
        corners: whether the corners of both images are aligned.
        scales: scale factors of rows and columns, if the operator has them.
        order: order of its sums.
        pixels: whether the source is NHWC in the model.
    """

    corners: bool
    scales: tuple[float | None, ...]
    order: Order
    pixels: bool
    name: ClassVar[str | None] = "dsconv.upsample_bilinear2d"

    def add(self, to: Executable, ids: Ids) -> None:
        assert self.result is not None
        rows, columns = _places(self.source.size, self.result.size[1:], self.corners, self.scales)
        to.interpolate(ids.value(self.source), rows, columns, *self.order, self.uses(ids))

    def orders(self) -> tuple[Order | None, Order | None]:
        """Return the order for images of at most ``MOST_OF_SMALL`` rows and columns together, and for larger ones.

        PyTorch has a separate kernel for the former. None: no order is bitwise equal.
        """
        assert self.result is not None
        small, channels = sum(self.result.size[1:]) <= MOST_OF_SMALL, self.source.size[0]
        for size in _ABOVE if small else _BELOW:
            out = self._made_of(size)
            if min(out) > 0 and (sum(out) <= MOST_OF_SMALL) != small:
                there = _order((channels, *size), out, self.corners, self.scales, self.pixels, backend())
                return (self.order, there) if small else (there, self.order)
        return (self.order, None) if small else (None, self.order)

    def _made_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns made of so many: by the scales, or as many times as many, or always the same."""
        assert self.result is not None
        each = zip(size, self.source.size[1:], self.result.size[1:], self.scales, strict=True)
        rows, columns = (
            int(n * scale) if scale else made if made % have else n * (made // have) for n, have, made, scale in each
        )
        return rows, columns


def places(size: int, result: int, corners: bool, scale: float | None) -> list[Between]:
    """Return the pairs of ``size`` rows or columns around those of the result, as PyTorch computes them in float32.

    >>> places(2, 4, False, None)
    [(0, 1, 1.0, 0.0), (0, 1, 0.75, 0.25), (0, 1, 0.25, 0.75), (1, 1, 0.75, 0.25)]
    """
    if result == size:
        # A copy: the next row is not used, even if it is not finite.
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
    read: Any = node.args[0]
    source, result = lowering.value(read), lowering.value(node)
    if source is None or result is None or not of_images(lowering, node):
        return None
    pixels = lies_in_pixels(read)
    if len(node.all_input_nodes) > 1 or not (pixels or lies_in_lines(read)):
        return None
    given: dict[str, Any] = arguments_of(node.target, node.args, node.kwargs)
    corners, scales = (
        given["align_corners"],
        tuple(given.get("scale_factors") or (given.get("scales_h"), given.get("scales_w"))),
    )
    # On other devices PyTorch's order is not reproduced.
    order: Order | None = _OWN_ORDER
    if read.meta["val"].is_cpu:
        order = _order(source.size, result.size[1:], corners, scales, pixels, backend())
    if order is None:
        return None
    source.in_float = result.direct = True
    how = {"corners": corners, "scales": scales, "order": order, "pixels": pixels}
    return Bilinear(node=node, result=result, source=source, **how)


def _places(
    size: tuple[int, int, int], out: tuple[int, int], corners: bool, scales: tuple[float | None, ...]
) -> list[list[Between]]:
    """Return the pairs for rows and for columns."""
    return [places(have, want, corners, scale) for have, want, scale in zip(size[1:], out, scales, strict=True)]


@cache
def _order(
    size: tuple[int, int, int],
    out: tuple[int, int],
    corners: bool,
    scales: tuple[float | None, ...],
    pixels: bool,
    _: str,
) -> Order | None:
    """Determine by trials the order of sums that equals PyTorch bitwise for images in that layout; None if none does.

    A PyTorch with another order then does no harm.
    """
    x = noise(size, pixels)
    rows, columns = _places(size, out, corners, scales)

    def interpolated(order: Order) -> Tensor:
        return made(x, out, lambda to, *of: to.interpolate(of[0], rows, columns, *order, alone(of[1])))

    expected = torch.ops.aten.upsample_bilinear2d.default(x, out, corners, *scales)
    tried: list[Order] = [_OWN_ORDER]
    tried += [(size[0] // lanes * lanes, _BELOW_FIRST, _ABOVE_FIRST) for lanes in (8, 16, 4, 1)]
    tried.append((0, _ABOVE_FIRST, _ABOVE_FIRST))
    return next((order for order in tried if torch.equal(interpolated(order), expected)), None)


register("aten", "upsample_bilinear2d", returns="new", by_image=True, equals_input=changes_nothing, lower=_bilinear)
