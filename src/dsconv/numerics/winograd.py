"""3x3 convolutions by Winograd's F(2x2, 3x3) in integers: 17 products for 4 outputs, instead of 36 for a direct one.

An output tile of 2x2 pixels is ``A' M A`` with ``M[p] = sum over channels of U[p] * V[p]`` at 16 positions ``p``,
``U = G g G'`` of the kernel and ``V = B' d B`` of the 4x4 input pixels of the tile (Lavin and Gray, "Fast Algorithms
for Convolutional Neural Networks", CVPR 2016). The products are integer products: ``U`` is rounded once, when a layer
is packed, with a scale for each position, output and block; ``V`` is rounded to 8 bits, with an exponent for each
position, tile and block. The centre position is a sum of four pixels and thus contains the mean of the input and most
of its energy; there, the rounding error of ``U`` is rounded again: a second product compensates most of the noise.

Positions are numbered row by row, in one dimension of 16; the second product of the centre is number 16.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.numerics.activations import NONFINITE, join_blocks, round_blocks, scaled, split_blocks
from dsconv.numerics.reference import Reference
from dsconv.numerics.weights import block_count, check_block_size

TILE = 2
"""Output pixels of a tile in height and width."""
POSITIONS = (TILE + 2) ** 2
PRODUCTS = POSITIONS + 1
_CENTRE = 5  # the position that is a sum of four pixels: no value there is negative after a ReLU
_POSITION_OF = [*range(POSITIONS), _CENTRE]
MOST = 127
"""Largest magnitude of an integer of ``U``."""
MOST_OF_LANE = 128
"""Largest sum of the integers of ``U`` of one sign in a lane: 255 times that fits 16 bits."""
# Channels that are accumulated in two 16-bit lanes, those of each in pairs.
_LANE_CHANNELS, _LANES = 8, 2
_COARSER = 1.01  # factor by which a scale grows while rounding overfills a lane


class WinogradWeight(NamedTuple):
    """``integers`` int8 ``(17, O, C)`` and ``scale`` float32 ``(17, O, CB)``, whose products approximate ``U``."""

    integers: Tensor
    scale: Tensor


Rounding = Callable[[Tensor, int], WinogradWeight]
"""The signature of :func:`winograd_weight`."""


def winograd_weight(w: Tensor, block_size: int) -> WinogradWeight:
    """Round the transformed kernel ``U = G g G'`` to integers of slightly more than 7 bits.

    Per position, output and block the scale is the smallest for which no integer exceeds 127, and those of one sign in
    a lane have a sum of at most 128. A lane is the set of values that byte instructions accumulate in 16 bits: of eight
    consecutive channels of a block, the first, second, fifth and sixth, or the other four.

    Every operation is rounded separately, so that the integers are the same on every machine.

    Args:
        w: float32 weight ``(O, C, 3, 3)``.
        block_size: number of input channels that share a scale, >= 1.

    Raises:
        ValueError: ``w`` has another shape, or ``block_size`` is below 1.

    >>> weight = winograd_weight(torch.ones(1, 1, 3, 3), block_size=8)
    >>> dequantize_winograd_weight(weight, block_size=8).view(4, 4)
    tensor([[1.0000, 1.5000, 0.5000, 1.0000],
            [1.5000, 2.2500, 0.7500, 1.5000],
            [0.5000, 0.7500, 0.2500, 0.5000],
            [1.0000, 1.5000, 0.5000, 1.0000]])
    """
    check_block_size(block_size)
    if w.dim() != 4 or w.shape[2:] != (3, 3):
        raise ValueError(f"w: expected a weight (O, C, 3, 3), got {tuple(w.shape)}")
    split = split_blocks(_transformed(w).flatten(0, 1), block_size, 1)  # (16 * O, CB, size)
    q, scale = _round_for_lanes(split)
    centre = slice(_CENTRE * len(w), (_CENTRE + 1) * len(w))
    more = _round_for_lanes(split[centre] - q[centre] * scale[centre].unsqueeze(2))
    q, scale = torch.cat([q, more[0]]), torch.cat([scale, more[1]])
    integers = join_blocks(q, torch.Size((len(q), w.shape[1])), 1).to(torch.int8)
    return WinogradWeight(integers.view(PRODUCTS, *w.shape[:2]), scale.view(PRODUCTS, len(w), split.shape[1]))


def dequantize_winograd_weight(weight: WinogradWeight, block_size: int) -> Tensor:
    """Return the float32 ``U (16, O, C)`` represented by integers and scales."""
    products = weight.integers.float()
    for block, scale in zip(torch.split(products, block_size, 2), weight.scale.unbind(2), strict=True):
        block.mul_(scale.unsqueeze(2))
    products[_CENTRE] += products[POSITIONS]
    return products[:POSITIONS]


def fake_winograd_weight(w: Tensor, block_size: int, rounding: Rounding = winograd_weight) -> Tensor:
    """Return ``U (16, O, C)`` of :func:`winograd_weight` in float32, differentiably.

    The gradient passes straight through the rounding to ``G g G'``.

    Args:
        w: float32 weight ``(O, C, 3, 3)``.
        block_size: number of input channels that share a scale, >= 1.
        rounding: rounding function: :func:`dsconv.ops.round_winograd` is faster and bitwise equal.
    """
    with torch.no_grad():
        rounded = dequantize_winograd_weight(rounding(w, block_size), block_size)
    if not (torch.is_grad_enabled() and w.requires_grad):
        return rounded
    # One matrix product; its different rounding cancels out.
    g = _kernel_side(torch.eye(3, dtype=torch.float32, device=w.device), 0)
    u = (torch.kron(g, g) @ w.flatten(2).flatten(0, 1).T).view_as(rounded)
    return rounded + (u - u.detach())


def winograd_shift(weight: WinogradWeight, block_size: int) -> Tensor:
    """Return the correction of the sums at the centre for mantissas of 0 to 255, which are stored less 128.

    It is ``128 * scale * sum of the integers`` of each block, summed over both products, float32 ``(O, CB)``, to be
    multiplied by ``2^e``.
    """
    first, second = (
        split_blocks(weight.integers[product].float(), block_size, 1).sum(2) * 128 * weight.scale[product]
        for product in (_CENTRE, POSITIONS)
    )
    return first + second


def winograd_input(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Transform the input tiles of a convolution: ``V = B' d B``, float32 ``(N, C, 16, TH, TW)``.

    Rows come first; each of the two sums or differences of a value is rounded separately.

    Args:
        x: ``(N, C, H, W)``, read as float32.
        padding: zeros on both sides of height and width. Tiles that extend beyond the output read zeros outside of
            them.

    >>> winograd_input(torch.ones(1, 1, 4, 4), (0, 0)).view(4, 4)
    tensor([[0., 0., 0., 0.],
            [0., 4., 0., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]])
    """
    sides = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    if min(sides) < 1:
        got = f"{tuple(x.shape)} with padding {tuple(padding)}"
        raise ValueError(f"x: expected images of 3x3 pixels at least, padding included, got {got}")
    tall, wide = (block_count(n, TILE) for n in sides)
    (height, width), (top, left) = x.shape[2:], padding
    below, right = tall * TILE + 2 - height - top, wide * TILE + 2 - width - left
    padded = F.pad(x.float(), (left, right, top, below))
    rows = _input_side(padded, 2, tall)  # (N, C, 4, TH, W)
    return _input_side(rows, 4, wide).transpose(3, 4).flatten(2, 3)


def quantize_winograd_input(v: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Round the transformed tiles: 8-bit mantissas, an exponent for each position, tile and block.

    The rounding is that of :func:`dsconv.numerics.quantize_activation` at 8 bits; but if no value of a block is
    negative at the centre position, the sum of four pixels, its mantissas are 0 to 255.

    Args:
        v: float32 ``(N, C, 16, TH, TW)`` from :func:`winograd_input`.
        block_size: number of channels that share an exponent, >= 1.

    Returns:
        Mantissas int16 in the shape of ``v`` and exponents int8 ``(N, CB, 16, TH, TW)``. A block that contains a NaN or
        an infinity, such as a sum that overflows float32, has mantissas 0 and the exponent :data:`NONFINITE`.

    >>> v = winograd_input(torch.tensor([[1.0, 2, 3, 4]]).repeat(4, 1)[None, None], (0, 0))
    >>> mantissa, exponent = quantize_winograd_input(v, block_size=8)
    >>> (mantissa * 2.0**exponent).view(4, 4)[1]
    tensor([-4., 10.,  2., -4.])
    """
    mantissa, exponent = _round_tiles(v, block_size)
    return join_blocks(mantissa, v.shape, 1).to(torch.int16), exponent.to(torch.int8)


def winograd_output(m: Tensor, size: tuple[int, int]) -> Tensor:
    """Transform sums back: ``A' M A`` of ``m (N, O, 16, TH, TW)``, cropped to ``size``: ``(N, O, *size)``.

    Rows come first. The first of two outputs is ``m0 + (m1 + m2)``, the second ``(m1 - m2) - m3``.
    """
    tiles = torch.unflatten(m, 2, (4, 4))  # (N, O, 4, 4, TH, TW)
    pixels = _output_side(_output_side(tiles, 2), 3).permute(0, 1, 4, 2, 5, 3)
    return pixels.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


def winograd_conv(x: Tensor, u: Tensor, bias: Tensor | None, padding: tuple[int, int], block_size: int) -> Tensor:
    """Simulate the layer in float32, differentiably: the gradient passes through the rounding of ``V``.

    Args:
        x: ``(N, C, H, W)``.
        u: float32 ``(16, O, C)``, the integers of ``U`` times their scales.
        bias: ``(O,)`` or None.
        padding: zeros on both sides of height and width.
        block_size: number of input channels that share a scale or an exponent.

    Returns:
        Float32 ``(N, O, H + 2 * padding - 2, W + 2 * padding - 2)``.
    """
    v = winograd_input(x, padding)
    with torch.no_grad():
        mantissa, exponent = _round_tiles(v, block_size)
        value = join_blocks(scaled(mantissa, exponent.unsqueeze(2)), v.shape, 1)
    if torch.is_grad_enabled() and v.requires_grad:
        value = value + (v - v.detach())
    m = torch.einsum("poc,ncphw->nophw", u, value)
    y = winograd_output(m, _output_size(x, padding))
    return y if bias is None else y + bias.float().view(1, -1, 1, 1)


def reference_winograd(
    mantissa: Tensor,
    exponent: Tensor,
    weight: WinogradWeight,
    block_size: int,
    size: tuple[int, int],
    *,
    bias: Tensor | None = None,
) -> Reference:
    """Compute the layer with int64 sums within a block, and float64 for all others.

    Args:
        mantissa, exponent: from :func:`quantize_winograd_input` with the same ``block_size``.
        weight: from :func:`winograd_weight` with the same ``block_size``.
        size: height and width of the output.
        bias: ``(O,)`` or None.

    Returns:
        ``output`` float64 ``(N, O, *size)``; ``bound`` is ``(2 * CB + 7) * 2^-24`` times the sum of the magnitudes of
        all terms of an output: those of ``CB`` blocks and their shifts, four more sums of the transform, and the bias.
    """
    images, channels, _, *tiles = mantissa.shape
    m = torch.zeros(images, weight.integers.shape[1], POSITIONS, *tiles, dtype=torch.float64, device="cpu")
    total, blocks = torch.zeros_like(m), block_count(channels, block_size)
    for block in range(blocks):
        part, e = slice(block * block_size, (block + 1) * block_size), exponent[:, block].long()
        power = torch.where(e == NONFINITE, torch.nan, torch.ldexp(torch.ones_like(e, dtype=torch.float64), e))
        for product, p in enumerate(_POSITION_OF):
            integers, scale = weight.integers[product, :, part].long(), weight.scale[product, :, block].double()
            sums = torch.einsum("oc,nchw->nohw", integers, mantissa[:, part, p].long())
            scales = scale[None, :, None, None] * power[:, None, p]
            m[:, :, p] += scales * sums
            total[:, :, p] += (scales * sums).abs()
            if p == _CENTRE:  # where mantissas may be stored less 128, which an extra term corrects
                total[:, :, p] += 2 * 128 * scales * integers.sum(1).abs()[None, :, None, None]
    output, bound = winograd_output(m, size), _sums_without_signs(total, size)
    if bias is not None:
        term = bias.double().view(1, -1, 1, 1)
        output, bound = output + term, bound + term.abs()
    return Reference(output, (2 * blocks + 7) * 2.0**-24 * bound)


def _output_size(x: Tensor, padding: tuple[int, int]) -> tuple[int, int]:
    return x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2


def _transformed(w: Tensor) -> Tensor:
    """Return ``G g G'`` of ``w (O, C, 3, 3)``, rounded once to float32, as ``(16, O, C)``."""
    return _kernel_side(_kernel_side(w.double(), 2), 3).float().flatten(2).permute(2, 0, 1)


def _kernel_side(g: Tensor, dim: int) -> Tensor:
    """Apply ``G`` along a dimension of three, which becomes one of four."""
    first, middle, last = g.unbind(dim)
    outer = first + last
    return torch.stack([first, (outer + middle) * 0.5, (outer - middle) * 0.5, last], dim)


def _input_side(d: Tensor, dim: int, tiles: int) -> Tensor:
    """Apply ``B'`` along a dimension with tiles at a stride of two, which becomes one of four and one of tiles."""
    d0, d1, d2, d3 = (d.narrow(dim, i, 2 * tiles - 1)[(slice(None),) * dim + (slice(None, None, 2),)] for i in range(4))
    return torch.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3], dim)


def _output_side(m: Tensor, dim: int) -> Tensor:
    """Apply ``A'`` along a dimension of four, which becomes one of two."""
    m0, m1, m2, m3 = m.unbind(dim)
    return torch.stack([m0 + (m1 + m2), (m1 - m2) - m3], dim)


def _sums_without_signs(total: Tensor, size: tuple[int, int]) -> Tensor:
    tiles = torch.unflatten(total, 2, (4, 4))
    for dim in (2, 3):
        t0, t1, t2, t3 = tiles.unbind(dim)
        tiles = torch.stack([t0 + t1 + t2, t1 + t2 + t3], dim)
    return tiles.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


def _round_tiles(v: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_block_size(block_size)
    split = split_blocks(v.detach(), block_size, 1)
    m = torch.full((split.shape[0], split.shape[1], *split.shape[3:]), 7, dtype=torch.int32, device=v.device)
    m[:, :, _CENTRE] += (split[:, :, :, _CENTRE].amin(2) >= 0).int()
    return round_blocks(split, m)


def _round_for_lanes(split: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers ``(rows, CB, size)``, as floats, and scales ``(rows, CB)``: 0 and NaN for non-finite blocks."""
    finite = split.isfinite().all(2)
    split = torch.where(finite.unsqueeze(2), split, 0.0)
    # Divided first, so that no sum overflows float32.
    scale = torch.maximum(split.abs().amax(2) / MOST, _fullest(_lanes(split / MOST_OF_LANE)))
    scale = torch.where(scale > 0, scale, 1.0)
    q = _rounded(split, scale)
    while bool((full := _fullest(_lanes(q)) > MOST_OF_LANE).any()):
        # Scales near the smallest float, as those of unused channels can be, grow by single float steps.
        coarser = torch.maximum(scale * _COARSER, torch.nextafter(scale, torch.full_like(scale, torch.inf)))
        scale = torch.where(full, coarser, scale)
        q[full] = _rounded(split[full], scale[full])
    return q, torch.where(finite, scale, torch.nan)


def _rounded(split: Tensor, scale: Tensor) -> Tensor:
    return (split / scale.unsqueeze(-1)).round().clamp(-MOST, MOST)


def _lanes(split: Tensor) -> Tensor:
    """Return ``(..., size)`` as ``(..., eights, 2, 2, 2)``: the second to last dimension is that of lanes."""
    missing = -split.shape[-1] % _LANE_CHANNELS
    return torch.unflatten(F.pad(split, (0, missing)), -1, (-1, _LANE_CHANNELS // 4, _LANES, 2))


def _fullest(lanes: Tensor) -> Tensor:
    """Return the largest sum of values of one sign in a lane, added in order."""
    largest = torch.zeros(lanes.shape[:-4], dtype=lanes.dtype, device=lanes.device)
    for values in (lanes.clamp(min=0), (-lanes).clamp(min=0)):
        pairs = values[..., 0] + values[..., 1]
        first, *others = pairs.unbind(-2)
        for other in others:
            first = first + other
        largest = torch.maximum(largest, first.flatten(-2).amax(-1))
    return largest
