"""Backend for integers on the CPU: a :class:`dsconv.backends.Backend` by the operators of :mod:`dsconv.ops.cpu`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsconv.backends.base import Executable, Operation
from dsconv.ops import FLOAT_BITS, native, packing

# Packed weights, and the settings that end the arguments of the operators.
Weights = tuple[packing.Packed, tuple[int, int, int, str, int]]

device: str | None = "cpu"
keeps_memory = True
# Memory of this size stays in the caches; that of more images at a time would not.
cached_bytes: int | None = 10 << 20


def describe(in_integers: bool = True) -> str:
    return f"{'integers' if in_integers else 'float32'} ({native.isa()})"


def covers(operation: Operation) -> str:
    config = operation.config
    if native.extension() is None:
        return "the extension dsconv._C is not built"
    if config.activation_bits is None and not takes_floats(operation):
        return "its input stays float"
    if packing.kernel_block_size(operation.shape, config) is None:
        return f"its blocks of {config.block_size} are not a multiple of 8 of at most {packing.MAX_BLOCK_SIZE}"
    return ""


def takes_floats(operation: Operation) -> bool:
    """Return whether float activations are supported: in 2-D depthwise layers, one block per filter, no shift."""
    config, (_, inputs, *kernel) = operation.config, operation.shape
    one_block = config.blocks == "flat" and math.prod(kernel) <= config.block_size and not config.weight_shift
    return inputs == 1 < operation.groups and one_block and len(kernel) < 3 and not operation.transposed


def pack(operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> Weights:
    config, block_size = operation.config, packing.kernel_block_size(operation.shape, operation.config)
    assert block_size is not None
    settings = (config.weight_bits, config.activation_bits or FLOAT_BITS, config.activation_sign, block_size)
    transposed = (operation.stride, operation.dilation) if operation.transposed else None
    packed = packing.pack(vqk, kds, kds_shift, config, operation.groups, transposed=transposed)
    return packed, (operation.shape[0], *settings)


def run(operation: Operation, packed: Weights, bias: Tensor | None, x: Tensor) -> Tensor:
    weights, settings = packed
    bias = None if bias is None else bias.float().contiguous()
    if len(operation.shape) == 2:
        rows = x.float() if x.dim() == 2 else x.float().reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.dsconv.linear(rows, *weights, bias, *settings)
        return (y if x.dim() == 2 else y.view(*x.shape[:-1], operation.shape[0])).to(x.dtype)
    # The kernels support two or three dimensions: for one, another of size 1 is added in front.
    missing = len(operation.shape) == 3
    dtype, x = x.dtype, x.float().unsqueeze(2) if missing else x.float()
    kernel, stride, dilation = (
        list(packing.two_or_more(of, 1)) for of in (operation.shape[2:], operation.stride, operation.dilation)
    )
    padding, flat = list(packing.two_or_more(operation.padding, 0)), operation.config.blocks == "flat"
    arguments = (x, *weights, bias, kernel, stride, padding, dilation, operation.groups, flat, *settings)
    if operation.transposed:
        extra = list(packing.two_or_more(operation.output_padding, 0))
        y = torch.ops.dsconv.convolution(*arguments, output_padding=extra)
    elif x.dim() == 5:
        y = torch.ops.dsconv.convolution(*arguments)
    else:
        y = torch.ops.dsconv.conv2d(*arguments, algorithm=operation.config.algorithm)
    return (y.squeeze(2) if missing else y).to(dtype)


def constant(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def repeated(run: Callable[[Sequence[Tensor]], Any], alone: bool) -> Callable[[Sequence[Tensor]], Any]:
    return run


def lower() -> Executable | None:
    module = native.extension()
    if module is None:
        return None
    made: Executable = module.Program(native.isa())
    return made
