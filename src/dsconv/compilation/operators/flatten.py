"""Images as rows of values."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.operator import Ids, Lowering, OfOne, Step, register
from dsconv.compilation.operators.renaming import reshaped, to_rows
from dsconv.compilation.operators.shuffles import channel_shuffle_of_views
from dsconv.compilation.operators.views import changes_nothing


@dataclass(eq=False, kw_only=True)
class Flatten(OfOne):
    """All values of an image as channels of one pixel, in channel-major order."""

    name: ClassVar[str | None] = "dsconv.flatten"

    def add(self, to: Executable, ids: Ids) -> None:
        to.flatten(ids.value(self.source), ids.value(self.result))


def _flatten(lowering: Lowering, node: fx.Node) -> Step | None:
    if (shuffle := channel_shuffle_of_views(lowering, node)) is not None:
        return shuffle
    source, result = lowering.value(node.args[0]), lowering.value(node)
    if source is None or result is None or lowering.channel_dim(node.args[0]) != 1:
        return None
    if result.size != (math.prod(source.size), 1, 1):
        return None
    source.in_float = result.in_float = True
    return Flatten(node=node, result=result, source=source)


register(
    "aten",
    "flatten reshape _unsafe_view view",
    returns="view",
    rounds="alike",
    by_image=True,
    equals_input=changes_nothing,
    reads_last=to_rows,
    renames=reshaped,
    lower=_flatten,
)
