"""Winograd weights in the extension: the bits that numerics defines, on every instruction set."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import by_isa, threads
from torch import Tensor

from dsconv import ops
from dsconv.errors import ConfigError
from dsconv.numerics import winograd_weight
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")
SPECIAL = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -1e-45, 1e-38, -0.0)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Draw weights ``(O, C, 3, 3)``, usual and unusual ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 140)), 3, 3, generator=generator)
    kind = draw(st.sampled_from(["plain", "positive", "apart", "outliers", "few", "rows of zeros", "quantized"]))
    if kind == "positive":
        w = w.abs()
    elif kind == "apart":
        w *= torch.rand(w.shape, generator=generator).mul(280).sub(150).exp2()
    elif kind == "outliers":
        w = w.pow(9)
    elif kind == "few":
        w *= torch.rand(w.shape, generator=generator) > 0.9
    elif kind == "rows of zeros":
        w[torch.rand(len(w), generator=generator) > 0.5] = 0
        w[:, : w.shape[1] // 2] = 0
    elif kind == "quantized":
        w = (w * 3).round() / 8
    w *= 2.0 ** draw(st.sampled_from([0, 0, -148, -140, -130, 60, 126]))
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
        w.view(-1)[draw(st.integers(0, w.numel() - 1))] = value
    return w


def bits(weight: Any) -> tuple[Tensor, Tensor]:
    integers, scale = weight
    assert integers.dtype == torch.int8 and scale.dtype == torch.float32
    return integers, scale.view(torch.int32)


@given(weights(), st.sampled_from([1, 3, 4, 8, 12, 16, 24, 32, 64, 100, 128, 1000]), st.integers(1, 2))
@settings(deadline=None, max_examples=300)
def test_rounds_to_the_bits_that_are_defined_on_every_instruction_set(w: Tensor, block_size: int, count: int) -> None:
    expected = bits(winograd_weight(w, block_size))
    with threads(count):
        for isa, found in by_isa(lambda: ops.round_winograd(w, block_size)).items():
            for a, b in zip(bits(found), expected, strict=True):
                assert torch.equal(a, b), isa


@pytest.mark.parametrize("shape", [(64, 128), (33, 200)])
def test_layers_have_the_same_bits(shape: tuple[int, int]) -> None:
    w = torch.randn(*shape, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.02
    expected = bits(winograd_weight(w, 64))
    for given_as in (w, w.to(memory_format=torch.channels_last), w.clone().requires_grad_()):
        assert all(map(torch.equal, bits(ops.round_winograd(given_as, 64)), expected))


@pytest.mark.parametrize(
    ("w", "kernels"),
    [
        (torch.ones(2, 8, 3, 3, dtype=torch.float32), True),
        (torch.ones(2, 8, 3, 3, dtype=torch.float64), False),
        (torch.ones(0, 8, 3, 3), False),
    ],
)
def test_what_it_does_not_cover_is_left_to_pytorch(w: Tensor, kernels: bool) -> None:
    module = native.extension()
    assert module is not None
    before = sum(module.runs().values())
    ops.round_winograd(w, 64)
    assert kernels == (sum(module.runs().values()) > before)


def test_without_the_extension_it_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(3, 20, 3, 3)
    found = ops.round_winograd(w, 8)
    monkeypatch.setattr(native, "extension", lambda: None)
    assert all(map(torch.equal, bits(ops.round_winograd(w, 8)), bits(found)))


def test_other_kernels_and_blocks_are_refused_as_in_numerics() -> None:
    for shape in ((3, 8, 3), (3, 8, 5, 5), (3, 8, 3, 1)):
        with pytest.raises(ValueError, match=r"expected a weight \(O, C, 3, 3\)"):
            ops.round_winograd(torch.zeros(shape), 8)
    for size in (0, -8, True):
        with pytest.raises(ConfigError, match="block_size"):
            ops.round_winograd(torch.zeros(3, 8, 3, 3), size)


def test_the_limits_are_those_of_the_extension() -> None:
    module = native.extension()
    assert module is not None
    for sizes, says in (
        ((1 << 30, 1 << 30, 8), "address"),
        ((1, (1 << 30) + 1, 8), "at most"),
        (((1 << 30) + 1, 8, 8), "at most"),
        ((1, 8, 16), "agree"),
        ((0, 8, 8), "agree"),
        ((1, 8, 0), "agree"),
    ):
        with pytest.raises(ValueError, match=says):
            module.round_winograd("scalar", sizes, 0, 0, 0)
