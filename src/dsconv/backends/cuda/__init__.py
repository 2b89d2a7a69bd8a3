"""Backend for integers on GPUs: a :class:`dsconv.backends.Backend` by Triton kernels.

Sums within a block are integer sums, by the matrix instructions for bytes; terms are added in the same order as in the
CPU kernels, so that layers are bitwise equal. Triton is imported when a layer is moved to a GPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dsconv.backends import cpu
from dsconv.backends.base import Executable, Operation
from dsconv.ops import FLOAT_BITS, packing

device: str | None = "cuda"
keeps_memory = False
cached_bytes: int | None = None
_MOST_TAPS = 31  # as many bits mark those inside the image
_LEAST_CAPABILITY = (8, 0)


def describe(in_integers: bool = True) -> str:
    return f"{'integers' if in_integers else 'float32'} (cuda)"


@cache
def _unusable() -> str:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'dsconv[gpu]'"
    if torch.version.hip is None and torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if found < _LEAST_CAPABILITY:
            return f"the GPU's compute capability is {found[0]}.{found[1]}, and the kernels need 8.0"
    return ""


def covers(operation: Operation) -> str:
    config, kernel = operation.config, operation.shape[2:]
    if reason := _unusable():
        return reason
    if operation.transposed or len(kernel) > 2:
        return "the kernels for GPUs are of convolutions of one and two dimensions that are not transposed"
    if config.activation_bits is None:
        return "" if cpu.takes_floats(operation) else "its input stays float"
    if config.algorithm == "winograd":
        return "Winograd has no kernels for GPUs: quantize with algorithm='direct'"
    if config.blocks == "flat" and operation.groups > 1:
        return "the kernels for GPUs take flattened blocks of one group"
    if config.blocks != "flat" and math.prod(kernel) > _MOST_TAPS:
        return f"its kernel has {math.prod(kernel)} taps, and the kernels for GPUs take {_MOST_TAPS}"
    if packing.kernel_block_size(operation.shape, config) is None:
        return f"its blocks of {config.block_size} are not a multiple of 8 of at most {packing.MAX_BLOCK_SIZE}"
    return ""


def pack(operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> cpu.Weights:
    from dsconv.backends.cuda import layouts

    config, in_float = operation.config, operation.config.activation_bits is None
    block_size = packing.kernel_block_size(operation.shape, config)
    assert block_size is not None
    settings = (config.weight_bits, config.activation_bits or FLOAT_BITS, config.activation_sign, block_size)
    packed = layouts.pack(vqk, kds, kds_shift, config, operation.groups, in_float)
    return packed, (operation.shape[0], *settings)


run = cpu.run


def lower() -> Executable | None:
    if _unusable():
        return None
    from dsconv.backends.cuda.program import CudaProgram

    return CudaProgram()


def constant(tensor: Tensor | None) -> Any:
    return tensor


def repeated(run: Callable[[Sequence[Tensor]], Any], alone: bool) -> Callable[[Sequence[Tensor]], Any]:
    from dsconv.backends.cuda.graphs import Graphs

    return Graphs(run, alone)


# Operators of dsconv.ops on GPU tensors.


def _layers() -> Any:
    from dsconv.backends.cuda import layers

    return layers


def register(key: str) -> Any:
    """Execute ``dsconv::conv2d`` and ``dsconv::linear`` by these kernels for a dispatch key; keep the result."""
    library: Any = torch.library.Library("dsconv", "IMPL")  # type: ignore[no-untyped-call]
    for name in ("conv2d", "linear"):
        for overload in ("", ".out"):
            library.impl(
                f"{name}{overload}", lambda *args, _name=name, **named: _layers().run(_name, *args, **named), key
            )
    return library


_library = register("CUDA")
