"""Layers with weights: convolutions, linear layers and normalizations become modules of ``torch.nn``."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.functions import prelu, same_padded
from dsconv.onnx.importing.modules import PaddedConv1d, PaddedConv2d, PaddedConv3d
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Unsupported, Value, as_tensor

# Any: their arguments are typed for each number of dimensions.
_CONV: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADDED: Any = (PaddedConv1d, PaddedConv2d, PaddedConv3d)
_TRANSPOSED: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCENORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
Pads = list[tuple[int, int]]


def filled(module: nn.Module, **tensors: "np.ndarray | Tensor | None") -> Any:
    """Return ``module`` with these parameters and buffers; those that are None are unchanged."""
    for name, value in tensors.items():
        if value is not None:
            value = as_tensor(value) if isinstance(value, np.ndarray) else value
            old = getattr(module, name)
            if old.shape != value.shape:
                raise Unsupported(f"its {name} has shape {list(value.shape)}, expected {list(old.shape)}")
            is_parameter = isinstance(old, nn.Parameter)
            setattr(module, name, nn.Parameter(value, value.is_floating_point()) if is_parameter else value)
    return module


def window(attributes: Attributes, kernel: list[int]) -> tuple[list[int], list[int], "Pads | str"]:
    """Return stride, dilation and padding before and after each dimension; ``upper`` or ``lower``: that of ``SAME``."""
    ones, dims = [1] * len(kernel), len(kernel)
    stride, dilation = attributes.ints("strides", ones) or ones, attributes.ints("dilations", ones) or ones
    match attributes.text("auto_pad", "NOTSET"):
        case "VALID":
            return stride, dilation, [(0, 0)] * dims
        case "SAME_UPPER" | "SAME_LOWER" as auto:
            lower = auto == "SAME_LOWER"
            if any(s != 1 and k != 1 for s, k in zip(stride, kernel, strict=True)):
                return stride, dilation, "lower" if lower else "upper"
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            return stride, dilation, [((t + lower) // 2, t - (t + lower) // 2) for t in total]
    pads = attributes.ints("pads", [0] * 2 * dims) or [0] * 2 * dims
    return stride, dilation, list(zip(pads[:dims], pads[dims:], strict=True))


@operator("Conv")
def conv(op: Builder, a: Attributes, x: Value, weight: Value, bias: Value = None) -> fx.Node:
    """Add a convolution; one with a computed weight, as a function."""
    rank, stated = op.known_rank(weight), a.ints("kernel_shape")
    kernel = list(weight.shape[2:]) if isinstance(weight, np.ndarray) else stated
    if kernel is None or (stated is not None and stated != kernel):
        raise Unsupported(f"a kernel of shape {kernel}, stated as {stated}")
    stride, dilation, pads = window(a, kernel)
    groups = a.get("group", 1)
    if not 1 <= len(kernel) <= 3 or rank != len(kernel) + 2:
        raise Unsupported(f"a convolution over {len(kernel)} dimensions")
    place = len(kernel) - 1
    if not isinstance(weight, np.ndarray) or not isinstance(bias, np.ndarray | None):
        if isinstance(pads, str) or any(before != after for before, after in pads):
            raise Unsupported("asymmetric padding with a weight that is computed at run time")
        function = (F.conv1d, F.conv2d, F.conv3d)[place]
        tensors = [None if t is None else op.tensor(t) for t in (x, weight, bias)]
        return op.call(function, *tensors, stride, [before for before, _ in pads], dilation, groups)
    source = op.tensor(x)
    if isinstance(pads, list) and (found := _zeros_before(source, len(kernel))):
        source, more = found
        pads = [(a + c, b + d) for (a, b), (c, d) in zip(pads, more, strict=True)]
    if pads == "lower":
        source, pads = op.call(same_padded, source, kernel, stride, dilation, 0.0, True), [(0, 0)] * len(kernel)
    sizes = weight.shape[1] * groups, weight.shape[0], kernel, stride

    def make() -> Any:
        if isinstance(pads, str) or any(before != after for before, after in pads):
            known = "same_upper" if isinstance(pads, str) else tuple(pads)
            made: Any = _PADDED[place](*sizes, 0, dilation, groups, bias is not None, pads=known)
        else:
            made = _CONV[place](*sizes, [before for before, _ in pads], dilation, groups, bias is not None)
        return filled(made, weight=weight, bias=bias)

    return op.layer(make, source, str(pads))


def _zeros_before(node: fx.Node, dims: int) -> "tuple[fx.Node, Pads] | None":
    """Return the input of a node that only adds zero padding to images, and the padding."""
    if node.target is not F.pad or node.args[2:] != ("constant", 0.0):
        return None
    source, border = node.args[:2]
    assert isinstance(source, fx.Node)
    if not isinstance(border, list | tuple) or len(border) > 2 * dims:
        return None
    if not all(isinstance(n, int) and n >= 0 for n in border):
        return None
    whole: list[Any] = [*border, *[0] * (2 * dims - len(border))]
    return source, list(zip(whole[::2], whole[1::2], strict=True))[::-1]


@operator("ConvTranspose")
def conv_transpose(op: Builder, a: Attributes, x: Value, weight: Value, bias: Value = None) -> fx.Node:
    """Add a transposed convolution."""
    w, b = op.weight(weight), None if bias is None else op.weight(bias, "bias")
    kernel, dims = list(w.shape[2:]), w.ndim - 2
    if not 1 <= dims <= 3:
        raise Unsupported(f"a transposed convolution over {dims} dimensions")
    stride, dilation, pads = window(a, kernel)
    more = a.ints("output_padding", [0] * dims) or [0] * dims
    if "output_shape" in a:
        raise Unsupported("the attribute output_shape")
    if isinstance(pads, str) or a.text("auto_pad", "NOTSET").startswith("SAME"):
        # The output is ``stride`` times as large as the input.
        total = [d * (k - 1) + 1 + m - s for k, s, d, m in zip(kernel, stride, dilation, more, strict=True)]
        if min(total) < 0:
            raise Unsupported("auto_pad with a stride larger than the kernel")
        upper = a.text("auto_pad", "") == "SAME_UPPER"
        pads = [(t // 2, t - t // 2) if upper else (t - t // 2, t // 2) for t in total]
    # Less padding after the input gives more output there.
    after = [m + before - behind for m, (before, behind) in zip(more, pads, strict=True)]
    cut = [max(0, -m) for m in after]
    sizes = w.shape[0], w.shape[1] * a.get("group", 1), kernel, stride, [before for before, _ in pads]

    def make() -> Any:
        rest = [max(0, m) for m in after], a.get("group", 1), b is not None, dilation
        return filled(_TRANSPOSED[dims - 1](*sizes, *rest), weight=w, bias=b)

    y = op.layer(make, x)
    border = [n for size in reversed(cut) for n in (0, -size)]
    return op.call(F.pad, y, border, "constant", 0.0) if any(cut) else y


def linear(op: Builder, x: Value, weight: np.ndarray, bias: "np.ndarray | None") -> fx.Node:
    """Add a linear layer with ``weight (O, I)``."""

    def make() -> Any:
        return filled(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight=weight, bias=bias)

    dims = op.dims(x)
    return op.shaped(op.layer(make, x), dims and [*dims[:-1], len(weight)])


@operator("Gemm")
def gemm(op: Builder, a: Attributes, x: Value, weight: Value, bias: Value = None) -> fx.Node:
    """Add a linear layer, or a matrix product if the weight is computed."""
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if isinstance(weight, np.ndarray) and not a.get("transA", 0):
        weight = weight if a.get("transB", 0) else weight.T
        scaled = weight if alpha == 1 else weight * np.asarray(alpha, weight.dtype)
        if bias is None:
            return linear(op, x, scaled, None)
        if isinstance(bias, np.ndarray) and bias.size in (1, len(weight)) and math.prod(bias.shape[:-1]) == 1:
            row = bias.reshape(-1) * np.asarray(beta, bias.dtype)
            return linear(op, x, scaled, np.broadcast_to(row, (len(weight),)))
        weight = weight.T if a.get("transB", 0) else weight
    left, right = op.tensor(x), op.tensor(weight)
    left = op.call(torch.t, left) if a.get("transA", 0) else left
    y = op.call(torch.matmul, left, op.call(torch.t, right) if a.get("transB", 0) else right)
    y = y if alpha == 1 else op.call(torch.mul, y, alpha)
    if bias is None:
        return y
    c = op.tensor(bias)
    return op.call(torch.add, y, c if beta == 1 else op.call(torch.mul, c, beta))


@operator("MatMul")
def matmul(op: Builder, a: Attributes, x: Value, y: Value) -> fx.Node:
    """Add a linear layer, or a matrix product if both operands are computed."""
    if isinstance(y, np.ndarray) and y.ndim == 2 and isinstance(x, fx.Node) and y.dtype.kind == "f":
        return linear(op, x, y.T, None)
    return op.call(torch.matmul, op.tensor(x), op.tensor(y))


@operator("BatchNormalization")
def batchnorm(op: Builder, a: Attributes, x: Value, *given: Value) -> fx.Node:
    """Add a BatchNorm with the statistics of the file."""
    if a.get("training_mode", 0) or op.more_outputs():
        raise Unsupported("a BatchNorm in training mode: export the network in evaluation mode")
    if not a.get("spatial", 1):
        raise Unsupported("a BatchNorm of each pixel (spatial=0)")
    weight, bias, mean, var = (op.weight(value, "statistics") for value in given)
    rank = op.rank(x) or 4
    if not 2 <= rank <= 5:
        raise Unsupported(f"an input of {rank} dimensions")

    def make() -> Any:
        made = _BATCHNORM[max(rank - 3, 0)](len(weight), a.get("epsilon", 1e-5))
        count = np.array(0, np.int64)
        return filled(made, weight=weight, bias=bias, running_mean=mean, running_var=var, num_batches_tracked=count)

    return op.layer(make, x)


@operator("InstanceNormalization")
def instance_norm(op: Builder, a: Attributes, x: Value, weight: Value, bias: Value) -> fx.Node:
    """Add an InstanceNorm."""
    rank, w, b = op.rank(x) or 4, op.weight(weight), op.weight(bias, "bias")
    if not 3 <= rank <= 5:
        raise Unsupported(f"an input of {rank} dimensions")

    def make() -> Any:
        return filled(_INSTANCENORM[rank - 3](len(w), a.get("epsilon", 1e-5), affine=True), weight=w, bias=b)

    return op.layer(make, x)


@operator("GroupNormalization")
def group_norm(op: Builder, a: Attributes, x: Value, weight: Value, bias: Value) -> fx.Node:
    """Add a GroupNorm; before opset 21 it had one scale for each group."""
    w, b, groups = op.weight(weight), op.weight(bias, "bias"), a.get("num_groups")
    dims = op.dims(x)
    channels = dims[1] if dims else None
    if channels is None:
        raise Unsupported("the file does not state how many channels its input has")
    if op.opset < 21:
        if w.size != groups or b.size != groups or channels % groups:
            raise Unsupported(f"{w.size} scales for {groups} groups of {channels} channels")
        w, b = np.repeat(w, channels // groups), np.repeat(b, channels // groups)
    return op.layer(lambda: filled(nn.GroupNorm(groups, channels, a.get("epsilon", 1e-5)), weight=w, bias=b), x)


@operator("LayerNormalization")
def layer_norm(op: Builder, a: Attributes, x: Value, weight: Value, bias: Value = None) -> fx.Node:
    """Add a LayerNorm over the last dimensions."""
    if op.more_outputs():
        raise Unsupported("its mean or deviation as an output")
    w, b, axis = op.weight(weight), None if bias is None else op.weight(bias, "bias"), a.get("axis", -1)
    over = -axis if axis < 0 else op.known_rank(x) - axis
    if over != w.ndim:
        raise Unsupported(f"a scale of shape {list(w.shape)} for {over} dimensions")

    def make() -> Any:
        return filled(nn.LayerNorm(w.shape, a.get("epsilon", 1e-5), bias=b is not None), weight=w, bias=b)

    return op.layer(make, x)


@operator("LRN")
def local_response_norm(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Add a normalization over neighbouring channels."""
    size = a.get("size")
    if size % 2 == 0:
        raise Unsupported(f"an even number of channels ({size})")
    given = a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0)
    return op.call(F.local_response_norm, op.tensor(x), size, *given)


@operator("PRelu")
def parametric_relu(op: Builder, a: Attributes, x: Value, slope: Value) -> fx.Node:
    """Add a PReLU; one whose slopes are not per channel, as a function."""
    rank = op.rank(x)
    if isinstance(slope, np.ndarray) and rank is not None:
        whole = (1,) * (rank - slope.ndim) + slope.shape
        if slope.size == 1 or (len(whole) > 1 and slope.size == whole[1]):
            row = slope.reshape(-1)
            return op.layer(lambda: filled(nn.PReLU(len(row)), weight=row), x)
    return op.call(prelu, op.tensor(x), op.tensor(slope))


@operator("LpNormalization")
def normalize(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Divide by the norm along one dimension."""
    return op.call(F.normalize, op.tensor(x), float(a.get("p", 2)), a.get("axis", -1))
