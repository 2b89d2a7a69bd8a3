"""Rounding of a layer's weights that minimises the error of its output, rather than that of the weights.

For a layer, ``x`` is the centred input computed by the quantized network, and ``y`` the output of the float network at
the same position. The mean squared error of a row of weights ``v`` is, up to a constant, a quadratic form,

    E (y - v x)^2 = (v - t)' H (v - t) + const,    H = E x x',    t = H^-1 E x y,

so ``t`` is rounded instead of the float weights ``w``: it corrects the effect of earlier layers on ``x``. ``H`` is
estimated from few images, so ``ridge mean(diag H) I`` is added to it, equivalent to a prior that ``v`` is near ``w``:

    t = w + H^-1 E x (y - w x).

``H`` is ``(G, d, d)`` for the G groups of a convolution, and weights are ``(G, R, d)``: R rows (outputs) of d inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.numerics.scales import round_rows

# Regularization of scales that the integers do not determine, as a fraction of that of the others.
HELD = 1e-4
# Maximum number of values in the normal equations of the scales that are solved at a time.
_CHUNK = 1 << 23


class Blocks(NamedTuple):
    """Columns of d that share a scale: ``runs`` (taps) of ``width`` columns, each divided into blocks of ``size``."""

    runs: int
    width: int
    size: int

    def parts(self) -> list[slice]:
        """Return the columns of each block; the last block of a run may be shorter."""
        starts = [(run * self.width, at) for run in range(self.runs) for at in range(0, self.width, self.size)]
        return [slice(run + at, run + min(at + self.size, self.width)) for run, at in starts]

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum of each block: ``(..., d)`` to ``(..., blocks)``."""
        x = F.pad(torch.unflatten(x, -1, (self.runs, self.width)), (0, -self.width % self.size))
        return torch.unflatten(x, -1, (-1, self.size)).sum(-1).flatten(-2)

    def spread(self, scale: Tensor) -> Tensor:
        """Return the scale of each column: ``(..., blocks)`` to ``(..., d)``."""
        wide = torch.unflatten(scale, -1, (self.runs, -1)).repeat_interleave(self.size, -1)
        return wide[..., : self.width].flatten(-2)


class Rounded(NamedTuple):
    """Integers ``q (G, R, d)``, as floats, and the ``scale`` and ``shift`` ``(G, R, blocks)`` of their blocks."""

    q: Tensor
    scale: Tensor
    shift: Tensor | None

    def weight(self, blocks: Blocks) -> Tensor:
        """Return the weights that these represent."""
        w = self.q * blocks.spread(self.scale)
        return w if self.shift is None else w + blocks.spread(self.shift)


def regularized(h: Tensor, ridge: float) -> Tensor:
    """Return ``h + ridge mean(diag h) I``, which is positive definite even if inputs are always zero.

    >>> regularized(torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]), ridge=0.5)
    tensor([[[5., 0.],
             [0., 1.]]])
    """
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    return h + torch.diag_embed(torch.where(mean > 0, ridge * mean, 1.0).expand(h.shape[:-1]))


def regression_target(w: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """Return ``w + g h^-1``, the weights that minimise ``E |y - v x|^2`` where ``g = E (y - w x) x'`` ``(G, R, d)``.

    >>> h, g = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), torch.tensor([[[1.0, 1.0]]])
    >>> regression_target(torch.zeros(1, 1, 2), h, g)
    tensor([[[0.5000, 0.2500]]])
    """
    return w + torch.cholesky_solve(g.mT, torch.linalg.cholesky(h)).mT


def quadratic(e: Tensor, h: Tensor) -> Tensor:
    """Return ``e h e'`` of each row: ``(G, R)``."""
    return ((e @ h) * e).sum(-1)


def round_to(target: Tensor, h: Tensor, blocks: Blocks, bits: int, *, shift: bool = False, sweeps: int = 3) -> Rounded:
    """Return integers, scales and shifts for which ``(v - target) h (v - target)'`` of each row is small.

    Columns are rounded one after the other, each compensating the errors of those before it; the scale of a block is
    fitted at its first column. Then all scales of a row are fitted jointly by least squares, each integer in turn moves
    to the value with the least error, and the scales are fitted again.

    Args:
        target: float32 ``(G, R, d)``.
        h: float32 ``(G, d, d)``, positive definite.
        blocks: columns that share a scale.
        bits: 2..8, width of the integers.
        shift: whether each block has a shift in addition to its scale.
        sweeps: number of passes over the integers in the last phase.

    Returns:
        Rounded weights; an all-zero block has integers 0 and scale 0.

    Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", ICLR 2023, in the equivalent form of Babai's nearest plane
    algorithm (Chen et al., "The Geometry of LLM Quantization", 2025); fits and descent are ours.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> w, x = torch.randn(1, 16, 64), torch.randn(1, 1000, 64) @ torch.randn(64, 64)
    >>> h = x.mT @ x / 1000
    >>> q, scale, _ = round_rows(w.view(-1, 1, 32), half=8, rule="refined", shift=False)
    >>> plain = Rounded(q.view(1, 16, 64), scale.view(1, 16, 2), None)
    >>> blocks = Blocks(runs=1, width=64, size=32)
    >>> errors = [float(quadratic(r.weight(blocks) - w, h).mean()) for r in (plain, round_to(w, h, blocks, bits=4))]
    >>> errors[1] < 0.5 * errors[0]
    True
    """
    rounded = nearest_plane(target, h, blocks, bits, shift=shift)
    rounded = refit(target, h, blocks, rounded)
    return refit(target, h, blocks, descend(target, h, blocks, rounded, bits, sweeps))


def nearest_plane(target: Tensor, h: Tensor, blocks: Blocks, bits: int, *, shift: bool = False) -> Rounded:
    """Round column by column, from the last to the first; each column compensates the errors of those before it.

    With ``h = L L'`` the error is ``|e L|^2``. Component k of ``e L`` contains ``e_k L_kk`` and the errors of the
    columns after k, which are already rounded: column k is rounded to minimise that component. The scale and the shift
    of a block are those of rule ``refined`` for the values that its columns would have without any rounding.
    """
    factor = torch.linalg.cholesky(h)
    half = 1 << (bits - 1)
    groups, rows, _ = target.shape
    error, q = torch.zeros_like(target), torch.empty_like(target)
    scales, shifts = [], []
    for part in reversed(blocks.parts()):
        inner = factor[:, part, part]
        # Errors of the columns after this block in its components, in units of its weights.
        carried = error[..., part.stop :] @ factor[:, part.stop :, part]
        wanted = target[..., part]
        free = wanted + torch.linalg.solve_triangular(inner, carried, upper=False, left=False)
        flat = free.flatten(0, 1)
        _, scale, offset = round_rows(flat.unsqueeze(1), half, "refined", shift)
        scale, offset = scale.view(groups, rows), offset.view(groups, rows)
        step = torch.where(scale == 0, torch.inf, scale)
        for k in range(flat.shape[1] - 1, -1, -1):
            diagonal = inner[:, k, k, None]
            level = (wanted[..., k] + carried[..., k] / diagonal - offset) / step
            level = level.round_().clamp_(-half, half - 1)
            missed = wanted[..., k] - scale * level - offset
            carried[..., :k] += missed.unsqueeze(-1) * inner[:, k : k + 1, :k]
            q[..., part.start + k] = level
            error[..., part.start + k] = missed
        scales.append(scale)
        shifts.append(offset)
    scale, offset = (torch.stack(values[::-1], -1) for values in (scales, shifts))
    return Rounded(q, scale, offset if shift else None)


def refit(target: Tensor, h: Tensor, blocks: Blocks, rounded: Rounded) -> Rounded:
    """Return the same integers with the scales, and shifts, of each row that minimise the error, fitted jointly.

    A row is ``z B``, its scales and shifts times their factors, so ``z = target h B' (B h B')^-1``.
    """
    groups, rows, _ = target.shape
    step = max(1, _CHUNK // (blocks.sums(h[:1, :1]).numel() * (1 + (rounded.shift is not None))) ** 2 // groups)
    parts = [_refit(target[:, r : r + step], h, blocks, _rows(rounded, r, step)) for r in range(0, rows, step)]
    scale, shift = (torch.cat(values, 1) for values in zip(*parts, strict=True))
    return Rounded(rounded.q, scale, None if rounded.shift is None else shift)


def _rows(rounded: Rounded, first: int, count: int) -> Rounded:
    part = slice(first, first + count)
    return Rounded(*(None if value is None else value[:, part] for value in rounded))  # type: ignore[arg-type]


def _refit(target: Tensor, h: Tensor, blocks: Blocks, rounded: Rounded) -> tuple[Tensor, Tensor]:
    q, scale, shift = rounded
    multiplied = [q] if shift is None else [q, torch.ones_like(q)]
    before = torch.stack([scale] if shift is None else [scale, shift], -1)
    wanted = target @ h
    right = torch.stack([blocks.sums(f * wanted) for f in multiplied], -1).flatten(-2).double()
    # (G, R, block and which of the two, block, which of the two)
    columns = [
        torch.stack([blocks.sums((f[..., part] @ h[:, part]) * other) for other in multiplied], -1)
        for part in blocks.parts()
        for f in multiplied
    ]
    normal = torch.stack(columns, 2).flatten(3).double()
    fitted = solve_held(normal, right, before.flatten(-2)).to(target.dtype).view(before.shape)
    return fitted[..., 0], fitted[..., -1]


def solve_held(normal: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """Return solutions ``(..., k)`` of normal equations ``(..., k, k)``, slightly regularized towards ``before``."""
    own = normal.diagonal(dim1=-2, dim2=-1)
    held = torch.where(own > 0, HELD * own, 1.0)
    solved: Tensor = torch.linalg.solve(normal + torch.diag_embed(held), right + held * before)
    return solved


def descend(target: Tensor, h: Tensor, blocks: Blocks, rounded: Rounded, bits: int, sweeps: int = 1) -> Rounded:
    """Move each integer in turn to the value with the least error, with scales and the other integers fixed."""
    half = 1 << (bits - 1)
    q, scale, shift = rounded
    q = q.clone()
    # Scales below the smallest normal number have no finite inverse.
    inverse = torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, 0.0, 1 / scale)
    error = target - Rounded(q, scale, shift).weight(blocks)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    for _ in range(sweeps):
        for block, part in enumerate(blocks.parts()):
            slope = error @ h[:, :, part]
            inner = h[:, part, part]
            for k, column in enumerate(range(part.start, part.stop)):
                level = slope[..., k] / diagonal[:, None, column] * inverse[..., block] + q[..., column]
                level = level.round_().clamp_(-half, half - 1)
                change = (level - q[..., column]) * scale[..., block]
                q[..., column] = level
                error[..., column] -= change
                slope -= change.unsqueeze(-1) * inner[:, k : k + 1]
    return Rounded(q, scale, shift)
