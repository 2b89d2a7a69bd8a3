"""Concatenations of channels, whose pieces are written in place if possible."""

from collections.abc import Sequence

from torch import fx

from dsconv.compilation.operators.map import Map
from dsconv.compilation.operators.operator import Lowering, Step, register
from dsconv.compilation.values import Value


def _concatenation(lowering: Lowering, node: fx.Node) -> Step | None:
    nodes, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    result = lowering.value(node)
    values = [lowering.value(n) for n in nodes]  # type: ignore[union-attr]
    pieces = [value for value in values if value is not None]
    if result is None or len(pieces) < len(values):
        return None
    if any(lowering.channel_dim(n) != dim % node.meta["val"].dim() for n in (node, *nodes)):  # type: ignore[misc]
        return None
    if any(piece.size[1:] != result.size[1:] for piece in pieces):
        return None
    result.pieces = tuple(inner for piece in _joined(pieces) for inner in piece.pieces or (piece,))
    # This step represents the pieces that must be copied.
    return Map(node=node, result=result, source=result)


def _joined(pieces: Sequence[Value]) -> list[Value]:
    """Return the pieces, with a value in place of consecutive views that cover it."""
    joined: list[Value] = []
    for piece in pieces:
        joined.append(piece)
        whole = piece.home
        if whole is not None and piece.first + piece.size[0] == whole.size[0]:
            views = [piece]
            while views[0].first and len(views) < len(joined):
                before = joined[-len(views) - 1]
                if before.home is not whole or before.first + before.size[0] != views[0].first:
                    break
                views.insert(0, before)
            if views[0].first == 0:
                joined[-len(views) :] = [whole]
    return joined


register("aten", "cat", returns="new", rounds="alike", keeps_channels=True, lower=_concatenation)
