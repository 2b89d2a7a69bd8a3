"""Depthwise layers and poolings that are fused with the layer before, some lines at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from program_cases import CONFIG, Net, conv, steps_of, tensors
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.compilation.operators import convolution
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "LEAST_JOINED_BYTES", 0)


def depthwise(channels: int, size: Any = 3, padding: Any = 1, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=padding, groups=channels, **settings)


def joined(run: Callable[[Any, Tensor], Any], size: tuple[int, int, int] = (3, 9, 9), **layers: nn.Module) -> int:
    """Check the bits of a network, and return the number of its steps that are fused into the next one."""
    steps_of(run, size, each_isa=True, **layers)
    fast = dsconv.compile(dsconv.quantize(Net(run, **layers), CONFIG), torch.randn(1, *size))
    return sum("in the next step" in step.fused for step in fast.plan.steps)


@pytest.mark.parametrize("size", [(1, 1), (40, 23), (30, 131)])
@pytest.mark.parametrize(
    "second",
    [
        depthwise(72),
        depthwise(72, stride=2),
        depthwise(72, 5, 2, stride=2),
        depthwise(72, (3, 1), (1, 0)),
        depthwise(72, 3, 3, dilation=2),
    ],
    ids=["plain", "stride", "five", "column", "dilation"],
)
def test_both_layers_have_the_bits_of_one_after_the_other(second: nn.Conv2d, size: tuple[int, int]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.project(F.relu6(net.second(F.relu6(net.expand(net.first(x))))))

    layers = {"first": conv(3, 16), "expand": conv(16, 72, 1), "second": second, "project": conv(72, 8, 1)}
    assert joined(run, (3, *size), **layers) == 1


@pytest.mark.parametrize("size", [(2, 3), (29, 41)])
@pytest.mark.parametrize(
    "second",
    [
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(2, 1, 1),
        nn.AvgPool2d(3, 1, 1),
        depthwise(40),
        depthwise(40, 5, 2),
    ],
    ids=["maximum", "padded", "average", "depthwise", "five"],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_layer_of_a_network_makes_lines(second: nn.Module, size: tuple[int, int], stride: int) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.second(F.relu(net.first(x))))

    layers = {"first": conv(3, 40, stride=stride), "second": second, "last": conv(40, 8, 1)}
    pooled = isinstance(second, nn.MaxPool2d) and second.padding == 0
    assert joined(run, (3, size[0] * stride + pooled, size[1] * stride + pooled), **layers) == 1


def test_poolings_of_layers_that_read_mantissas_are_joined() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(F.max_pool2d(net.second(net.first(x)), 3, 2))

    assert joined(run, (3, 40, 23), first=conv(3, 16), second=conv(16, 72), last=conv(72, 8, 1)) == 1


def test_activations_and_residuals_go_with_them() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        other = net.other(x)
        return net.project(F.hardswish(net.second(F.silu(net.expand(x))) + other))

    layers = {"first": conv(3, 16), "expand": conv(16, 32, 3), "other": conv(16, 32, 1), "second": depthwise(32)}
    assert joined(run, (3, 20, 20), **layers, project=conv(32, 8, 1)) == 1


def test_what_others_read_as_well_is_written() -> None:
    def twice(net: Any, x: Tensor) -> Tensor:
        y = net.expand(net.first(x))
        return net.second(y) + y

    def returned(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.expand(net.first(x))
        return net.second(y), y

    def after_another(net: Any, x: Tensor) -> Tensor:
        y = net.expand(net.first(x))
        z = net.project(net.first(x))
        return net.second(y) * z

    layers = {"first": conv(3, 16), "expand": conv(16, 32, 1), "second": depthwise(32)}
    assert joined(twice, **layers) == joined(returned, **layers) == 0
    assert joined(after_another, **layers, project=conv(16, 32, 1)) == 0


def test_the_input_of_the_first_is_kept_until_the_second_is_done() -> None:
    """Run two consecutive triples: without the rule, every buffer would be free to be overwritten."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        for i in "ab":
            y = F.relu6(net.get_submodule(f"expand_{i}")(x))
            x = x + net.get_submodule(f"project_{i}")(F.relu6(net.get_submodule(f"second_{i}")(y)))
        return x

    layers: dict[str, nn.Module] = {"first": conv(3, 16)}  # which both read
    for i in "ab":
        layers |= {f"expand_{i}": conv(16, 96, 1), f"second_{i}": depthwise(96), f"project_{i}": conv(96, 16, 1)}
    assert joined(run, (3, 33, 33), **layers) == 2


def test_small_tensors_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "LEAST_JOINED_BYTES", 4 * 32 * 9 * 9 + 1)

    def run(net: Any, x: Tensor) -> Tensor:
        return net.second(net.expand(net.first(x)))

    assert joined(run, first=conv(3, 16), expand=conv(16, 32, 1), second=depthwise(32)) == 0


def test_a_profile_counts_the_time_of_both_in_the_second() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.second(net.expand(net.first(x)))

    layers = {"first": conv(3, 16), "expand": conv(16, 64, 1), "second": depthwise(64)}
    qnet = dsconv.quantize(Net(run, **layers))
    x = torch.randn(1, 3, 64, 64)
    steps = dsconv.profile(dsconv.compile(qnet, x), x, runs=3).steps
    assert [step.name for step in steps] == ["first", "expand", "second"]
    assert tensors(dsconv.compile(qnet, x)(x))[0].shape == (1, 64, 64, 64)
    assert steps[1].median_ms < steps[2].median_ms
