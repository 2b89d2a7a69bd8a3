"""Operators on sizes: Python numbers instead of tensors, so that networks accept images of other sizes."""

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.table import on_sizes
from dsconv.onnx.importing.values import Attributes, Sizes, Value

_FLOATS = (1, 10, 11, 16)


def _is_scalar(value: Value) -> bool:
    return value.scalar if isinstance(value, Sizes) else isinstance(value, np.ndarray) and value.ndim == 0


def _is_float(value: Any) -> bool:
    if isinstance(value, fx.Node):
        if value.target is torch.sym_float:
            return True
        of_floats = value.target in (python.add, python.sub, python.mul, python.truediv)
        return value.target is python.truediv or (of_floats and any(_is_float(part) for part in value.args))
    return isinstance(value, float)


def _applied(op: Builder, function: Callable[..., Any], *numbers: Any) -> Any:
    """Return the result of a function of numbers: a number, or a node if some are known only at run time."""
    if not any(isinstance(number, fx.Node) for number in numbers):
        return function(*numbers)
    return op.call(function, *numbers)


@on_sizes("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min")
def arithmetic(op: Builder, a: Attributes, x: Value, y: Value) -> Any:
    """Compute with numbers, element by element."""
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        return NotImplemented
    left, right = op.numbers(x), op.numbers(y)
    count = max(len(left), len(right))
    left, right = (part * count if len(part) == 1 else part for part in (left, right))
    functions: dict[str, Callable[..., Any]] = {
        "Add": python.add,
        "Sub": python.sub,
        "Mul": python.mul,
        "Mod": python.mod,
        "Max": torch.sym_max,
        "Min": torch.sym_min,
    }
    results = []
    for n, m in zip(left, right, strict=True):
        if op.node.op_type == "Div":
            function: Callable[..., Any] = python.truediv if _is_float(n) or _is_float(m) else python.floordiv
        else:
            function = functions[op.node.op_type]
        if (function in (python.mul, python.floordiv) and m == 1) or (function in (python.add, python.sub) and m == 0):
            results.append(n)
        elif function is python.mul and isinstance(n, int) and n == 1:
            results.append(m)
        else:
            results.append(_applied(op, function, n, m))
    return op.sizes(results, _is_scalar(x) and _is_scalar(y))


@on_sizes("Neg")
def negative(op: Builder, a: Attributes, x: Sizes) -> Any:
    """Change the sign."""
    return op.sizes([_applied(op, python.mul, -1, number) for number in x.values], x.scalar)


@on_sizes("Floor", "Ceil")
def rounded(op: Builder, a: Attributes, x: Sizes) -> Any:
    """Round fractions; they stay floats until they are cast, which does not change their value."""
    function = math.floor if op.node.op_type == "Floor" else math.ceil
    return op.sizes([_applied(op, function, n) if _is_float(n) else n for n in x.values], x.scalar)


@on_sizes("Cast")
def cast(op: Builder, a: Attributes, x: Sizes) -> Any:
    """Convert integers to floats, or the other way round."""
    if a.get("to") in _FLOATS:
        values = [n if _is_float(n) else _applied(op, torch.sym_float, n) for n in x.values]
    else:
        values = [_applied(op, math.trunc, n) if _is_float(n) else n for n in x.values]
    return op.sizes(values, x.scalar)


@on_sizes("Gather")
def gather(op: Builder, a: Attributes, x: Value, indices: Value) -> Any:
    """Select some of the numbers."""
    if not isinstance(x, Sizes) or not isinstance(indices, np.ndarray):
        return NotImplemented
    return op.sizes([x.values[int(place)] for place in indices.reshape(-1)], indices.ndim == 0)


@on_sizes("Slice")
def cut(op: Builder, a: Attributes, x: Value, starts: Value = None, ends: Value = None, *more: Value) -> Any:
    """Slice the numbers."""
    if not isinstance(x, Sizes):
        return NotImplemented
    first = (a.ints("starts") or [0])[0] if starts is None else op.ints(starts, "starts")[0]
    last = (a.ints("ends") or [0])[0] if ends is None else op.ints(ends, "ends")[0]
    step = op.ints(more[1], "steps")[0] if len(more) > 1 and more[1] is not None else 1
    return op.sizes(x.values[first : None if step < 0 and last < -len(x.values) else last : step])


@on_sizes("Concat")
def concat(op: Builder, a: Attributes, *given: Value) -> Any:
    """Concatenate lists of numbers."""
    if any(isinstance(value, fx.Node) for value in given):
        return NotImplemented
    return op.sizes([number for value in given for number in op.numbers(value)])


@on_sizes("Split")
def split(op: Builder, a: Attributes, x: Value, sizes: Value = None) -> Any:
    """Split a list of numbers into parts."""
    if not isinstance(x, Sizes):
        return NotImplemented
    count = len(op.node.output)
    known = a.ints("split") if sizes is None else op.ints(sizes, "sizes")
    known = known or [-(-len(x.values) // count)] * count
    starts = [sum(known[:place]) for place in range(count)]
    return tuple(op.sizes(x.values[start : start + size]) for start, size in zip(starts, known, strict=True))


@on_sizes("Unsqueeze", "Squeeze", "Identity")
def kept(op: Builder, a: Attributes, x: Sizes, *axes: Value) -> Any:
    """Convert a number to a list, or the other way round."""
    scalar = {"Unsqueeze": False, "Squeeze": True}.get(op.node.op_type, x.scalar)
    return op.sizes(x.values, scalar)


@on_sizes("Reshape")
def reshape(op: Builder, a: Attributes, x: Value, target: Value = None) -> Any:
    """Convert a number to a list, or the other way round."""
    if not isinstance(x, Sizes):
        return NotImplemented
    shape = a.ints("shape") if target is None else op.ints(target, "shape")
    return op.sizes(x.values, not shape) if len(shape or []) < 2 else NotImplemented


@on_sizes("ReduceProd")
def product(op: Builder, a: Attributes, x: Sizes, axes: Value = None) -> Any:
    """Multiply the numbers."""
    total: Any = 1
    for number in x.values:
        total = _applied(op, python.mul, total, number)
    return op.sizes([total], not a.get("keepdims", 1))


@on_sizes("Equal")
def equal(op: Builder, a: Attributes, x: Value, y: Value) -> Any:
    """Compare sizes with constants, as exporters do to find a -1: sizes of tensors are not negative."""
    sizes, other = (x, y) if isinstance(x, Sizes) else (y, x)
    if not isinstance(sizes, Sizes) or not isinstance(other, np.ndarray) or other.size == 0 or other.max() >= 0:
        return NotImplemented
    others = np.broadcast_to(other.reshape(-1), (len(sizes.values),)).tolist()
    pairs = zip(sizes.values, others, strict=True)
    return np.array([not isinstance(n, fx.Node) and n == m for n, m in pairs])


@on_sizes("Where")
def where(op: Builder, a: Attributes, condition: Value, x: Value, y: Value) -> Any:
    """Select numbers if the condition is known."""
    if not isinstance(condition, np.ndarray) or isinstance(x, fx.Node) or isinstance(y, fx.Node):
        return NotImplemented
    chosen = condition.reshape(-1).tolist()
    left, right = (part * len(chosen) if len(part) == 1 else part for part in (op.numbers(x), op.numbers(y)))
    results = [n if take else m for take, n, m in zip(chosen, left, right, strict=True)]
    return op.sizes(results, condition.ndim == 0)
