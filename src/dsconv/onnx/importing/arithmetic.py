"""Arithmetic, comparisons and types."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.functions import FUNCTIONS
from dsconv.onnx.importing.table import OPERATORS, operator
from dsconv.onnx.importing.values import TYPES, Attributes, Sizes, Unsupported, Value

_UNARY: dict[str, Any] = {
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
}
_BINARY: dict[str, Any] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "Less": torch.lt,
    "GreaterOrEqual": torch.ge,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}
_TENSORS_ONLY = (torch.logical_and, torch.logical_or, torch.logical_xor)


def _unary(function: Any, op: Builder, a: Attributes, x: Value) -> fx.Node:
    return op.call(function, op.tensor(x))


def _binary(function: Any, op: Builder, a: Attributes, x: Value, y: Value) -> fx.Node:
    if function in _TENSORS_ONLY:
        return op.call(function, op.tensor(x), op.tensor(y))
    right = op.operand(y, x)
    # A number has no tensor methods as the first operand; the order does not matter in a sum or product.
    left: Any = op.operand(x, y) if function in (torch.add, torch.mul) and isinstance(right, fx.Node) else op.tensor(x)
    return op.call(function, left, right) if isinstance(left, fx.Node) else op.call(function, right, left)


OPERATORS.update({name: partial(_unary, function) for name, function in _UNARY.items()})
OPERATORS.update({name: partial(_binary, function) for name, function in _BINARY.items()})


def _is_whole(op: Builder, x: Value, y: Value) -> bool:
    """Return whether two tensors are integers, as far as known."""
    kinds = [value.dtype.kind for value in (x, y) if isinstance(value, np.ndarray)]
    return bool(kinds) and kinds[0] in "iu"


@operator("Div")
def div(op: Builder, a: Attributes, x: Value, y: Value) -> fx.Node:
    """Divide; integers are rounded towards zero."""
    rounding = {"rounding_mode": "trunc"} if _is_whole(op, x, y) or isinstance(x, Sizes) else {}
    return op.call(torch.div, op.tensor(x), op.operand(y, x), **rounding)


@operator("Mod")
def mod(op: Builder, a: Attributes, x: Value, y: Value) -> fx.Node:
    """Return the remainder with the sign of the divisor or, with ``fmod``, of the dividend."""
    return op.call(torch.fmod if a.get("fmod", 0) else torch.remainder, op.tensor(x), op.operand(y, x))


@operator("Sum", "Max", "Min", "Mean")
def several(op: Builder, a: Attributes, first: Value, *more: Value) -> fx.Node:
    """Reduce any number of tensors by a sum or a comparison."""
    kind = op.node.op_type
    function = {"Max": torch.maximum, "Min": torch.minimum}.get(kind, torch.add)
    total = op.tensor(first)
    for value in more:
        total = op.call(function, total, op.tensor(value))
    return op.call(torch.div, total, len(more) + 1) if kind == "Mean" and more else total


@operator("Where")
def where(op: Builder, a: Attributes, condition: Value, x: Value, y: Value) -> fx.Node:
    """Select elements from two tensors."""
    return op.call(torch.where, op.tensor(condition), op.tensor(x), op.tensor(y))


@operator("Cast")
def cast(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Change the dtype."""
    if a.get("to") not in TYPES:
        raise Unsupported(f"the type {a.get('to')}")
    return op.call(FUNCTIONS["torch.to"], op.tensor(x), TYPES[a.get("to")])


@operator("CumSum")
def cumulative_sum(op: Builder, a: Attributes, x: Value, axis: Value) -> fx.Node:
    """Compute cumulative sums along a dimension."""
    if a.get("exclusive", 0) or a.get("reverse", 0):
        raise Unsupported("exclusive or reverse")
    return op.call(torch.cumsum, op.tensor(x), op.ints(axis, "axis")[0])


@operator("Einsum")
def einsum(op: Builder, a: Attributes, *given: Value) -> fx.Node:
    """Compute the sum of products given by an equation."""
    return op.call(torch.einsum, a.text("equation", ""), *[op.tensor(value) for value in given])


@operator("Trilu")
def triangle(op: Builder, a: Attributes, x: Value, diagonal: Value = None) -> fx.Node:
    """Keep the values above, or below, a diagonal."""
    k = 0 if diagonal is None else op.ints(diagonal, "diagonal")[0]
    return op.call(torch.triu if a.get("upper", 1) else torch.tril, op.tensor(x), k)
