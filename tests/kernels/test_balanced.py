"""Rule ``balanced`` in the extension: the definition of numerics, on every instruction set."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import by_isa, threads
from torch import Tensor

from dsconv import LayerConfig, nn, ops
from dsconv.numerics import balanced
from dsconv.ops import native, rounding
from dsconv.threads import PyTorchOnOneThread

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


@st.composite
def roundings(draw: st.DrawFn) -> tuple[Tensor, tuple[Tensor, Tensor] | None, int, bool]:
    """Draw weights ``(T, n, R)``, moments of their inputs if known, bits and whether there is a shift."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = draw(st.integers(1, 3))
    taps, n, rows = draw(st.sampled_from([1, 2, 9, 25])), draw(st.integers(1, 70)), kinds * draw(st.integers(1, 21))
    w = torch.randn(taps, n, rows, generator=generator)
    kind = draw(st.sampled_from(["plain", "apart", "outlier", "zeros", "one channel"]))
    if kind == "apart":
        w *= torch.rand(rows, generator=generator).mul(60).sub(30).exp2()
    elif kind == "outlier":
        w[:, :1] *= 100
    elif kind == "zeros":
        w *= torch.rand(w.shape, generator=generator) > 0.8
        w[..., :1] = 0
    elif kind == "one channel":
        w[:, 1:] = 0
    known = None
    if draw(st.booleans()):
        mean, variance = torch.randn(2, n, kinds, generator=generator)
        known = mean, variance.square() * draw(st.sampled_from([0.0, 1.0, 1e6]))
    return w, known, draw(st.integers(2, 8)), draw(st.booleans())


def errors(w: Tensor, known: tuple[Tensor, Tensor] | None, found: balanced.Result) -> Tensor:
    """Return the expected squared error of each row: ``(R,)``."""
    mean, variance = known or (w.new_full((w.shape[1], 1), 0.4**0.5), w.new_ones(w.shape[1], 1))
    q, scale, shift = (value.double() for value in found)
    return balanced.Model.of(mean.double(), variance.double(), len(w)).value(w.double() - q * scale - shift)


@given(roundings())
@settings(deadline=None, max_examples=150)
def test_rounds_as_it_is_defined_and_alike_on_every_instruction_set(case: Any) -> None:
    w, known, bits, shift = case
    expected = balanced.round_balanced(w, known, bits, shift)
    by_name = by_isa(lambda: balanced.round_balanced(w, known, bits, shift, ops.solve_balanced))
    first, *others = by_name.values()
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), by_name.keys()
    for a, b in zip(first, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    # Another order of sums can decide differently between equally good choices; the results follow the choice.
    alike = (first[0] == expected[0]).all(0).all(0)
    for a, b in zip(first[1:], expected[1:], strict=True):
        largest = b.abs().amax(0, keepdim=True)
        assert ((a - b).abs() <= 1e-5 * largest)[..., alike].all()
    before, after = (errors(w, known, found) for found in (expected, first))
    size = w.double().square().sum((0, 1)) * (
        1 if known is None else 1 + float(known[1].max() + known[0].square().max())
    )
    assert (after <= before * 1.02 + 1e-9 * size)[~alike].all()


def test_rows_of_random_weights_are_those_of_the_definition() -> None:
    w = torch.randn(9, 32, 2000, generator=torch.Generator().manual_seed(0))
    for bits, shift in ((4, True), (3, False), (8, True)):
        known = torch.rand(2, 32, 4, generator=torch.Generator().manual_seed(1)).unbind()
        expected = balanced.round_balanced(w, known, bits, shift)
        found = balanced.round_balanced(w, known, bits, shift, ops.solve_balanced)
        alike = (found[0] == expected[0]).all(0).all(0)
        assert alike.float().mean() > 0.99
        for a, b in zip(found[1:], expected[1:], strict=True):
            assert torch.allclose(a[..., alike], b[..., alike], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("config", [{}, {"weight_shift": True}, {"weight_scale": "kl"}])
def test_layers_are_rounded_by_it_on_the_threads_that_pytorch_has(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Conv2d(70, 24, 3, groups=2)
    settings = LayerConfig(block_size=16, weight_rule="balanced", **config)
    results: list[Tensor] = []

    def vqk() -> Tensor:
        return nn.DSConv2d.from_float(layer, settings).vqk

    for count in (1, 3):
        with threads(count):
            results += by_isa(vqk).values()
            assert torch.get_num_threads() == count
    assert all(torch.equal(other, results[0]) for other in results)
    monkeypatch.setattr(ops, "solve_balanced", None)
    assert (vqk() == results[0]).float().mean() > 0.99


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((rounding._MOST_TAPS, 4, 9), True),
        ((rounding._MOST_TAPS + 1, 4, 9), False),
        ((1, 64, 9), True),
        ((64, rounding._MOST_COLUMNS // 64 + 1, 1), False),
    ],
)
def test_what_it_does_not_cover_is_left_to_pytorch(
    shape: tuple[int, ...], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, left = native.extension(), "left to PyTorch"
    assert module is not None
    monkeypatch.setattr(rounding, "solve", lambda *given: left)
    before = sum(module.runs().values())
    found = balanced.round_balanced(torch.ones(shape), None, 4, False, ops.solve_balanced)
    assert (found is not left) == kernels == (sum(module.runs().values()) > before)


def test_weights_elsewhere_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "solve", lambda *given: "left to PyTorch")
    w = torch.zeros(2, 8, 4, device="meta")
    assert balanced.round_balanced(w, None, 4, False, ops.solve_balanced) == "left to PyTorch"  # type: ignore[comparison-overlap]


def test_takes_every_dtype_layout_and_moments_for_all_kinds() -> None:
    w = torch.randn(4, 16, 30, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.rand(16, 3), torch.rand(16, 1)
    expected = balanced.round_balanced(w, (mean, variance.repeat(1, 3)), 4, True, ops.solve_balanced)
    for other in (w.double(), w.mT.contiguous().mT):
        found = balanced.round_balanced(other, (mean, variance), 4, True, ops.solve_balanced)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_number_of_threads_of_later_threads_stays_what_it_is() -> None:
    """Check that new threads, which use the number that any thread set last, do not use that of a single task."""

    def on_thread(function: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    layer, config = torch.nn.Conv2d(16, 8, 3), LayerConfig(block_size=16, weight_rule="balanced")
    started, go = Event(), Event()

    def quantize_on_one() -> None:
        assert torch.get_num_threads() == 1
        started.set()
        go.wait()
        nn.DSConv2d.from_float(layer, config)

    with threads(3), ThreadPoolExecutor(1) as pool:
        with PyTorchOnOneThread(always=True):
            other = pool.submit(quantize_on_one)
            started.wait()
        go.set()
        other.result()
        assert on_thread(torch.get_num_threads) == torch.get_num_threads() == 3


def test_the_limits_are_those_of_the_extension() -> None:
    module = native.extension()
    assert module is not None
    for taps, n, says in (
        (rounding._MOST_TAPS, 1, "address"),
        (1, rounding._MOST_COLUMNS, "address"),
        (129, 1, "taps"),
    ):
        with pytest.raises(ValueError, match=says):
            module.round_balanced("scalar", (taps, n, 1, 1), 4, False, 1e-4, [0], *[[0] * 3] * 3)
