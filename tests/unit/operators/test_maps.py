"""Sums, products and other maps of compiled networks: with PyTorch's bits, and with the fewest steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Net(nn.Module):
    """Two layers, and constants."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], dims: int = 2, channels: int = 20):
        super().__init__()
        torch.manual_seed(0)
        conv: Any = nn.Conv2d if dims == 2 else nn.Conv1d
        self.run, self.a, self.b = run, conv(3, channels, 3, padding=1), conv(3, channels, 1)
        self.gain = nn.Parameter(torch.randn(channels, *[1] * dims))
        self.one = nn.Parameter(torch.tensor(0.7))
        self.slopes = nn.Parameter(torch.randn(channels))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


CONFIG = dsconv.QuantConfig.preset("default", algorithm="direct")


def compiled(run: Callable[[Any, Tensor], Tensor], x: Tensor, dims: int = 2) -> list[tuple[str, ...]]:
    """Check the bits of a network, and return the operations of its maps."""
    qnet = dsconv.quantize(Net(run, dims), CONFIG)
    fast = dsconv.compile(qnet, x)
    with torch.inference_mode():
        for images in (x, x[:1]):
            assert torch.equal(fast(images), qnet(images)) and fast(images).stride() == qnet(images).stride()
    assert not fast.plan.in_pytorch
    maps = [step.fused for step in fast.plan.steps if step.operator == "dsconv.map"]
    return [fused for fused in maps if fused != ("quantize",)]  # the images


SUMS = ("sub", "add", "sub", "clamp")
MAPS: list[tuple[Callable[[Net, Tensor], Tensor], list[tuple[str, ...]]]] = [
    (lambda m, x: (m.a(x) - 1) / 3, [("sub", "div")]),
    (lambda m, x: 2 - m.a(x) / m.one, [("div", "rsub")]),
    (lambda m, x: 1 / (m.a(x) - m.gain), [("sub", "reciprocal", "mul")]),
    (lambda m, x: m.a(x) - m.b(x), [("sub",)]),
    (lambda m, x: F.relu(m.a(x) / 2) - m.b(x) / 4, [("div",), ("div", "relu", "sub")]),
    (lambda m, x: m.b(x) - F.relu(m.a(x) / 2), [("div", "relu", "sub")]),
    (lambda m, x: -m.a(x) * m.b(x), [("neg", "mul")]),
    (lambda m, x: (lambda y, z: (y - z + y * 2 - z).clamp(max=0.5))(m.a(x), m.b(x)), [("mul",), SUMS]),
    (lambda m, x: (lambda y: y * y - y)(m.a(x) / 2), [("div",), ("mul", "sub")]),
    (lambda m, x: F.prelu(m.a(x), m.slopes) * 2, [("prelu", "mul")]),
]


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("run", "maps"), MAPS)
def test_operations_that_follow_one_another_are_one_map(
    run: Callable[[Net, Tensor], Tensor], maps: list[tuple[str, ...]], dims: int
) -> None:
    assert sorted(compiled(run, torch.randn(3, 3, *[9, 7][:dims]), dims)) == sorted(maps)


@pytest.mark.parametrize(
    ("run", "fused"),
    [
        (lambda m, x: m.a(x) * m.gain, ("bias", "mul")),
        (lambda m, x: 3 * m.a(x), ("bias", "mul")),
        (lambda m, x: m.a(x) + m.gain, ("bias", "add")),
        (lambda m, x: (lambda z: F.relu(m.a(x) * m.gain + z))(m.b(x)), ("bias", "mul", "add", "relu")),
        (lambda m, x: m.a(x) * m.gain + m.one, ("bias", "mul")),  # a layer would round both together
    ],
)
def test_constants_behind_a_layer_are_its_own(run: Callable[[Net, Tensor], Tensor], fused: tuple[str, ...]) -> None:
    x = torch.randn(3, 3, 9, 7)
    qnet = dsconv.quantize(Net(run), CONFIG)
    fast = dsconv.compile(qnet, x)
    assert fused in [step.fused for step in fast.plan.steps]
    with torch.inference_mode():
        assert torch.equal(fast(x), qnet(x))


@pytest.mark.parametrize("shape", [(1, 1), (9, 7)])
@pytest.mark.parametrize("channels", [1, 20])
def test_operands_may_be_of_one_pixel_or_one_channel(channels: int, shape: tuple[int, int]) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        gate = m.b(x)
        if channels == 1:
            gate = gate.amax(1, keepdim=True)
        if shape == (1, 1):
            gate = F.max_pool2d(gate, (9, 7))
        return (m.a(x) - gate) * gate

    qnet, x = dsconv.quantize(Net(run), CONFIG), torch.randn(3, 3, 9, 7)
    fast = dsconv.compile(qnet, x)
    with torch.inference_mode():
        assert torch.equal(fast(x), qnet(x))
    assert {step.operator for step in fast.plan.in_pytorch} <= {"aten.amax"}


def test_infinities_and_zeros_with_a_sign_are_those_of_pytorch() -> None:
    x = (
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0])
        .view(1, 6, 1, 1)
        .expand(2, 6, 2, 2)
        .contiguous()
    )

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return -x, 0 - x, x / x, 1 / x, x * 0, x - x, self.layer(x)

    qnet = dsconv.quantize(Sums().eval(), CONFIG)
    with torch.inference_mode():
        for found, expected in zip(dsconv.compile(qnet, x)(x), qnet(x), strict=True):
            assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
            assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())
