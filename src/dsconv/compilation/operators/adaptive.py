"""Averages over as many windows as are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import fx

from dsconv.backends import lowering
from dsconv.backends.base import Executable
from dsconv.compilation.layouts import are_pixels, lies_in_lines
from dsconv.compilation.operators.average import average_of_image
from dsconv.compilation.operators.operator import Ids, Lowering, Step, register
from dsconv.compilation.operators.pool import Pool
from dsconv.compilation.operators.views import changes_nothing
from dsconv.compilation.values import Value

_aten = torch.ops.aten
Span = tuple[int, int]
"""From which row or column to before which."""


@dataclass(eq=False, kw_only=True)
class AdaptiveAverage(Step):
    """Averages over windows of ``rows`` and ``columns``.

    Attributes:
        at_once: whether a sum is divided by the number of pixels, or by that of rows and then by that of columns.
    """

    source: Value
    rows: list[Span]
    columns: list[Span]
    at_once: bool
    name: ClassVar[str | None] = "dsconv.adaptive_avg_pool2d"

    def sources(self) -> Iterator[Value]:
        yield self.source

    def add(self, to: Executable, ids: Ids) -> None:
        to.average_windows(ids.value(self.source), self.rows, self.columns, self.at_once, self.uses(ids))


def spans(size: int, result: int) -> list[Span]:
    """Return which of ``size`` rows or columns each of the result is made of.

    >>> spans(5, 3)
    [(0, 2), (1, 4), (3, 5)]
    """
    return [(i * size // result, -(-(i + 1) * size // result)) for i in range(result)]


def _average(lowering: Lowering, node: fx.Node) -> Step | None:
    result = lowering.value(node)
    if result is not None and result.size[1:] == (1, 1):
        return average_of_image(lowering, node)
    source = lowering.value(node.args[0])
    if source is None or result is None or lowering.channel_dim(node.args[0]) != 1 or result.size[0] != source.size[0]:
        return None
    if source.node.meta["val"].dim() != 4:
        return _windows(node, source, result) if source.node.meta["val"].dim() == 3 else None
    recorded = source.node.meta
    pixels = not lies_in_lines(source.node) and are_pixels(recorded["sizes"], recorded["strides"])
    at_once: bool | None = False
    if recorded["val"].is_cpu:
        known = pixels or lies_in_lines(source.node)
        at_once = _divides_at_once(source.size, result.size[1:], pixels) if known else None
    if at_once is None:
        return _windows(node, source, result)
    source.in_float = result.direct = True
    rows, columns = (spans(have, want) for have, want in zip(source.size[1:], result.size[1:], strict=True))
    return AdaptiveAverage(node=node, result=result, source=source, rows=rows, columns=columns, at_once=at_once)


@cache
def _divides_at_once(size: tuple[int, int, int], out: tuple[int, int], pixels: bool) -> bool | None:
    """Find by trying how PyTorch divides for images in that layout; None where it does so in another way."""
    channels, height, width = size
    x = torch.randn((1, *size), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    if pixels:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = _aten.adaptive_avg_pool2d.default(x, out)
    of = torch.empty_like(expected, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    for at_once in (False, True):
        backend, program = lowering()
        source = program.values(1, 0, 0, size, (x.numel(), 1, width * channels, channels))
        result = program.values(2, 0, 0, (channels, *out), (of.numel(), 1, out[1] * channels, channels))
        rows, columns = spans(height, out[0]), spans(width, out[1])
        program.average_windows(source, rows, columns, at_once, (result, -1, [], 0, 0.0, 0.0))
        program.run(1, [backend.constant(tensor) for tensor in (None, x, of)], 0, 1, backend.constant(None))
        if torch.equal(of, expected):
            return at_once
    return None


def _windows(node: fx.Node, source: Value, result: Value) -> Step | None:
    """Averages over windows that meet, of a size that divides that of the image, in an order of our own."""
    if any(size % made for size, made in zip(source.size[1:], result.size[1:], strict=True)):
        return None
    kernel = [size // made for size, made in zip(source.size[1:], result.size[1:], strict=True)]
    source.in_float = result.direct = True
    window = (*kernel, *kernel, 0, 0, 1, 1)
    return Pool(node=node, result=result, source=source, window=window, average=True)


_FACTS: dict[str, Any] = {"returns": "new", "by_image": True, "equals_input": changes_nothing, "lower": _average}
register("aten", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", **_FACTS)
