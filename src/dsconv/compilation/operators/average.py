"""Averages of whole images, and the order in which they are summed up."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends import lowering
from dsconv.backends.base import Executable
from dsconv.compilation.layouts import lies_in_lines
from dsconv.compilation.operators.operator import Ids, Lowering, Step, register
from dsconv.compilation.values import Value
from dsconv.ops import arguments_of

# The last bits of a sum follow from its order, and that of PyTorch from the lanes of the vectors that it was built for.
_LANES = (8, 16, 4)
_TRIED = 16  # channels: enough that no other order rounds all of them alike, and few even of large images
OWN_LANES = 8  # on every processor


@dataclass(eq=False, kw_only=True)
class Average(Step):
    """The average of every channel of an image, in the order that so many lanes give."""

    source: Value
    lanes: int
    name: ClassVar[str | None] = "dsconv.average"

    def sources(self) -> Iterator[Value]:
        yield self.source

    def add(self, to: Executable, ids: Ids) -> None:
        to.average(ids.value(self.source), self.lanes, ids.value(self.result))


def lanes_of_pytorch(size: tuple[int, int, int]) -> int | None:
    """With how many lanes an ``Average`` has the bits of PyTorch's, for images ``(C, H, W)``; or None.

    Found by trying, so that another PyTorch with another order goes unharmed.

    >>> lanes_of_pytorch((64, 7, 7)) in (None, 4, 8, 16)
    True
    """
    backend, _ = lowering()
    return _lanes_of_pytorch(size, backend.describe())


@cache
def _lanes_of_pytorch(size: tuple[int, int, int], backend: str) -> int | None:
    channels, height, width = size
    if channels == 1:
        return None  # a sum over all there is, which is cut up among threads
    generator = torch.Generator().manual_seed(0)
    tried = (1, min(channels, _TRIED), height, width)
    x = torch.randn(tried, generator=generator, dtype=torch.float32, device="cpu")
    expected = x.mean((2, 3)).flatten()
    return next((lanes for lanes in _LANES if torch.equal(_averages(x, lanes), expected)), None)


def _averages(x: Tensor, lanes: int) -> Tensor:
    """Of one image."""
    _, channels, height, width = x.shape
    pixels = x.contiguous(memory_format=torch.channels_last)
    made = torch.empty(channels, dtype=torch.float32, device="cpu")
    backend, program = lowering()
    source = program.values(1, 0, 0, (channels, height, width), (x.numel(), 1, width * channels, channels))
    program.average(source, lanes, program.values(2, 0, 0, (channels, 1, 1), (channels, 1, channels, channels)))
    program.run(1, [backend.constant(tensor) for tensor in (None, pixels, made)], 0, 1, backend.constant(None))
    return made


def average_of_image(lowering: Lowering, node: fx.Node) -> Step | None:
    """Return the step of an average of whole images."""
    read: Any = node.args[0]
    source, result = lowering.value(read), lowering.value(node)
    if source is None or result is None or result.size != (source.size[0], 1, 1):
        return None
    given, dims = arguments_of(node.target, node.args, node.kwargs), read.meta["val"].dim()
    over = [dim for dim in range(1, dims) if dim != lowering.channel_dim(read)]
    if dims == 2 or sorted(dim % dims for dim in given.get("dim") or over) != over or given.get("dtype") is not None:
        return None
    # PyTorch takes an average of another layout in another order.
    here = read.meta["val"].is_cpu and lies_in_lines(read)
    lanes = (lanes_of_pytorch(source.size) if here else None) or OWN_LANES
    source.in_float = result.in_float = True
    return Average(node=node, result=result, source=source, lanes=lanes)


register("aten", "mean", returns="new", by_image=True, lower=average_of_image)
