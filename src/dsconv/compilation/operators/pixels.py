"""Pads, crops, and nearest neighbours: every pixel of the result is a pixel of the source, or a constant."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.operator import Ids, Lowering, Moves, Step, of_images, only_user, register
from dsconv.compilation.operators.views import changes_nothing, channels
from dsconv.ops import arguments_of

_aten = torch.ops.aten
_CONSTANT = (_aten.pad.default, _aten.constant_pad_nd.default)


@dataclass(eq=False, kw_only=True)
class Pixels(Moves):
    """Pixels at ``rows`` and ``columns`` of the source; ``fill`` if one of these is -1."""

    rows: list[int]
    columns: list[int]
    fill: float

    def add(self, to: Executable, ids: Ids) -> None:
        to.pick(ids.value(self.source), self.rows, self.columns, self.fill, self.uses(ids))


def _pixels(lowering: Lowering, node: fx.Node) -> Step | None:
    chain, before = [node], node.args[0]
    while isinstance(before, fx.Node) and before in lowering.absorbed and _crops(before):
        chain.insert(0, before)
        before = before.args[0]
    source, result = lowering.value(before), lowering.value(node)
    if source is None or result is None or source.size[0] != result.size[0] or not of_images(lowering, node):
        return None
    found = _places(chain, source.size[1:])
    if found is None:
        return None
    rows, columns, fill = found
    source.in_float = result.direct = True
    return Pixels(node=node, result=result, source=source, rows=rows, columns=columns, fill=fill, kind=_kind(node))


def _kind(node: fx.Node) -> str:
    packet = str(node.target.overloadpacket).removeprefix("aten.")  # type: ignore[union-attr]
    other = {"slice": "crop", "constant_pad_nd": "pad", "_upsample_nearest_exact2d": "upsample_nearest_exact2d"}
    return other.get(packet, packet)


def _places(chain: list[fx.Node], size: tuple[int, int]) -> tuple[list[int], list[int], float] | None:
    """Return rows and columns of the source, and the fill value; determined by running PyTorch on indices."""
    height, width = size
    y = torch.arange(height, dtype=torch.float32, device="cpu")[:, None].expand(height, width)
    x = torch.arange(width, dtype=torch.float32, device="cpu").expand(height, width)
    places, fill = torch.stack([y, x])[None], 0.0
    for node in chain:
        given: dict[str, Any] = arguments_of(node.target, node.args, node.kwargs)
        if len(node.all_input_nodes) > 1 or len(given.get("pad", ())) > 4:
            return None
        if node.target in _CONSTANT and given.get("mode", "constant") == "constant":
            fill = float(given["value"] or 0)
            given["value"] = -1
        _, *rest = given.values()
        places = node.target(places, *rest)  # type: ignore[operator]
    y, x = places[0].long()
    # -1 fills whole rows and columns, or does not occur.
    rows, columns = y.amax(1), x.amax(0)
    inside = (rows[:, None] >= 0) & (columns >= 0)
    alike = torch.where(inside, rows[:, None], -1).equal(y) and torch.where(inside, columns, -1).equal(x)
    return (rows.tolist(), columns.tolist(), fill) if alike else None


def _crops(node: Any) -> bool:
    """Return whether a node is a slice of rows or columns."""
    if not isinstance(node, fx.Node) or node.target is not _aten.slice.Tensor or node.meta["val"].dim() != 4:
        return False
    return arguments_of(node.target, node.args, node.kwargs)["dim"] % 4 in (2, 3)


def _slice(lowering: Lowering, node: fx.Node) -> Step | None:
    if not _crops(node) or lowering.channel_dim(node) != 1:
        channels(lowering, node)
        return None
    if lowering.value(node.args[0]) is not None and of_images(lowering, node) and _crops(only_user(node)):
        lowering.absorbed.add(node)  # the next one handles both
        return None
    return _pixels(lowering, node)


def _pads_nothing(node: fx.Node) -> bool:
    pads: Any = node.args[1]
    return not any(pads)


_FACTS: dict[str, Any] = {"rounds": "alike", "by_image": True, "lower": _pixels}
register("aten", "upsample_nearest2d _upsample_nearest_exact2d", returns="new", equals_input=changes_nothing, **_FACTS)
for _name in ("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d"):
    register("aten", _name, returns="new", equals_input=_pads_nothing, **_FACTS)
_SLICE: dict[str, Any] = {"returns": "view", "rounds": "alike", "keeps_channels": True, "lower": _slice}
register("aten", "slice", equals_input=changes_nothing, **_SLICE)
