"""Activations in block floating point: the table of conventions, against an oracle in exact rational numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsconv.numerics import (
    ACTIVATION_SIGNS,
    NONFINITE,
    dequantize_activation,
    fake_quantize_activation,
    quantize_activation,
)

bits_ = st.integers(2, 8)
signs = st.sampled_from(ACTIVATION_SIGNS)
MAX_FLOAT = 3.4028234663852886e38

any_bits = st.integers(0, 2**32 - 1).map(lambda n: float(np.uint32(n).view(np.float32)))
on_a_grid = st.tuples(st.integers(-1024, 1024), st.integers(-12, 12)).map(lambda p: p[0] * 2.0 ** p[1])
edges = st.sampled_from(
    [
        0.0,
        -0.0,
        2.0 ** (-100),
        2.0 ** (-101),
        -(2.0 ** (-100)),
        float(np.nextafter(np.float32(2.0**-100), np.float32(0))),  # the float32 below; that of float64 would round up
        1e-45,
        1e-40,
        MAX_FLOAT,
        -MAX_FLOAT,
        2.0**127,
        1.0,
        -1.0,
        2.0,
        0.9999999403953552,
        1.0000001192092896,
    ]
)
values = st.one_of(
    st.lists(any_bits, min_size=1, max_size=12),
    st.lists(on_a_grid, min_size=1, max_size=12),
    st.lists(st.one_of(edges, on_a_grid), min_size=1, max_size=12),
    st.lists(on_a_grid.map(abs), min_size=1, max_size=12),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
)


def oracle(block: list[float], bits: int, sign: str) -> tuple[list[int], int]:
    """Return mantissas and exponent of one block according to the table of the arithmetic."""
    if not all(map(math.isfinite, block)):
        return [0] * len(block), NONFINITE
    largest = max(map(abs, block))
    if largest < 2.0**-100:
        return [0] * len(block), 0
    signed = min(block) < 0
    m = 7 if bits == 8 else bits if sign == "extra" or (sign == "adaptive" and not signed) else bits - 1
    low, high = (-(2**m - 1) if sign == "extra" else -(2**m)), 2**m - 1
    exponent = math.frexp(largest)[1] - 1 - m + 1
    lsb = Fraction(2) ** exponent
    return [min(max(round(Fraction(x) / lsb), low), high) for x in block], exponent


def ldexp32(mantissa: int, exponent: int) -> float:
    """Return ``mantissa * 2^exponent`` in float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(np.ldexp(np.float64(mantissa), exponent)))


@settings(max_examples=300)
@given(values, bits_, signs)
def test_every_block_is_what_the_table_says(block: list[float], bits: int, sign: str) -> None:
    x = torch.tensor([block])
    mantissa, exponent = quantize_activation(x, bits, len(block), sign=sign)
    expected_mantissa, expected_exponent = oracle(block, bits, sign)
    assert mantissa.dtype == torch.int8 and exponent.dtype == torch.int8
    assert mantissa[0].tolist() == expected_mantissa
    assert exponent.tolist() == [[expected_exponent]]
    back = dequantize_activation(mantissa, exponent, len(block))
    if expected_exponent == NONFINITE:
        assert back.isnan().all()
    else:
        assert back[0].tolist() == [ldexp32(q, expected_exponent) for q in expected_mantissa]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", ACTIVATION_SIGNS)
def test_range_of_mantissas(bits: int, sign: str) -> None:
    m_unsigned = 7 if bits == 8 else bits - (sign == "included")
    m_signed = 7 if bits == 8 else bits - (sign != "extra")
    generator = torch.Generator().manual_seed(bits)
    x = torch.rand(5000, 16, generator=generator)
    mantissa, _ = quantize_activation(x, bits, 16, sign=sign)
    assert (int(mantissa.min()), int(mantissa.max())) == (0, 2**m_unsigned - 1)
    assert (mantissa.amax(1) >= 2 ** (m_unsigned - 1)).all()
    mantissa, _ = quantize_activation(torch.randn(5000, 16, generator=generator), bits, 16, sign=sign)
    lowest = -(2**m_signed - 1) if sign == "extra" else -(2**m_signed)
    assert (int(mantissa.min()), int(mantissa.max())) == (lowest, 2**m_signed - 1)


@pytest.mark.parametrize("power", range(-100, 128))
def test_exponent_is_exact_at_powers_of_two(power: int) -> None:
    at = 2.0**power
    below = float(np.nextafter(np.float32(at), np.float32(0)))
    x = torch.tensor([[at, 0.0], [below, 0.0]])
    _, exponent = quantize_activation(x, 4, 2, sign="extra")
    assert exponent.flatten().tolist() == [power - 3, power - 4 if power > -100 else 0]


def test_ties_go_to_even() -> None:
    x = torch.tensor([[8.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]])
    assert quantize_activation(x, 4, 8, sign="extra")[0].tolist() == [[8, 0, 2, 2, 4, 0, -2, -2]]


def test_adaptive_chooses_per_block() -> None:
    x = torch.tensor([[1.0, 15.0, 3.0, -1.0, 15.0, 3.0, 0.0, -0.0]])
    mantissa, exponent = quantize_activation(x, 4, 3)
    assert mantissa.tolist() == [[1, 15, 3, 0, 7, 2, 0, 0]]
    assert exponent.tolist() == [[0, 1, 0]]


@given(values)
def test_eight_bits_are_seven_and_a_sign_in_all_conventions(block: list[float]) -> None:
    x = torch.tensor([block])
    extra, included, adaptive = (quantize_activation(x, 8, 4, sign=sign) for sign in ("extra", "included", "adaptive"))
    for result in (included, adaptive):
        assert torch.equal(result[1], extra[1])
        assert torch.equal(result[0].clamp(min=-127), extra[0])


@given(values, bits_, signs, st.integers(1, 6), st.integers(1, 3))
def test_fake_quantization_is_the_round_trip(
    row: list[float], bits: int, sign: str, block_size: int, groups: int
) -> None:
    x = torch.tensor([row * groups]).repeat(2, 1).view(2, -1, 1).repeat(1, 1, 2)
    round_trip = dequantize_activation(
        *quantize_activation(x, bits, block_size, sign=sign, groups=groups), block_size, groups=groups
    )
    for value in (x, x.clone().requires_grad_()):
        fake = fake_quantize_activation(value, bits, block_size, sign=sign, groups=groups)
        assert fake.shape == x.shape
        assert torch.equal(fake.isnan(), round_trip.isnan())
        assert torch.equal(fake.nan_to_num(0.0, math.inf, -math.inf), round_trip.nan_to_num(0.0, math.inf, -math.inf))


@given(st.integers(1, 20), st.integers(1, 24), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=3), signs)
def test_blocks_are_channels_of_one_image_place_and_group(
    channels: int, block_size: int, groups: int, size: list[int], sign: str
) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, groups * channels, *size, generator=generator)
    x[:, ::3] = x[:, ::3].abs()
    mantissa, exponent = quantize_activation(x, 4, block_size, sign=sign, groups=groups)
    count = -(-channels // block_size)
    assert exponent.shape == (2, groups * count, *size)
    flat, m_flat, e_flat = (t.movedim(1, -1).reshape(-1, t.shape[1]).tolist() for t in (x, mantissa, exponent))
    for values, mantissas, exponents in zip(flat, m_flat, e_flat, strict=True):
        for g in range(groups):
            for b in range(count):
                at = slice(g * channels + b * block_size, g * channels + min(channels, (b + 1) * block_size))
                assert (mantissas[at], exponents[g * count + b]) == oracle(values[at], 4, sign)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sign", ACTIVATION_SIGNS)
def test_nonfinite_block_and_no_other_is_nan(bad: float, sign: str) -> None:
    x = torch.ones(2, 10, 3)
    x[1, 5, 2] = bad
    mantissa, exponent = quantize_activation(x, 4, 4, sign=sign)
    assert (exponent == NONFINITE).nonzero().tolist() == [[1, 1, 2]]
    assert not mantissa[1, 4:8, 2].any()
    expected = torch.zeros(2, 10, 3, dtype=torch.bool)
    expected[1, 4:8, 2] = True
    assert torch.equal(dequantize_activation(mantissa, exponent, 4).isnan(), expected)
    assert torch.equal(fake_quantize_activation(x, 4, 4, sign=sign).isnan(), expected)


def test_gradient_passes_straight_through() -> None:
    x = torch.randn(3, 10, 4, requires_grad=True)
    y = fake_quantize_activation(x, 2, 4, groups=2)
    assert not torch.equal(y, x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_gradient_of_half_precision_input_keeps_its_dtype() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    fake_quantize_activation(x, 4, 4).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and (x.grad == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 20, 3) * 3).to(dtype)
    for result, expected in zip(quantize_activation(x, 5, 8), quantize_activation(x.float(), 5, 8), strict=True):
        assert torch.equal(result, expected)
    assert fake_quantize_activation(x, 5, 8).dtype == torch.float32


def test_half_precision_subnormals_keep_their_exponent() -> None:
    x = torch.tensor([[2.0**-24, 0.0]], dtype=torch.float16)
    assert fake_quantize_activation(x, 4, 2).tolist() == [[2.0**-24, 0.0]]


@pytest.mark.parametrize("shape", [(0, 8, 2), (2, 8, 0), (0, 8)])
def test_empty_batch_and_size(shape: tuple[int, ...]) -> None:
    mantissa, exponent = quantize_activation(torch.zeros(shape), 4, 3)
    assert mantissa.shape == shape and exponent.shape == (shape[0], 3, *shape[2:])
    assert dequantize_activation(mantissa, exponent, 3).shape == shape
    assert fake_quantize_activation(torch.zeros(shape, requires_grad=True), 4, 3).shape == shape


def test_memory_layout_does_not_matter_and_the_input_is_left_alone() -> None:
    x = torch.randn(2, 10, 4, 5)
    before = x.clone()
    expected = quantize_activation(x, 4, 4)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for a, b in zip(quantize_activation(view, 4, 4), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(x, before)


@pytest.mark.parametrize("sign", ACTIVATION_SIGNS)
def test_quantizing_twice_changes_nothing(sign: str) -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for bits in range(2, 9):
        once = fake_quantize_activation(x, bits, 32, sign=sign)
        if sign == "extra":  # otherwise -2^m may round up into the next octave, whose grid is coarser
            assert torch.equal(fake_quantize_activation(once, bits, 32, sign=sign), once)
        assert (once - x).abs().max() <= x.abs().max() * 2.0 ** (2 - bits)


def call(**changes: object) -> tuple[Tensor, Tensor]:
    arguments: dict[str, object] = {"x": torch.ones(2, 6), "bits": 4, "block_size": 2} | changes
    return quantize_activation(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1}, "bits: expected a whole number in 2..8, got 1"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.5}, "bits"),
        ({"block_size": 0}, "block_size: expected a whole number from 1, got 0"),
        ({"sign": "both"}, "sign: expected one of adaptive, extra, included, got 'both'"),
        ({"groups": 4}, "groups: expected a divisor of the 6 channels, got 4"),
        ({"groups": 0}, "groups"),
        ({"x": torch.ones(2, 6, dtype=torch.int8)}, "expected a float tensor, got torch.int8"),
        ({"x": torch.ones(6)}, r"expected a tensor \(N, C, ...\), got shape \(6,\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_dequantize_names_shapes_that_do_not_fit() -> None:
    mantissa, exponent = call()
    with pytest.raises(ValueError, match=r"exponent: expected shape \(2, 2\), got \(2, 3\)"):
        dequantize_activation(mantissa, exponent, 3)
