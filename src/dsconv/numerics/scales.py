"""Integers, scale and shift of rows of values, each row independently.

A row is a slice along dimension ``dim`` of a tensor and shares one scale; scale and shift have a size of 1 there.
Integers are stored as floats.
"""

import torch
from torch import Tensor

# Initial values of a refined scale, as fractions of the one that maps the extreme value onto the last level.
_GRID = (1.0, 0.9, 0.8)


def round_rows(w: Tensor, half: int, rule: str, shift: bool, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers, scale and shift of each row independently, by rule ``paper`` or ``refined``.

    Args:
        w: float32, rows of n values along ``dim``.
        half: 2^(bits - 1).
        rule: ``paper`` or ``refined``.
        shift: whether each scale has a shift.
        dim: dimension of the rows. The order of sums, and thus their last digits, depend on it.
    """
    # Divided by its extreme value a row stays within [-1, 1], even if it is subnormal or huge.
    low, high = w.amin(dim, keepdim=True), w.amax(dim, keepdim=True)
    largest = torch.maximum(-low, high)
    unit = torch.where(largest == 0, 1.0, largest)
    ratio = w / unit
    starts = _shifted_starts(low / unit, high / unit, half) if shift else _signed_starts(_side(w, dim, low, high), half)
    if rule == "paper":
        starts = starts[:1]
    q = _best_start(ratio, starts, half, shift, dim)
    if rule != "paper":
        a, c = _fit(ratio, q, shift, dim)
        q = _round(ratio, a, c, half)
    a, c = _fit(w.double(), q.double(), shift, dim)
    return q, a.float(), c.float()


def _side(w: Tensor, dim: int, low: Tensor, high: Tensor) -> Tensor:
    """Return the sign of the first value of largest magnitude, 0 in a row of zeros."""
    side = torch.where(high > -low, high, low).sign()
    if (tied := (high == -low) & (high != 0)).any():
        side = torch.where(tied, w.gather(dim, w.abs().argmax(dim, keepdim=True)).sign(), side)
    return side


def _signed_starts(extreme: Tensor, half: int) -> list[tuple[Tensor, Tensor]]:
    """Return scales that map the extreme value, or a slightly smaller one, onto the last level of either side."""
    zero = torch.zeros_like(extreme)
    negative = [(extreme * (-g / half), zero) for g in _GRID]
    return negative + [(extreme * (g / (half - 1)), zero) for g in _GRID]


def _shifted_starts(low: Tensor, high: Tensor, half: int) -> list[tuple[Tensor, Tensor]]:
    """Return scales and shifts that spread the values, or slightly less than their range, over all levels."""
    middle, step = (low + high) / 2, (high - low) / (2 * half - 1)
    return [(step * g, middle + step * (g / 2)) for g in _GRID]


def _round(w: Tensor, scale: Tensor, shift: Tensor, half: int) -> Tensor:
    """Return ``clamp(round_half_even((w - shift) / scale))``, 0 if the scale is 0."""
    q = (w - shift).div_(torch.where(scale == 0, torch.inf, scale))
    return q.round_().clamp_(-half, half - 1)


def _fit(w: Tensor, q: Tensor, shift: bool, dim: int) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale, and shift if requested, of each row; a scale of 0 if q is constant (or zero)."""
    wq, qq = (w * q).sum(dim, keepdim=True), (q * q).sum(dim, keepdim=True)
    if not shift:
        return wq / torch.where(qq == 0, 1.0, qq), torch.zeros_like(wq)
    n = w.shape[dim]
    w_mean, q_mean = w.mean(dim, keepdim=True), q.mean(dim, keepdim=True)
    qq = qq - n * q_mean * q_mean
    scale = torch.where(qq > 0, (wq - n * w_mean * q_mean) / torch.where(qq > 0, qq, 1.0), 0.0)
    return scale, w_mean - scale * q_mean


def _best_start(w: Tensor, starts: list[tuple[Tensor, Tensor]], half: int, shift: bool, dim: int) -> Tensor:
    """Return integers of the start that, after refitting scale and shift, has the least squared error in each row."""
    best_scale, best_shift = starts[0]
    least: Tensor | None = None
    if len(starts) > 1:
        for scale, offset in starts:
            q = _round(w, scale, offset, half)
            a, c = _fit(w, q, shift, dim)
            error = q.mul_(a).add_(c).sub_(w).square_().sum(dim, keepdim=True)
            better = error < (torch.inf if least is None else least)
            best_scale, best_shift = torch.where(better, scale, best_scale), torch.where(better, offset, best_shift)
            least = error if least is None else torch.minimum(error, least)
    return _round(w, best_scale, best_shift, half)
