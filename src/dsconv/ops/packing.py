"""Packing of a layer's weights in the layout of the kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.numerics import block_count, dequantize_weight, winograd_shift
from dsconv.ops import native
from dsconv.ops.arguments import PIXEL, Geometry, sizes_of
from dsconv.ops.rounding import round_winograd
from dsconv.threads import with_pytorch_on_one_thread

MAX_BLOCK_SIZE = 512


class Packed(NamedTuple):
    """Weight, KDS and shift of a layer in the order in which the kernels read them."""

    weight: Tensor
    kds: Tensor
    kds_shift: Tensor | None


def kernel_block_size(weight_shape: Sequence[int], config: LayerConfig) -> int | None:
    """Return the block size for the kernels; a single short block is padded. None if they do not support it."""
    taps = torch.Size(weight_shape[2:]).numel()
    depth = weight_shape[1] * (taps if config.blocks == "flat" else 1)
    size = config.block_size if block_count(depth, config.block_size) > 1 else -(-depth // 8) * 8
    return size if size % 8 == 0 and size <= MAX_BLOCK_SIZE else None


@with_pytorch_on_one_thread
def pack(
    vqk: Tensor,
    kds: Tensor,
    kds_shift: Tensor | None,
    config: LayerConfig,
    groups: int,
    *,
    transposed: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Packed:
    """Pack the weights of a supported layer in the layout of the kernels, on the CPU.

    Args:
        vqk: int8 ``(O, C/groups, *K)`` with up to three kernel dimensions.
        kds, kds_shift: ``(O, CB, *K)``, or ``(O, CB)`` for flattened blocks.
        config: its settings, which the kernels support (:mod:`dsconv.backends.cpu`).
        groups: convolution groups.
        transposed: stride and dilation of a transposed convolution, which determine the order of its taps.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_layer(vqk, kds, kds_shift, config)
    if config.algorithm == "winograd":
        return _pack_winograd(vqk, kds, kds_shift, config)
    block_size = kernel_block_size(vqk.shape, config)
    assert block_size is not None
    # Any image whose output has a pixel will do: the packed layout does not depend on it.
    where = [(1,) * (vqk.dim() - 2)] * 2 if transposed is None else transposed
    kernel, stride, dilation = (two_or_more(of, 1) for of in (vqk.shape[2:], *where))
    none = (0,) * len(kernel)
    geometry = Geometry(kernel, stride, none, dilation, groups, None if transposed is None else none)
    sizes = sizes_of((1, vqk.shape[1] * groups, *kernel), vqk.shape[0], geometry, block_size, config.blocks == "flat")
    return Packed(
        _packed_weight(sizes, vqk, config.weight_bits),
        _packed_kds(sizes, kds),
        None if kds_shift is None else _packed_kds(sizes, kds_shift),
    )


def two_or_more(sizes: Sequence[int], fill: int) -> tuple[int, ...]:
    """Return sizes of a convolution for each dimension that the kernels support: two or three.

    >>> two_or_more((3,), 1), two_or_more((2, 3, 3), 1)
    ((1, 3), (2, 3, 3))
    """
    return (fill,) * (2 - len(sizes)) + tuple(sizes)


def winograd_weights(
    vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of a Winograd layer in packed form, and their scales and shift before packing.

    Returns:
        Integers ``(O, C, products)``, scales ``(O, CB, products)``, and the shift of the centre ``(O, CB)``, float32.
    """
    w = dequantize_weight(vqk, kds.float(), config.block_size, kds_shift)
    weight = round_winograd(w, config.block_size)
    of_centre = winograd_shift(weight, config.block_size)
    return weight.integers.permute(1, 2, 0), weight.scale.permute(1, 2, 0), of_centre


def _pack_winograd(vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig) -> Packed:
    integers, scale, shift = winograd_weights(vqk, kds, kds_shift, config)
    block_size, (outputs, channels) = kernel_block_size(vqk.shape, config), vqk.shape[:2]
    assert block_size is not None
    x, kernel = (1, channels, 3, 3), Geometry((3, 3))
    sizes = sizes_of(x, outputs, kernel, block_size, flat=False, algorithm="winograd")
    of_centre = sizes_of((1, channels, 1, 1), outputs, PIXEL, block_size, flat=False)
    return Packed(
        _packed_weight(sizes, integers, 8),
        _packed_kds(sizes, scale),
        _packed_kds(of_centre, shift),
    )


def _packed_weight(sizes: Any, integers: Tensor, bits: int) -> Tensor:
    module = native.extension()
    assert module is not None
    weight_bytes, _ = module.packed_sizes(sizes, bits)
    integers = integers.detach().cpu().contiguous()
    packed = torch.empty(weight_bytes, dtype=torch.uint8, device="cpu")
    module.pack_weight(sizes, integers.data_ptr(), bits, packed.data_ptr())
    return packed


def _packed_kds(sizes: Any, kds: Tensor) -> Tensor:
    module = native.extension()
    assert module is not None
    _, count = module.packed_sizes(sizes, 8)
    kds = kds.detach().cpu().float().contiguous()
    packed = torch.empty(count, dtype=torch.float32, device="cpu")
    module.pack_kds(sizes, kds.data_ptr(), packed.data_ptr())
    return packed


def check_layer(vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig) -> None:
    """Check the tensors of a layer.

    Raises:
        ValueError: shapes, dtypes or integers do not match.
    """
    flat = config.blocks == "flat"
    blocks = block_count(vqk[:1].numel() if flat else vqk.shape[1], config.block_size)
    shape = (vqk.shape[0], blocks) if flat else (vqk.shape[0], blocks, *vqk.shape[2:])
    if vqk.dtype != torch.int8:
        raise ValueError(f"vqk: expected int8, got {vqk.dtype}")
    half = 1 << (config.weight_bits - 1)
    low, high = (int(v) for v in vqk.aminmax()) if vqk.numel() else (0, 0)
    if low < -half or high >= half:
        raise ValueError(f"vqk: expected {config.weight_bits}-bit integers {-half}..{half - 1}, got {low}..{high}")
    for name, scale in (("kds", kds), ("kds_shift", kds_shift)):
        if scale is not None and (scale.shape != shape or not scale.is_floating_point()):
            raise ValueError(f"{name}: expected floats of shape {shape}, got {scale.dtype} {tuple(scale.shape)}")
