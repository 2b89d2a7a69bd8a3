"""Maxima and averages over windows."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.operator import Ids, Lowering, OfOne, Step, register
from dsconv.ops import arguments_of


@dataclass(eq=False, kw_only=True)
class Pool(OfOne):
    """Maximum or average over windows: (kernel, stride, padding, dilation), each for height and width.

    Attributes:
        ceil: whether a last window may extend beyond the end.
    """

    window: tuple[int, ...]
    average: bool = False
    count_zeros: bool = False
    divisor: int = 0
    ceil: bool = False

    def reads_lines(self) -> bool:
        return True

    def add(self, to: Executable, ids: Ids) -> None:
        assert self.result is not None
        how = (self.window, self.average, self.count_zeros, self.divisor, self.result.size[1:])
        to.pool(ids.value(self.source), *how, self.uses(ids))


def _pool(lowering: Lowering, node: fx.Node) -> Step | None:
    given = arguments_of(node.target, node.args, node.kwargs)
    source, result = lowering.value(node.args[0]), lowering.value(node)
    dims = node.meta["val"].dim()
    if source is None or result is None or dims == 2 or lowering.channel_dim(node.args[0]) != 1:
        return None
    average = "count_include_pad" in given

    def pair(value: Any, missing: int = 1) -> tuple[int, int]:
        return _pair(value) if dims == 4 else (missing, _pair(value)[1])

    kernel = pair(given["kernel_size"])
    stride = pair(given["stride"]) if given["stride"] else kernel
    dilation = (1, 1) if average else pair(given["dilation"])
    window = (*kernel, *stride, *pair(given["padding"], 0), *dilation)
    zeros, divisor = (given["count_include_pad"], given.get("divisor_override") or 0) if average else (False, 0)
    source.in_float = result.direct = True
    return Pool(
        node=node,
        result=result,
        source=source,
        window=window,
        average=average,
        count_zeros=zeros,
        divisor=divisor,
        ceil=given["ceil_mode"],
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    one, other = value * 2 if len(value) == 1 else value
    return one, other


register("aten", "max_pool1d max_pool2d", returns="new", rounds="alike", by_image=True, lower=_pool)
register("aten", "max_pool3d", returns="new", rounds="alike", by_image=True)
register("aten", "avg_pool1d avg_pool2d", returns="new", by_image=True, lower=_pool)
