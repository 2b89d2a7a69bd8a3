"""Exact convolution of VQK, KDS and block floating point: the oracle of every faster path. Slow by design."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.numerics.activations import NONFINITE
from dsconv.numerics.weights import block_count


class Reference(NamedTuple):
    """``output`` float64 ``(N, O, *S)`` and ``bound``: maximum difference of a float32 path from it, same shape.

    ``bound = (terms + 1) * 2^-24 * sum |term|`` with one term per tap and block, and one more each with a shift.
    """

    output: Tensor
    bound: Tensor


def reference_conv(
    mantissa: Tensor,
    exponent: Tensor,
    vqk: Tensor,
    kds: Tensor,
    block_size: int,
    *,
    kds_shift: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Reference:
    """Return the convolution with int64 sums within a block and float64 sums over blocks.

    ``y[n,o,s] = bias[o] + sum over taps and blocks of KDS * 2^e * S``, ``S = sum over the block of VQK * mantissa``,
    plus ``KDS_shift * 2^e * sum mantissa`` with a shift.

    Args:
        mantissa, exponent: input ``(N, C, *S)``, from :func:`dsconv.numerics.quantize_activation` with the same
            ``block_size`` and ``groups``.
        vqk, kds, kds_shift: weight ``(O, C/groups, *K)``.
        bias: ``(O,)`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, for as many dimensions as ``K`` has
            (none for a linear layer).

    >>> from dsconv.numerics import quantize_activation, quantize_weight
    >>> mantissa, exponent = quantize_activation(torch.tensor([[[1.0, 2.0, 3.0]]]), bits=4, block_size=1)
    >>> vqk, kds = quantize_weight(torch.tensor([[[-1.0, 0.5]]]), bits=4, block_size=1)
    >>> reference_conv(mantissa, exponent, vqk, kds, block_size=1).output
    tensor([[[ 0.0000, -0.5000]]], dtype=torch.float64)
    """
    dims = vqk.dim() - 2

    def per_dim(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value)

    stride, padding, dilation = per_dim(stride), per_dim(padding), per_dim(dilation)
    border = [p for pad in reversed(padding) for p in (pad, pad)]
    mantissa, exponent = F.pad(mantissa.long(), border), F.pad(exponent.long(), border)
    kernel, channels = vqk.shape[2:], vqk.shape[1]
    blocks = block_count(channels, block_size)
    size = [
        (full - d * (k - 1) - 1) // s + 1
        for full, d, k, s in zip(mantissa.shape[2:], dilation, kernel, stride, strict=True)
    ]
    images, outputs = len(mantissa), len(vqk)
    output = mantissa.new_zeros(images, groups, outputs // groups, *size, dtype=torch.float64)
    total = torch.zeros_like(output)
    scales = [kds] if kds_shift is None else [kds, kds_shift]
    taps: list[tuple[int, ...]] = list(itertools.product(*map(range, kernel)))
    for tap in taps:
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        window = (
            slice(None),
            slice(None),
            *(slice(at, at + (n - 1) * s + 1, s) for at, n, s in zip(starts, size, stride, strict=True)),
        )
        m_tap = torch.unflatten(mantissa[window], 1, (groups, channels))
        e_tap = torch.unflatten(exponent[window], 1, (groups, blocks))
        at_tap: tuple[slice | int, ...] = (slice(None), slice(None), *tap)
        w_tap = torch.unflatten(vqk[at_tap].long(), 0, (groups, -1))
        for block in range(blocks):
            part = slice(block * block_size, (block + 1) * block_size)
            e = e_tap[:, :, block]
            power = torch.where(e == NONFINITE, torch.nan, torch.ldexp(torch.ones_like(e, dtype=torch.float64), e))
            sums = [torch.einsum("ngc...,goc->ngo...", m_tap[:, :, part], w_tap[:, :, part])]
            if kds_shift is not None:
                sums.append(m_tap[:, :, part].sum(2, keepdim=True))
            for scale, integer in zip(scales, sums, strict=True):
                factor = scale[at_tap][:, block].double().view(1, groups, -1, *(1,) * dims)
                term = factor * power.unsqueeze(2) * integer.double()
                output += term
                total += term.abs()
    if bias is not None:
        term = bias.double().view(1, groups, -1, *(1,) * dims)
        output, total = output + term, total + term.abs()
    terms = kernel.numel() * blocks * len(scales)
    return Reference(output.flatten(1, 2), (terms + 1) * 2.0**-24 * total.flatten(1, 2))
