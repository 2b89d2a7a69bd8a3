"""Integers, scale and shift of rows of values, each row for itself.

``w`` and ``q`` are ``(R, T, n)``: rows of n values that share one scale, the T taps of a block together; ``scale`` and
``shift`` are ``(R, T, 1)``. ``q`` is float and holds whole numbers.
"""

import torch
from torch import Tensor

# Start values of a refined scale, as fractions of the one that maps the extreme value onto the last level.
_GRID = (1.0, 0.9, 0.8)


def round_rows(w: Tensor, half: int, rule: str, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
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
