"""Conversion of activations to block floating point (BFP) and back: integer mantissas, one shared exponent per block.

``x (N, C, *S)`` is divided into blocks of ``block_size`` channels, per image and position ``S``; a block never spans
two of ``groups`` equal parts of the channels, and the last block of a part may be shorter. A value is
``mantissa * 2^exponent``.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.errors import check_choice
from dsconv.names import ACTIVATION_SIGNS, ActivationSign
from dsconv.numerics.weights import block_count, check_bits, check_block_size

NONFINITE = -128
"""Exponent of a block that contains a NaN or an infinity; no finite block has it. Its values dequantize to NaN."""

SMALLEST = 2.0**-100
"""A block whose largest magnitude is below this is treated as zero (mantissas 0, exponent 0)."""


def quantize_activation(
    x: Tensor, bits: int, block_size: int, *, sign: ActivationSign = "adaptive", groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return mantissas and exponents of ``x`` in block floating point.

    Per block, ``E = floor(log2 max|x|)`` and ``mantissa = clamp(round_half_even(x / 2^e))`` with ``e = E - m + 1``.
    ``sign`` determines how many of the ``bits`` are magnitude bits ``m``:

    =============  ==================================  ===================================  ============
    ``sign``       block without a negative value      other blocks                         bits a value
    =============  ==================================  ===================================  ============
    ``extra``      m = bits, ±(2^bits - 1)             the same                             bits + 1
    ``included``   m = bits - 1, two's complement      the same                             bits
    ``adaptive``   m = bits, [0, 2^bits - 1]           m = bits - 1, two's complement       bits
    =============  ==================================  ===================================  ============

    At 8 bits m is 7 in all three, since mantissas are stored as int8.

    Args:
        x: float tensor ``(N, C, *S)``, read as float32.
        bits: 2..8.
        block_size: number of channels that share an exponent, >= 1.
        sign: the convention above.
        groups: number of equal parts of the channels that blocks do not cross.

    Returns:
        Mantissas int8 ``(N, C, *S)`` and exponents int8 ``(N, groups * CB, *S)`` for ``CB`` blocks in a group. A block
        with a NaN or an infinity has mantissas 0 and the exponent :data:`NONFINITE`.

    Raises:
        ValueError: an argument is out of range.

    Source: Gennari do Nascimento et al., ICCV 2019, section 3.3; ``adaptive`` is ours.

    >>> x = torch.tensor([[0.5, 3.0, 6.1, 7.9], [-1.0, 0.25, 0.0, 0.0]])
    >>> quantize_activation(x, bits=4, block_size=4)
    (tensor([[ 1,  6, 12, 15],
            [-4,  1,  0,  0]], dtype=torch.int8), tensor([[-1],
            [-2]], dtype=torch.int8))
    """
    blocks = _to_blocks(x, bits, block_size, sign, groups)
    mantissa = join_blocks(blocks.mantissa.to(torch.int8), x.shape, groups)
    return mantissa, blocks.exponent.to(torch.int8)


def dequantize_activation(mantissa: Tensor, exponent: Tensor, block_size: int, *, groups: int = 1) -> Tensor:
    """Return float32 values ``mantissa * 2^exponent`` ``(N, C, *S)``; NaN if the exponent is :data:`NONFINITE`.

    Raises:
        ValueError: the shapes do not match.

    >>> mantissa, exponent = torch.tensor([[1, 6, 12, 15]], dtype=torch.int8), torch.tensor([[-1]], dtype=torch.int8)
    >>> dequantize_activation(mantissa, exponent, block_size=4)
    tensor([[0.5000, 3.0000, 6.0000, 7.5000]])
    """
    _check(mantissa, block_size, groups)
    channels = mantissa.shape[1] // groups
    expected = (mantissa.shape[0], groups * block_count(channels, block_size), *mantissa.shape[2:])
    if exponent.shape != expected:
        raise ValueError(f"exponent: expected shape {expected}, got {tuple(exponent.shape)}")
    split = split_blocks(mantissa.float(), block_size, groups)
    value = scaled(split, exponent.int().unsqueeze(2))
    return join_blocks(value, mantissa.shape, groups)


def fake_quantize_activation(
    x: Tensor, bits: int, block_size: int, *, sign: ActivationSign = "adaptive", groups: int = 1
) -> Tensor:
    """Return the values of ``dequantize_activation(quantize_activation(x))`` without the integers, differentiably.

    The gradient ignores rounding and clamping (straight-through estimator).

    >>> x = torch.tensor([[0.5, 3.0, 6.1, 7.9]], requires_grad=True)
    >>> fake_quantize_activation(x, bits=4, block_size=4)
    tensor([[0.5000, 3.0000, 6.0000, 7.5000]], grad_fn=<AddBackward0>)
    """
    with torch.no_grad():
        blocks = _to_blocks(x, bits, block_size, sign, groups)
        value = join_blocks(scaled(blocks.mantissa, blocks.exponent.unsqueeze(2)), x.shape, groups)
    # x - x is 0 and carries the gradient; in a block that is not finite it is NaN, like the value.
    return value + (x.float() - x.detach().float()) if torch.is_grad_enabled() and x.requires_grad else value


class Blocks(NamedTuple):
    """``mantissa`` ``(N, groups * CB, size, *S)``, float; ``exponent`` ``(N, groups * CB, *S)``, int32."""

    mantissa: Tensor
    exponent: Tensor


def check_activation(x: Tensor, bits: int, block_size: int, sign: str, groups: int) -> None:
    """Check the arguments of :func:`quantize_activation`.

    Raises:
        ValueError: an argument is out of range.
    """
    check_bits("bits", bits)
    check_choice("sign", sign, ACTIVATION_SIGNS)
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a float tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.layout is not torch.strided:
        layout = "" if x.layout is torch.strided else f", {x.layout}"
        raise ValueError(f"x: expected a float tensor, got {x.dtype}{layout}")
    _check(x, block_size, groups)


def _to_blocks(x: Tensor, bits: int, block_size: int, sign: str, groups: int) -> Blocks:
    check_activation(x, bits, block_size, sign, groups)
    split = split_blocks(x.detach().float(), block_size, groups)
    negative = split.amin(2) < 0
    if bits == 8 or sign == "included":
        m = torch.full_like(negative, bits - 1, dtype=torch.int32)
    elif sign == "extra":
        m = torch.full_like(negative, bits, dtype=torch.int32)
    else:
        m = bits - negative.int()
    blocks = round_blocks(split, m)
    if sign == "extra":
        limit = ((1 << m) - 1).float().unsqueeze(2)
        blocks = blocks._replace(mantissa=torch.maximum(blocks.mantissa, -limit))
    return blocks


def round_blocks(split: Tensor, m: Tensor) -> Blocks:
    """Return mantissas of ``m`` bits and exponents of blocks ``(N, CB, size, *S)``, ``m`` int32 ``(N, CB, *S)``.

    Mantissas are at most ``2^m - 1`` and at least ``-2^m``.
    """
    low, high = split.aminmax(dim=2)
    largest = torch.maximum(high, -low)
    finite = torch.isfinite(largest)
    used = finite & (largest >= SMALLEST)
    # frexp returns 0.5 <= |fraction| < 1, hence the 1: exact, where a floating-point log2 is not.
    magnitude_exponent = torch.frexp(torch.where(used, largest, 1.0)).exponent - 1
    exponent = torch.where(used, magnitude_exponent - m + 1, 0)
    # Twice half the power of two, because 2^-127 would be subnormal and may be flushed to zero.
    mantissa = (split * 0.5) * _power_of_two(1 - exponent).unsqueeze(2)
    mantissa = torch.minimum(mantissa.round(), ((1 << m) - 1).float().unsqueeze(2))
    mantissa = torch.where(used.unsqueeze(2), mantissa, 0.0)
    return Blocks(mantissa, torch.where(finite, exponent, NONFINITE))


def _check(x: Tensor, block_size: int, groups: int) -> None:
    check_block_size(block_size)
    if x.dim() < 2:
        raise ValueError(f"expected a tensor (N, C, ...), got shape {tuple(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels, got {groups}")


def split_blocks(x: Tensor, block_size: int, groups: int) -> Tensor:
    """Return ``(N, C, *S)`` as ``(N, groups * CB, size, *S)``; the last block of a group is padded with zeros."""
    channels = x.shape[1] // groups
    size = max(1, min(block_size, channels))
    blocks = block_count(channels, size)
    if missing := blocks * size - channels:
        x = torch.unflatten(x, 1, (groups, channels))
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)).flatten(1, 2)
    return torch.unflatten(x, 1, (groups * blocks, size))


def join_blocks(blocks: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Invert :func:`split_blocks`."""
    channels = shape[1] // groups
    if blocks.shape[1] * blocks.shape[2] == shape[1]:
        return blocks.flatten(1, 2)
    return torch.unflatten(blocks.flatten(1, 2), 1, (groups, -1))[:, :, :channels].flatten(1, 2)


def _power_of_two(n: Tensor) -> Tensor:
    """Return float32 ``2^n`` for integers ``n`` in -126..127, from the bits."""
    return ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def scaled(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """Return ``mantissa * 2^exponent``, NaN if the exponent is NONFINITE."""
    nonfinite = exponent == NONFINITE
    value = mantissa * _power_of_two(torch.where(nonfinite, 0, exponent))
    return torch.where(nonfinite, torch.nan, value)
