"""The exact reference convolution, against loops over exact rational numbers; and error bounds against it."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import nn as tnn

from dsconv import nn, ops
from dsconv.config import LayerConfig
from dsconv.numerics import (
    NONFINITE,
    Reference,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight_shifted,
    reference_conv,
)


def loops(
    m: Tensor,
    e: Tensor,
    vqk: Tensor,
    kds: Tensor,
    block_size: int,
    shift: Tensor | None,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> dict[tuple[int, ...], tuple[Fraction, Fraction]]:
    """Return value and sum of magnitudes of each output, one multiplication at a time."""
    images, size = len(m), m.shape[2:]
    outputs, channels, *kernel = vqk.shape
    count = -(-channels // block_size)
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    found = {}
    for n, o, *at in itertools.product(range(images), range(outputs), *map(range, out_size)):
        group = o // (outputs // groups)
        total = magnitude = Fraction(0)
        for tap in itertools.product(*map(range, kernel)):
            place = [a * s + t * d - p for a, s, t, d, p in zip(at, stride, tap, dilation, padding, strict=True)]
            if any(x < 0 or x >= limit for x, limit in zip(place, size, strict=True)):
                continue
            for b in range(count):
                power = Fraction(2) ** int(e[(n, group * count + b, *place)])
                inside = range(b * block_size, min(channels, (b + 1) * block_size))
                mantissas = [int(m[(n, group * channels + c, *place)]) for c in inside]
                dot = sum(int(vqk[(o, c, *tap)]) * q for c, q in zip(inside, mantissas, strict=True))
                terms = [Fraction(float(kds[(o, b, *tap)])) * power * dot]
                if shift is not None:
                    terms.append(Fraction(float(shift[(o, b, *tap)])) * power * sum(mantissas))
                total += sum(terms)
                magnitude += sum(map(abs, terms))
        if bias is not None:
            total, magnitude = total + Fraction(float(bias[o])), magnitude + abs(Fraction(float(bias[o])))
        found[(n, o, *at)] = total, magnitude
    return found


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    dims = draw(st.integers(0, 3))
    groups = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3 if dims < 3 else 2)) for _ in range(dims)]
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    return {
        "groups": groups,
        "channels": draw(st.integers(1, 6)),
        "outputs": groups * draw(st.integers(1, 2)),
        "kernel": kernel,
        "dilation": dilation,
        "padding": padding,
        "stride": tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        "size": [n + draw(st.integers(0, 2)) for n in least],
        "block_size": draw(st.integers(1, 7)),
        "bits": draw(st.integers(2, 8)),
        "a_bits": draw(st.integers(2, 8)),
        "shift": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=60)
@given(cases())
def test_reference_is_the_operator_of_the_definition(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    groups, block_size = case["groups"], case["block_size"]
    x = torch.randn(1, groups * case["channels"], *case["size"], generator=generator)
    w = torch.randn(case["outputs"], case["channels"], *case["kernel"], generator=generator)
    m, e = quantize_activation(x, case["a_bits"], block_size, groups=groups)
    vqk, kds, shift = quantize_weight_shifted(w, case["bits"], block_size)
    shift = shift if case["shift"] else None
    bias = torch.randn(case["outputs"], generator=generator) if case["bias"] else None
    where = {name: case[name] for name in ("stride", "padding", "dilation")}
    result = reference_conv(m, e, vqk, kds, block_size, kds_shift=shift, bias=bias, groups=groups, **where)
    expected = loops(m, e, vqk, kds, block_size, shift, bias, groups=groups, **where)
    assert result.output.dtype == torch.float64
    assert result.output.numel() == len(expected)
    for at, (value, magnitude) in expected.items():
        assert abs(Fraction(float(result.output[at])) - value) <= magnitude * Fraction(2) ** -48
        terms = vqk[0, 0].numel() * kds.shape[1] * (2 if case["shift"] else 1)
        assert float(result.bound[at]) == pytest.approx(float(magnitude) * (terms + 1) * 2.0**-24, rel=1e-9)


def test_whole_numbers_for_all_dimensions_mean_the_same() -> None:
    m, e = quantize_activation(torch.randn(1, 4, 5, 5), 4, 2)
    vqk, kds, _ = quantize_weight_shifted(torch.randn(2, 4, 2, 2), 4, 2)
    short = reference_conv(m, e, vqk, kds, 2, stride=2, padding=1, dilation=2)
    full = reference_conv(m, e, vqk, kds, 2, stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    assert torch.equal(short.output, full.output) and torch.equal(short.bound, full.bound)


def test_integer_sums_are_exact_at_their_largest() -> None:
    m = torch.full((1, 4096), -128, dtype=torch.int8)
    e = torch.zeros(1, 1, dtype=torch.int8)
    vqk = torch.full((1, 4096), -128, dtype=torch.int8)
    vqk[0, 0] = -127
    result = reference_conv(m, e, vqk, torch.ones(1, 1), 4096)
    assert result.output.item() == 4096 * 2**14 - 128


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_that_is_not_finite_makes_every_output_that_reads_it_nan(shift: bool) -> None:
    m, e = quantize_activation(torch.randn(2, 8, 6, 6), 4, 4, groups=2)
    e[1, 1, 3, 3] = NONFINITE
    vqk, kds, c = quantize_weight_shifted(torch.randn(4, 4, 3, 3), 4, 4)
    kds[2] = 0
    vqk[3] = 0
    output = reference_conv(m, e, vqk, kds, 4, kds_shift=c if shift else None, padding=1, groups=2).output
    expected = torch.zeros(2, 4, 6, 6, dtype=torch.bool)
    expected[1, 2:, 2:5, 2:5] = True
    assert torch.equal(output.isnan(), expected)


KINDS = {0: (tnn.Linear, nn.DSLinear), 1: (tnn.Conv1d, nn.DSConv1d), 2: (tnn.Conv2d, nn.DSConv2d)}
KINDS[3] = (tnn.Conv3d, nn.DSConv3d)


def reference_of(layer: nn.DSLayer, x: Tensor, **where: object) -> Reference:
    config = layer.config
    m, e = quantize_activation(
        x, config.activation_bits, config.block_size, sign=config.activation_sign, groups=where.get("groups", 1)
    )
    return reference_conv(
        m, e, layer.vqk, layer.kds, config.block_size, kds_shift=layer.kds_shift, bias=layer.bias, **where
    )


@settings(max_examples=100)
@given(cases(), st.sampled_from(["adaptive", "extra", "included"]))
def test_modules_stay_within_the_float_bound_of_the_reference(case: dict, sign: str) -> None:
    torch.manual_seed(case["seed"])
    dims = len(case["kernel"])
    float_type, quantized_type = KINDS[dims]
    config = LayerConfig(
        weight_bits=case["bits"],
        activation_bits=case["a_bits"],
        block_size=case["block_size"],
        weight_shift=case["shift"],
        activation_sign=sign,
    )
    where: dict = {name: case[name] for name in ("stride", "padding", "dilation", "groups")} if dims else {}
    if dims:
        inputs = case["groups"] * case["channels"]
        layer = float_type(inputs, case["outputs"], case["kernel"], bias=case["bias"], **where)
    else:
        inputs = case["channels"]
        layer = float_type(inputs, case["outputs"], bias=case["bias"])
    quantized = quantized_type.from_float(layer, config)
    x = torch.randn(2, inputs, *case["size"])
    expected = reference_of(quantized, x, **where)
    # The simulation rounds the weight, multiplies and adds one by one: the usual bound of a sum of that many terms.
    magnitude = float_type(inputs, case["outputs"], *([case["kernel"]] if dims else []), bias=case["bias"], **where)
    magnitude.double()
    m, e = quantize_activation(x, case["a_bits"], case["block_size"], sign=sign, groups=where.get("groups", 1))
    x_q = dequantize_activation(m, e, case["block_size"], groups=where.get("groups", 1))
    with torch.no_grad():
        w_abs = dequantize_weight(quantized.vqk.float().abs(), quantized.kds.abs(), case["block_size"])
        if case["shift"]:
            w_abs += dequantize_weight(
                torch.zeros_like(quantized.vqk), quantized.kds, case["block_size"], quantized.kds_shift.abs()
            )
        magnitude.weight.copy_(w_abs)
        if case["bias"]:
            magnitude.bias.copy_(quantized.bias.abs())
        bound = (w_abs[0].numel() + 4) * 2.0**-24 * magnitude(x_q.abs().double())
        with ops.simulated():
            error = (quantized(x).double() - expected.output).abs()
        assert (error <= bound).all()
        if quantized.backend.reason is None:
            assert ((quantized(x) - expected.output).abs() <= expected.bound).all()
