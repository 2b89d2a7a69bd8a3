"""DSConv in integers on the CPU, by the kernels of the extension ``dsconv._C``.

``dsconv::conv2d`` and ``dsconv::linear`` take packed weights (:func:`pack`). They return the same bits on every
instruction set, number of threads and split of the batch; see the exactness notes in docs/numerics.md.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.errors import ConfigError
from dsconv.numerics import ACTIVATION_SIGNS, block_count

MAX_BLOCK_SIZE = 512


class Packed(NamedTuple):
    """A layer's weight, KDS and shift in the order in which the kernels read them."""

    weight: Tensor
    kds: Tensor
    kds_shift: Tensor | None


@cache
def extension() -> ModuleType | None:
    """``dsconv._C``, running its tasks on the threads of PyTorch where it offers them; None where not built."""
    try:
        from dsconv import _C
    except ImportError:
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        run = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return _C
    _C.use_parallel_for(ctypes.cast(run, ctypes.c_void_p).value or 0)
    return _C


@cache
def isa() -> str | None:
    """The instruction set that convolutions use: the best that has kernels, but none above ``DSCONV_MAX_ISA``.

    Raises:
        ConfigError: ``DSCONV_MAX_ISA`` is not the name of an instruction set.
    """
    known = ("scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "neondotprod")
    cap = os.environ.get("DSCONV_MAX_ISA")
    if cap is not None and cap not in known:
        raise ConfigError(f"DSCONV_MAX_ISA: expected one of {', '.join(known)}, got {cap!r}")
    module = extension()
    if module is None:
        return None
    usable = [name for name in module.isa_with_kernels() if cap is None or known.index(name) <= known.index(cap)]
    return usable[-1] if usable else None


def why_not(weight_shape: Sequence[int], config: LayerConfig, *, transposed: bool = False) -> str:
    """Why the kernels do not cover a layer of VQK shape ``(O, C/groups, *K)``; empty where they do."""
    if extension() is None:
        return "the extension dsconv._C is not built"
    if transposed:
        return "transposed convolutions have no kernels"
    if len(weight_shape) > 4:
        return "3-D convolutions have no kernels"
    if config.activation_bits is None:
        return "its input stays float"
    if kernel_block_size(weight_shape, config) is None:
        return f"its blocks of {config.block_size} are not a multiple of 8 of at most {MAX_BLOCK_SIZE}"
    return ""


def kernel_block_size(weight_shape: Sequence[int], config: LayerConfig) -> int | None:
    """Block size as the kernels see it; a single short block is filled up. None where they do not cover it."""
    taps = torch.Size(weight_shape[2:]).numel()
    depth = weight_shape[1] * (taps if config.blocks == "flat" else 1)
    size = config.block_size if block_count(depth, config.block_size) > 1 else -(-depth // 8) * 8
    return size if size % 8 == 0 and size <= MAX_BLOCK_SIZE else None


def _sizes(
    x: Sequence[int],
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block_size: int,
    flat: bool,
) -> tuple[int, ...]:
    """Sizes of a convolution of ``x (N, C, H, W)`` in the order of csrc/bindings.cpp."""
    out = _output_size(x[2:], kernel, stride, padding, dilation)
    where = (*kernel, *stride, *padding, *dilation)
    return (*x, outputs, *out, *where, groups, block_size, int(flat))


def _output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def pack(vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig, groups: int) -> Packed:
    """Weights of a covered layer as the kernels read them, on the CPU.

    Args:
        vqk: int8 ``(O, C/groups, *K)`` with up to two kernel dimensions.
        kds, kds_shift: ``(O, CB, *K)``, or ``(O, CB)`` for flattened blocks.
        config: its settings; :func:`why_not` has nothing against them.
        groups: convolution groups.
    """
    module = extension()
    block_size = kernel_block_size(vqk.shape, config)
    assert module is not None
    assert block_size is not None
    kernel = [1] * (4 - vqk.dim()) + list(vqk.shape[2:])
    # Any image will do whose output has a pixel: the packed layout does not depend on it.
    x = (1, vqk.shape[1] * groups, *kernel)
    sizes = _sizes(x, vqk.shape[0], kernel, (1, 1), (0, 0), (1, 1), groups, block_size, config.blocks == "flat")
    weight_bytes, kds_count = module.packed_sizes(sizes, config.weight_bits)
    vqk = vqk.detach().cpu().contiguous()
    weight = torch.empty(weight_bytes, dtype=torch.uint8)
    module.pack_weight(sizes, vqk.data_ptr(), config.weight_bits, weight.data_ptr())

    def packed(scale: Tensor) -> Tensor:
        scale = scale.detach().cpu().float().contiguous()
        result = torch.empty(kds_count)
        module.pack_kds(sizes, scale.data_ptr(), result.data_ptr())
        return result

    return Packed(weight, packed(kds), None if kds_shift is None else packed(kds_shift))


# The order of csrc/conv/tile.h is that of ACTIVATION_SIGNS.
# PyTorch declares no types here.
_library: Any = torch.library.Library("dsconv", "DEF")  # type: ignore[no-untyped-call]
_SETTINGS = "int outputs, int weight_bits, int activation_bits, str sign, int block_size"
_WEIGHTS = "Tensor weight, Tensor kds, Tensor? kds_shift, Tensor? bias"
_library.define(
    f"conv2d(Tensor x, {_WEIGHTS}, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    f"bool flat, {_SETTINGS}) -> Tensor"
)
_library.define(f"linear(Tensor x, {_WEIGHTS}, {_SETTINGS}) -> Tensor")


def _check_input(name: str, x: Tensor, dims: int, sign: str) -> None:
    if extension() is None:
        raise RuntimeError(f"dsconv::{name}: the extension dsconv._C is not built")
    if sign not in ACTIVATION_SIGNS:
        raise ValueError(f"dsconv::{name}: sign: expected one of {', '.join(ACTIVATION_SIGNS)}, got {sign!r}")
    if x.dtype != torch.float32 or x.dim() != dims:
        raise ValueError(f"dsconv::{name}: expected float32 x of {dims} dimensions, got {x.dtype} {tuple(x.shape)}")


def _check_weights(name: str, weights: Sequence[Tensor | None], sizes: Sequence[int], bits: int) -> None:
    module = extension()
    assert module is not None
    weight_bytes, kds_count = module.packed_sizes(sizes, bits)
    expected = [("weight", torch.uint8, weight_bytes), ("kds", torch.float32, kds_count)]
    expected += [("kds_shift", torch.float32, kds_count), ("bias", torch.float32, sizes[4])]
    for (argument, dtype, count), value in zip(expected, weights, strict=True):
        if value is None:
            continue
        if value.dtype != dtype or value.shape != (count,) or not value.is_contiguous() or not value.is_cpu:
            raise ValueError(
                f"dsconv::{name}: {argument}: expected contiguous {dtype} ({count},) on the CPU for these settings, "
                f"got {value.dtype} {tuple(value.shape)}"
            )


def _run(
    x: Tensor,
    x_strides: tuple[int, ...],
    weights: Sequence[Tensor | None],
    y: Tensor,
    y_strides: tuple[int, ...],
    sizes: tuple[int, ...],
    weight_bits: int,
    activation_bits: int,
    sign: str,
) -> Tensor:
    module = extension()
    assert module is not None
    if y.numel():
        addresses = [0 if value is None else value.data_ptr() for value in weights]
        module.convolve(
            isa(),
            sizes,
            x.data_ptr(),
            x_strides,
            *addresses,
            y.data_ptr(),
            y_strides,
            weight_bits,
            activation_bits,
            ACTIVATION_SIGNS.index(sign),
        )
    return y


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _empty_output(x: Tensor, outputs: int, size: Sequence[int]) -> Tensor:
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return torch.empty((x.shape[0], outputs, *size), dtype=x.dtype, device=x.device, memory_format=layout)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    kds: Tensor,
    kds_shift: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flat: bool,
    outputs: int,
    weight_bits: int,
    activation_bits: int,
    sign: str,
    block_size: int,
) -> Tensor:
    _check_input("conv2d", x, 4, sign)
    sizes = _sizes(x.shape, outputs, kernel_size, stride, padding, dilation, groups, block_size, flat)
    weights = (weight, kds, kds_shift, bias)
    _check_weights("conv2d", weights, sizes, weight_bits)
    x = x if _channels_last(x) else x.contiguous()
    y = _empty_output(x, outputs, sizes[5:7])
    return _run(x, x.stride(), weights, y, y.stride(), sizes, weight_bits, activation_bits, sign)


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    kds: Tensor,
    kds_shift: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flat: bool,
    outputs: int,
    *settings: object,
) -> Tensor:
    return _empty_output(x, outputs, _output_size(x.shape[2:], kernel_size, stride, padding, dilation))


def _linear(
    x: Tensor,
    weight: Tensor,
    kds: Tensor,
    kds_shift: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    weight_bits: int,
    activation_bits: int,
    sign: str,
    block_size: int,
) -> Tensor:
    _check_input("linear", x, 2, sign)
    one = (1, 1)
    # A row of pixels whose channels lie side by side.
    # The weights are checked against a row of at least one.
    sizes = _sizes((1, x.shape[-1], 1, max(1, x.shape[0])), outputs, one, one, (0, 0), one, 1, block_size, False)
    weights = (weight, kds, kds_shift, bias)
    _check_weights("linear", weights, sizes, weight_bits)
    x = x.contiguous()
    y = x.new_empty((x.shape[0], outputs))
    return _run(x, (0, 1, 0, x.shape[1]), weights, y, (0, 1, 0, outputs), sizes, weight_bits, activation_bits, sign)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    kds: Tensor,
    kds_shift: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    *settings: object,
) -> Tensor:
    return x.new_empty((x.shape[0], outputs))


for _name, _kernel, _fake in (("conv2d", _conv2d, _conv2d_fake), ("linear", _linear, _linear_fake)):
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"dsconv::{_name}", _fake, lib=_library)
