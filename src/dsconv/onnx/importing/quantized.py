"""Models that are quantized already: weights are dequantized, and what rounds activations is left out."""

from typing import Any

import numpy as np
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Rounded, Unsupported, Value

_ALREADY = "the model is quantized already, and its weights cannot be told from its activations: take the float model"
# What has no negative outputs, so that cutting them off does nothing.
_NOT_NEGATIVE = (F.relu, F.relu6, F.hardsigmoid)
# Unsigned types of ONNX: of 8, 16 and 4 bits.
_UNSIGNED = (0, 2, 4, 21)


def _beside(part: np.ndarray, x: np.ndarray, a: Attributes) -> np.ndarray:
    """Return a scale or zero point in a shape that is broadcast with ``x``: one, one a channel, or one a block."""
    axis = a.get("axis", 1)
    if part.size == 1:
        return part.reshape(())
    if part.ndim == 1:
        shape = [1] * x.ndim
        shape[axis] = len(part)
        return part.reshape(shape)
    whole = np.repeat(part, a.get("block_size", 1), axis)
    return np.take(whole, range(x.shape[axis]), axis)


@operator("QuantizeLinear")
def quantize(op: Builder, a: Attributes, x: Value, scale: Value, zero: Value = None) -> Any:
    """Round a constant; take note of a tensor that is rounded.

    Quantizers leave out a ReLU whose output is rounded to numbers from zero on: it is put back.
    """
    if isinstance(x, np.ndarray) and isinstance(scale, np.ndarray) and isinstance(zero, np.ndarray):
        if zero.dtype.kind not in "iu":
            raise Unsupported(f"integers of type {zero.dtype}")
        limits = np.iinfo(zero.dtype)
        steps = np.rint(x / _beside(scale, x, a)) + _beside(zero, x, a)
        return np.clip(steps, limits.min, limits.max).astype(zero.dtype)
    source = op.tensor(x)
    if zero is None:
        from_zero = a.get("output_dtype", 0) in _UNSIGNED
    else:
        point = op.weight(zero, "zero point")
        from_zero = point.dtype.name.startswith("uint") and not point.any()
    if from_zero and source.target not in _NOT_NEGATIVE:
        source = op.call(F.relu, source)
    return Rounded(source)


@operator("DequantizeLinear")
def dequantize(op: Builder, a: Attributes, x: Value, scale: Value, zero: Value = None) -> Any:
    """Return the float values of a constant, or a tensor as it was before it was rounded."""
    if isinstance(x, np.ndarray) and isinstance(scale, np.ndarray) and isinstance(zero, np.ndarray | None):
        # Differences of integers of 8 and 16 bits are exact in float32; those of 32 bits have no zero point.
        steps = x.astype(np.float32) - (0 if zero is None else _beside(zero.astype(np.float32), x, a))
        return (steps * _beside(scale.astype(np.float32), x, a)).astype(scale.dtype)
    if not isinstance(x, Rounded):
        raise Unsupported(_ALREADY)
    return x.node


@operator("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
def refuse(op: Builder, a: Attributes, *given: Value) -> None:
    """Refuse integers that are multiplied."""
    raise Unsupported(_ALREADY)
