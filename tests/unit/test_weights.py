"""Weights to VQK and KDS: the guarantees of the arithmetic, checked against float64 numpy."""

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsconv import ops
from dsconv.numerics import (
    WEIGHT_RULES,
    InputMoments,
    balanced,
    block_count,
    dequantize_weight,
    quantize_weight,
    quantize_weight_shifted,
    weights,
)

BITS = range(2, 9)
bits_ = st.integers(2, 8)
rules = st.sampled_from(WEIGHT_RULES)


@st.composite
def float_weights(draw: st.DrawFn, *, moderate: bool = False) -> Tensor:
    """Draw weights of 0 to 3 kernel dimensions: Gaussian, with ties, outliers, zeros, tiny and huge values."""
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 37)), *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["gaussian", "ties", "outlier", "holes", "constant"]))
    if kind == "ties":
        w = (w * 4).round() / 4
    elif kind == "outlier":
        w[:, :1] *= 100
    elif kind == "holes":
        w *= torch.rand(shape, generator=generator) > 0.8
    elif kind == "constant":
        w = torch.full(shape, float(w.flatten()[0]))
    scales = [1.0, 2.0**-20, 2.0**20] if moderate else [1.0, 1e-30, 1e-38, 2e-44, 1e36]
    return w * draw(st.sampled_from(scales))


def blocks(w: Tensor, block_size: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield the index into KDS and the values (O, n) of every block and tap."""
    for tap in itertools.product(*map(range, w.shape[2:])):
        for block in range(block_count(w.shape[1], block_size)):
            part = w[(slice(None), slice(block * block_size, (block + 1) * block_size), *tap)]
            yield (block, *tap), part


def squared_errors(w: Tensor, vqk: Tensor, kds: Tensor, block_size: int, shift: Tensor | None = None) -> Tensor:
    """Return the squared error of each block in float64."""
    found = []
    for (index, part), (_, q) in zip(blocks(w, block_size), blocks(vqk, block_size), strict=True):
        approximation = q.double() * kds[(slice(None), *index)].double()[:, None]
        if shift is not None:
            approximation = approximation + shift[(slice(None), *index)].double()[:, None]
        found.append((part.double() - approximation).square().sum(1))
    return torch.stack(found)


@given(float_weights(), bits_, st.integers(1, 40), rules, st.sampled_from(["l2", "kl"]))
def test_shapes_dtypes_and_range(w: Tensor, bits: int, block_size: int, rule: str, scale: str) -> None:
    vqk, kds = quantize_weight(w, bits, block_size, rule=rule, scale=scale)
    assert vqk.shape == w.shape and vqk.dtype == torch.int8
    assert kds.shape == (w.shape[0], math.ceil(w.shape[1] / block_size), *w.shape[2:]) and kds.dtype == torch.float32
    assert -(2 ** (bits - 1)) <= int(vqk.min()) and int(vqk.max()) <= 2 ** (bits - 1) - 1
    assert torch.isfinite(kds).all()
    assert dequantize_weight(vqk, kds, block_size).shape == w.shape


@given(float_weights(), bits_, st.integers(1, 40))
def test_paper_rule_is_the_published_formula(w: Tensor, bits: int, block_size: int) -> None:
    vqk, _ = quantize_weight(w, bits, block_size)
    half = 2 ** (bits - 1)
    for (_, part), (_, q) in zip(blocks(w, block_size), blocks(vqk, block_size), strict=True):
        for values, integers in zip(part.numpy(), q.numpy(), strict=True):
            extreme = values[np.abs(values).argmax()]
            ratio = values / extreme if extreme else np.zeros_like(values)
            expected = np.clip(np.rint(ratio * np.float32(-half)), -half, half - 1)
            np.testing.assert_array_equal(integers, expected)


@given(float_weights(), bits_, st.integers(1, 40))
def test_extreme_value_lands_on_the_lowest_level(w: Tensor, bits: int, block_size: int) -> None:
    vqk, kds = quantize_weight(w, bits, block_size)
    for (index, part), (_, q) in zip(blocks(w, block_size), blocks(vqk, block_size), strict=True):
        extreme = part.gather(1, part.abs().argmax(1, keepdim=True))
        at = q.gather(1, part.abs().argmax(1, keepdim=True))
        assert torch.where(extreme == 0, at == 0, at == -(2 ** (bits - 1))).all()
        scale = kds[(slice(None), *index)][:, None]
        assert torch.where(extreme > 0, scale <= 0, scale >= 0).all()


@given(float_weights(moderate=True), bits_, st.integers(1, 40), rules)
def test_kds_is_the_least_squares_scale(w: Tensor, bits: int, block_size: int, rule: str) -> None:
    vqk, kds = quantize_weight(w, bits, block_size, rule=rule)
    if rule == "balanced":  # its integers move after the fit
        return
    for (index, part), (_, q) in zip(blocks(w, block_size), blocks(vqk, block_size), strict=True):
        for values, integers, scale in zip(part.numpy(), q.numpy(), kds[(slice(None), *index)].numpy(), strict=True):
            values, integers = values.astype(np.float64), integers.astype(np.float64)
            if integers.any():
                best = np.linalg.lstsq(integers[:, None], values, rcond=None)[0][0]
                assert scale == pytest.approx(best, rel=1e-6)
            else:
                assert scale == 0


@pytest.mark.parametrize(("bits", "error"), [(4, 0.0088), (2, 0.14)])
def test_error_of_gaussian_blocks(bits: int, error: float) -> None:
    w = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    vqk, kds = quantize_weight(w, bits, 64)
    relative = float(squared_errors(w, vqk, kds, 64).sum() / w.double().square().sum())
    assert relative == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("bits", BITS)
def test_zero_block_has_integers_and_scales_of_zero(rule: str, bits: int) -> None:
    w = torch.randn(3, 12, 2, 2)
    w[:, 4:8] = 0
    w[1] = 0
    for scale in ("l2", "kl"):
        vqk, kds = quantize_weight(w, bits, 4, rule=rule, scale=scale)
        assert not vqk[:, 4:8].any() and not kds[:, 1].any() and not vqk[1].any() and not kds[1].any()
        assert kds[0, 0].all()
    vqk, kds, shift = quantize_weight_shifted(w, bits, 4, rule=rule)
    assert not vqk[:, 4:8].any() and not kds[:, 1].any() and not shift[:, 1].any()


@given(float_weights(), bits_, st.integers(1, 12), rules, st.booleans())
def test_short_last_block_is_quantized_as_if_alone(
    w: Tensor, bits: int, block_size: int, rule: str, shift: bool
) -> None:
    whole = w.shape[1] - w.shape[1] % block_size
    quantize = quantize_weight_shifted if shift else quantize_weight
    all_of_it = quantize(w, bits, block_size, rule=rule)
    for part, first in ((w[:, :whole], True), (w[:, whole:], False)):
        if part.shape[1]:
            alone = quantize(part, bits, block_size, rule=rule)
            channels = slice(0, whole) if first else slice(whole, None)
            count = whole // block_size
            kept = slice(0, count) if first else slice(count, None)
            assert torch.equal(all_of_it[0][:, channels], alone[0])
            for scales, alone_scales in zip(all_of_it[1:], alone[1:], strict=True):
                assert torch.equal(scales[:, kept], alone_scales)


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 24), rules)
def test_blocks_never_span_groups(groups: int, channels: int, block_size: int, rule: str) -> None:
    w = torch.randn(2 * groups, channels, 3, generator=torch.Generator().manual_seed(groups))
    vqk, kds = quantize_weight(w, 4, block_size, groups=groups, rule=rule)
    for part, q, k in zip(w.chunk(groups), vqk.chunk(groups), kds.chunk(groups), strict=True):
        alone = quantize_weight(part, 4, block_size, rule=rule)
        assert torch.equal(q, alone[0]) and torch.equal(k, alone[1])


@given(float_weights(moderate=True), bits_, st.integers(1, 40), rules, st.integers(-60, 60), st.booleans())
def test_integers_do_not_change_with_the_scale_of_a_filter(
    w: Tensor, bits: int, block_size: int, rule: str, power: int, negative: bool
) -> None:
    factor = (-1 if negative else 1) * 2.0**power
    vqk, kds = quantize_weight(w, bits, block_size, rule=rule)
    scaled_vqk, scaled_kds = quantize_weight(w * factor, bits, block_size, rule=rule)
    assert torch.equal(scaled_vqk, vqk)
    assert torch.equal(scaled_kds, kds * factor)


@given(float_weights(moderate=True), bits_, st.integers(1, 40), rules, st.integers(-60, 60))
def test_integers_with_a_shift_do_not_change_with_the_scale_of_a_filter(
    w: Tensor, bits: int, block_size: int, rule: str, power: int
) -> None:
    vqk, kds, shift = quantize_weight_shifted(w, bits, block_size, rule=rule)
    scaled = quantize_weight_shifted(w * 2.0**power, bits, block_size, rule=rule)
    assert torch.equal(scaled.vqk, vqk)
    assert torch.equal(scaled.kds, kds * 2.0**power) and torch.equal(scaled.kds_shift, shift * 2.0**power)


@pytest.mark.parametrize("sign", [1, -1])
def test_of_two_extreme_values_the_first_decides(sign: int) -> None:
    w = sign * torch.tensor([[0.5, -1.0, 1.0, -1.0]])
    vqk, kds = quantize_weight(w, 4, 4)
    assert vqk.tolist() == [[4, -8, 7, -8]]
    assert float(kds) * sign > 0


def test_folding_batchnorm_gives_the_same_integers() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(32, 64, 3, 3, generator=generator)
    norm = torch.nn.BatchNorm2d(32).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=generator))
        norm.running_var.copy_(torch.rand(32, generator=generator) + 0.1)
        norm.weight[5] = 0
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    vqk, kds = quantize_weight(w, 4, 32)
    folded_vqk, folded_kds = quantize_weight(w * factor.view(-1, 1, 1, 1), 4, 32)
    live = torch.arange(32) != 5
    assert not folded_kds[5].any()
    # The products are rounded to float32, which can change the rounding of values so close to the middle of two levels.
    near_tie = torch.zeros_like(w, dtype=torch.bool)
    for tap in itertools.product(range(3), range(3)):
        for block in range(2):
            at = (slice(None), slice(32 * block, 32 * block + 32), *tap)
            level = 8 * w[at].double() / w[at].double().abs().amax(1, keepdim=True)
            near_tie[at] = ((level.abs() % 1) - 0.5).abs() < 1e-5
    changed = (folded_vqk != vqk)[live]
    assert not (changed & ~near_tie[live]).any()
    assert near_tie.float().mean() < 1e-3
    same = ~changed.any(1, keepdim=True).expand(-1, 2, -1, -1)
    expected = (kds * factor.view(-1, 1, 1, 1))[live]
    assert torch.allclose(folded_kds[live][same], expected[same], rtol=1e-5)


@settings(max_examples=10)
@given(float_weights(moderate=True), bits_, st.integers(1, 40), st.sampled_from(["paper", "refined"]))
def test_kl_scale_is_bounded_and_no_worse_in_divergence(w: Tensor, bits: int, block_size: int, rule: str) -> None:
    w = w / w.abs().max().clamp(min=1e-30) * 5
    for amplitude in (0.02, 1.0, 8.0):
        values = w * amplitude
        vqk, l2 = quantize_weight(values, bits, block_size, rule=rule)
        same, kl = quantize_weight(values, bits, block_size, rule=rule, scale="kl")
        assert torch.equal(vqk, same)
        assert (kl.abs() <= 1.5001 * l2.abs()).all() and (kl.abs() >= 0.4999 * l2.abs()).all() and (kl * l2 >= 0).all()
        for (index, part), (_, q) in zip(blocks(values, block_size), blocks(vqk, block_size), strict=True):
            at = (slice(None), *index)
            target = part.double().log_softmax(1)

            def divergence(scale: Tensor, q: Tensor = q, target: Tensor = target) -> Tensor:
                return (target.exp() * (target - (scale.double()[:, None] * q).log_softmax(1))).sum(1)

            found = divergence(kl[at])
            assert (found <= divergence(l2[at]) * (1 + 1e-6) + 1e-7).all()
            for factor in (0.5, 0.8, 0.95, 1.05, 1.2, 1.5):
                assert (found <= divergence(l2[at] * factor) * (1 + 1e-5) + 1e-7).all(), factor


@given(float_weights(moderate=True), bits_, st.integers(1, 40), st.booleans())
def test_refined_is_never_worse_than_paper(w: Tensor, bits: int, block_size: int, shift: bool) -> None:
    quantize = quantize_weight_shifted if shift else quantize_weight
    paper, refined = quantize(w, bits, block_size), quantize(w, bits, block_size, rule="refined")
    power = torch.stack([part.double().square().sum(1) for _, part in blocks(w, block_size)])
    error, before = (squared_errors(w, r[0], r[1], block_size, r[2] if shift else None) for r in (refined, paper))
    assert (error <= before * (1 + 1e-5) + power * 1e-11).all()


def refined_error(w: np.ndarray, bits: int, shift: bool) -> float:
    """Return the squared error of one block by rule ``refined``, in float64, with all steps of each start."""
    half = 2 ** (bits - 1)
    extreme, low, high = w[np.abs(w).argmax()], w.min(), w.max()
    columns = np.ones((2 if shift else 1, len(w)))

    def rounded(scale: float, offset: float) -> np.ndarray:
        return np.clip(np.rint((w - offset) / scale), -half, half - 1)

    def fitted(q: np.ndarray) -> tuple[np.ndarray, float]:
        columns[0] = q
        terms = np.linalg.lstsq(columns.T, w, rcond=None)[0]
        return terms, float(np.square(w - terms @ columns).sum())

    starts = []
    for part in (1, 0.9, 0.8):
        if shift:
            step = (high - low) / (2 * half - 1)
            starts.append((step * part, (low + high) / 2 + step * part / 2))
        else:
            starts += [(-extreme * part / half, 0), (extreme * part / (half - 1), 0)]
    q = min((rounded(*start) for start in starts), key=lambda q: fitted(q)[1])
    scale, offset = (*fitted(q)[0], 0)[:2]
    return fitted(rounded(scale, offset))[1]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_refined_rounds_from_the_best_of_three_ranges_and_either_sign(bits: int, shift: bool) -> None:
    w = torch.randn(60, 24, generator=torch.Generator().manual_seed(bits))
    quantize = quantize_weight_shifted if shift else quantize_weight
    vqk, kds, *offset = quantize(w, bits, 24, rule="refined")
    found = squared_errors(w, vqk, kds, 24, *offset)[0]
    expected = [refined_error(row, bits, shift) for row in w.double().numpy()]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def objective(w: Tensor, vqk: Tensor, kds: Tensor, block_size: int, shift: Tensor) -> Tensor:
    """Return ``e' H e`` of each output and block, with the full ``H = (1 - r) I + r [same input channel] + k 1 1'``."""
    found = []
    error = (w.double() - dequantize_weight(vqk, kds, block_size, shift).double()).reshape(*w.shape[:2], -1)
    taps = error.shape[2]
    r, k = (0.7 if taps > 1 else 0.0), 0.4
    for part in error.split(block_size, dim=1):
        n = part.shape[1]
        same = torch.kron(torch.eye(n, dtype=torch.float64), torch.ones(taps, taps, dtype=torch.float64))
        h = (1 - r) * torch.eye(n * taps, dtype=torch.float64) + r * same + k
        e = part.flatten(1)
        found.append(((e @ h) * e).sum(1))
    return torch.stack(found)


@given(float_weights(moderate=True), bits_, st.integers(1, 12), st.booleans())
def test_balanced_never_raises_its_objective(w: Tensor, bits: int, block_size: int, shift: bool) -> None:
    results = []
    for rule in ("refined", "balanced"):
        if shift:
            results.append(quantize_weight_shifted(w, bits, block_size, rule=rule))
        else:
            vqk, kds = quantize_weight(w, bits, block_size, rule=rule)
            results.append((vqk, kds, torch.zeros_like(kds)))
    before, after = (objective(w, q, a, block_size, c) for q, a, c in results)
    # In float32, errors below 1e-6 of the weights are noise.
    noise = 1e-9 * w.double().square().amax() * w[0].numel()
    assert (after <= before * (1 + 1e-4) + noise).all()


@pytest.mark.parametrize("solver", [None, ops.solve_balanced])
@pytest.mark.parametrize("seed", range(5))
def test_balanced_has_finite_scales_of_the_largest_floats(seed: int, solver: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    sign, kept = (torch.rand(14, 3, 25, generator=generator) > p for p in (0.5, 0.3))
    w = torch.finfo(torch.float32).max * (2.0 * sign - 1) * kept
    found = quantize_weight_shifted(w, 5, 3, rule="balanced", solver=solver)
    assert found.kds.isfinite().all() and found.kds_shift.isfinite().all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shift", [False, True])
def test_balanced_expects_the_inputs_that_are_known(groups: int, shift: bool) -> None:
    """Check that the output error on inputs of these moments is smaller than without knowing them."""
    generator = torch.Generator().manual_seed(0)
    channels = 24 // groups
    w = torch.randn(48, channels, generator=generator)
    mean, deviation = (
        torch.randn(groups, channels, generator=generator).exp(),
        torch.rand(groups, channels, generator=generator),
    )
    moments = InputMoments(mean, deviation.square())
    x = mean + deviation * torch.randn(1000, groups, channels, generator=generator)

    def error(inputs: InputMoments | None) -> float:
        given = {"groups": groups, "rule": "balanced", "inputs": inputs}
        found = quantize_weight_shifted(w, 3, 8, **given) if shift else quantize_weight(w, 3, 8, **given)
        missed = (dequantize_weight(*found[:2], 8, *found[2:]) - w).view(groups, -1, channels)
        return torch.einsum("ngc,goc->ngo", x, missed).square().mean().item()

    known, unknown = error(moments), error(None)
    assert known < 0.5 * unknown


def test_moments_of_another_shape_are_an_error() -> None:
    moments = InputMoments(torch.zeros(1, 8), torch.ones(1, 9))
    with pytest.raises(ValueError, match=r"inputs.variance: expected shape \(1, 8\), got \(1, 9\)"):
        quantize_weight(torch.randn(4, 8), 4, 8, rule="balanced", inputs=moments)


@pytest.mark.parametrize("kernel", [(3, 3), ()])
def test_balanced_lowers_its_objective(kernel: tuple[int, ...]) -> None:
    w = torch.randn(64, 32, *kernel, generator=torch.Generator().manual_seed(2))
    refined, balanced = (quantize_weight(w, 4, 32, rule=rule) for rule in ("refined", "balanced"))
    before, after = (objective(w, vqk, kds, 32, torch.zeros_like(kds)).sum() for vqk, kds in (refined, balanced))
    assert after < (0.75 if kernel else 0.97) * before


@given(float_weights(moderate=True), bits_, st.integers(2, 40), st.sampled_from(["paper", "refined"]))
def test_scale_and_shift_are_the_least_squares_line(w: Tensor, bits: int, block_size: int, rule: str) -> None:
    vqk, kds, shift = quantize_weight_shifted(w, bits, block_size, rule=rule)
    for (index, part), (_, q) in zip(blocks(w, block_size), blocks(vqk, block_size), strict=True):
        at = (slice(None), *index)
        for values, integers, a, c in zip(part.double(), q.double(), kds[at], shift[at], strict=True):
            error = values - integers * a.double() - c.double()
            size = float(values.abs().max())
            assert abs(float(error.sum())) <= 1e-6 * size * len(values)
            assert abs(float((error * integers).sum())) <= 1e-6 * size * len(values) * 2**bits
            if integers.min() == integers.max():
                assert a == 0


@given(float_weights(moderate=True), bits_, st.integers(2, 40))
def test_with_a_shift_the_ends_of_a_block_land_on_the_first_and_last_level(
    w: Tensor, bits: int, block_size: int
) -> None:
    vqk, _, _ = quantize_weight_shifted(w, bits, block_size)
    for (_, part), (_, q) in zip(blocks(w, block_size), blocks(vqk, block_size), strict=True):
        spread = part.amax(1) - part.amin(1) > 1e-4 * part.abs().amax(1)
        assert (q.amin(1)[spread] == -(2 ** (bits - 1))).all()
        assert (q.amax(1)[spread] == 2 ** (bits - 1) - 1).all()


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("value", [3.0, -0.1, 1e-40, 3e38, 0.0])
def test_constant_block_is_its_shift(rule: str, value: float) -> None:
    w = torch.full((2, 5, 3), value)
    vqk, kds, shift = quantize_weight_shifted(w, 4, 5, rule=rule)
    assert not vqk.any() and not kds.any()
    assert torch.equal(dequantize_weight(vqk, kds, 5, shift), w)


def test_shift_lowers_the_error_at_few_bits() -> None:
    w = torch.randn(256, 32, generator=torch.Generator().manual_seed(3)) + 0.3
    for bits in (2, 3, 4):
        plain = quantize_weight(w, bits, 32)
        shifted = quantize_weight_shifted(w, bits, 32)
        assert squared_errors(w, *shifted[:2], 32, shifted.kds_shift).sum() < squared_errors(w, *plain, 32).sum()


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [3e38, 3.4028235e38, 1e-38, 1e-44])
def test_huge_and_subnormal_weights(rule: str, bits: int, size: float) -> None:
    w = torch.randn(8, 24, 2, generator=torch.Generator().manual_seed(bits))
    w = w / w.abs().amax(1, keepdim=True) * size
    w[:, -1] = -w[:, 0]
    for result in (
        (*quantize_weight(w, bits, 16, rule=rule), None),
        (*quantize_weight(w, bits, 16, rule=rule, scale="kl"), None),
        quantize_weight_shifted(w, bits, 16, rule=rule),
    ):
        assert torch.isfinite(result[1]).all()
        assert -(2 ** (bits - 1)) <= int(result[0].min()) and int(result[0].max()) < 2 ** (bits - 1)
        vqk = result[0].double()
        kds = result[1].double().repeat_interleave(16, 1)[:, :24]
        back = vqk * kds
        if result[2] is not None:
            assert torch.isfinite(result[2]).all()
            back = back + result[2].double().repeat_interleave(16, 1)[:, :24]
        error = (w.double() - back).abs().max()
        # A subnormal KDS has few digits.
        assert error <= size * 2.0 ** (2 - bits) + 2.0**-149 * 2 ** (bits - 1)


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_integers_of_huge_weights_are_those_of_ordinary_ones(rule: str) -> None:
    w = torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(5)).clamp(-3.9, 3.9)
    for shift in (False, True):
        quantize = quantize_weight_shifted if shift else quantize_weight
        assert torch.equal(quantize(w * 2.0**126, 4, 16, rule=rule)[0], quantize(w, 4, 16, rule=rule)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_weight_is_an_error(bad: float) -> None:
    w = torch.ones(2, 3, 3, 3)
    w[1, 2, 0, 1] = bad
    for quantize in (quantize_weight, quantize_weight_shifted):
        with pytest.raises(ValueError, match="expected finite values, got 1 NaN or infinite of 54"):
            quantize(w, 4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1}, "bits: expected a whole number in 2..8, got 1"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": True}, "bits"),
        ({"block_size": 0}, "block_size: expected a whole number from 1, got 0"),
        ({"block_size": -3}, "block_size"),
        ({"block_size": 2.0}, "block_size"),
        ({"groups": 3}, "groups: expected a divisor of the 4 output channels, got 3"),
        ({"groups": 0}, "groups"),
        ({"rule": "best"}, "rule: expected one of paper, refined, balanced, got 'best'"),
        ({"scale": "l1"}, "scale: expected one of l2, kl, got 'l1'"),
        ({"w": torch.ones(4, 4, dtype=torch.int32)}, "expected a float tensor"),
        ({"w": torch.ones(4)}, "2 to 5 dimensions"),
        ({"w": torch.ones(1, 1, 1, 1, 1, 1)}, "2 to 5 dimensions"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"w": torch.ones(4, 4), "bits": 4, "block_size": 2} | changes
    with pytest.raises(ValueError, match=message):
        quantize_weight(**arguments)


def test_dequantize_names_shapes_that_do_not_fit() -> None:
    vqk, kds = quantize_weight(torch.randn(4, 10, 3), 4, 4)
    with pytest.raises(ValueError, match=r"kds: expected shape \(4, 2, 3\) .* blocks of 5, got \(4, 3, 3\)"):
        dequantize_weight(vqk, kds, 5)
    with pytest.raises(ValueError, match=r"kds_shift: expected shape \(4, 3, 3\)"):
        dequantize_weight(vqk, kds, 4, kds[:, :1])


@given(float_weights(moderate=True), bits_, st.integers(1, 40), st.booleans())
def test_dequantized_weight_is_scale_times_integer_plus_shift(
    w: Tensor, bits: int, block_size: int, shift: bool
) -> None:
    vqk, kds, c = quantize_weight_shifted(w, bits, block_size)
    back = dequantize_weight(vqk, kds, block_size, c if shift else None)
    assert back.dtype == torch.float32
    for (index, q), (_, part) in zip(blocks(vqk, block_size), blocks(back, block_size), strict=True):
        expected = q.float() * kds[(slice(None), *index)][:, None]
        assert torch.equal(part, expected + c[(slice(None), *index)][:, None] if shift else expected)


@pytest.mark.parametrize("bits", BITS)
def test_weights_on_the_levels_are_kept_exactly(bits: int) -> None:
    half = 2 ** (bits - 1)
    w = torch.arange(-half, half).float().repeat(3, 1) * torch.tensor([[0.5], [2.0], [-4.0]])
    for rule in ("paper", "refined"):
        assert torch.equal(dequantize_weight(*quantize_weight(w, bits, 2 * half, rule=rule), 2 * half), w)


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_results_do_not_depend_on_the_chunks_worked_on(rule: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(13, 21, 3, 2, generator=torch.Generator().manual_seed(4))

    def results() -> list[Tensor]:
        return [
            *quantize_weight(w, 4, 8, rule=rule),
            *quantize_weight(w, 3, 8, rule=rule, scale="kl"),
            *quantize_weight_shifted(w, 2, 8, rule=rule),
        ]

    expected, again = results(), results()
    for module, limit in ((weights, "_CHUNK"), (weights, "_PART"), (balanced, "_SLAB"), (balanced, "_MOST")):
        monkeypatch.setattr(module, limit, chunk)
    for a, b, c in zip(expected, again, results(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("slab", [1, 16, 64, 100, 200, 400])
def test_each_output_is_rounded_for_its_own_inputs_in_any_part(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare parts of a block's outputs, several blocks, or several groups with each one alone."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(12, 20, 3, generator=generator)
    mean, variance = torch.rand(2, 3, 20, generator=generator)
    monkeypatch.setattr(balanced, "_SLAB", slab)
    whole = quantize_weight_shifted(w, 3, 8, groups=3, rule="balanced", inputs=InputMoments(mean, variance))
    for group in range(3):
        for first, last in ((0, 8), (8, 16), (16, 20)):
            known = InputMoments(*(m[group : group + 1, first:last] for m in (mean, variance)))
            outputs, block = slice(4 * group, 4 * group + 4), first // 8
            alone = quantize_weight_shifted(w[outputs, first:last], 3, 8, rule="balanced", inputs=known)
            assert torch.equal(whole.vqk[outputs, first:last], alone.vqk)
            for together, single in zip(whole[1:], alone[1:], strict=True):
                assert torch.equal(together[outputs, block : block + 1], single)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype, rule: str) -> None:
    w = torch.randn(4, 20, 3).to(dtype)
    vqk, kds = quantize_weight(w, 4, 8, rule=rule)
    expected = quantize_weight(w.float(), 4, 8, rule=rule)
    assert kds.dtype == torch.float32
    assert torch.equal(vqk, expected[0]) and torch.equal(kds, expected[1])


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_memory_layout_does_not_matter_and_the_weight_is_left_alone(rule: str) -> None:
    w = torch.randn(6, 20, 3, 3, requires_grad=True)
    before = w.detach().clone()
    expected = quantize_weight(w, 4, 8, rule=rule)
    for view in (
        w.to(memory_format=torch.channels_last),
        w.detach().transpose(0, 1).contiguous().transpose(0, 1),
        w.detach().repeat_interleave(2, 3)[..., ::2],
    ):
        vqk, kds = quantize_weight(view, 4, 8, rule=rule)
        assert torch.equal(vqk, expected[0]) and torch.equal(kds, expected[1])
    assert torch.equal(w, before) and not expected[1].requires_grad


def test_empty_weights_have_empty_results() -> None:
    vqk, kds = quantize_weight(torch.zeros(0, 8, 3), 4, 4)
    assert vqk.shape == (0, 8, 3) and kds.shape == (0, 2, 3)


_MEMORY = """
import torch
from dsconv import nn as dsnn
from dsconv.config import LayerConfig

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
layer = torch.nn.Linear(4096, 4096, bias=False)
{warm}
# The peak is that of this process from here on: ru_maxrss would begin with what its parent had.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = kilobytes("VmRSS")
dsnn.DSLinear.from_float(layer, LayerConfig(weight_rule={rule!r}, weight_shift={shift}))
print((kilobytes("VmHWM") - before) * 1024 / (4 * layer.weight.numel()))
"""
_WARM = "dsnn.DSLinear.from_float(torch.nn.Linear(64, 64), LayerConfig(weight_rule={rule!r}, weight_shift={shift}))"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("rule", "shift"), [("paper", False), ("balanced", True)])
def test_extra_memory_stays_below_twice_the_weights(rule: str, shift: bool) -> None:
    code = _MEMORY.format(warm=_WARM.format(rule=rule, shift=shift), rule=rule, shift=shift)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.25 < float(done.stdout) < 2.0
