"""Activations."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.functions import flat_log_softmax, flat_softmax
from dsconv.onnx.importing.table import OPERATORS, operator
from dsconv.onnx.importing.values import Attributes, Unsupported, Value

_PLAIN: dict[str, Any] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Mish": F.mish,
    "HardSwish": F.hardswish,
    "Erf": torch.erf,
}


def _plain(function: Any, op: Builder, a: Attributes, x: Value) -> fx.Node:
    return op.call(function, op.tensor(x))


OPERATORS.update({name: partial(_plain, function) for name, function in _PLAIN.items()})


@operator("LeakyRelu")
def leaky_relu(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a leaky ReLU."""
    return op.call(F.leaky_relu, op.tensor(x), a.get("alpha", 0.01))


@operator("Elu")
def elu(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add an ELU."""
    return op.call(F.elu, op.tensor(x), a.get("alpha", 1.0))


@operator("Celu")
def celu(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a CELU."""
    return op.call(F.celu, op.tensor(x), a.get("alpha", 1.0))


@operator("Selu")
def selu(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a SELU; one with other constants than the usual ones is a scaled ELU."""
    alpha, gamma = a.get("alpha", 1.67326319217681884765625), a.get("gamma", 1.05070102214813232421875)
    if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.0507010) < 1e-5:
        return op.call(F.selu, op.tensor(x))
    return op.call(torch.mul, op.call(F.elu, op.tensor(x), alpha), gamma)


@operator("Gelu")
def gelu(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a GELU."""
    return op.call(F.gelu, op.tensor(x), approximate=a.text("approximate", "none"))


@operator("Swish")
def swish(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add ``x * sigmoid(alpha x)``."""
    source, alpha = op.tensor(x), a.get("alpha", 1.0)
    if alpha == 1:
        return op.call(F.silu, source)
    return op.call(torch.mul, source, op.call(torch.sigmoid, op.call(torch.mul, source, alpha)))


@operator("ThresholdedRelu")
def thresholded_relu(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Keep values above a threshold."""
    return op.call(F.threshold, op.tensor(x), a.get("alpha", 1.0), 0.0)


@operator("HardSigmoid")
def hard_sigmoid(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a hard sigmoid; one with another slope than PyTorch's as separate operations."""
    alpha, beta = a.get("alpha", 0.2), a.get("beta", 0.5)
    source = op.tensor(x)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return op.call(F.hardsigmoid, source)
    return op.call(F.hardtanh, op.call(torch.add, op.call(torch.mul, source, alpha), beta), 0.0, 1.0)


@operator("Clip")
def clip(op: Builder, a: Attributes, x: Value, low: Value = None, high: Value = None) -> fx.Node:
    """Add a ReLU, ReLU6 or clamp."""
    source = op.tensor(x)
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        for function, bound in ((torch.maximum, low), (torch.minimum, high)):
            source = source if bound is None else op.call(function, source, op.tensor(bound))
        return source
    least = a.get("min") if low is None else op.weight(low, "bound").item()
    most = a.get("max") if high is None else op.weight(high, "bound").item()
    # Before opset 11 the largest float means no bound.
    largest = float(np.finfo(np.float32).max)
    least = None if isinstance(least, float) and least <= -largest else least
    most = None if isinstance(most, float) and most >= largest else most
    if (least, most) == (None, None):
        return source
    if (least, most) == (0.0, None):
        return op.call(F.relu, source)
    if (least, most) == (0.0, 6.0):
        return op.call(F.relu6, source)
    if least is None or most is None or isinstance(least, int):
        return op.call(torch.clamp, source, least, most)
    if least > most:
        raise Unsupported(f"a range from {least} to {most}")
    return op.call(F.hardtanh, source, least, most)


@operator("Softmax", "LogSoftmax")
def softmax(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a softmax or its logarithm; before opset 13, over all dimensions from ``axis`` on."""
    is_log = op.node.op_type == "LogSoftmax"
    source, axis = op.tensor(x), a.get("axis", -1 if op.opset >= 13 else 1)
    dims = op.dims(x)
    if op.opset >= 13 or axis == -1 or (dims and all(size == 1 for size in dims[axis:][1:])):
        return op.call(F.log_softmax if is_log else F.softmax, source, axis)
    return op.call(flat_log_softmax if is_log else flat_softmax, source, axis)


@operator("Identity", "Dropout")
def same(op: Builder, a: Attributes, x: Value, *unused: Value) -> Any:
    """Return the input; a Dropout has no effect in evaluation."""
    if op.more_outputs():
        raise Unsupported("its mask as an output")
    return x
