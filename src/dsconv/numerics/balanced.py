"""Rounds weights under a model of their inputs that needs no data: rule ``balanced``.

The inputs of a channel at different taps are pixels side by side, with a correlation r; each channel has a mean m and a
variance v, and channels do not depend on one another. With the error e of the weights, the expected squared error of
an output is

    e' H e,    H = [same channel] v (1 if same tap else r) + m m'.

This is what :func:`dsconv.numerics.rounding.round_to` does for any H, each block by itself. Here H is a diagonal, a
constant for each channel and a rank of one, so that an integer costs a few operations, whatever the size of its block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsconv.numerics.rounding import solve_held
from dsconv.numerics.scales import round_rows

# Without knowledge, inputs have a variance of 1 and this squared mean.
_MEAN_POWER = 0.4
_TAP_CORRELATION = 0.7
# What is added to the diagonal of H, as a fraction of its mean.
_RIDGE = 0.1


class _Model(NamedTuple):
    """``e' H e = sum_c own_c sum_t e_tc^2 + sum_c shared_c (sum_t e_tc)^2 + (sum_tc mean_c e_tc)^2``.

    Each is ``(n, R)``, or ``(n, 1)`` where it is the same for all rows.
    """

    own: Tensor
    shared: Tensor
    mean: Tensor

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, taps: int) -> "_Model":
        correlation = _TAP_CORRELATION if taps > 1 else 0.0
        return cls((1 - correlation) * variance, correlation * variance, mean)

    def regularized(self, ridge: float) -> "_Model":
        """With ``ridge mean(diag H)`` added to the diagonal; with 1 where all inputs are always zero."""
        diagonal = (self.own + self.shared + self.mean.square()).mean(0)
        return self._replace(own=self.own + torch.where(diagonal > 0, ridge * diagonal, 1.0))

    def value(self, e: Tensor) -> Tensor:
        """``e' H e`` of errors ``(T, n, R)``: ``(R,)``."""
        sums = e.sum(0)
        inner = self.own * e.square().sum(0) + self.shared * sums.square()
        return inner.sum(0) + (self.mean * sums).sum(0).square()


def round_balanced(
    w: Tensor, known: tuple[Tensor, Tensor] | None, bits: int, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and shifts for which the expected error of each block's share of its output is small.

    Args:
        w: ``(R, T, n)``: rows of n channels at T taps each, in the order (groups, outputs of a group, blocks).
        known: mean and variance of the inputs, each ``(groups, blocks, n)``; None: nothing is known of them.
        bits: 2..8, width of the integers.
        shift: whether a scale has a shift beside it.

    Returns:
        Float32 integers ``(R, T, n)``, and scales and shifts ``(R, T, 1)``. By the measure that rows are rounded for,
        none is worse than by rule ``refined``.

    >>> w = torch.randn(100, 9, 32, generator=torch.Generator().manual_seed(0))
    >>> found = round_rows(w, 8, "refined", False), round_balanced(w, None, 4, False)
    >>> before, after = (float((w - q * a).sum((1, 2)).std()) for q, a, _ in found)
    >>> after < 0.1 * before
    True
    """
    half = 1 << (bits - 1)
    rows, taps, n = w.shape
    unit = w.abs().amax((1, 2))  # next to the largest float, squares would overflow
    unit = torch.where(unit == 0, 1.0, unit)
    # In float64, so that what rows are worked on together does not show in the result.
    if known is None:
        mean, variance = (torch.full((n, 1), m, dtype=torch.float64) for m in (_MEAN_POWER**0.5, 1.0))
    else:
        groups, blocks = known[0].shape[:2]
        outputs = rows // groups // blocks
        mean, variance = (
            m.double().permute(2, 0, 1).unsqueeze(2).expand(n, groups, outputs, blocks).reshape(n, rows) for m in known
        )
    model = _Model.of(mean.to(w.device), variance.to(w.device), taps)
    target = w.permute(1, 2, 0).double().contiguous() / unit
    held = model.regularized(_RIDGE)
    found = _refit(target, held, _nearest_plane(target, held, half, shift), shift)
    found = _refit(target, held, _descend(target, held, found, half), shift)

    # What is made for the output is not always better for it than what is made for the weights.
    q, a, c = (value.permute(1, 2, 0) for value in round_rows(w, half, "refined", shift))
    refined = q, a / unit, c / unit
    better = model.value(target - _weight(*found)) <= model.value(target - _weight(*refined))
    q, a, c = (torch.where(better, new, old).permute(2, 0, 1) for new, old in zip(found, refined, strict=True))
    unit = unit.view(-1, 1, 1)
    return q.float(), (a * unit).float(), (c * unit).float()


# Below, integers and targets are ``(T, n, R)`` and scales and shifts ``(T, 1, R)``, all float64.

_Rounded = tuple[Tensor, Tensor, Tensor]


def _weight(q: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return q * scale + shift


def _nearest_plane(target: Tensor, model: _Model, half: int, shift: bool) -> _Rounded:
    """Column by column from the last to the first, each rounded to where the error is least with those before it free.

    With errors e of the columns P that are rounded, what is free had best err by ``-H_FF^-1 H_FP e_P``. By Sherman and
    Morrison that is, with N free taps of a channel, ``k = 1 / (own + N shared)`` and S its sum of errors,

        -k (shared S + mean (sum mean S - sum N k mean shared S) / (1 + sum N k mean^2)).
    """
    own, shared, mean = model
    q, error = torch.empty_like(target), torch.empty_like(target)
    scale, offset = (torch.zeros_like(target[:, :1]) for _ in range(2))
    sums = torch.zeros_like(target[0])
    for tap in reversed(range(len(target))):
        # Before its tap is rounded, and after it, a channel has one more free tap.
        more, less = (count / (own + count * shared) for count in (tap + 1, tap))
        pull, push = ((mean * (1 - share * shared)).expand_as(sums) for share in (more, less))
        # The columns that are still to come have `more`, those behind `less`.
        power = mean.square() * torch.stack([more, less])
        spread = 1 + power[0].cumsum(0) + power[1].sum(0) - power[1].cumsum(0)
        gain = more / (tap + 1)
        moved = target[tap] + gain * shared * sums
        common = (pull * sums).sum(0)
        free = moved + gain * mean * (common / spread[-1])
        _, a, c = round_rows(free.T.float().unsqueeze(1), half, "refined", shift)
        scale[tap], offset[tap] = a.flatten(), c.flatten()
        step = torch.where(scale[tap] == 0, torch.inf, scale[tap])
        # What of the common part is left at each column, but for the errors of this tap.
        behind = ((push - pull) * sums).flip(0).cumsum(0).flip(0)
        common = common + torch.cat([behind[1:], torch.zeros_like(behind[:1])])
        weight = gain * mean / spread
        start, level, wanted = (moved + weight * common - offset[tap]) / step, q[tap], target[tap] - offset[tap]
        weight = (weight / step).expand_as(start)
        new = torch.zeros_like(common[0])
        for k in range(len(level) - 1, -1, -1):
            torch.addcmul(start[k], weight[k], new, out=level[k]).round_().clamp_(-half, half - 1)
            torch.addcmul(wanted[k], scale[tap, 0], level[k], value=-1, out=error[tap, k])
            new.addcmul_(push[k], error[tap, k])
        sums += error[tap]
    return q, scale, offset


def _descend(target: Tensor, model: _Model, rounded: _Rounded, half: int) -> _Rounded:
    """Moves each integer in turn to where the error is least, scales and the other integers being as they are."""
    own, shared, mean = model
    q, scale, shift = rounded
    q, error = q.clone(), target - _weight(*rounded)
    sums = error.sum(0)
    common = (mean * sums).sum(0)
    diagonal = own + shared + mean.square()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    for tap in range(len(q)):
        start = q[tap] + (own * error[tap] + shared * sums) / diagonal * inverse[tap]
        weight, lost = mean / diagonal * inverse[tap], mean * scale[tap]
        before = q[tap].clone()
        for k in range(len(start)):
            level = torch.addcmul(start[k], weight[k], common, out=q[tap, k]).round_().clamp_(-half, half - 1)
            common.addcmul_(lost[k], level - before[k], value=-1)
        sums -= (q[tap] - before) * scale[tap]
    return q, scale, shift


def _refit(target: Tensor, model: _Model, rounded: _Rounded, shift: bool) -> _Rounded:
    """The same integers with the scales, and shifts, of each row that leave the least error, all fitted together."""
    own, shared, mean = model
    q, scale, offset = rounded
    factors = torch.stack([q, torch.ones_like(q)] if shift else [q])  # (F, T, n, R)
    before = torch.cat([scale, offset] if shift else [scale], 1).transpose(0, 1).flatten(0, 1).T  # (R, F T)
    total = target.sum(0)
    wanted = own * target + shared * total + mean * (mean * total).sum(0)
    right = (factors * wanted).sum(2).flatten(0, 1).T
    inner = (mean * factors).sum(2).flatten(0, 1).T
    # (R, factor and tap, factor and tap): that of one tap, of all taps of a channel, and of all channels.
    same = (factors.unsqueeze(1) * (own * factors)).sum(3).permute(3, 0, 1, 2)
    normal = torch.diag_embed(same).transpose(2, 3).flatten(1, 2).flatten(2)
    if len(q) > 1:
        normal += torch.einsum("ftnr,gsnr->rftgs", factors, shared * factors).flatten(1, 2).flatten(2)
    normal += inner.unsqueeze(2) * inner.unsqueeze(1)
    fitted = solve_held(normal, right, before)
    found = torch.unflatten(fitted.T, 0, (-1, len(q), 1))
    return q, found[0], found[1] if shift else offset
