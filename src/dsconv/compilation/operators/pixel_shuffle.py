"""Pixel shuffle: channels become pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.operator import Ids, Lowering, Step, register
from dsconv.compilation.values import Value


@dataclass(eq=False, kw_only=True)
class PixelShuffle(Step):
    """``factor * factor`` channels of a pixel as so many pixels of a channel."""

    source: Value
    factor: int
    name: ClassVar[str | None] = "dsconv.pixel_shuffle"

    def sources(self) -> Iterator[Value]:
        yield self.source

    def add(self, to: Executable, ids: Ids) -> None:
        to.shuffle(ids.value(self.source), self.factor, ids.value(self.result))


def _pixel_shuffle(lowering: Lowering, node: fx.Node) -> Step | None:
    source, result, factor = lowering.value(node.args[0]), lowering.value(node), node.args[1]
    if source is None or result is None or not isinstance(factor, int) or lowering.channel_dim(node.args[0]) != 1:
        return None
    source.in_float = result.in_float = True
    return PixelShuffle(node=node, result=result, source=source, factor=factor)


register("aten", "pixel_shuffle", rounds="alike", by_image=True, lower=_pixel_shuffle)
