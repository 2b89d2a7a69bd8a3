"""Tensors whose last dimension is the channels: tokens, and images (N, H, W, C)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsconv
from dsconv.compilation.operators import bits_of_pytorch
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Transformer(nn.Module):
    """One block with a class token, positions, and attention."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.positions = nn.Parameter(torch.randn(1, 5, channels))
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.wide, self.narrow = nn.Linear(channels, 64), nn.Linear(64, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.first(x)).reshape(x.shape[0], 5, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Gated(nn.Module):
    """Channels that are split into a gate and the input of a convolution, in images (N, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.LayerNorm(32)
        self.wide, self.inner, self.narrow = nn.Linear(32, 72), nn.Conv2d(24, 24, 3, padding=1), nn.Linear(40, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        gate, kept, turned = torch.split(self.wide(self.norm(x)), (40, 16, 16), dim=-1)
        turned = self.inner(torch.cat([turned, kept[..., :8]], -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.narrow(F.relu(gate) * torch.cat([kept, turned], -1))


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (
            Transformer,
            {"expand", "cat", "add", "reshape", "permute", "select", "scaled_dot_product_attention", "transpose"},
        ),
        (Gated, set()),
    ],
)
def test_norms_and_linear_layers_are_steps_wherever_their_channels_lie(model: type[nn.Module], left: set[str]) -> None:
    torch.manual_seed(0)
    qmodel, x = dsconv.quantize(model().eval()), torch.randn(5, 3, 8, 8)
    compiled = dsconv.compile(qmodel, x[:1])
    assert {step.operator.removeprefix("aten.") for step in compiled.plan.in_pytorch} == left
    assert sum("layer_norm" in step.fused for step in compiled.plan.steps) == (2 if left else 1)
    with torch.inference_mode():
        for images in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
            expected = qmodel(images)
            assert float((compiled(images) - expected).norm() / expected.norm()) < 0.02
        with bits_of_pytorch():
            exact = dsconv.compile(qmodel, x[:1])
            assert torch.equal(exact(x), qmodel(x)) and torch.equal(exact(x[:1]), qmodel(x[:1]))


def test_a_norm_over_the_width_of_images_leaves_their_channels_where_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2), nn.LayerNorm(4), nn.Conv2d(16, 8, 1))
    qmodel, x = dsconv.quantize(model.eval()), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = qmodel(x)
        assert float((dsconv.compile(qmodel, x[:1])(x) - expected).norm() / expected.norm()) < 0.02
