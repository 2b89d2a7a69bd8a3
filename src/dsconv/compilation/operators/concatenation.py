"""Concatenations of channels: their pieces are written in place, as far as they can be."""

from torch import fx

from dsconv.compilation.operators.map import Map
from dsconv.compilation.operators.operator import Lowering, Step, register


def _concatenation(lowering: Lowering, node: fx.Node) -> Step | None:
    nodes, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    result = lowering.value(node)
    pieces = [lowering.value(n) for n in nodes]  # type: ignore[union-attr]
    if result is None or dim not in (1, 1 - node.meta["val"].dim()) or any(p is None for p in pieces):
        return None
    if any(lowering.channel_dim(n) != 1 for n in nodes):  # type: ignore[union-attr]
        return None
    if any(p.size[1:] != result.size[1:] for p in pieces if p is not None):
        return None
    result.pieces = tuple(inner for p in pieces if p is not None for inner in p.pieces or (p,))
    # This step stands for the pieces that have to be put together here.
    return Map(node=node, result=result, source=result)


register("aten", "cat", returns="new", rounds="alike", lower=_concatenation)
