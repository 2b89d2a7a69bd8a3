"""Packing of integers of 2..8 bits to a dense bit stream, and unpacking.

Value ``i`` is stored as ``q + 2^(bits-1)`` in bits ``i * bits .. (i + 1) * bits - 1`` of the stream; bit ``j`` of the
stream is bit ``j % 8`` of byte ``j // 8``, the least significant first. The last byte is padded with zero bits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsconv.numerics.weights import check_bits


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes that ``count`` integers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 ``q`` of any shape, in row-major order, into uint8 ``(packed_bytes(q.numel(), bits),)``.

    Raises:
        ValueError: a value does not fit ``bits`` bits.

    >>> pack(torch.tensor([-8, 7, 0], dtype=torch.int8), bits=4)
    tensor([240,   8], dtype=torch.uint8)
    """
    check_bits("bits", bits)
    half = 1 << (bits - 1)
    if q.numel() and not (-half <= int(q.min()) and int(q.max()) < half):
        raise ValueError(f"q: expected values in {-half}..{half - 1}, got {int(q.min())}..{int(q.max())}")
    codes = torch.zeros(-(-q.numel() // 8) * 8, dtype=torch.uint8, device=q.device)
    codes[: q.numel()] = (q.flatten().to(torch.int16) + half).to(torch.uint8)
    if bits == 8:
        return codes[: q.numel()]
    # Eight values make `bits` whole bytes, by way of one 64-bit word.
    word = torch.zeros(len(codes) // 8, dtype=torch.int64, device=q.device)
    for k, code in enumerate(codes.view(-1, 8).unbind(1)):
        word |= code.long() << (k * bits)
    packed = torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], dim=1)
    return packed.to(torch.uint8).flatten()[: packed_bytes(q.numel(), bits)]


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Unpack int8 values of ``shape``; inverse of :func:`pack`.

    Raises:
        ValueError: ``packed`` is not uint8 with the length required by ``shape``.

    >>> unpack(torch.tensor([240, 8], dtype=torch.uint8), bits=4, shape=(3,)).tolist()
    [-8, 7, 0]
    """
    check_bits("bits", bits)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(
            f"packed: expected uint8 ({packed_bytes(count, bits)},) for {count} integers of {bits} bits, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if bits < 8:
        words = -(-count // 8)
        padded = torch.zeros(words * bits, dtype=torch.uint8, device=packed.device)
        padded[: len(packed)] = packed
        word = torch.zeros(words, dtype=torch.int64, device=packed.device)
        for j, byte in enumerate(padded.view(words, bits).unbind(1)):
            word |= byte.long() << (8 * j)
        mask = (1 << bits) - 1
        packed = torch.stack([(word >> (k * bits)) & mask for k in range(8)], dim=1).to(torch.uint8).flatten()[:count]
    return (packed.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).view(*shape)
