"""Reductions over dimensions."""

import operator as python
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.table import OPERATORS, operator
from dsconv.onnx.importing.values import Attributes, Unsupported, Value


def _over(op: Builder, a: Attributes, x: Value, axes: Value) -> "list[int] | None":
    """Return the dimensions of a reduction, None if it has no effect."""
    known = a.ints("axes") if axes is None else op.ints(axes, "axes")
    if known:
        return [op.axis(x, axis) for axis in known]
    return None if a.get("noop_with_empty_axes", 0) else list(range(op.known_rank(x)))


def _reduced(function: Any, op: Builder, a: Attributes, x: Value, axes: Value = None) -> fx.Node:
    over, keep = _over(op, a, x, axes), bool(a.get("keepdims", 1))
    if over is None:
        return op.tensor(x)
    source = op.batch_of_file(x) if 0 in over else op.tensor(x)
    if function is torch.mean and keep and sorted(over) == [2, 3] and op.rank(x) == 4:
        return op.call(F.adaptive_avg_pool2d, source, [1, 1])
    leads = op.leads(x) and (keep or 0 not in over)
    dims = op.dims(x)
    known = dims and [1 if dim in over else size for dim, size in enumerate(dims) if keep or dim not in over]
    return op.shaped(op.lead(op.call(function, source, over, keep), leads), known)


OPERATORS.update(
    {
        name: partial(_reduced, function)
        for name, function in (
            ("ReduceMean", torch.mean),
            ("ReduceSum", torch.sum),
            ("ReduceMax", torch.amax),
            ("ReduceMin", torch.amin),
            ("ReduceLogSumExp", torch.logsumexp),
        )
    }
)


@operator("ReduceL2", "ReduceL1", "ReduceSumSquare", "ReduceLogSum")
def norm(op: Builder, a: Attributes, x: Value, axes: Value = None) -> fx.Node:
    """Reduce by a norm or a similar function."""
    kind, source = op.node.op_type, op.tensor(x)
    over = _over(op, a, x, axes)
    if over is None:
        raise Unsupported("noop_with_empty_axes")
    inner = {"ReduceL1": torch.abs, "ReduceLogSum": None}.get(kind, torch.square)
    total = op.call(torch.sum, source if inner is None else op.call(inner, source), over, bool(a.get("keepdims", 1)))
    outer = {"ReduceL2": torch.sqrt, "ReduceLogSum": torch.log}.get(kind)
    return total if outer is None else op.call(outer, total)


@operator("ReduceProd")
def product(op: Builder, a: Attributes, x: Value, axes: Value = None) -> fx.Node:
    """Multiply along dimensions."""
    y, keep = op.tensor(x), bool(a.get("keepdims", 1))
    for dim in sorted(_over(op, a, x, axes) or [], reverse=True):
        y = op.call(torch.prod, y, dim, keep)
    return y


@operator("ArgMax", "ArgMin")
def place(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Return the index of the largest or smallest value."""
    if a.get("select_last_index", 0):
        raise Unsupported("select_last_index")
    function = torch.argmax if op.node.op_type == "ArgMax" else torch.argmin
    return op.call(function, op.tensor(x), a.get("axis", 0), bool(a.get("keepdims", 1)))


@operator("TopK")
def largest(op: Builder, a: Attributes, x: Value, k: Value = None) -> Any:
    """Return the largest or smallest values and their indices."""
    count = a.get("k") if k is None else op.numbers(k)[0]
    how = a.get("axis", -1), bool(a.get("largest", 1)), bool(a.get("sorted", 1))
    found = op.call(torch.topk, op.tensor(x), count, *how)
    return tuple(op.call(python.getitem, found, part) for part in range(len(op.node.output)))
