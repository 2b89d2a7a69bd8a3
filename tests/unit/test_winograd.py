"""3x3 Winograd convolutions in integers, as dsconv.numerics defines them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dsconv import LayerConfig, ops
from dsconv.nn import DSConv2d
from dsconv.numerics import (
    NONFINITE,
    WinogradWeight,
    dequantize_winograd_weight,
    fake_winograd_weight,
    quantize_winograd_input,
    reference_winograd,
    winograd_conv,
    winograd_input,
    winograd_output,
    winograd_weight,
)
from dsconv.numerics.winograd import MOST, MOST_OF_LANE

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def transformed(w: Tensor) -> Tensor:
    """Return ``G g G'`` in float64, ``(16, O, C)``."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    return torch.einsum("ik,ockl,jl->ijoc", g, w.double(), g).flatten(0, 1)


@given(sizes, st.tuples(st.integers(0, 2), st.integers(0, 2)), st.integers(0, 2), st.integers(1, 20))
def test_the_transforms_make_the_convolution(size: tuple[int, int], pad: tuple[int, int], n: int, c: int) -> None:
    if min(s + 2 * p for s, p in zip(size, pad, strict=True)) < 3:
        return
    x, w = torch.randint(-9, 10, (n, c, *size)).float(), torch.randint(-9, 10, (3, c, 3, 3)).float()
    m = torch.einsum("poc,ncphw->nophw", transformed(w), winograd_input(x, pad).double())
    expected = F.conv2d(x.double(), w.double(), padding=pad)
    assert torch.equal(winograd_output(m, (expected.shape[2], expected.shape[3])), expected)


@given(
    st.integers(1, 5), st.integers(1, 70), st.sampled_from([1, 4, 8, 24, 64]), st.floats(-60, 60), st.integers(0, 99)
)
def test_integers_of_the_weight_fit_bytes_and_lanes(o: int, c: int, size: int, power: float, seed: int) -> None:
    w = torch.randn(o, c, 3, 3, generator=torch.Generator().manual_seed(seed)).pow(3) * 2**power
    integers, scale = winograd_weight(w, size)
    assert integers.shape == (17, o, c) and scale.shape == (17, o, math.ceil(c / size))
    assert integers.abs().max() <= MOST
    for block in integers.int().split(size, 2):
        for eight in F.pad(block, (0, -block.shape[2] % 8)).split(8, 2):
            for lane in (eight[..., [0, 1, 4, 5]], eight[..., [2, 3, 6, 7]]):
                assert max(lane.clamp(min=0).sum(2).max(), -lane.clamp(max=0).sum(2).min()) <= MOST_OF_LANE
    # Half a step, and the rounding of the transform to float32 and of the product.
    u, near = transformed(w), dequantize_winograd_weight(winograd_weight(w, size), size).double()
    step = scale.double().repeat_interleave(size, 2)[:, :, :c]
    step = torch.cat([step[:5], step[16:], step[6:16]])
    assert ((near - u).abs() <= 0.5001 * step + 1e-6 * u.abs()).all()


def test_a_scale_is_no_larger_than_it_must_be() -> None:
    w = torch.randn(16, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, _ = winograd_weight(w, 64)
    u = transformed(w)
    error = (dequantize_winograd_weight(winograd_weight(w, 64), 64) - u).square().sum() / u.square().sum()
    assert 10 * math.log10(error) < -36  # 7 bits up to the largest value give -35
    eights = integers.int().unflatten(2, (-1, 8))
    lanes = torch.stack([eights[..., [0, 1, 4, 5]], eights[..., [2, 3, 6, 7]]]).clamp(min=0).sum(-1)
    assert (lanes.amax((0, 3)) > 0.85 * MOST_OF_LANE).float().mean() > 0.5


@pytest.mark.parametrize("magnitude", [1e-44, 1e-43, 1e-42, 1e-41, 1e-38, 1e-37, 1e37, 1.4e38])
def test_weights_at_the_ends_of_floats_are_rounded(magnitude: float) -> None:
    w = (torch.rand(4, 16, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1) * magnitude / 1.1
    integers, scale = winograd_weight(w, 8)
    assert integers.abs().max() <= MOST and scale.isfinite().all()
    for lane in ([0, 1, 4, 5], [2, 3, 6, 7]):
        for sign in (1, -1):
            assert (sign * integers.int().view(17, 4, 2, 8)[..., lane]).clamp(min=0).sum(3).max() <= MOST_OF_LANE
    near = dequantize_winograd_weight(WinogradWeight(integers, scale), 8).double()
    assert ((near - transformed(w)).abs() <= 3e-2 * magnitude + 2e-43).all()


def test_an_empty_block_of_the_weight_is_zero() -> None:
    w = torch.zeros(2, 16, 3, 3)
    w[1, :8] = 1
    integers, scale = winograd_weight(w, 8)
    assert scale[:, 0].eq(1).all() and integers[:, 0].eq(0).all() and integers[:, 1, 8:].eq(0).all()
    assert integers[:16, 1, :8].ne(0).all()


@given(st.integers(1, 40), st.sampled_from([8, 16, 64]), st.booleans(), st.integers(0, 99))
def test_mantissas_are_the_nearest_of_eight_bits(c: int, size: int, rectified: bool, seed: int) -> None:
    x = torch.randn(1, c, 5, 6, generator=torch.Generator().manual_seed(seed))
    v = winograd_input(x.relu() if rectified else x, (1, 1))
    mantissa, exponent = quantize_winograd_input(v, size)
    assert exponent.shape == (1, math.ceil(c / size), 16, 3, 3)
    centre = torch.arange(16) == 5
    others = mantissa[:, :, ~centre]
    assert others.min() >= -128 and others.max() <= 127
    step = torch.exp2(exponent.double()).repeat_interleave(size, 1)[:, :c]
    near = mantissa * step
    clamped = (mantissa == 127) | (mantissa == 255)
    assert ((near - v).abs() <= torch.where(clamped, 1, 0.5) * step).all()
    for block, of in zip(v.split(size, 1), mantissa.split(size, 1), strict=True):
        positive = block[:, :, 5].amin(1) >= 0
        assert (of[:, :, 5].amin(1)[positive] >= 0).all()
        assert (of[:, :, 5].amax(1)[positive & (block[:, :, 5].amax(1) > 0)] >= 128).all()
        assert (of[:, :, 5].amax(1)[~positive] <= 127).all()


@settings(max_examples=20)
@given(sizes, st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_the_simulation_is_the_reference_but_for_its_sums(size: tuple[int, int], c: int, b: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(2, c, *size), winograd_weight(torch.randn(5, c, 3, 3), 16), torch.randn(5)
    given_bias = bias if b else None
    expected = reference_winograd(
        *quantize_winograd_input(winograd_input(x, (1, 1)), 16), weight, 16, size, bias=given_bias
    )
    y = winograd_conv(x, dequantize_winograd_weight(weight, 16), given_bias, (1, 1), 16)
    assert ((y - expected.output).abs() <= 4 * expected.bound).all()


def test_it_is_near_the_convolution() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 64, 14, 14).relu(), torch.randn(32, 64, 3, 3)
    u = dequantize_winograd_weight(winograd_weight(w, 64), 64)
    y, expected = winograd_conv(x, u, None, (1, 1), 64), F.conv2d(x, w, padding=1)
    assert 10 * ((y - expected).square().sum() / expected.square().sum()).log10() < -33.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_all_outputs_that_read_it_and_in_no_other(value: float) -> None:
    x, w = torch.randn(1, 8, 7, 6), torch.randn(3, 8, 3, 3)
    x[0, 3, 2, 1] = value
    u = dequantize_winograd_weight(winograd_weight(w, 8), 8)
    direct = F.conv2d(x, w, padding=1)
    assert torch.equal(winograd_conv(x, u, None, (1, 1), 8).isnan(), ~direct.isfinite())
    _, exponent = quantize_winograd_input(winograd_input(x, (1, 1)), 8)
    assert (exponent == NONFINITE).any()


def test_sums_beyond_the_range_of_floats_are_nan() -> None:
    x, w = torch.full((1, 8, 4, 4), 3e38), torch.randn(3, 8, 3, 3)
    y = winograd_conv(x, dequantize_winograd_weight(winograd_weight(w, 8), 8), None, (0, 0), 8)
    assert y.isnan().all()


def test_blocks_that_are_next_to_nothing_are_zero() -> None:
    x, w = torch.full((1, 8, 4, 4), 2.0**-103), torch.ones(3, 8, 3, 3)
    u = dequantize_winograd_weight(winograd_weight(w, 8), 8)
    assert winograd_conv(x, u, None, (0, 0), 8).eq(0).all() and not winograd_conv(2 * x, u, None, (0, 0), 8).eq(0).any()


def test_its_gradients_are_those_of_the_convolution() -> None:
    torch.manual_seed(0)
    x, w, bias = torch.randn(1, 8, 5, 4, dtype=torch.double), torch.randn(3, 8, 3, 3), torch.randn(3)
    x, bias = x.float().requires_grad_(), bias.requires_grad_()
    u = transformed(w).float().requires_grad_()
    winograd_conv(x, u, bias, (1, 1), 8).square().sum().backward()
    found = x.grad
    assert found is not None and u.grad is not None and bias.grad is not None
    other = x.detach().clone().requires_grad_()
    F.conv2d(other, w, bias, padding=1).square().sum().backward()
    assert other.grad is not None
    assert (found - other.grad).norm() < 0.02 * other.grad.norm()


def test_the_gradient_of_the_weight_is_that_of_its_transform() -> None:
    torch.manual_seed(0)
    w, weights = torch.randn(5, 20, 3, 3, requires_grad=True), torch.randn(16, 5, 20)
    u = fake_winograd_weight(w, 8)
    assert torch.equal(u, dequantize_winograd_weight(winograd_weight(w.detach(), 8), 8))
    (found,) = torch.autograd.grad((u * weights).sum(), w)
    (expected,) = torch.autograd.grad((transformed(w) * weights).sum(), w)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(3, 8, 3), (3, 8, 5, 5), (3, 8, 3, 1)])
def test_other_kernels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a weight \(O, C, 3, 3\)"):
        winograd_weight(torch.zeros(shape), 8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_weights_that_are_not_finite_make_their_outputs_nan_by_kernels_and_simulated(value: float) -> None:
    config = LayerConfig(block_size=8, activation_bits=8, algorithm="winograd")
    layer = DSConv2d(16, 3, 3, bias=False, config=config).eval()
    layer.vqk = torch.full((3, 16, 3, 3), 7, dtype=torch.int8)
    layer.kds = torch.full((3, 2, 3, 3), 40.0)
    layer.kds[1, 1, 1, 1] = value
    layer.pack_()
    x = torch.full((1, 16, 5, 5), 255.0)
    with torch.inference_mode():
        y = layer(x)
        with ops.simulated():
            simulated = layer(x)
    assert y[:, [0, 2]].isfinite().all() and torch.allclose(y[:, [0, 2]], simulated[:, [0, 2]])
    # 1e38 times 7 is also infinite.
    assert y[:, 1].isnan().all() and simulated[:, 1].isnan().all()
    weight = ops.round_winograd(layer.dequantized_weight(), 8)
    assert weight.scale[:, 1, 1].isnan().any() and (weight.integers[weight.scale.isnan().any(2)][..., 8:] == 0).all()


def test_images_smaller_than_the_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 3x3 pixels at least, padding included"):
        winograd_input(torch.ones(1, 8, 2, 5), (0, 0))
    assert winograd_input(torch.ones(1, 8, 1, 1), (1, 1)).shape == (1, 8, 16, 1, 1)
