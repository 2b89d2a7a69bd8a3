"""Pixel shuffles are steps of compiled networks."""

import pytest
import torch
from torch import nn

import dsconv
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("behind", [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Identity()])
@torch.inference_mode()
def test_has_pytorchs_values(factor: int, behind: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4 * factor**2, 3, padding=1), nn.PixelShuffle(factor), behind).eval()
    qnet, x = dsconv.quantize(net), torch.randn(3, 3, 5, 7)
    fast = dsconv.compile(qnet, x)
    assert [step.operator for step in fast.plan.steps].count("dsconv.pixel_shuffle") == 1 and not fast.plan.in_pytorch
    for images in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(fast(images), qnet(images)) and fast(images).stride() == qnet(images).stride()


@torch.inference_mode()
def test_of_a_concatenation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(20, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = torch.cat([self.a(x), self.b(x)], 1)
            up = nn.functional.pixel_shuffle(whole, 2)
            return self.c(torch.cat([up, nn.functional.interpolate(whole, scale_factor=2)], 1))

    qnet, x = dsconv.quantize(Net().eval()), torch.randn(2, 3, 6, 6)
    fast = dsconv.compile(qnet, x)
    assert torch.equal(fast(x), qnet(x))


def test_the_extension_refuses_tensors_that_do_not_fit() -> None:
    module = native.extension()
    one = module.Program("scalar")

    def tensor(c: int, h: int, w: int) -> int:
        return one.values(0, 0, 0, (c, h, w), (c * h * w, 1, w * c, c))

    source, lines = tensor(16, 2, 3), one.values(0, 0, 0, (16, 2, 3), (96, 6, 3, 1))
    one.shuffle(source, 2, tensor(4, 4, 6))
    for args in (
        (source, 2, tensor(4, 4, 5)),
        (source, 2, tensor(8, 4, 6)),
        (source, 2, tensor(4, 2, 12)),
        (source, 0, source),
        (source, -2, tensor(4, 4, 6)),
        (lines, 2, tensor(4, 4, 6)),
    ):
        with pytest.raises(ValueError, match="shuffle"):
            one.shuffle(*args)
