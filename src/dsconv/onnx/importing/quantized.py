"""Models that are quantized already: weights are dequantized, and what rounds activations is left out."""

from torch import fx
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Rounded, Unsupported, Value

_ALREADY = "the model is quantized already, and its weights cannot be told from its activations: take the float model"
# What has no negative outputs, so that cutting them off does nothing.
_NOT_NEGATIVE = (F.relu, F.relu6, F.hardsigmoid)
# Unsigned types of ONNX: of 8, 16 and 4 bits.
_UNSIGNED = (0, 2, 4, 21)


@operator("QuantizeLinear")
def quantize(op: Builder, a: Attributes, x: Value, scale: Value, zero: Value = None) -> Rounded:
    """Take note of a tensor that is rounded.

    Quantizers leave out a ReLU whose output is rounded to numbers from zero on: it is put back.
    """
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
def dequantize(op: Builder, a: Attributes, x: Value, scale: Value, zero: Value = None) -> fx.Node:
    """Return the tensor before it was rounded."""
    if not isinstance(x, Rounded):
        raise Unsupported(_ALREADY)
    return x.node


@operator("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
def refuse(op: Builder, a: Attributes, *given: Value) -> None:
    """Refuse integers that are multiplied."""
    raise Unsupported(_ALREADY)
