"""Rounding of weights under a model of their inputs that needs no data: rule ``balanced``.

The inputs of a channel at different taps are neighbouring pixels with a correlation r; each channel has a mean m and a
variance v, and channels are independent. With the error e of the weights, the expected squared error of an output is

    e' H e,    H = [same channel] v (1 if same tap else r) + m m'.

:func:`dsconv.numerics.rounding.round_to` minimises this for any H, each block separately. Here H is the sum of a
diagonal, a constant per channel and a rank-one matrix, so that an integer takes a few operations, whatever the size of
its block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dsconv.numerics.rounding import solve_held
from dsconv.numerics.scales import round_rows

# Without statistics, inputs have a variance of 1 and this squared mean.
_MEAN_POWER = 0.4
TAP_CORRELATION = 0.7
# Ridge added to the diagonal of H, as a fraction of its mean.
_RIDGE = 0.1
# Number of weights of a tap that are processed at a time: small enough to stay in cache, and large enough that calls
# of PyTorch take less time than the computation. Maximum number of values of all taps, and of the normal equations of
# scales, at a time.
_SLAB, _MOST = 1 << 16, 1 << 20


class Model(NamedTuple):
    """``e' H e = sum_c own_c sum_t e_tc^2 + sum_c shared_c (sum_t e_tc)^2 + (sum_tc mean_c e_tc)^2``.

    Each is ``(n, M)``: M kinds of rows, in consecutive runs of equal length.
    """

    own: Tensor
    shared: Tensor
    mean: Tensor

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, taps: int) -> "Model":
        correlation = TAP_CORRELATION if taps > 1 else 0.0
        return cls((1 - correlation) * variance, correlation * variance, mean)

    def regularized(self, ridge: float) -> "Model":
        """Return the model with ``ridge mean(diag H)`` added to the diagonal; with 1 if all inputs are always zero."""
        diagonal = (self.own + self.shared + self.mean.square()).mean(0)
        return self._replace(own=self.own + torch.where(diagonal > 0, ridge * diagonal, 1.0))

    def rows(self, count: int) -> "Model":
        """Return the model of each of ``count`` rows, ``(n, count)``; or ``(n, 1)`` if all are of one kind."""
        return Model(*(_rows(value, count) for value in self))

    def value(self, e: Tensor) -> Tensor:
        """Return ``e' H e`` of errors ``(T, n, R)``: ``(R,)``."""
        own, shared, mean = self.rows(e.shape[2])
        sums = e.sum(0)
        inner = torch.stack([(own * tap).mul_(tap).sum(0) for tap in e]).sum(0)
        return inner + (shared * sums).mul_(sums).sum(0) + (mean * sums).sum(0).square()


def _rows(value: Tensor, count: int) -> Tensor:
    """Expand ``(n, M)`` to ``(n, count)``; ``(n, 1)`` broadcasts to every row and is faster."""
    return value if value.shape[1] == 1 else value.repeat_interleave(count // value.shape[1], 1)


def most_rows(taps: int, n: int, on_cpu: bool) -> int:
    """Return how many rows :func:`round_balanced` should get at a time: many for its loops, few for the cache."""
    return max(1, min((_SLAB if on_cpu else 16 * _SLAB) // n, _MOST // (taps * n), _MOST // taps**2))


# Integers int8 ``(T, n, R)``, and scales and shifts float32 ``(T, 1, R)``.
Result = tuple[Tensor, Tensor, Tensor]
# The signature of :func:`solve`: weights, model, the regularized model, 2^(bits - 1), whether there are shifts.
Solver = Callable[[Tensor, Model, Model, int, bool], Result]


def round_balanced(
    w: Tensor, known: tuple[Tensor, Tensor] | None, bits: int, shift: bool, solver: Solver | None = None
) -> Result:
    """Return integers, scales and shifts with a small expected error of each block's contribution to its output.

    Args:
        w: float32 ``(T, n, R)``: R rows of n channels at T taps each, with rows of one kind of inputs contiguous.
        known: mean and variance of the inputs, each ``(n, M)`` for M kinds, where R is a multiple of M; None if
            unknown.
        bits: 2..8, width of the integers.
        shift: whether each scale has a shift.
        solver: a faster substitute for :func:`solve`; None is that itself.

    Returns:
        Int8 integers ``(T, n, R)``, and float32 scales and shifts ``(T, 1, R)``. By the minimised measure, no row is
        worse than with rule ``refined``.

    >>> w = torch.randn(9, 32, 100, generator=torch.Generator().manual_seed(0))
    >>> found = round_rows(w, 8, "refined", False, dim=1), round_balanced(w, None, 4, False)
    >>> before, after = (float((w - q * a).sum((0, 1)).std()) for q, a, _ in found)
    >>> after < 0.1 * before
    True
    """
    if known is None:
        mean, variance = (w.new_full((w.shape[1], 1), m, dtype=torch.float64) for m in (_MEAN_POWER**0.5, 1.0))
    else:
        mean, variance = known
    model = Model.of(mean.to(w.device, torch.float64), variance.to(w.device, torch.float64), len(w))
    return (solver or solve)(w, model, model.regularized(_RIDGE), 1 << (bits - 1), shift)


def solve(w: Tensor, model: Model, held: Model, half: int, shift: bool) -> Result:
    """Return rows rounded for ``held``; a row that ``model`` rates worse than rule ``refined`` uses that rule."""
    unit = torch.maximum(w.amax((0, 1)), -w.amin((0, 1)))  # squares would overflow near the largest float
    unit = torch.where(unit == 0, 1.0, unit)
    # In float64, so that the result does not depend on which rows are processed together.
    target = w.double().mul_(1 / unit.double())
    found = _refit(target, held, _nearest_plane(target, held, half, shift), shift)
    found = _refit(target, held, _descend(target, held, found, half), shift)

    # A start for the output error is not always better for it than one for the weight error.
    plain = [round_rows(tap, half, "refined", shift, dim=0) for tap in w]
    q, a, c = (torch.stack(values).double() for values in zip(*plain, strict=True))
    refined = q, a / unit, c / unit
    better = model.value(_missed(target, found)) <= model.value(_missed(target, refined))
    for value in found[1:]:  # float32 cannot represent every scale of a huge weight
        better &= (value * unit).float().isfinite().all(0).squeeze(0)
    q, a, c = (torch.where(better, new, old) for new, old in zip(found, refined, strict=True))
    return q.to(torch.int8), (a * unit).float(), (c * unit).float()


# Below, integers and targets are ``(T, n, R)`` and scales and shifts ``(T, 1, R)``, all float64. One tap at a time
# stays in cache.

_Rounded = tuple[Tensor, Tensor, Tensor]


def _missed(target: Tensor, rounded: _Rounded) -> Tensor:
    q, scale, shift = rounded
    missed = target - shift
    for tap, level, step in zip(missed, q, scale, strict=True):
        tap.addcmul_(level, step, value=-1)
    return missed


def _nearest_plane(target: Tensor, model: Model, half: int, shift: bool) -> _Rounded:
    """Round the columns from the last to the first, each to the least error with those before it still free.

    With errors e of the rounded columns P, the best error of the free columns is ``-H_FF^-1 H_FP e_P``. By Sherman and
    Morrison this is, with N free taps of a channel, ``k = 1 / (own + N shared)`` and S its sum of errors,

        -k (shared S + mean (sum mean S - sum N k mean shared S) / (1 + sum N k mean^2)).
    """
    own, shared, mean = model
    q = torch.empty_like(target)
    scale, offset = (torch.zeros_like(target[:, :1]) for _ in range(2))
    sums, error = torch.zeros_like(target[0]), torch.empty_like(target[0])
    for tap in reversed(range(len(target))):
        # A channel has one free tap more before its tap is rounded than afterwards.
        more, less = (count / (own + count * shared) for count in (tap + 1, tap))
        pull, push = (mean * (1 - share * shared) for share in (more, less))
        # The columns still to be rounded have `more`, the finished ones `less`.
        power = mean.square() * torch.stack([more, less])
        spread = 1 + power[0].cumsum(0) + power[1].sum(0) - power[1].cumsum(0)
        gain = more / (tap + 1)
        made_up, free_weight, weight, change, pull, push = (
            _rows(value, target.shape[2])
            for value in (gain * shared, gain * mean / spread[-1], gain * mean / spread, push - pull, pull, push)
        )
        moved = torch.addcmul(target[tap], made_up, sums)
        common = (pull * sums).sum(0)
        free = torch.addcmul(moved, free_weight, common)
        _, scale[tap], offset[tap] = round_rows(free.float(), half, "refined", shift, dim=0)
        step, wanted = scale[tap, 0], target[tap] - offset[tap]
        inverse = torch.where(step == 0, 0.0, 1 / step)
        start = moved.sub_(offset[tap]).mul_(inverse)
        columns = (start, weight * inverse, wanted, push, change, sums, q[tap], error)
        for first, factor, whole, pushed, changed, so_far, level, missed in zip(
            *(reversed(value.unbind(0)) for value in columns), strict=True
        ):
            torch.addcmul(first, factor, common, out=level).round_().clamp_(-half, half - 1)
            torch.addcmul(whole, step, level, value=-1, out=missed)
            common.addcmul_(pushed, missed).addcmul_(changed, so_far)
        sums += error
    return q, scale, offset


def _descend(target: Tensor, model: Model, rounded: _Rounded, half: int) -> _Rounded:
    """Move each integer in turn to the value with the least error, with scales and the other integers fixed."""
    own, shared, mean = model.rows(target.shape[2])
    q, scale, shift = rounded
    q, error = q.clone(), _missed(target, rounded)
    sums = error.sum(0)
    common = (mean * sums).sum(0)
    diagonal = 1 / (own + shared + mean.square())
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    for tap, step in enumerate(inverse):
        moved = (own * error[tap]).addcmul_(shared, sums).mul_(diagonal)
        start = torch.addcmul(q[tap], moved, step)
        change = q[tap].clone()
        columns = (start, mean * diagonal * step, mean * scale[tap], q[tap], change)
        for first, factor, lost, level, changed in zip(*(value.unbind(0) for value in columns), strict=True):
            torch.addcmul(first, factor, common, out=level).round_().clamp_(-half, half - 1)
            common.addcmul_(lost, changed.sub_(level))
        sums.addcmul_(change, scale[tap])
    return q, scale, shift


def _refit(target: Tensor, model: Model, rounded: _Rounded, shift: bool) -> _Rounded:
    """Return the same integers with the scales, and shifts, of each row that minimise the error, fitted jointly."""
    own, shared, mean = model.rows(target.shape[2])
    q, scale, offset = rounded
    taps, factors = len(q), 1 + shift
    # The factors of a tap are its integers and, with a shift, 1. The normal equations are (factor and tap, twice, R).
    normal = target.new_zeros((factors, taps, factors, taps, target.shape[2]))
    right, inner = (target.new_empty((factors, taps, target.shape[2])) for _ in range(2))
    total = target.sum(0)
    alike = (shared * total).add_(mean * (mean * total).sum(0))
    if shift:
        inner[1] = mean.sum(0)
        if taps > 1:
            normal[1, :, 1] = shared.sum(0)
    for tap, level in enumerate(q):
        wanted = torch.addcmul(alike, own, target[tap])
        right[0, tap] = (level * wanted).sum(0)
        inner[0, tap] = (mean * level).sum(0)
        if taps > 1:  # the part of all taps of a channel
            weighted = shared * level
            for other in range(tap, taps):
                normal[0, tap, 0, other] = normal[0, other, 0, tap] = (weighted * q[other]).sum(0)
            if shift:
                normal[0, tap, 1] = normal[1, :, 0, tap] = weighted.sum(0)
        weighted = own * level
        normal[0, tap, 0, tap] += (weighted * level).sum(0)
        if shift:
            right[1, tap] = wanted.sum(0)
            own_sum = weighted.sum(0)
            normal[0, tap, 1, tap] += own_sum
            normal[1, tap, 0, tap] += own_sum
            normal[1, tap, 1, tap] += own.sum(0)
    normal, right, inner = normal.flatten(2, 3).flatten(0, 1), right.flatten(0, 1), inner.flatten(0, 1)
    normal += inner.unsqueeze(1) * inner
    before = torch.cat([scale, offset] if shift else [scale], 0).squeeze(1)
    fitted = solve_held(normal.permute(2, 0, 1), right.T, before.T).T.contiguous()
    found = torch.unflatten(fitted, 0, (factors, taps, 1))
    return q, found[0], found[1] if shift else offset
