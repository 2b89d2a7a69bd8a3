"""Views: slices of channels are read in place, and operators without effect need no step."""

import operator
from typing import Any

import torch
from torch import fx

from dsconv.compilation.operators.operator import Lowering, register
from dsconv.ops import arguments_of

_aten = torch.ops.aten
_BROADCASTING = (_aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.div.Tensor)
_PARTS = (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)


def changes_nothing(node: fx.Node) -> bool:
    """Return whether a node that moves or converts values has the shape and dtype of its input."""
    of: Any = node.args[0]
    return bool(node.meta["val"].dtype == of.meta["val"].dtype and _shape(node) == _shape(of))


def take_parts_as_slices(graph: fx.Graph) -> None:
    """Replace each part of a split or a chunk by a slice, and each part of ``unbind`` by a ``select``."""
    for node in list(graph.nodes):
        of: Any = node.args[0] if node.target is operator.getitem else None
        if not isinstance(of, fx.Node) or of.target not in (*_PARTS, _aten.unbind.int):
            continue
        given, index = arguments_of(of.target, of.args, of.kwargs), int(node.args[1])
        dim, parts = given["dim"] % given["self"].meta["val"].dim(), of.meta["val"]
        sizes = [1 if of.target is _aten.unbind.int else part.shape[dim] for part in parts]
        if not all(isinstance(size, int) for size in sizes):
            continue  # parts of a batch
        index %= len(sizes)
        first = sum(sizes[:index])
        if of.target is _aten.unbind.int:
            node.target, node.args = _aten.select.int, (given["self"], dim, first)
        else:
            node.target, node.args = _aten.slice.Tensor, (given["self"], dim, first, first + sizes[index])
    for node in reversed(graph.nodes):
        if node.target in (*_PARTS, _aten.unbind.int) and not node.users:
            graph.erase_node(node)


def bounds(node: fx.Node) -> tuple[int, int] | None:
    """Return the dimension and the start of a slice of step 1 or a ``narrow``; None for another node."""
    given = arguments_of(node.target, node.args, node.kwargs)
    sizes = given["self"].meta["val"].shape
    dim, start = given["dim"] % len(sizes), given["start"] or 0
    if given.get("step", 1) != 1 or not isinstance(start, int) or not isinstance(sizes[dim], int):
        return None
    return dim, min(sizes[dim], start + sizes[dim] if start < 0 else start)


def channels(lowering: Lowering, node: fx.Node) -> None:
    """Let a slice of channels be read in place."""
    source, result, found = lowering.value(node.args[0]), lowering.value(node), bounds(node)
    if source is None or result is None or found is None or result.size[1:] != source.size[1:]:
        return
    if not found[0] == result.dim == lowering.channel_dim(node.args[0]):
        return
    result.home, result.first = source, found[1]
    source.views.append(result)
    source.in_float = True
    lowering.absorbed.add(node)


def take_expansions_as_they_are(graph: fx.Graph) -> None:
    """Let products and sums read a tensor without its expansion to the size of the other one."""
    for node in list(graph.nodes):
        if node.target not in (_aten.expand.default, _aten.expand_as.default):
            continue
        of: Any = node.args[0]
        for user in list(node.users):
            others = [n for n in user.all_input_nodes if n is not node]
            as_large = [_shape(n) for n in others] == [_shape(node)]
            if user.target in _BROADCASTING and as_large and of.meta["val"].dim() == node.meta["val"].dim():
                user.replace_input_with(node, of)
        if not node.users:
            graph.erase_node(node)


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))


register(
    "aten", "narrow", returns="view", rounds="alike", keeps_channels=True, equals_input=changes_nothing, lower=channels
)
register("aten", "alias detach expand expand_as", returns="view", rounds="alike", equals_input=changes_nothing)
register("aten", "contiguous", returns="view", rounds="alike", makes_rows=True, equals_input=changes_nothing)
register("aten", "clone _to_copy", rounds="alike", keeps_channels=True, equals_input=changes_nothing)
register("aten", "chunk select split split_with_sizes unbind", returns="view", rounds="alike")
