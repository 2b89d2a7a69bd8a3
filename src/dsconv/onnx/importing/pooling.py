"""Pooling."""

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.functions import average_pool, same_padded
from dsconv.onnx.importing.layers import Pads, window
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Unsupported, Value

_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def _border(pads: Pads) -> list[int]:
    return [n for pair in reversed(pads) for n in pair]


def _overhangs(op: Builder, x: Value, kernel: list[int], stride: list[int], pads: Pads) -> bool:
    """Return whether padding after the image only lets the last window extend beyond it (Caffe's convention)."""
    dims = op.dims(x) or [None] * (len(kernel) + 2)
    for size, k, s, (before, after) in zip(dims[2:], kernel, stride, pads, strict=True):
        if before or k < s or not 0 <= after < s:
            return False
        # The number of windows must be equal for the known size, or for every size.
        if after not in (0, s - 1) and (size is None or (size + after - k) // s != -((k - size) // s)):
            return False
        if after == 0 and s > 1 and (size is None or (size - k) % s):
            return False
    return True


@operator("MaxPool")
def max_pool(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Take the largest value of each window."""
    if op.more_outputs() or a.get("storage_order", 0):
        raise Unsupported("indices of the largest values as an output")
    kernel, source = a.ints("kernel_shape") or [], op.tensor(x)
    stride, dilation, pads = window(a, kernel)
    ceil, lowest = bool(a.get("ceil_mode", 0)), float("-inf")
    if not 1 <= len(kernel) <= 3:
        raise Unsupported(f"windows over {len(kernel)} dimensions")
    if isinstance(pads, str):
        source = op.call(same_padded, source, kernel, stride, dilation, lowest, pads == "lower")
        pads = [(0, 0)] * len(kernel)
    elif max(dilation) == 1 and any(after for _, after in pads) and _overhangs(op, x, kernel, stride, pads):
        pads, ceil = [(0, 0)] * len(kernel), True
    elif any(before != after or 2 * before > k for (before, after), k in zip(pads, kernel, strict=True)):
        source = op.call(F.pad, source, _border(pads), "constant", lowest)
        pads = [(0, 0)] * len(kernel)
    return op.call(_MAX[len(kernel) - 1], source, kernel, stride, [before for before, _ in pads], dilation, ceil)


@operator("AveragePool")
def average(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Take the average of each window."""
    kernel, source = a.ints("kernel_shape") or [], op.tensor(x)
    stride, dilation, pads = window(a, kernel)
    ceil, counts = bool(a.get("ceil_mode", 0)), bool(a.get("count_include_pad", 0))
    if max(dilation, default=1) > 1 or not 1 <= len(kernel) <= 3:
        raise Unsupported(f"windows with dilation {dilation}, over {len(kernel)} dimensions")
    if isinstance(pads, str):
        return op.call(average_pool, source, kernel, stride, None, ceil, counts, pads == "lower")
    if not counts and any(after for _, after in pads) and _overhangs(op, x, kernel, stride, pads):
        pads, ceil = [(0, 0)] * len(kernel), True
    if any(before != after or 2 * before > k for (before, after), k in zip(pads, kernel, strict=True)):
        return op.call(average_pool, source, kernel, stride, _border(pads), ceil, counts)
    even = [before for before, _ in pads]
    return op.call(_AVERAGE[len(kernel) - 1], source, kernel, stride, even, ceil, counts)


@operator("GlobalAveragePool")
def global_average(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Take the average of each channel."""
    dims = (op.rank(x) or 4) - 2
    if not 1 <= dims <= 3:
        raise Unsupported(f"an input of {dims + 2} dimensions")
    return op.call(_ADAPTIVE[dims - 1], op.tensor(x), [1] * dims)


@operator("GlobalMaxPool")
def global_max(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Take the largest value of each channel."""
    over: Any = list(range(2, op.rank(x) or 4))
    return op.call(torch.amax, op.tensor(x), over, True)
