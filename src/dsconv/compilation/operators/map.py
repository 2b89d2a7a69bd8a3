"""Elementwise operations: sums, products, BatchNorm, activations, norms over channels, and copies.

Consecutive operations are one map, which computes all of them while a few pixels are in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable, MapOperation
from dsconv.compilation.layouts import in_one_format
from dsconv.compilation.operators.operator import (
    Constant,
    Ids,
    Lowering,
    OfOne,
    Settings,
    Step,
    fixed,
    only_user,
    register,
)
from dsconv.compilation.values import Value
from dsconv.ops import ACTIVATIONS, OPERATIONS


@dataclass(frozen=True, eq=False)
class Operation:
    """One of :data:`dsconv.ops.OPERATIONS`; its operand is a tensor, per-channel constants, or ``alpha``.

    Attributes:
        called: its name in the plan.
        offset: per-channel offset, added last.
    """

    kind: str
    called: str
    value: Value | None = None
    constants: Tensor | None = None
    alpha: float = 0.0
    beta: float = 0.0
    activation: str = "none"
    offset: Tensor | None = None

    def numbers(self, ids: Ids) -> MapOperation:
        """Return it in the form that an executable takes."""
        numbers = OPERATIONS.index(self.kind), ACTIVATIONS.index(self.activation)
        tensors = ids.constant(self.constants), ids.constant(self.offset)
        return (*numbers, self.alpha, self.beta, ids.value(self.value), *tensors)


@dataclass(eq=False, kw_only=True)
class Map(OfOne):
    """``source`` after some operations."""

    operations: list[Operation] = field(default_factory=list)
    takes_gaps: ClassVar[bool] = True
    name: ClassVar[str | None] = "dsconv.map"

    def sources(self) -> Iterator[Value]:
        yield from super().sources()
        yield from (operation.value for operation in self.operations if operation.value is not None)

    def takes_lines(self) -> bool:
        return self.result is None

    def add(self, to: Executable, ids: Ids) -> None:
        to.map(ids.value(self.source), [operation.numbers(ids) for operation in self.operations], self.uses(ids))

    def constants(self) -> Sequence[Tensor | None]:
        return [tensor for o in self.operations for tensor in (o.constants, o.offset)]


def activation(settings: Settings) -> Operation:
    """Return the operation that computes an activation."""
    return Operation("activate", settings["activation"], **settings)


def mapped(lowering: Lowering, node: fx.Node, source: Value, *operations: Operation) -> Step:
    """Return the map of a node, which extends the map before it if nothing else reads that."""
    result, earlier = lowering.value(node), _map_for(lowering, node, source)
    assert result is not None
    result.direct = True
    made, fused = list(operations), [operation.called for operation in operations if operation.called]
    if earlier is not None and all(operation.value is not source for operation in operations):
        lowering.steps.remove(earlier)
        source, made, fused = earlier.source, earlier.operations + made, earlier.fused + fused
    for value in (source, *(o.value for o in made if o.value is not None)):
        value.in_float = True
    return Map(node=node, result=result, source=source, operations=made, fused=fused)


def _map_for(lowering: Lowering, node: fx.Node, value: Value) -> Map | None:
    """Return the map that makes a value for a node alone."""
    found = next((step for step in reversed(lowering.steps) if step.result is value), None)
    if not isinstance(found, Map) or value.pieces or only_user(found.node) is not node:
        return None
    return None if any(value in step.sources() for step in lowering.steps if step is not found) else found


def per_channel(given: Any, constant: Constant, of: Tensor, dim: int) -> float | Tensor | None:
    """Return an operand of a tensor whose channels are dimension ``dim``: a number, or float32 ``(C,)``.

    None if ``given`` is something else.
    """
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    tensor = constant(given)
    if tensor is None or tensor.dtype != torch.float32 or tensor.dim() > of.dim():
        return None
    if tensor.numel() == 1:
        return float(tensor.detach())
    shape = [1] * of.dim()
    shape[dim] = of.shape[dim]
    return fixed(tensor).flatten() if [1] * (of.dim() - tensor.dim()) + list(tensor.shape) == shape else None


def batchnorm_terms(norm: fx.Node, constant: Callable[[Any], Tensor | None]) -> tuple[Tensor, Tensor] | None:
    """Return ``gain`` and ``offset`` of a BatchNorm, which PyTorch computes as ``x * gain + offset``, rounded once.

    None if it is in training mode, or its values are unknown or not finite in float32.
    """
    arguments: Any = norm.args
    _, *nodes, training, _, eps, _ = arguments
    values = [None if n is None else constant(n) for n in nodes]
    weight, bias, mean, var = values
    given = [value for value, n in zip(values, nodes, strict=True) if n is not None]
    if training or mean is None or var is None or any(v is None or v.dtype != torch.float32 for v in given):
        return None
    # The exact bits that PyTorch uses: its results for 1 without a mean and a bias, and for 0 with them.
    zeros = torch.zeros_like(mean)
    with torch.no_grad():
        gain = torch.batch_norm(zeros[None] + 1, weight, None, zeros, var, False, 0.0, eps, False)[0]
        offset = torch.batch_norm(zeros[None], weight, bias, mean, var, False, 0.0, eps, False)[0]
    return (gain, offset) if bool(gain.isfinite().all() and offset.isfinite().all()) else None


def _batchnorm(lowering: Lowering, node: fx.Node) -> Step | None:
    source, terms = lowering.value(node.args[0]), batchnorm_terms(node, lowering.constant)
    if source is None or terms is None or not in_one_format(node.args[0]) or lowering.channel_dim(node.args[0]) != 1:
        return None
    gain, offset = terms
    return mapped(lowering, node, source, Operation("scale", "batch_norm", constants=gain, offset=offset))


# Operations of an operator with its first argument as x, and with its second.
_BINARY = {
    "add": ("add", "add"),
    "sub": ("subtract", "subtract_from"),
    "rsub": ("subtract_from", "subtract"),
    "mul": ("multiply", "multiply"),
    "div": ("divide", "divide_by"),
}


def _binary(lowering: Lowering, node: fx.Node) -> Step | None:
    """Return the step of a sum, difference, product or quotient of two tensors, or of one and constants."""
    result = lowering.value(node)
    if result is None or node.kwargs or len(node.args) != 2:
        return None
    name = node.target._opname  # type: ignore[union-attr]
    first, second = node.args
    # The one of full size is x; if both are, one whose map can be extended.
    pairs = list(zip((first, second), (second, first), _BINARY[name], strict=True))
    pairs.sort(key=lambda pair: not _goes_on(lowering, node, pair[0]))
    for x, other, kind in pairs:
        source, value = lowering.value(x), lowering.value(other)
        if source is None or source.size != result.size or not _alike(lowering, x, node):
            continue
        operand = per_channel(other, lowering.constant, node.meta["val"], lowering.channel_dim(node))
        if isinstance(operand, float):
            return mapped(lowering, node, source, Operation(kind, name, alpha=operand))
        if operand is not None:
            return mapped(lowering, node, source, Operation(kind, name, constants=operand))
        if value is not None and _alike(lowering, other, node) and _broadcasts(value, result):
            return mapped(lowering, node, source, Operation(kind, name, value=value))
    return None


def _goes_on(lowering: Lowering, node: fx.Node, x: Any) -> bool:
    value = lowering.value(x)
    return value is not None and _map_for(lowering, node, value) is not None


def _alike(lowering: Lowering, of: Any, node: fx.Node) -> bool:
    """Return whether two tensors have the same dimensions, in the same order."""
    dims = of.meta["val"].dim() == node.meta["val"].dim()
    return dims and lowering.channel_dim(of) == lowering.channel_dim(node)


def _broadcasts(value: Value, result: Value) -> bool:
    (channels, *image), (all_channels, *size) = value.size, result.size
    return channels in (1, all_channels) and image in ([1, 1], size)


def _negative(lowering: Lowering, node: fx.Node) -> Step | None:
    source = lowering.value(node.args[0])
    return None if source is None else mapped(lowering, node, source, Operation("multiply", "neg", alpha=-1.0))


def _reciprocal(lowering: Lowering, node: fx.Node) -> Step | None:
    source = lowering.value(node.args[0])
    return None if source is None else mapped(lowering, node, source, Operation("divide_by", "reciprocal", alpha=1.0))


for _name in ("add", "sub", "mul", "div"):
    register("aten", _name, returns="new", in_place=True, rounds="alike", keeps_channels=True, lower=_binary)
register("aten", "rsub", returns="new", rounds="alike", keeps_channels=True, lower=_binary)
register("aten", "neg", returns="new", in_place=True, rounds="alike", keeps_channels=True, lower=_negative)
register("aten", "reciprocal", returns="new", in_place=True, rounds="alike", keeps_channels=True, lower=_reciprocal)
register("aten", "batch_norm", returns="new", lower=_batchnorm)
