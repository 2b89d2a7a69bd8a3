"""Activations with an exponential, norms and softmax: error against float64, and the same bits in every layout."""

import math
from collections.abc import Callable

import pytest
import torch
from kernel_cases import by_isa, same_bits
from torch import Tensor
from torch.nn import functional as F

from dsconv.ops import ACTIVATIONS, OPERATIONS, native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

CHANNELS = 1024


def mapped(x: Tensor, activation: str, alpha: float = 0.0, beta: float = 0.0, operation: str = "activate") -> Tensor:
    """Return the map of ``x (N, C)``, by the best instruction set."""
    module = native.extension()
    assert module is not None
    one, y, (rows, channels) = module.Program(native.isa()), torch.empty_like(x), x.shape
    size, strides = (channels, 1, rows), (x.numel(), 1, x.numel(), channels)
    source, result = (one.values(base, 0, 0, size, strides) for base in (1, 2))
    numbers = OPERATIONS.index(operation), ACTIVATIONS.index(activation)
    one.map(source, [(*numbers, alpha, beta, -1, 0, 0)], (result, -1, [], 0, 0.0, 0.0))
    one.run(1, [0, x.data_ptr(), y.data_ptr()], 0, 1, 0)
    return y


def all_sizes() -> Tensor:
    """Return two million finite numbers, evenly spread over the bit patterns of float32."""
    x = torch.arange(-(1 << 31), 1 << 31, 2039, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    return x[: len(x) // CHANNELS * CHANNELS].view(-1, CHANNELS)


def units(exact: Tensor) -> Tensor:
    """Return the distance of neighbouring float32 numbers of that size."""
    return torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 23)


def _gelu_tanh(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# The definition in float64, the largest error in units in the last place (docs/kernels.md), and the start of its range.
IN_UNITS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "silu": (lambda x: x / (1 + torch.exp(-x)), 3, -87.0),
    "sigmoid": (torch.sigmoid, 3, -87.0),
    "exp": (torch.exp, 1, -87.0),
    "elu": (F.elu, 2, -math.inf),
    "tanh": (torch.tanh, 3, -math.inf),
    "mish": (lambda x: torch.where(x > 30, x, x * torch.tanh(torch.log1p(torch.exp(x.clamp(max=30))))), 5, -80.0),
    "softplus": (lambda x: torch.where(x > 30, x, torch.log1p(torch.exp(x.clamp(max=30)))), 4, -80.0),
}
# Activations whose error is relative to the larger of 1 and the number.
BY_ONE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "gelu": (lambda x: x * torch.special.erfc(-x / math.sqrt(2)) / 2, 2e-7),
    "gelu_tanh": (_gelu_tanh, 2e-7),
}


@pytest.mark.parametrize("name", IN_UNITS)
def test_the_largest_error_is_what_is_documented(name: str) -> None:
    define, most, first = IN_UNITS[name]
    x = all_sizes()
    exact, found = define(x.double()), mapped(x, name, alpha=1.0).double()
    inside = exact.abs() < torch.finfo(torch.float32).max
    error = (found - exact).abs()
    counted = inside & (x >= first)
    worst = (error / units(exact))[counted].max()
    assert most / 2 < worst <= most
    if first > -math.inf:
        assert error[inside & (x < first)].max() < 1e-36
    assert bool((found[~inside] == exact[~inside].float()).all())


@pytest.mark.parametrize("name", BY_ONE)
def test_the_largest_error_of_a_gelu_is_what_is_documented(name: str) -> None:
    define, most = BY_ONE[name]
    x = torch.cat([all_sizes(), torch.linspace(-12, 12, 1000 * CHANNELS).view(-1, CHANNELS)])
    exact, found = define(x.double()), mapped(x, name).double()
    worst = ((found - exact).abs() / exact.abs().clamp(min=1.0))[x.abs() < 1e30].max()
    assert most / 2 < worst <= most


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "relu": (F.relu, 0.0, 0.0),
    "clamp": (lambda x: x.clamp(-0.5, 2.0), -0.5, 2.0),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), 0.2, 0.0),
    "hardswish": (F.hardswish, 0.0, 0.0),
    "hardsigmoid": (F.hardsigmoid, 0.0, 0.0),
    "silu": (F.silu, 0.0, 0.0),
    "sigmoid": (torch.sigmoid, 0.0, 0.0),
    "elu": (F.elu, 1.0, 0.0),
    "exp": (torch.exp, 0.0, 0.0),
    "gelu": (lambda x: F.gelu(x.double()).float(), 0.0, 0.0),  # oneDNN's result for infinity is NaN
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.0, 0.0),
    "mish": (F.mish, 0.0, 0.0),
    "softplus": (F.softplus, 0.0, 0.0),
    "tanh": (torch.tanh, 0.0, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_number_infinite_or_zero_is_treated_as_pytorch_does(name: str) -> None:
    assert set(FUNCTIONS) == set(ACTIVATIONS) - {"none"}
    function, alpha, beta = FUNCTIONS[name]
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, -300.0, 300.0])
    x = special.repeat(16)[:, None].contiguous()  # PyTorch computes all of them with vectors
    for isa, y in by_isa(lambda: mapped(x, name, alpha, beta)).items():
        assert same_bits(y, function(x)), (isa, y[:9].tolist(), function(x)[:9].tolist())


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-math.inf, 1.5), (-2.0, math.inf), (2.0, -1.0)])
def test_a_clamp_has_any_bounds(low: float, high: float) -> None:
    x = torch.randn(33, 37) * 3
    for y in by_isa(lambda: mapped(x, "clamp", low, high)).values():
        assert same_bits(y, x.clamp(low, high))


@pytest.mark.parametrize("channels", [1, 7, 16, 100, 1000])
def test_softmax_is_near_and_the_same_everywhere(channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, channels) * 10
    found = by_isa(lambda: mapped(x, "none", operation="softmax"))
    first = next(iter(found.values()))
    assert all(same_bits(y, first) for y in found.values())
    exact = x.double().softmax(1)
    assert (first - exact).abs().max() < 3e-7
    x[0, 0], x[1, -1], x[2] = math.nan, math.inf, -math.inf
    assert same_bits(
        mapped(x, "none", operation="softmax")[:3], torch.full((3, channels), math.nan, dtype=torch.float32)
    )
    assert mapped(x, "none", operation="softmax")[3:].isfinite().all()
