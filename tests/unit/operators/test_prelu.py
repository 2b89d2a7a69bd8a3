"""PReLU in compiled networks: fused if a layer can compute it, with the same bits."""

import pytest
import torch
from torch import nn

import dsconv
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def compiled(net: nn.Module, x: torch.Tensor) -> list[tuple[str, tuple[str, ...]]]:
    """Compile a network, check its bits, and return operator and fused operators of each step."""
    qnet = dsconv.quantize(net.eval(), dsconv.QuantConfig.preset("default", algorithm="direct"))
    fast = dsconv.compile(qnet, x)
    with torch.inference_mode():
        assert torch.equal(fast(x), qnet(x))
    return [(step.operator, step.fused) for step in fast.plan.steps]


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 1.5])
@pytest.mark.parametrize("channels", [1, 24])
def test_one_slope_is_an_activation_of_the_layer_before_it(channels: int, slope: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.PReLU(channels, slope), nn.Conv2d(24, 8, 3))
    steps = compiled(net, torch.randn(2, 3, 9, 9))
    assert steps == [("dsconv.conv2d", ("bias", "leaky_relu", "quantize")), ("dsconv.conv2d", ("bias",))]


def test_one_that_no_layer_computes_is_a_map() -> None:
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.MaxPool2d(2), nn.PReLU(), nn.Conv2d(24, 8, 3))
    assert ("dsconv.map", ("prelu", "quantize")) in compiled(net, torch.randn(2, 3, 9, 9))


def test_a_slope_for_each_channel_is_a_map() -> None:
    prelu = nn.PReLU(24)
    nn.init.normal_(prelu.weight)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), prelu, nn.Conv2d(24, 8, 3))
    assert ("dsconv.map", ("prelu", "quantize")) in compiled(net, torch.randn(2, 3, 9, 9))
