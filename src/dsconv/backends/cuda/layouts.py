"""Memory layouts on a GPU.

Quantized activations (:class:`Rows`) have a row of mantissas per pixel: int8 ``(pixels, row_bytes)``, with the blocks
of a row, group by group, padded to :func:`filled` bytes. Scales ``2^e`` and terms of a shift are float32
``(blocks, pixels)``, so that those of neighbouring pixels are read together. A scale is NaN if a block is not finite.

Weights (:func:`pack`) are int8 ``(terms, outputs, filled)``, with a term for each tap and block; with up to 4 bits, two
terms share a byte, the first in the low nibble. The outputs of each group are padded to a multiple of 64. KDS are
``(terms, outputs)``: float32, and a shift likewise; if both are float16, they are int32 with the KDS in the low half
and its shift in the high half, and an empty tensor replaces the shift.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.numerics import block_count
from dsconv.ops import packing

PANEL = 64
"""The outputs of a group are padded to a multiple of this."""
_SMALLEST_BLOCK = 32  # size for matrix instructions


def filled(block_size: int) -> int:
    """Return the bytes of a block in rows and weights.

    >>> filled(8), filled(48), filled(64)
    (32, 64, 64)
    """
    return max(_SMALLEST_BLOCK, 1 << (block_size - 1).bit_length())


def whole_panels(outputs: int) -> int:
    """Return the outputs of a group including padding."""
    return -(-outputs // PANEL) * PANEL


class Form(NamedTuple):
    """Quantization format of activations: ``depth`` channels in each of the groups, in blocks."""

    depth: int
    block_size: int
    groups: int
    bits: int
    sign: str
    shift: bool

    @property
    def blocks(self) -> int:
        """Number of blocks of a group."""
        return block_count(self.depth, self.block_size)

    @property
    def row_bytes(self) -> int:
        return self.groups * self.blocks * filled(self.block_size)

    def bytes(self, pixels: int) -> int:
        """Return the memory of ``pixels`` pixels in bytes."""
        return pixels * (self.row_bytes + self.groups * self.blocks * (8 if self.shift else 4))


class Rows(NamedTuple):
    """Quantized pixels: mantissas, scales and terms of the shift, which are the scales if there is no shift."""

    form: Form
    pixels: int
    mantissa: Tensor
    scale: Tensor
    term: Tensor


def rows_in(memory: Tensor, form: Form, pixels: int) -> Rows:
    """Place rows in contiguous int8 ``memory`` of at least ``form.bytes(pixels)``, aligned to 16 bytes."""
    ends = [pixels * form.row_bytes]
    for _ in range(2 if form.shift else 1):
        ends.append(ends[-1] + 4 * pixels * form.groups * form.blocks)
    mantissa, scale = memory[: ends[0]], memory[ends[0] : ends[1]].view(torch.float32)
    term = memory[ends[1] : ends[2]].view(torch.float32) if form.shift else scale
    return Rows(form, pixels, mantissa, scale, term)


def empty_rows(form: Form, pixels: int, device: torch.device) -> Rows:
    """Return rows with memory of their own."""
    return rows_in(torch.empty(form.bytes(pixels), dtype=torch.int8, device=device), form, pixels)


def pack(
    vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig, groups: int, depthwise: bool
) -> packing.Packed:
    """Pack the weights of a layer in the layout of the kernels, on the device of VQK.

    Args:
        vqk: int8 ``(O, C/groups, *K)`` with up to two kernel dimensions.
        kds, kds_shift: ``(O, CB, *K)``, or ``(O, CB)`` for flattened blocks.
        config: its settings.
        groups: convolution groups.
        depthwise: its activations stay float: weights are float32 ``(taps, O)``, and KDS ``(O,)``.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    packing.check_layer(vqk, kds, kds_shift, config)
    if depthwise:
        return packing.Packed(vqk.flatten(1).t().float().contiguous(), kds.flatten().float(), None)
    block_size = packing.kernel_block_size(vqk.shape, config)
    assert block_size is not None
    rows = vqk.reshape(len(vqk), -1, 1) if config.blocks == "flat" else vqk.reshape(*vqk.shape[:2], -1)
    outputs, depth, taps = rows.shape
    blocks, size = block_count(depth, block_size), min(block_size, depth)
    q = torch.zeros((outputs, blocks * size, taps), dtype=torch.int8, device=vqk.device)
    q[:, :depth] = rows
    terms = _by_term(q.view(outputs, blocks, size, taps).permute(3, 1, 0, 2), groups)
    weight = torch.zeros((*terms.shape[:2], filled(block_size)), dtype=torch.int8, device=vqk.device)
    weight[:, :, :size] = terms
    if config.weight_bits <= 4:
        weight = torch.cat([weight, torch.zeros_like(weight[: len(weight) % 2])])
        weight = (weight[0::2] & 15) | (weight[1::2] << 4)
    scales = [
        _by_term(s.reshape(outputs, blocks, taps).permute(2, 1, 0), groups) for s in (kds, kds_shift) if s is not None
    ]
    if len(scales) == 2 and all(s.dtype == torch.float16 for s in scales):
        low, high = (s.contiguous().view(torch.int16).int() for s in scales)
        return packing.Packed(weight.contiguous(), (low & 0xFFFF) | (high << 16), scales[0].new_empty(0))
    return packing.Packed(weight.contiguous(), *[s.float().contiguous() for s in scales], *[None] * (2 - len(scales)))


def _by_term(values: Tensor, groups: int) -> Tensor:
    """Return ``(taps, blocks, O, ...)`` as ``(taps * blocks, groups * padded outputs, ...)``, padded with zeros."""
    taps, blocks, outputs, *rest = values.shape
    made = values.new_zeros((taps * blocks, groups, whole_panels(outputs // groups), *rest))
    made[:, :, : outputs // groups] = values.reshape(taps * blocks, groups, outputs // groups, *rest)
    return made.flatten(1, 2)
