"""Backend that simulates layers in float32: dequantized weights times activations in block floating point.

It supports all layers, on every device. The gradient passes straight through the rounding of activations.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.backends.base import Operation
from dsconv.config import LayerConfig
from dsconv.numerics import dequantize_weight, fake_quantize_activation, fake_winograd_weight, winograd_conv
from dsconv.ops.rounding import round_winograd
from dsconv.ops.views import patches, transposed_layout

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

device: str | None = None
keeps_memory = True
cached_bytes: int | None = None


def describe(in_integers: bool = True) -> str:
    return "float simulation"


def covers(operation: Operation) -> str:
    return ""


def pack(operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> Tensor:
    """Return the weight as :func:`prepare` does."""
    rows = vqk.flatten(1) if operation.config.blocks == "flat" else vqk
    return prepare(operation, dequantize_weight(rows, kds, operation.config.block_size, kds_shift).view(vqk.shape))


def prepare(operation: Operation, weight: Tensor) -> Tensor:
    """Return a float32 weight ``(O, C/groups, *K)`` as :func:`run` reads it, differentiably.

    For Winograd this is its rounded transform ``U (16, O, C)``, otherwise the weight itself.
    """
    config = operation.config
    return fake_winograd_weight(weight, config.block_size, round_winograd) if config.algorithm == "winograd" else weight


def run(operation: Operation, packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    config, groups, weight = operation.config, operation.groups, packed
    bias = None if bias is None else bias.float()
    dims = weight.dim() - 2
    if config.algorithm == "winograd":
        return winograd_conv(x, weight, bias, operation.padding, config.block_size).to(x.dtype)  # type: ignore[arg-type]
    if not dims:
        rows = x.reshape(-1, x.shape[-1])
        return F.linear(quantized(rows, config, groups=1).view(x.shape), weight, bias).to(x.dtype)
    stride, padding, dilation = list(operation.stride), list(operation.padding), list(operation.dilation)
    if operation.transposed:
        x_q, extra = quantized(x, config, groups), list(operation.output_padding)
        weight = transposed_layout(weight, groups)
        return _CONV_TRANSPOSE[dims - 1](x_q, weight, bias, stride, padding, extra, groups, dilation).to(x.dtype)
    if config.blocks == "flat" and config.activation_bits is not None:
        x_q = quantized(patches(x, weight.shape[2:], stride, padding, dilation), config, groups)
        weight = weight.reshape(len(weight), -1, *[1] * dims)
        stride, padding, dilation = [1] * dims, [0] * dims, [1] * dims
    else:
        x_q = quantized(x, config, groups)
    return _CONV[dims - 1](x_q, weight, bias, stride, padding, dilation, groups).to(x.dtype)


# Simulation of a layer as one operator, for graphs without gradients.
_library: Any = torch.library.Library("dsconv", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("simulated(Tensor x, Tensor vqk, Tensor kds, Tensor? kds_shift, Tensor? bias, str operation) -> Tensor")


def run_whole(
    operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, bias: Tensor | None, x: Tensor
) -> Tensor:
    """Run :func:`pack` and :func:`run`, by the operator ``dsconv::simulated``."""
    given = operation._replace(config=operation.config.model_dump())._asdict()  # type: ignore[arg-type]
    y: Tensor = torch.ops.dsconv.simulated(x, vqk, kds, kds_shift, bias, json.dumps(given))
    return y


@lru_cache(maxsize=4096)
def _operation(text: str) -> Operation:
    given = json.loads(text)
    sizes = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Operation(**{**given, **sizes, "config": LayerConfig(**given["config"])})


def _simulated(
    x: Tensor, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, bias: Tensor | None, operation: str
) -> Tensor:
    what = _operation(operation)
    return run(what, pack(what, vqk, kds, kds_shift), bias, x)


_library.impl("simulated", _simulated, "CompositeExplicitAutograd")
torch.library.register_fake("dsconv::simulated", _simulated, lib=_library)


def constant(tensor: Tensor | None) -> Any:
    return tensor


def repeated(run: Callable[[Sequence[Tensor]], Any], alone: bool) -> Callable[[Sequence[Tensor]], Any]:
    return run


def lower() -> None:
    return None


def quantized(x: Tensor, config: LayerConfig, groups: int) -> Tensor:
    """Return float32 ``x (N, C, *S)`` after the rounding defined by ``config``."""
    if config.activation_bits is None:
        return x.float()
    return fake_quantize_activation(x, config.activation_bits, config.block_size, sign=config.sign, groups=groups)
