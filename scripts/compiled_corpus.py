"""Write small compiled networks with steps of every kind, which csrc/test/network_test.cpp damages.

python scripts/compiled_corpus.py csrc/test/corpus
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsconv


def image(channels: int, size: int = 8) -> Tensor:
    return torch.zeros(1, channels, size, size, dtype=torch.float32)


class Residual(nn.Module):
    """Convolutions of several kinds, a sum, pools, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.deep, self.narrow = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 24, 1, groups=4)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(self.norm(self.deep(x)) + x)
        return self.last(self.narrow(F.avg_pool2d(x, 2)).mean((2, 3)))  # type: ignore[no-any-return]


class Mobile(nn.Module):
    """Depthwise layers that are joined with the one before, products by image, rare activations."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.depthwise = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.squeeze, self.project = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(F.silu(self.grow(x))))
        x = x * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return F.gelu(self.project(x))


class Dense(nn.Module):
    """Concatenation, upsampling, shuffles, pads, group norm, several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 1)
        self.norm, self.last, self.up = nn.GroupNorm(2, 16), nn.Conv2d(16, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Tensor]:
        small = self.one(x)
        up = F.interpolate(small, scale_factor=2.0, mode="bilinear")
        whole = F.channel_shuffle(self.norm(torch.cat([up, self.two(other)], 1)), 4)
        made = self.last(F.pad(whole, (1, 1, 1, 1), mode="reflect"))
        return {
            "near": F.interpolate(made, scale_factor=2.0, mode="nearest"),
            "shuffled": F.pixel_shuffle(self.up(small), 2),
            "windows": F.adaptive_avg_pool2d(whole, (3, 5)),
            "flat": torch.softmax(made, 1).flatten(1),
        }


class Scales(nn.Module):
    """Windows beyond the end, strides, pads, crops, interpolation, transposed layers, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 8, 5, 2, 2), nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.max_pool2d(torch.relu(self.first(x)), 3, 2, ceil_mode=True)
        pads = F.pad(y, (2, 1, 0, 3), mode="replicate") + F.pad(y, (1, 2, 2, 1), value=0.5)
        near = F.interpolate(pads[:, :, ::2, 1::2], scale_factor=3.0, mode="nearest")
        between = F.interpolate(self.last(y[:, :, 1:-1, 2:]), scale_factor=2.0, mode="bilinear")
        return self.up(y), near, between, F.adaptive_avg_pool2d(pads, (3, 2))


NETWORKS: dict[str, tuple[type[nn.Module], Sequence[Tensor], str, bool]] = {
    "residual": (Residual, [image(3, 16)], "default", False),
    "whole": (Residual, [image(3, 12)], "default", True),
    "direct": (Residual, [image(3, 12)], "w8a8", False),
    "mobile": (Mobile, [image(4)], "default", False),
    "dense": (Dense, [image(8), image(8)], "default", False),
    "scales": (Scales, [image(3, 20)], "default", False),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (network, inputs, preset, fast_start) in NETWORKS.items():
        torch.manual_seed(0)
        fast = dsconv.compile(dsconv.quantize(network().eval(), preset), tuple(inputs))
        saved = fast.save(folder / f"{name}.dsconv", fast_start=fast_start)
        print(f"{name}: {saved.bytes:,} bytes, {len(fast.plan.steps)} steps, sizes by {saved.size_step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
