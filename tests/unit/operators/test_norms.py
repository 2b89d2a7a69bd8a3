"""Norms and softmax of compiled networks, in every shape of a tensor of images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import by_isa, same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.compilation import CompiledModel
from dsconv.numerics import sqnr_db
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def of(run: Callable[[Any, Tensor], Tensor], x: Tensor, **layers: nn.Module) -> CompiledModel:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)
            for parameter in self.parameters():
                nn.init.normal_(parameter)

        def forward(self, x: Tensor) -> Tensor:
            return run(self, x)

    torch.manual_seed(0)
    return dsconv.compile(dsconv.quantize(Net().eval(), "w8a8"), x)


class Rows(nn.LayerNorm):
    """A layer norm over the channels of images, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


NORMS = {
    "group": lambda: nn.GroupNorm(4, 36),
    "one group": lambda: nn.GroupNorm(1, 36, affine=False),
    "instance": lambda: nn.InstanceNorm2d(36),
    "layer": lambda: Rows(36),
}


@pytest.mark.parametrize("size", [(1, 2), (9, 7), (40, 30)])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_near_and_the_same_everywhere(norm: str, size: tuple[int, int]) -> None:
    x = torch.randn(3, 3, *size)
    fast = of(lambda m, x: m.norm(m.conv(x)), x, conv=nn.Conv2d(3, 36, 1), norm=NORMS[norm]())
    assert not fast.plan.in_pytorch
    with torch.inference_mode():
        exact = fast.model.norm.double()(fast.model.conv(x).double())
        fast.model.norm.float()
    found = by_isa(lambda: dsconv.compile(fast.model, x)(x))
    first = next(iter(found.values()))
    assert all(same_bits(y, first) for y in found.values())
    assert (first - exact).abs().max() < 2e-6 * exact.abs().max()
    assert torch.equal(torch.cat([fast(image[None]) for image in x]), first)


def test_a_norm_of_numbers_that_are_not_finite_is_that_of_pytorch() -> None:
    x = torch.randn(4, 36, 3, 3)
    x[0, 0, 0, 0], x[1, 1, 1, 1], x[2] = torch.inf, torch.nan, 0.0
    for norm in NORMS.values():
        fast = of(lambda m, x: m.norm(x) + 0 * m.conv(0 * x), x[3:], conv=nn.Conv2d(36, 36, 1), norm=norm())
        with torch.inference_mode():
            found, expected = fast(x), fast.model(x)
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_blocks_of_convnext_are_steps_of_the_program() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        return m.last(x + m.down(F.gelu(m.up(y))).permute(0, 3, 1, 2) * 0.5)

    x = torch.randn(3, 3, 8, 6)
    fast = of(
        block,
        x,
        stem=nn.Conv2d(3, 32, 3, padding=1),
        depthwise=nn.Conv2d(32, 32, 7, padding=3, groups=32),
        norm=nn.LayerNorm(32),
        up=nn.Linear(32, 128),
        down=nn.Linear(128, 32),
        last=nn.Conv2d(32, 8, 1),
    )
    fused = [step.fused for step in fast.plan.steps]
    assert ("layer_norm", "quantize") in fused and ("bias", "gelu", "quantize") in fused
    assert not fast.plan.in_pytorch
    for images in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
        with torch.inference_mode():
            found, expected = fast(images), fast.model(images)
        assert found.stride() == expected.stride()
        assert sqnr_db(expected.square().sum().item(), (found - expected).square().sum().item() or 1e-30) > 30


def test_sequences_are_images_of_one_line() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(m.norm(m.a(x))), 3, 2, 1)
        y = F.relu(m.b(x) + x)
        y = y * F.hardsigmoid(m.gate(y.mean(-1, keepdim=True)))
        y = F.avg_pool1d(y - 1, 3, 2, 1, count_include_pad=False)
        return m.head(F.adaptive_avg_pool1d(y, 1).flatten(1))

    x = torch.randn(3, 3, 37)
    fast = of(
        run,
        x,
        a=nn.Conv1d(3, 24, 5),
        norm=nn.BatchNorm1d(24),
        b=nn.Conv1d(24, 24, 3, padding=1),
        gate=nn.Conv1d(24, 24, 1),
        head=nn.Linear(24, 10),
    )
    assert not fast.plan.in_pytorch
    with torch.inference_mode():
        for sequences in (x, x[:1]):
            assert torch.equal(fast(sequences), fast.model(sequences))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_windows_of_adaptive_averages_may_divide_the_image(size: int) -> None:
    x = torch.randn(2, 3, 6, 12)
    fast = of(lambda m, x: F.adaptive_avg_pool2d(m.conv(x), size), x, conv=nn.Conv2d(3, 20, 3, padding=1))
    assert not fast.plan.in_pytorch
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), fast.model(x))


@pytest.mark.parametrize("dim", [1, -3, 2, -1])
def test_softmax_over_channels_is_a_map(dim: int) -> None:
    x = torch.randn(2, 3, 6, 12)
    fast = of(lambda m, x: m.conv(x).softmax(dim), x, conv=nn.Conv2d(3, 20, 3, padding=1))
    assert [step.operator for step in fast.plan.in_pytorch] == ([] if dim in (1, -3) else ["aten.softmax"])
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), fast.model(x), rtol=0, atol=3e-7)
