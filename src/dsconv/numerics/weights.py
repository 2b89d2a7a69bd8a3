"""Conversion of weights to VQK (integers) and KDS (one float per block), and back.

Layout everywhere: weight ``(O, C/groups, *K)`` with zero (linear) to three kernel dimensions, VQK the same, KDS and its
optional shift ``(O, CB, *K)`` with ``CB = ceil(C / groups / block_size)``.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dsconv.errors import check_choice, check_whole
from dsconv.names import WEIGHT_RULES, WEIGHT_SCALES, WeightRule, WeightScale
from dsconv.numerics.balanced import Solver, most_rows, round_balanced
from dsconv.numerics.scales import round_rows

# Number of weights that are processed at a time: a chunk limits the extra memory, a part of it stays in cache.
_CHUNK, _PART = 1 << 20, 1 << 18
_NEWTON_STEPS = 8
_MIN_BITS, _MAX_BITS = 2, 8


class QuantizedWeight(NamedTuple):
    """``vqk`` int8 ``(O, C/groups, *K)``; ``kds`` and ``kds_shift`` float32 ``(O, CB, *K)``."""

    vqk: Tensor
    kds: Tensor
    kds_shift: Tensor


class InputMoments(NamedTuple):
    """Known moments of a layer's inputs: ``mean`` and ``variance`` per channel, float32 ``(groups, C/groups)``."""

    mean: Tensor
    variance: Tensor


def block_count(channels: int, block_size: int) -> int:
    """Return the number of blocks for ``channels`` values: ``ceil(channels / block_size)``."""
    return -(-channels // block_size)


def quantize_weight(
    w: Tensor,
    bits: int,
    block_size: int,
    *,
    groups: int = 1,
    rule: WeightRule = "paper",
    scale: WeightScale = "l2",
    inputs: InputMoments | None = None,
    solver: Solver | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the variable quantized kernel and kernel distribution shift of a float weight.

    Args:
        w: float weight ``(O, C/groups, *K)``: of a convolution with 1 to 3 dimensions, or of a linear layer ``(O, C)``.
        bits: 2..8, width of the integers.
        block_size: number of input channels that share one scale, >= 1; the last block of a tap may be shorter.
        groups: convolution groups. They divide ``O``; a block never spans two, as ``w`` has the inputs of one.
        rule: ``paper``: the value of largest magnitude, with its sign, is mapped to ``-2^(bits-1)``, and the rest is
            rounded half to even. ``refined``: the scale of either sign with the least squared error, by alternating
            rounding and least squares from several starts. ``balanced``: scales and integers are chosen jointly so that
            the expected error of a block's output is small, rather than that of its weights: errors cancel over a
            block, and over the taps of each input channel.
        scale: ``l2`` least squares, ``sum(w q) / sum(q^2)``; ``kl`` minimises ``sum T log(T / I)``, ``T = softmax(w)``,
            ``I = softmax(scale q)`` per block, between 0.5 and 1.5 times ``l2``.
        inputs: moments for the expected error of ``balanced``; None is a variance of 1 and a squared mean of 0.4
            everywhere.
        solver: implementation of ``balanced``: :func:`dsconv.ops.solve_balanced`, which is faster; None is PyTorch.

    Returns:
        VQK int8 ``(O, C/groups, *K)`` in ``[-2^(bits-1), 2^(bits-1) - 1]`` and KDS float32 ``(O, CB, *K)``. An all-zero
        block has VQK 0 and KDS 0.

    Raises:
        ValueError: an argument is out of range, or ``w`` contains a NaN or an infinity.

    Source: Gennari do Nascimento et al., "DSConv: Efficient Convolution Operator", ICCV 2019, section 3.

    >>> w = torch.tensor([[0.8, -0.4, 0.1, 0.0]])
    >>> vqk, kds = quantize_weight(w, bits=4, block_size=4)
    >>> vqk.tolist(), kds.shape
    ([[-8, 4, -1, 0]], torch.Size([1, 1]))
    >>> dequantize_weight(vqk, kds, block_size=4)
    tensor([[ 0.8000, -0.4000,  0.1000, -0.0000]])
    """
    vqk, kds, _ = _quantize(w, bits, block_size, groups, rule, scale, inputs, solver, shift=False)
    return vqk, kds


def quantize_weight_shifted(
    w: Tensor,
    bits: int,
    block_size: int,
    *,
    groups: int = 1,
    rule: WeightRule = "paper",
    inputs: InputMoments | None = None,
    solver: Solver | None = None,
) -> QuantizedWeight:
    """Quantize like :func:`quantize_weight`, with a shift per block: ``w ~ kds * vqk + kds_shift``.

    The smallest and the largest value of a block are mapped to the first and the last level; scale and shift are then
    the least-squares line through the block, so that the errors of a block sum to zero. The other rules repeat rounding
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
    return _quantize(w, bits, block_size, groups, rule, "l2", inputs, solver, shift=True)


def dequantize_weight(vqk: Tensor, kds: Tensor, block_size: int, kds_shift: Tensor | None = None) -> Tensor:
    """Return the float32 weight ``(O, C/groups, *K)`` ``kds * vqk (+ kds_shift)``.

    Raises:
        ValueError: the shapes of ``vqk`` and ``kds`` do not match.

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
            value = value[:, torch.arange(channels, dtype=torch.int64, device=value.device) // block_size]
        return value

    w = vqk.float() * spread(kds)
    return w if kds_shift is None else w + spread(kds_shift)


def check_bits(name: str, bits: int) -> None:
    """Raise ValueError unless ``bits`` is an integer in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not _MIN_BITS <= bits <= _MAX_BITS:
        raise ValueError(f"{name}: expected a whole number in {_MIN_BITS}..{_MAX_BITS}, got {bits!r}")


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless ``block_size`` is an integer of at least 1."""
    check_whole("block_size", block_size, 1)


def _quantize(
    w: Tensor,
    bits: int,
    block_size: int,
    groups: int,
    rule: str,
    scale: str,
    inputs: InputMoments | None,
    solver: Solver | None,
    *,
    shift: bool,
) -> QuantizedWeight:
    check_bits("bits", bits)
    check_block_size(block_size)
    check_choice("rule", rule, WEIGHT_RULES)
    check_choice("scale", scale, WEIGHT_SCALES)
    if not w.is_floating_point() or not 2 <= w.dim() <= 5:
        raise ValueError(
            f"w: expected a float tensor (O, C/groups, *K) of 2 to 5 dimensions, got {w.dtype} {tuple(w.shape)}"
        )
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {w.shape[0]} output channels, got {groups}")
    # Checking the extreme values needs no temporary of the weight's size.
    if w.numel() and not torch.isfinite(torch.stack(w.detach().aminmax())).all():
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"w: expected finite values, got {bad} NaN or infinite of {w.numel()}")
    outputs, channels, kernel = w.shape[0], w.shape[1], w.shape[2:]
    for name, moment in (("mean", inputs and inputs.mean), ("variance", inputs and inputs.variance)):
        if moment is not None and moment.shape != (groups, channels):
            raise ValueError(f"inputs.{name}: expected shape {(groups, channels)}, got {tuple(moment.shape)}")

    w = w.detach()
    whole = channels - channels % block_size
    vqk = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    kds = w.new_empty((outputs, block_count(channels, block_size), *kernel), dtype=torch.float32)
    kds_shift = torch.zeros_like(kds)
    # The shorter last block is solved separately, so that no rule ever sees padding.
    for first, last, size in ((0, whole, block_size), (whole, channels, channels - whole)):
        if first == last or not w.numel():
            continue
        blocks = slice(first // block_size, block_count(last, block_size))
        part, found = w[:, first:last], QuantizedWeight(vqk[:, first:last], kds[:, blocks], kds_shift[:, blocks])
        if rule == "balanced":
            known = None if inputs is None else InputMoments(*(m[:, first:last] for m in inputs))
            _balance(part, bits, size, groups, scale, known, solver, shift, found)
        else:
            _round(part, bits, size, rule, scale, shift, found)
    return QuantizedWeight(vqk, kds, kds_shift)


# Below, ``w`` is ``(O, blocks * size, *K)``, and ``found`` are views of the result to write.


def _round(w: Tensor, bits: int, size: int, rule: str, scale: str, shift: bool, found: QuantizedWeight) -> None:
    """Round by rule ``paper`` or ``refined``, some outputs at a time."""
    taps, kernel = w.shape[2:].numel(), w.shape[2:]
    step = max(1, _CHUNK // (w.shape[1] * taps))
    for o in range(0, len(w), step):
        part = w[o : o + step].float()
        # Rows of n values that share one scale, the taps of a block together: (R, T, n).
        rows = part.reshape(-1, size, taps).transpose(1, 2).contiguous()
        # Temporaries of the size of a part stay in cache.
        many = max(1, _PART // rows[:1].numel()) if w.is_cpu else len(rows)
        solved = [round_rows(few, 1 << (bits - 1), rule, shift) for few in torch.split(rows, many)]
        q, a, c = (torch.cat(column) for column in zip(*solved, strict=True))
        if scale == "kl":
            a = _kl_scale(rows.double(), q.double(), a.double()).float()
        found.vqk[o : o + step] = q.transpose(1, 2).reshape(part.shape)
        found.kds[o : o + step] = a.reshape(len(part), -1, *kernel)
        if shift:
            found.kds_shift[o : o + step] = c.reshape(len(part), -1, *kernel)


def _balance(
    w: Tensor,
    bits: int,
    size: int,
    groups: int,
    scale: str,
    inputs: InputMoments | None,
    solver: Solver | None,
    shift: bool,
    found: QuantizedWeight,
) -> None:
    """Round by rule ``balanced``, some outputs of some blocks of some groups at a time."""
    # (groups, outputs of a group, blocks, n, T)
    weight, vqk = (_by_block(value, groups, size) for value in (w, found.vqk))
    kds, kds_shift = (_by_block(value, groups, 1) for value in (found.kds, found.kds_shift))
    moments = None if inputs is None else [torch.unflatten(m, 1, (-1, size)) for m in inputs]
    _, outputs, blocks, _, taps = weight.shape
    most = most_rows(taps, size, w.is_cpu)
    # All outputs of a block read the same inputs, so they come first.
    per_block = min(outputs, most)
    per_group = min(blocks, most // per_block) if per_block == outputs else 1
    per_part = max(1, most // (outputs * blocks)) if per_group == blocks else 1
    for g, b, o in itertools.product(
        range(0, groups, per_part), range(0, blocks, per_group), range(0, outputs, per_block)
    ):
        at = slice(g, g + per_part), slice(o, o + per_block), slice(b, b + per_group)
        # (T, n, R), rows in the order (groups, blocks, outputs)
        order = 4, 3, 0, 2, 1
        part = weight[at].permute(order)
        rows = part.float().contiguous().flatten(2)
        known = None
        if moments is not None:
            mean, variance = (m[at[0], at[2]].flatten(0, 1).mT for m in moments)
            known = mean, variance
        q, a, c = round_balanced(rows, known, bits, shift, solver)
        if scale == "kl":
            a = _kl_scale(rows.double(), q.double(), a.double(), dim=1).float()
        vqk[at].permute(order).copy_(q.view(part.shape))
        for value, result in ((kds, a), (kds_shift, c))[: 1 + shift]:
            value[at].permute(order).copy_(result.view(taps, 1, *part.shape[2:]))


def _by_block(value: Tensor, groups: int, size: int) -> Tensor:
    """Return a view ``(groups, O / groups, blocks, size, T)`` of ``(O, blocks * size, *K)``."""
    value = value.flatten(2) if value.dim() > 2 else value.unsqueeze(2)
    return torch.unflatten(torch.unflatten(value, 1, (-1, size)), 0, (groups, -1))


def _kl_scale(w: Tensor, q: Tensor, scale: Tensor, dim: int = 2) -> Tensor:
    """Return the scale that minimises ``sum T log(T / I)``, ``T = softmax(w)``, ``I = softmax(scale q)``.

    The divergence is convex in the scale: its slope is ``sum (I - T) q`` and its curvature the variance of q under I.
    It is minimised by bounded Newton steps.
    """
    target = torch.softmax(w, dim)
    bounds = scale * 0.5, scale * 1.5
    low, high = torch.minimum(*bounds), torch.maximum(*bounds)
    for _ in range(_NEWTON_STEPS):
        model = torch.softmax(scale * q, dim)
        mean = (model * q).sum(dim, keepdim=True)
        slope = mean - (target * q).sum(dim, keepdim=True)
        curvature = (model * (q - mean).square()).sum(dim, keepdim=True)
        scale = scale - torch.where(curvature > 0, slope / torch.where(curvature > 0, curvature, 1.0), 0.0)
        scale = torch.minimum(torch.maximum(scale, low), high)
    return scale
