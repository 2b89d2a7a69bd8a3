"""Averages over a given number of windows."""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.layouts import lies_in_lines, lies_in_pixels
from dsconv.compilation.operators.average import average_of_image
from dsconv.compilation.operators.operator import Ids, Lowering, OfOne, Step, register
from dsconv.compilation.operators.pool import Pool
from dsconv.compilation.operators.trying import alone, backend, made, noise
from dsconv.compilation.operators.views import changes_nothing
from dsconv.compilation.values import Value

Span = tuple[int, int]
"""First row or column, and the end (exclusive)."""


@dataclass(eq=False, kw_only=True)
class AdaptiveAverage(OfOne):
    """Averages over windows of ``rows`` and ``columns``.

    Attributes:
        at_once: whether a sum is divided by the number of pixels, or by the number of rows and then by that of columns.
    """

    rows: list[Span]
    columns: list[Span]
    at_once: bool
    name: ClassVar[str | None] = "dsconv.adaptive_avg_pool2d"

    def add(self, to: Executable, ids: Ids) -> None:
        to.average_windows(ids.value(self.source), self.rows, self.columns, self.at_once, self.uses(ids))


def spans(size: int, result: int) -> list[Span]:
    """Return the span of ``size`` rows or columns for each row or column of the result.

    >>> spans(5, 3)
    [(0, 2), (1, 4), (3, 5)]
    """
    return [(i * size // result, -(-(i + 1) * size // result)) for i in range(result)]


def _average(lowering: Lowering, node: fx.Node) -> Step | None:
    result = lowering.value(node)
    if result is not None and result.size[1:] == (1, 1):
        return average_of_image(lowering, node)
    read: Any = node.args[0]
    source = lowering.value(read)
    if source is None or result is None or lowering.channel_dim(read) != 1 or result.size[0] != source.size[0]:
        return None
    if read.meta["val"].dim() != 4:
        return _windows(node, source, result) if read.meta["val"].dim() == 3 else None
    pixels, at_once = lies_in_pixels(read), None
    if not read.meta["val"].is_cpu:
        at_once = False  # PyTorch's order there is not reproduced
    elif pixels or lies_in_lines(read):
        at_once = _divides_at_once(source.size, result.size[1:], pixels, backend())
    if at_once is None:
        return _windows(node, source, result)
    source.in_float = result.direct = True
    rows, columns = (spans(have, want) for have, want in zip(source.size[1:], result.size[1:], strict=True))
    return AdaptiveAverage(node=node, result=result, source=source, rows=rows, columns=columns, at_once=at_once)


@cache
def _divides_at_once(size: tuple[int, int, int], out: tuple[int, int], pixels: bool, _: str) -> bool | None:
    """Determine by trials how PyTorch divides for images in that layout; None if it uses another method."""
    x = noise(size, pixels)
    rows, columns = (spans(have, want) for have, want in zip(size[1:], out, strict=True))

    def averages(at_once: bool) -> Tensor:
        return made(x, out, lambda to, *of: to.average_windows(of[0], rows, columns, at_once, alone(of[1])))

    expected = torch.ops.aten.adaptive_avg_pool2d.default(x, out)
    return next((at_once for at_once in (False, True) if torch.equal(averages(at_once), expected)), None)


def _windows(node: fx.Node, source: Value, result: Value) -> Step | None:
    """Average over adjacent windows whose size divides that of the image, in our own order."""
    if any(size % made for size, made in zip(source.size[1:], result.size[1:], strict=True)):
        return None
    kernel = [size // made for size, made in zip(source.size[1:], result.size[1:], strict=True)]
    source.in_float = result.direct = True
    window = (*kernel, *kernel, 0, 0, 1, 1)
    return Pool(node=node, result=result, source=source, window=window, average=True)


_FACTS: dict[str, Any] = {"returns": "new", "by_image": True, "own_bits": True}
register(
    "aten",
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    equals_input=changes_nothing,
    lower=_average,
    **_FACTS,
)
