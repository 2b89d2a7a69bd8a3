"""Each part of the rounding against its definition, computed in another way, in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dsconv.calibration.collect import Moments
from dsconv.numerics import quantize_weight, quantize_weight_shifted
from dsconv.numerics.balanced import round_balanced
from dsconv.numerics.rounding import (
    Blocks,
    Rounded,
    descend,
    nearest_plane,
    quadratic,
    refit,
    regression_target,
    regularized,
    round_to,
)
from dsconv.numerics.scales import round_rows

# Runs of 7 columns, divided into blocks of 3, 3 and 1.
BLOCKS = Blocks(runs=2, width=7, size=3)


def problem(rows: int = 5, groups: int = 2, d: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights ``(G, R, d)``, correlated inputs ``(G, n, d)``, and the inputs' second moments."""
    torch.manual_seed(0)
    x = torch.randn(groups, 200, d) @ torch.randn(groups, d, d) + torch.randn(groups, 200, d)
    return torch.randn(groups, rows, d), x, x.mT @ x / 200


def loss(rounded: Rounded, target: Tensor, h: Tensor, blocks: Blocks = BLOCKS) -> Tensor:
    return quadratic((rounded.weight(blocks) - target).double(), h.double())


def test_blocks_add_up_and_spread() -> None:
    parts = BLOCKS.parts()
    assert [(part.start, part.stop) for part in parts] == [(0, 3), (3, 6), (6, 7), (7, 10), (10, 13), (13, 14)]
    x = torch.randn(3, 14)
    torch.testing.assert_close(BLOCKS.sums(x), torch.stack([x[:, part].sum(1) for part in parts], 1))
    spread = BLOCKS.spread(BLOCKS.sums(x))
    for block, part in enumerate(parts):
        assert (spread[:, part] == BLOCKS.sums(x)[:, block, None]).all()


def test_the_target_is_the_regression_of_outputs_on_inputs() -> None:
    w, x, _ = problem()
    y = torch.randn(2, 200, 5)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    g = (y - x @ w.mT).mT @ x / 200
    got = regression_target(w, x.mT @ x / 200, g)
    for group in range(2):
        expected = np.linalg.lstsq(x[group].double().numpy(), y[group].double().numpy(), rcond=None)[0].T
        np.testing.assert_allclose(got[group], expected, rtol=1e-3, atol=1e-3)


def test_a_ridge_pulls_the_target_to_the_weights() -> None:
    w, _, h = problem()
    g = torch.randn_like(w)
    distance = [float((regression_target(w, regularized(h, ridge), g) - w).norm()) for ridge in (0.01, 1.0, 100.0)]
    assert distance[0] > distance[1] > distance[2] > 0
    dead = regularized(torch.zeros(1, 3, 3), 0.1)
    assert torch.equal(regression_target(w[:1, :, :3], dead, torch.zeros(1, 5, 3)), w[:1, :, :3])


def test_nearest_plane_is_gptq() -> None:
    """Compare with rounding each column at the optimum for which the later columns stay real numbers."""
    w, _, h = problem(groups=1, d=8)
    blocks = Blocks(runs=1, width=8, size=8)
    got = nearest_plane(w, h, blocks, bits=4)
    target, hessian = w[0].double().numpy(), h[0].double().numpy()
    _, kds = quantize_weight(w[0], 4, 8, rule="refined")
    for row, scale in enumerate(kds[:, 0].double().numpy()):
        error = np.zeros(8)
        for k in range(7, -1, -1):
            free = -np.linalg.solve(hessian[: k + 1, : k + 1], hessian[: k + 1, k + 1 :] @ error[k + 1 :])
            level = np.clip(np.round((target[row, k] - free[k]) / scale), -8, 7)
            assert got.q[0, row, k] == level
            error[k] = target[row, k] - scale * level


@pytest.mark.parametrize("shift", [False, True])
def test_without_correlation_nearest_plane_rounds_to_the_nearest(shift: bool) -> None:
    w, _, _ = problem()
    h = torch.diag_embed(torch.rand(2, 14) + 0.1)
    got = nearest_plane(w, h, BLOCKS, bits=3, shift=shift)
    for block, part in enumerate(BLOCKS.parts()):
        rows = w[..., part].flatten(0, 1)
        size = rows.shape[1]
        if shift:
            _, scale, offset = quantize_weight_shifted(rows, 3, size, rule="refined")
            assert got.shift is not None
            torch.testing.assert_close(got.shift[..., block].flatten(), offset.flatten())
        else:
            _, scale = quantize_weight(rows, 3, size, rule="refined")
        torch.testing.assert_close(got.scale[..., block].flatten(), scale.flatten())
    step = BLOCKS.spread(got.scale)
    inside = (got.q > -4) & (got.q < 3)
    assert inside.any() and ((got.weight(BLOCKS) - w).abs() <= step.abs() / 2 + 1e-5)[inside].all()


@pytest.mark.parametrize("shift", [False, True])
def test_refit_is_least_squares(shift: bool) -> None:
    w, x, h = problem(d=14)
    plain = nearest_plane(w, h, BLOCKS, bits=4, shift=shift)
    got = refit(w, h, BLOCKS, plain)
    assert torch.equal(got.q, plain.q) and (got.shift is not None) is shift
    assert (loss(got, w, h) <= loss(plain, w, h) * (1 + 1e-4)).all()
    for group, row in itertools.product(range(2), range(5)):
        ones = torch.zeros(6, 14)
        for block, part in enumerate(BLOCKS.parts()):
            ones[block, part] = 1
        # The block of one column has a scale and a shift for one weight, so least squares has many solutions.
        basis = torch.cat([got.q[group, row] * ones, *([ones] if shift else [])]).double()
        inputs = x[group].double()
        design, wanted = inputs @ basis.T, inputs @ w[group, row].double()
        z = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
        least = (design @ z - wanted).square().mean()
        assert least <= loss(got, w, h)[group, row] * (1 + 1e-4)
        torch.testing.assert_close(loss(got, w, h)[group, row], least, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_descend_ends_where_no_single_integer_can_improve(bits: int) -> None:
    w, _, h = problem()
    vqk, kds = quantize_weight(w.flatten(0, 1), bits, 14, rule="paper")
    scale = kds.view(2, 5, 1).expand(2, 5, 6).contiguous()
    start = Rounded(vqk.view(2, 5, 14).float(), scale, None)
    got = descend(w, h, BLOCKS, start, bits)
    assert (loss(got, w, h) <= loss(start, w, h) * (1 + 1e-6)).all()
    assert loss(got, w, h).sum() < 0.9 * loss(start, w, h).sum()
    while (again := descend(w, h, BLOCKS, got, bits)).q.ne(got.q).any():
        got = again
    for column, level in itertools.product(range(14), range(-(1 << bits - 1), 1 << bits - 1)):
        changed = got.q.clone()
        changed[..., column] = level
        assert (loss(Rounded(changed, scale, None), w, h) >= loss(got, w, h) * (1 - 1e-5)).all()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_round_to_is_better_than_rounding_alone_and_near_the_best(bits: int, shift: bool) -> None:
    w, _, h = problem(rows=8)
    got = round_to(w, h, BLOCKS, bits, shift=shift)
    assert got.q.min() >= -(1 << bits - 1) and got.q.max() < 1 << bits - 1 and torch.equal(got.q, got.q.round())
    plain = round_to(w, torch.eye(14).expand_as(h), BLOCKS, bits, shift=shift)
    assert loss(got, w, h).sum() < 0.7 * loss(plain, w, h).sum()


def test_round_to_against_all_integers_of_a_small_row() -> None:
    w, _, h = problem(rows=12, groups=1, d=4)
    blocks = Blocks(runs=1, width=4, size=4)
    got = loss(round_to(w, h, blocks, 2), w, h, blocks)[0]
    target, hessian = w[0].double(), h[0].double()
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for levels in itertools.product(range(-2, 2), repeat=4):
        q = torch.tensor(levels, dtype=torch.float64)
        energy = q @ hessian @ q
        scale = torch.zeros(12, 1) if energy == 0 else (target @ hessian @ q / energy)[:, None]
        best = torch.minimum(best, quadratic(scale * q - target, hessian))
    assert (got >= best * (1 - 1e-5)).all()
    assert (got <= best * 1.01).sum() >= 4 and got.sum() < 2 * best.sum()


def test_a_scale_without_a_finite_inverse_rounds_to_numbers() -> None:
    """Fit a block that outputs do not depend on."""
    target, h, blocks = torch.randn(1, 3, 8), torch.eye(8).unsqueeze(0), Blocks(runs=1, width=8, size=4)
    scale = torch.tensor([5.6e-41, 0.1]).expand(1, 3, 2)
    found = descend(target, h, blocks, Rounded(torch.ones(1, 3, 8), scale, torch.zeros(1, 3, 2)), 4)
    assert found.q.isfinite().all() and found.scale.equal(scale)


def test_a_block_of_zeros_stays_zero() -> None:
    w, _, h = problem()
    w[..., 3:6] = 0
    got = round_to(w, torch.eye(14).expand_as(h), BLOCKS, 4)
    assert not got.q[..., 3:6].any() and torch.isfinite(got.scale).all()
    assert not got.weight(BLOCKS)[..., 3:6].any()


def test_moments_are_those_of_numpy() -> None:
    w, x, _ = problem()
    x = x + 30  # far from zero, like inputs after ReLU
    y = (x @ w.mT + torch.randn(2, 200, 5) + 7).transpose(0, 1).flatten(1)
    moments = Moments(w)
    for part in (slice(0, 50), slice(50, 51), slice(51, 200)):
        moments.add(x[:, part], y[part])
    assert moments.is_finite()
    moments.finish()
    assert moments.count == 200
    v, bias = w + 0.1 * torch.randn_like(w), torch.randn(2, 5)
    squares, variance = 0.0, 0.0
    for group in range(2):
        inputs, outputs = x[group].double().numpy(), y.view(200, 2, 5)[:, group].double().numpy()
        left = outputs - inputs @ w[group].double().numpy().T
        both = np.cov(np.concatenate([inputs, left], 1).T, bias=True)
        np.testing.assert_allclose(moments.h[group], both[:14, :14], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(moments.g[group], both[14:, :14], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(moments.noise[group], np.diag(both[14:, 14:]), rtol=1e-3)
        np.testing.assert_allclose(moments.mean_x[group], inputs.mean(0), rtol=1e-5)
        made = inputs @ v[group].double().numpy().T
        right = (outputs - made).mean(0)
        np.testing.assert_allclose(moments.bias(v)[group], right, rtol=1e-4, atol=1e-3)
        squares += np.square(outputs - made - bias[group].numpy()).mean(0).sum()
        variance += outputs.var(0).sum()
    assert moments.error(v, bias) == pytest.approx(squares / variance, rel=1e-4)
    moments.add(torch.full((2, 1, 14), torch.inf), y[:1])
    assert not moments.is_finite()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("taps", [1, 4, 9])
@pytest.mark.parametrize("known", [False, True])
def test_balanced_is_the_same_under_a_matrix_that_is_built_in_full(known: bool, taps: int, shift: bool) -> None:
    """Use groups, and blocks of one output, with different inputs; some integers are at the end of their range."""
    generator = torch.Generator().manual_seed(taps)
    groups, outputs, blocks, n = (2, 5, 3, 16) if known else (1, 15, 1, 16)
    w = torch.randn(groups * outputs * blocks, taps, n, generator=generator)
    mean, variance = torch.rand(2, groups, blocks, n, generator=generator)
    if not known:
        mean, variance = torch.full_like(mean, 0.4**0.5), torch.ones_like(variance)
    # Rows of one kind of inputs are adjacent: (T, n, groups, blocks, outputs).
    order = torch.unflatten(w, 0, (groups, outputs, blocks)).permute(3, 4, 0, 2, 1)
    moments = mean.flatten(0, 1).mT, variance.flatten(0, 1).mT
    solved = round_balanced(order.flatten(2), moments if known else None, 3, shift)
    q, scale, offset = (
        torch.unflatten(value, 2, (groups, blocks, outputs)).permute(2, 4, 3, 0, 1).flatten(0, 2) for value in solved
    )

    alike = torch.full((taps, taps), 0.7).fill_diagonal_(1.0)
    h = torch.einsum("st,gbn,nm->gbsntm", alike, variance, torch.eye(n)).reshape(groups, blocks, taps * n, taps * n)
    h = (h + torch.einsum("gbi,gbj->gbij", *[mean.repeat(1, 1, taps)] * 2)).double().flatten(0, 1)
    target = w.double().view(groups, outputs, blocks, taps * n).transpose(1, 2).flatten(0, 1)
    cut = Blocks(taps, n, n)
    full = round_to(target, regularized(h, 0.1), cut, 3, shift=shift, sweeps=1)

    def by_block(value: Tensor) -> Tensor:
        return value.view(groups, outputs, blocks, -1).transpose(1, 2).flatten(0, 1)

    found = Rounded(by_block(q).double(), by_block(scale).double(), by_block(offset).double())
    refined = [by_block(value).double() for value in round_rows(w, 4, "refined", shift)]
    plain = quadratic(Rounded(*refined).weight(cut) - target, h)
    assert torch.allclose(
        quadratic(found.weight(cut) - target, h), quadratic(full.weight(cut) - target, h).minimum(plain)
    )
    same = (found.q == full.q).all(-1)
    assert same.float().mean() > 0.8  # the others are results of rule refined
    assert (found.q[~same] == refined[0][~same]).all()
