"""Weights to VQK (integers) and KDS (one float per block), and back.

Layout everywhere: weight ``(O, C/groups, *K)`` with zero (linear) to three kernel dimensions, VQK the same,
KDS and its optional shift ``(O, CB, *K)`` with ``CB = ceil(C / groups / block_size)``.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

WeightRule = Literal["paper", "refined", "balanced"]
WeightScale = Literal["l2", "kl"]
WEIGHT_RULES: tuple[str, ...] = get_args(WeightRule)
WEIGHT_SCALES: tuple[str, ...] = get_args(WeightScale)

# Weights that are worked on at a time: a chunk bounds the extra memory, a part of it stays in cache.
_CHUNK, _PART = 1 << 20, 1 << 18
# Start values of a refined scale, as fractions of the one that maps the extreme value onto the last level.
_GRID = (1.0, 0.9, 0.8)
# The model of a layer's inputs under which `balanced` rounds, see _balance.
_TAP_CORRELATION, _MEAN_POWER = 0.7, 0.4
_NEWTON_STEPS = 8
_MIN_BITS, _MAX_BITS = 2, 8


class QuantizedWeight(NamedTuple):
    """``vqk`` int8 ``(O, C/groups, *K)``; ``kds`` and ``kds_shift`` float32 ``(O, CB, *K)``."""

    vqk: Tensor
    kds: Tensor
    kds_shift: Tensor


def block_count(channels: int, block_size: int) -> int:
    """Blocks that ``channels`` values fall into: ``ceil(channels / block_size)``."""
    return -(-channels // block_size)


def quantize_weight(
    w: Tensor,
    bits: int,
    block_size: int,
    *,
    groups: int = 1,
    rule: WeightRule = "paper",
    scale: WeightScale = "l2",
) -> tuple[Tensor, Tensor]:
    """Variable quantized kernel and kernel distribution shift of a float weight.

    Args:
        w: float weight ``(O, C/groups, *K)``: of a convolution of 1 to 3 dimensions, or of a linear layer ``(O, C)``.
        bits: 2..8, width of the integers.
        block_size: input channels that share one scale, >= 1; the last block of a tap is short where it must be.
        groups: convolution groups. They divide ``O``; a block never spans two, as ``w`` holds the inputs of one.
        rule: ``paper``: the value of largest magnitude, with its sign, lands on ``-2^(bits-1)``, the rest is rounded
            half to even. ``refined``: the scale of either sign that leaves the least squared error, by rounding and
            least squares in turn from several starts. ``balanced``: ``refined``, and then integers are moved
            so that the errors of a block, and those of each input channel over the taps, come to cancel.
        scale: ``l2`` least squares, ``sum(w q) / sum(q^2)``; ``kl`` minimises ``sum T log(T / I)``,
            ``T = softmax(w)``, ``I = softmax(scale q)`` per block, within half and one and a half times ``l2``.

    Returns:
        VQK int8 ``(O, C/groups, *K)`` in ``[-2^(bits-1), 2^(bits-1) - 1]`` and KDS float32 ``(O, CB, *K)``.
        An all-zero block has VQK 0 and KDS 0.

    Raises:
        ValueError: an argument is out of range, or ``w`` holds a NaN or an infinity.

    Source: Gennari do Nascimento et al., "DSConv: Efficient Convolution Operator", ICCV 2019, section 3.

    >>> w = torch.tensor([[0.8, -0.4, 0.1, 0.0]])
    >>> vqk, kds = quantize_weight(w, bits=4, block_size=4)
    >>> vqk.tolist(), kds.shape
    ([[-8, 4, -1, 0]], torch.Size([1, 1]))
    >>> dequantize_weight(vqk, kds, block_size=4)
    tensor([[ 0.8000, -0.4000,  0.1000, -0.0000]])
    """
    vqk, kds, _ = _quantize(w, bits, block_size, groups, rule, scale, shift=False)
    return vqk, kds


def quantize_weight_shifted(
    w: Tensor, bits: int, block_size: int, *, groups: int = 1, rule: WeightRule = "paper"
) -> QuantizedWeight:
    """As :func:`quantize_weight`, with a shift per block beside the scale: ``w ~ kds * vqk + kds_shift``.

    The smallest and the largest value of a block land on the first and the last level; scale and shift are then the
    least-squares line through the block, so that the errors of a block sum to zero. The other rules repeat rounding
    and fitting from several starts. A block whose values are all equal has VQK 0, KDS 0 and that value as its shift.

    Returns:
        ``(vqk, kds, kds_shift)``; see :class:`QuantizedWeight`.

    Raises:
        ValueError: as :func:`quantize_weight`.

    >>> w = torch.tensor([[1.0, 1.25, 1.5, 1.75]])
    >>> vqk, kds, shift = quantize_weight_shifted(w, bits=2, block_size=4)
    >>> vqk.tolist(), kds.tolist(), shift.tolist()
    ([[-2, -1, 0, 1]], [[0.25]], [[1.5]])
    """
    return _quantize(w, bits, block_size, groups, rule, "l2", shift=True)


def dequantize_weight(vqk: Tensor, kds: Tensor, block_size: int, kds_shift: Tensor | None = None) -> Tensor:
    """Float32 weight ``(O, C/groups, *K)`` that VQK, KDS and the optional shift stand for: ``kds * vqk (+ kds_shift)``.

    Raises:
        ValueError: the shapes of ``vqk`` and ``kds`` do not belong together.

    >>> vqk, kds = torch.tensor([[[-8], [4], [2]]], dtype=torch.int8), torch.tensor([[[0.5], [1.0]]])
    >>> dequantize_weight(vqk, kds, block_size=2).flatten()
    tensor([-4.,  2.,  2.])
    """
    channels = vqk.shape[1]
    expected = (vqk.shape[0], block_count(channels, block_size), *vqk.shape[2:])
    for name, value in (("kds", kds), ("kds_shift", kds_shift)):
        if value is not None and value.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected} for vqk {tuple(vqk.shape)} in blocks of {block_size}, "
                f"got {tuple(value.shape)}"
            )

    def spread(value: Tensor) -> Tensor:
        value = value.float()
        if expected[1] > 1:
            # Not a slice of repeat_interleave, which PyTorch 2.13 compiles to wrong machine code.
            value = value[:, torch.arange(channels, device=value.device) // block_size]
        return value

    w = vqk.float() * spread(kds)
    return w if kds_shift is None else w + spread(kds_shift)


def check_bits(name: str, bits: int) -> None:
    """Raise ValueError unless ``bits`` is a whole number in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not _MIN_BITS <= bits <= _MAX_BITS:
        raise ValueError(f"{name}: expected a whole number in {_MIN_BITS}..{_MAX_BITS}, got {bits!r}")


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless ``block_size`` is a whole number of at least 1."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size: expected a whole number of at least 1, got {block_size!r}")


def _quantize(
    w: Tensor, bits: int, block_size: int, groups: int, rule: str, scale: str, *, shift: bool
) -> QuantizedWeight:
    check_bits("bits", bits)
    check_block_size(block_size)
    for name, value, allowed in (("rule", rule, WEIGHT_RULES), ("scale", scale, WEIGHT_SCALES)):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    if not w.is_floating_point() or not 2 <= w.dim() <= 5:
        raise ValueError(
            f"w: expected a float tensor (O, C/groups, *K) of 2 to 5 dimensions, got {w.dtype} {tuple(w.shape)}"
        )
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {w.shape[0]} output channels, got {groups}")
    # The extreme values tell without a temporary of the weight's size.
    if w.numel() and not torch.isfinite(torch.stack(w.detach().aminmax())).all():
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"w: expected finite values, got {bad} NaN or infinite of {w.numel()}")

    w = w.detach()
    outputs, channels, kernel = w.shape[0], w.shape[1], w.shape[2:]
    taps, whole = kernel.numel(), channels - channels % block_size
    vqk = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    kds = w.new_empty((outputs, block_count(channels, block_size), *kernel), dtype=torch.float32)
    kds_shift = torch.zeros_like(kds)
    # The short last block is solved by itself, so that no rule ever sees padding.
    for first, last, size in ((0, whole, block_size), (whole, channels, channels - whole)):
        if first == last or not taps:
            continue
        step = max(1, _CHUNK // ((last - first) * taps))
        blocks = slice(first // block_size, block_count(last, block_size))
        for o in range(0, outputs, step):
            part = w[o : o + step, first:last].float()
            rows = part.reshape(-1, size, taps).transpose(1, 2)
            q, a, c = _solve(rows.contiguous(), bits, rule, scale, shift)
            vqk[o : o + step, first:last] = q.transpose(1, 2).reshape(part.shape)
            kds[o : o + step, blocks] = a.view(len(part), -1, *kernel)
            if shift:
                kds_shift[o : o + step, blocks] = c.view(len(part), -1, *kernel)
    return QuantizedWeight(vqk, kds, kds_shift)


# Below, ``w`` and ``q`` are ``(R, T, n)``: rows of n values that share one scale, the T taps of a block together;
# ``scale`` and ``shift`` are ``(R, T, 1)``. ``q`` is float and holds whole numbers.


def _solve(w: Tensor, bits: int, rule: str, scale: str, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    half = 1 << (bits - 1)
    # Temporaries of the size of a part stay in cache; the descent below wants longer vectors.
    step = max(1, _PART // w[:1].numel()) if w.is_cpu else len(w)
    parts = [_round_rows(part, half, rule, shift) for part in torch.split(w, step)]
    q, a, c = (torch.cat(column) for column in zip(*parts, strict=True))
    if rule == "balanced":
        q = _balance(w, q, a, c, half)
    if scale == "kl":
        columns = (torch.split(column.double(), step) for column in (w, q, a))
        a = torch.cat([_kl_scale(*part).float() for part in zip(*columns, strict=True)])
    return q, a, c


def _round_rows(w: Tensor, half: int, rule: str, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scale and shift of each row for itself, by rule ``paper`` or ``refined``."""
    # Divided by its extreme value a row stays within [-1, 1], be it subnormal or huge.
    extreme = w.gather(2, w.abs().argmax(2, keepdim=True))
    unit = torch.where(extreme == 0, 1.0, extreme.abs())
    ratio = w / unit
    starts = _shifted_starts(ratio, half) if shift else _signed_starts(extreme / unit, half)
    if rule == "paper":
        starts = starts[:1]
    q = _best_start(ratio, starts, half, shift)
    if rule != "paper":
        a, c = _fit(ratio, q, shift)
        q = _round(ratio, a, c, half)
    a, c = _fit(w.double(), q.double(), shift)
    return q, a.float(), c.float()


def _signed_starts(extreme: Tensor, half: int) -> list[tuple[Tensor, Tensor]]:
    """Scales that put the extreme value, or one a little smaller, onto the last level of either side."""
    zero = torch.zeros_like(extreme)
    negative = [(extreme * (-g / half), zero) for g in _GRID]
    return negative + [(extreme * (g / (half - 1)), zero) for g in _GRID]


def _shifted_starts(w: Tensor, half: int) -> list[tuple[Tensor, Tensor]]:
    """Scales and shifts that spread the values, or a little less than their range, over all levels."""
    low, high = w.aminmax(dim=2, keepdim=True)
    middle, step = (low + high) / 2, (high - low) / (2 * half - 1)
    return [(step * g, middle + step * (g / 2)) for g in _GRID]


def _round(w: Tensor, scale: Tensor, shift: Tensor, half: int) -> Tensor:
    """``clamp(round_half_even((w - shift) / scale))``, 0 where the scale is 0."""
    q = (w - shift).div_(torch.where(scale == 0, torch.inf, scale))
    return q.round_().clamp_(-half, half - 1)


def _fit(w: Tensor, q: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Least-squares scale, and shift where asked for, of each row; a scale of 0 where q is constant (or zero)."""
    wq, qq = (w * q).sum(2, keepdim=True), (q * q).sum(2, keepdim=True)
    if not shift:
        return wq / torch.where(qq == 0, 1.0, qq), torch.zeros_like(wq)
    n = w.shape[2]
    w_mean, q_mean = w.mean(2, keepdim=True), q.mean(2, keepdim=True)
    qq = qq - n * q_mean * q_mean
    scale = torch.where(qq > 0, (wq - n * w_mean * q_mean) / torch.where(qq > 0, qq, 1.0), 0.0)
    return scale, w_mean - scale * q_mean


def _best_start(w: Tensor, starts: list[tuple[Tensor, Tensor]], half: int, shift: bool) -> Tensor:
    """Integers of the start that, its scale and shift fitted again, leaves the least squared error in each row."""
    best_scale, best_shift = starts[0]
    least: Tensor | None = None
    if len(starts) > 1:
        for scale, offset in starts:
            q = _round(w, scale, offset, half)
            a, c = _fit(w, q, shift)
            error = q.mul_(a).add_(c).sub_(w).square_().sum(2, keepdim=True)
            better = error < (torch.inf if least is None else least)
            best_scale, best_shift = torch.where(better, scale, best_scale), torch.where(better, offset, best_shift)
            least = error if least is None else torch.minimum(error, least)
    return _round(w, best_scale, best_shift, half)


def _balance(w: Tensor, q: Tensor, scale: Tensor, shift: Tensor, half: int) -> Tensor:
    """Coordinate descent on the integers under a model of the inputs that needs no data.

    With ``e = w - scale q - shift`` it lowers, for each row of taps, ``e' H e`` where ``H = (1 - r) I + r [same input
    channel] + k 1 1'``: neighbouring pixels of a channel are alike (correlation r), and after a ReLU every input has a
    positive mean (its square, as a fraction of the variance, is k). Errors of one channel's taps, and those of a whole
    block, thus come to cancel.
    """
    taps, n = w.shape[1:]
    tap_correlation = _TAP_CORRELATION if taps > 1 else 0.0
    unit = w.abs().amax((1, 2), keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    # One contiguous vector over the rows per coordinate: the loop below is sequential in taps * n, parallel in rows.
    step = (scale / unit).permute(1, 2, 0).contiguous()
    # Divided first: next to the largest float, q * scale would overflow.
    error = (w / unit - q * (scale / unit) - shift / unit).permute(1, 2, 0).contiguous()
    q = q.permute(1, 2, 0).contiguous()
    channel_error = error.sum(0)
    block_error = channel_error.sum(0)
    inverse = torch.where(step == 0, 0.0, 1 / (step * (1 + _MEAN_POWER)))
    for c in range(n):
        for t in range(taps):
            slope = error[t, c] * (1 - tap_correlation)
            slope.add_(channel_error[c], alpha=tap_correlation).add_(block_error, alpha=_MEAN_POWER)
            moved = slope.mul_(inverse[t, 0]).round_().add_(q[t, c]).clamp_(-half, half - 1)
            change = (moved - q[t, c]).mul_(step[t, 0])
            q[t, c] = moved
            error[t, c] -= change
            channel_error[c] -= change
            block_error -= change
    return q.permute(2, 0, 1)


def _kl_scale(w: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Scale that minimises ``sum T log(T / I)``, ``T = softmax(w)``, ``I = softmax(scale q)``, by bounded Newton steps.

    The divergence is convex in the scale: its slope is ``sum (I - T) q`` and its curvature the variance of q under I.
    """
    target = torch.softmax(w, 2)
    bounds = scale * 0.5, scale * 1.5
    low, high = torch.minimum(*bounds), torch.maximum(*bounds)
    for _ in range(_NEWTON_STEPS):
        model = torch.softmax(scale * q, 2)
        mean = (model * q).sum(2, keepdim=True)
        slope = mean - (target * q).sum(2, keepdim=True)
        curvature = (model * (q - mean).square()).sum(2, keepdim=True)
        scale = scale - torch.where(curvature > 0, slope / torch.where(curvature > 0, curvature, 1.0), 0.0)
        scale = torch.minimum(torch.maximum(scale, low), high)
    return scale
