"""Import of quantized models: weights are dequantized, and rounding of activations is removed."""

from typing import Any

import numpy as np
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Rounded, Unsupported, Value

_ALREADY = "the model is already quantized, and weights cannot be distinguished from activations: use the float model"
# Functions without negative outputs, for which clipping at zero has no effect.
_NOT_NEGATIVE = (F.relu, F.relu6, F.hardsigmoid)
# Unsigned types of ONNX, with 8, 16 and 4 bits.
_UNSIGNED = (0, 2, 4, 21)


def _beside(part: np.ndarray, x: np.ndarray, a: Attributes) -> np.ndarray:
    """Return a scale or zero point in a shape that broadcasts with ``x``: a scalar, per channel, or per block."""
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
    """Round a constant; record that a tensor is rounded.

    Quantizers omit a ReLU whose output is rounded to an unsigned range: it is restored.
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
    """Return the float values of a constant, or a tensor before its rounding."""
    if isinstance(x, np.ndarray) and isinstance(scale, np.ndarray) and isinstance(zero, np.ndarray | None):
        # Differences of 8- and 16-bit integers are exact in float32; 32-bit integers have no zero point.
        steps = x.astype(np.float32) - (0 if zero is None else _beside(zero.astype(np.float32), x, a))
        return (steps * _beside(scale.astype(np.float32), x, a)).astype(scale.dtype)
    if not isinstance(x, Rounded):
        raise Unsupported(_ALREADY)
    return x.node


@operator("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
def refuse(op: Builder, a: Attributes, *given: Value) -> None:
    """Reject products of integers."""
    raise Unsupported(_ALREADY)
