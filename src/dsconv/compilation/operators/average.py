"""Averages of whole images, and the order of their sums."""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.layouts import lies_in_lines
from dsconv.compilation.operators.operator import Ids, Lowering, OfOne, Step, register
from dsconv.compilation.operators.trying import backend, made, noise
from dsconv.ops import arguments_of

# The last bits of a sum depend on its order, and PyTorch's order on the vector width that it was built for.
_LANES = (8, 16, 4)
_TRIED = 16  # channels: enough that no other order rounds all of them the same way, and few even for large images
_LARGE = (_TRIED, 64, 64)
OWN_LANES = 8  # on every processor


@dataclass(eq=False, kw_only=True)
class Average(OfOne):
    """Average of every channel of an image, in the order given by the number of lanes."""

    lanes: int
    name: ClassVar[str | None] = "dsconv.average"

    def add(self, to: Executable, ids: Ids) -> None:
        to.average(ids.value(self.source), self.lanes, ids.value(self.result))


def lanes_of_pytorch(size: tuple[int, int, int]) -> int | None:
    """Return the number of lanes with which ``Average`` equals PyTorch bitwise for images ``(C, H, W)``, or None.

    It is determined by trials, so that a PyTorch with another order does no harm.

    >>> lanes_of_pytorch((64, 7, 7)) in (None, 4, 8, 16)
    True
    """
    return _lanes_of_pytorch(size, backend())


@cache
def _lanes_of_pytorch(size: tuple[int, int, int], _: str) -> int | None:
    channels, height, width = size
    if channels == 1:
        return None  # a sum over the whole tensor, which is divided among threads
    x = noise((min(channels, _TRIED), height, width))

    def averages(lanes: int) -> Tensor:
        return made(x, (1, 1), lambda to, source, result: to.average(source, lanes, result))

    expected = x.mean((2, 3), keepdim=True)
    found = [lanes for lanes in _LANES if torch.equal(averages(lanes), expected)]
    if len(found) > 1 and size != _LARGE:  # several fit for small images: use the same as for all others
        usual = _lanes_of_pytorch(_LARGE, _)
        return usual if usual in found else found[0]
    return next(iter(found), None)


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
    # PyTorch sums in another order for another layout.
    here = read.meta["val"].is_cpu and lies_in_lines(read)
    lanes = (lanes_of_pytorch(source.size) if here else None) or OWN_LANES
    source.in_float = result.in_float = True
    return Average(node=node, result=result, source=source, lanes=lanes)


register("aten", "mean", returns="new", by_image=True, own_bits=True, lower=average_of_image)
