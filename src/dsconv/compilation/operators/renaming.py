"""Operators that give an image tensor another shape, or its channels another dimension, without moving values.

Programs store the channels of a pixel contiguously, whatever their dimension, so these operators need no step.
"""

import math
from typing import Any

from torch import fx

from dsconv.compilation.operators.operator import register
from dsconv.compilation.values import Seen


def reshaped(node: fx.Node, source: Seen, batch: Any) -> Seen | None:
    """Return a node's view of images whose dimensions other than those of size 1 stay, or whose pixels are rows."""
    read: Any = node.args[0]
    before, after = read.meta["val"].shape, node.meta["val"].shape
    channels, *image = source.size
    last = source.dim == len(before) - 1
    if len(after) == 2 and last and after[1] == channels and str(after[0]) == str(math.prod(before[:-1])):
        return Seen(source.size, 1)
    if str(after[0]) != str(batch) or len(after) not in (2, 3, 4):
        return None
    if len(before) == 2 and str(before[0]) != str(batch):  # rows
        kept = list(after[1:-1]) in (image, [math.prod(image)] if image[0] == 1 else None)
        return Seen(source.size, len(after) - 1) if kept and after[-1] == channels else None
    if channels == 1:  # whose dimension is one of several of size 1
        return Seen(source.size, 1) if len(after) > 2 and size_of(after, 1) == source.size else None
    ones = [[d for d in range(1, len(shape)) if shape[d] != 1] for shape in (before, after)]
    if [before[d] for d in ones[0]] != [after[d] for d in ones[1]]:
        return None
    dim = ones[1][ones[0].index(source.dim)]
    return Seen(source.size, dim) if size_of(after, dim) == source.size else None


def to_rows(node: fx.Node) -> bool:
    """Return whether a node makes rows of the last dimension of its input, as linear layers require."""
    read: Any = node.args[0]
    before, after = read.meta["val"].shape, node.meta["val"].shape
    return len(before) > 2 and len(after) == 2 and before[-1] == after[-1] and str(before[0]) != str(after[0])


def size_of(shape: Any, dim: int) -> tuple[int, int, int]:
    """Return channels, height and width of images with channel dimension ``dim``; frames are stacked vertically."""
    *frames, height, width = [1, 1] + [n for d, n in enumerate(shape) if d not in (0, dim)]
    return shape[dim], math.prod(frames) * height, width


def _permuted(node: fx.Node, source: Seen, _: Any) -> Seen | None:
    dims: Any = node.args[1]
    return _moved([dim % len(dims) for dim in dims], source)


def _transposed(node: fx.Node, source: Seen, _: Any) -> Seen | None:
    one, other = (dim % node.meta["val"].dim() for dim in node.args[1:])
    order = list(range(node.meta["val"].dim()))
    order[one], order[other] = other, one
    return _moved(order, source)


def _moved(order: list[int], source: Seen) -> Seen | None:
    dim, others = order.index(source.dim), [d for d in order if d != source.dim]
    images = 2 < len(order) < 5 and others == sorted(others) and order[0] == 0
    return Seen(source.size, dim) if images and dim in (1, len(order) - 1) else None


register("aten", "permute", returns="view", rounds="alike", renames=_permuted)
register("aten", "transpose", returns="view", rounds="alike", renames=_transposed)
register("aten", "squeeze unsqueeze", returns="view", rounds="alike", renames=reshaped)
