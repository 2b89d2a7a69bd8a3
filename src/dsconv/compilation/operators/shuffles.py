"""Shuffles: channel shuffle, channels to pixels, and pixels to channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.operator import Ids, Lowering, Moves, Step, of_images, register
from dsconv.compilation.values import Value

_aten = torch.ops.aten
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
Loop = tuple[int, ...]
"""Size; the strides in channels, rows and columns of the source; and those of the result."""


@dataclass(eq=False, kw_only=True)
class Shuffle(Moves):
    """Values of an image in another order, as nested loops, the outermost first."""

    loops: Sequence[Loop]

    def add(self, to: Executable, ids: Ids) -> None:
        to.rearrange(ids.value(self.source), self.loops, ids.value(self.result))


def _shuffle(lowering: Lowering, node: fx.Node, source: Value, kind: str, loops: Sequence[Loop]) -> Step:
    source.in_float = True
    result = lowering.value(node)
    assert result is not None
    result.in_float = True
    return Shuffle(node=node, result=result, source=source, loops=loops, kind=kind)


def _channels(lowering: Lowering, node: fx.Node, source: Value, groups: int) -> Step:
    channels, height, width = source.size
    each = channels // groups
    pixels = ((height, 0, 1, 0, 0, 1, 0), (width, 0, 0, 1, 0, 0, 1))
    loops = (*pixels, (groups, each, 0, 0, 1, 0, 0), (each, 1, 0, 0, groups, 0, 0))
    return _shuffle(lowering, node, source, "channel_shuffle", loops)


def _channel_shuffle(lowering: Lowering, node: fx.Node) -> Step | None:
    source, result, groups = lowering.value(node.args[0]), lowering.value(node), node.args[1]
    if source is None or result is None or not isinstance(groups, int) or not of_images(lowering, node):
        return None
    return _channels(lowering, node, source, groups)


def channel_shuffle_of_views(lowering: Lowering, node: fx.Node) -> Step | None:
    """Return the step of a reshape that ends a channel shuffle: split into groups, transpose, and merge."""
    chain = [node]
    while len(chain) < 3 and chain[-1].args and isinstance(of := chain[-1].args[0], fx.Node):
        if of.target not in (_aten.clone.default, _aten.contiguous.default):
            chain.append(of)
        else:
            chain[-1] = of
    if len(chain) < 3 or not _exchanges_groups(chain[1]) or chain[2].target not in _RESHAPES:
        return None
    source, result, split = lowering.value(chain[2].args[0]), lowering.value(node), chain[2].meta["val"].shape
    if source is None or result is None or len(split) != 5 or not of_images(lowering, node):
        return None
    if not result.size == source.size == (split[1] * split[2], *split[3:]):
        return None
    between = [node.args[0]]
    while between[-1] is not chain[2]:
        between.append(between[-1].args[0])  # type: ignore[union-attr]
    if all(len(n.users) == 1 for n in between):  # type: ignore[union-attr]
        lowering.absorbed.update(between)  # type: ignore[arg-type]
    return _channels(lowering, node, source, split[1])


def _exchanges_groups(node: fx.Node) -> bool:
    dims: Any = node.args[1:]
    if node.target is _aten.permute.default:
        return [dim % 5 for dim in dims[0]] == [0, 2, 1, 3, 4]
    return node.target is _aten.transpose.int and {dim % 5 for dim in dims} == {1, 2}


def _factor(lowering: Lowering, node: fx.Node) -> tuple[Value, Value, int] | None:
    source, result, factor = lowering.value(node.args[0]), lowering.value(node), node.args[1]
    if source is None or result is None or not isinstance(factor, int) or not of_images(lowering, node):
        return None
    return source, result, factor


def _to_pixels(size: tuple[int, int, int], factor: int) -> tuple[Loop, ...]:
    """Return loops that turn ``factor * factor`` channels of a pixel into as many pixels of a channel."""
    channels, height, width = size
    rows = ((height, 0, 1, 0, 0, factor, 0), (factor, factor, 0, 0, 0, 1, 0))
    columns = ((width, 0, 0, 1, 0, 0, factor), (factor, 1, 0, 0, 0, 0, 1))
    return (*rows, *columns, (channels, factor * factor, 0, 0, 1, 0, 0))


def _pixel_shuffle(lowering: Lowering, node: fx.Node) -> Step | None:
    if (found := _factor(lowering, node)) is None:
        return None
    source, result, factor = found
    loops = _to_pixels((result.size[0], *source.size[1:]), factor)
    return _shuffle(lowering, node, source, "pixel_shuffle", loops)


def _pixel_unshuffle(lowering: Lowering, node: fx.Node) -> Step | None:
    if (found := _factor(lowering, node)) is None:
        return None
    source, result, factor = found
    forth = _to_pixels((source.size[0], *result.size[1:]), factor)
    loops = [(size, *written, *read) for size, *turns in forth for read, written in [(turns[:3], turns[3:])]]
    return _shuffle(lowering, node, source, "pixel_unshuffle", loops)


_FACTS: dict[str, Any] = {"returns": "view", "rounds": "alike", "by_image": True}
register("aten", "pixel_shuffle", lower=_pixel_shuffle, **_FACTS)
register("aten", "pixel_unshuffle", lower=_pixel_unshuffle, **_FACTS)
register("aten", "channel_shuffle native_channel_shuffle", lower=_channel_shuffle, **_FACTS)
