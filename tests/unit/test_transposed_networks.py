"""Networks with transposed and 3-D convolutions: in integers layer by layer, and compiled to the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
    )


class UNet(nn.Module):
    """Ronneberger et al., MICCAI 2015, of three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([convs(3, 16), convs(16, 32)])
        self.bottom = convs(32, 64)
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)])
        self.joined = nn.ModuleList([convs(64, 32), convs(32, 16)])
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.bottom(x)
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([kept.pop(), up(x)], 1))
        return self.last(x)


def fsrcnn() -> nn.Sequential:
    """Dong et al., ECCV 2016, three times as large."""
    middle = [layer for _ in range(4) for layer in (nn.Conv2d(12, 12, 3, padding=1), nn.PReLU(12))]
    return nn.Sequential(
        *(nn.Conv2d(1, 56, 5, padding=2), nn.PReLU(56), nn.Conv2d(56, 12, 1), nn.PReLU(12), *middle),
        *(nn.Conv2d(12, 56, 1), nn.PReLU(56), nn.ConvTranspose2d(56, 1, 9, stride=3, padding=4, output_padding=2)),
    )


def generator() -> nn.Sequential:
    """Radford et al., ICLR 2016, for images of 32x32."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(100, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for inputs, outputs in ((64, 32), (32, 16)):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.ReLU())


class Block3d(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm3d(outputs) for _ in range(3)])
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.norms[2](self.shortcut(x)))


def video() -> nn.Sequential:
    """A small ResNet over space and time (Tran et al., CVPR 2018)."""
    stem = nn.Conv3d(3, 16, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False), nn.BatchNorm3d(16), nn.ReLU()
    return nn.Sequential(
        *(*stem, Block3d(16, 24, 1), Block3d(24, 32, 2)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 7)
    )


def separable() -> nn.Sequential:
    """Return layers of X3D (Feichtenhofer, CVPR 2020): depthwise ones between pointwise ones."""
    return nn.Sequential(
        *(nn.Conv3d(3, 24, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.Conv3d(24, 24, (3, 1, 1), 1, (1, 0, 0), groups=24)),
        *(nn.ReLU(), nn.Conv3d(24, 48, 1), nn.ReLU(), nn.Conv3d(48, 48, 3, 1, 1, groups=48), nn.ReLU()),
        *(nn.Conv3d(48, 32, 1, 1, (1, 0, 0)), nn.ConvTranspose3d(32, 16, 1, 2), nn.ReLU()),
    )


class VNet(nn.Module):
    """Segmentation of volumes (Milletari et al., 3DV 2016) with two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 32, 2, stride=2)
        self.up, self.last = nn.ConvTranspose3d(32, 16, 2, stride=2), nn.Conv3d(32, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = F.relu(self.first(x))
        return self.last(torch.cat([kept, F.relu(self.up(F.relu(self.down(kept))))], 1))


class Line(nn.Module):
    """An upsampler of waveforms, as in HiFi-GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(20, 32, 7, padding=3)
        self.ups = nn.ModuleList([nn.ConvTranspose1d(32, 16, 16, 8, 4), nn.ConvTranspose1d(16, 8, 4, 2, 1)])
        self.last = nn.Conv1d(8, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up in self.ups:
            x = up(F.leaky_relu(x, 0.1))
        return self.last(F.leaky_relu(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "U-Net": (UNet, (3, 24, 20)),
    "FSRCNN": (fsrcnn, (1, 11, 14)),
    "DCGAN": (generator, (100, 1, 1)),
    "video": (video, (3, 5, 20, 22)),
    "X3D": (separable, (3, 4, 12, 10)),
    "V-Net": (VNet, (1, 4, 8, 6)),
    "waveforms": (Line, (20, 9)),
}


def network(name: str, config: str = "w4a4") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return dsconv.quantize(model, config), torch.randn(3, *size)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_are_in_integers_as_they_are_simulated(name: str) -> None:
    model, x = network(name)
    assert {row.backend for row in dsconv.summary(model).layers} == {f"integers ({native.isa()})"}
    with torch.inference_mode():
        y = model(x)
        with dsconv.ops.simulated():
            simulated = model(x)
    assert dsconv.numerics.sqnr_db(y.square().sum().item(), (y - simulated).square().sum().item()) > 40


@pytest.mark.parametrize("config", ["w4a4", "default"])
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_they_return_the_same_bits(name: str, config: str) -> None:
    model, x = network(name, config)
    fast = dsconv.compile(model, x)
    left = [step.operator for step in fast.plan.in_pytorch]
    if name != "waveforms":  # which are not images
        assert left == []
    layouts = [torch.contiguous_format]
    layouts += [torch.channels_last] * (x.dim() == 4) + [torch.channels_last_3d] * (x.dim() == 5)
    with torch.inference_mode():
        for images in (x, x[:1], x[:0], torch.cat([x, x + 1])):
            for layout in layouts if len(images) else layouts[:1]:
                given = images.contiguous(memory_format=layout)
                expected, made = fast.model(given), fast(given)
                assert torch.equal(made, expected)
                assert not made.numel() or made.stride() == expected.stride()


def test_a_layer_that_is_simulated_is_one_step_of_pytorch() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 24, 3, 2, output_padding=1), nn.Conv2d(24, 4, 1)]
    config = dsconv.QuantConfig.preset("paper", overrides={"2": {"block_size": 12, "kds_dtype": "float32"}})
    model, x = dsconv.quantize(nn.Sequential(*layers).eval(), config), torch.randn(2, 3, 9, 8)
    fast = dsconv.compile(model, x)
    assert [step.operator for step in fast.plan.in_pytorch] == ["dsconv.simulated", "dsconv.simulated"]
    with torch.inference_mode():
        for images in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(fast(images), fast.model(images))
            assert fast(images).stride() == fast.model(images).stride()


def test_layers_quantize_for_transposed_ones_and_these_for_those_behind() -> None:
    model, x = network("DCGAN")
    steps = dsconv.compile(model, x).plan.steps
    assert [step.operator for step in steps] == ["dsconv.map"] + ["dsconv.convolution (transposed)"] * 4
    assert [step.fused[-1] for step in steps] == ["quantize"] * 4 + ["relu"]
    model, x = network("video")
    fused = {step.name: step.fused for step in dsconv.compile(model, x).plan.steps}
    assert fused["3.first"] == ("batch_norm", "relu", "quantize")
    assert fused["3.second"] == ("batch_norm",)
    assert fused["3.shortcut"] == ("batch_norm", "add", "relu", "quantize")


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_loaded_they_return_the_same_bits(name: str, tmp_path: Path) -> None:
    model, x = network(name)
    path = dsconv.save(model, tmp_path / "net.safetensors")
    loaded = dsconv.load(path, NETWORKS[name][0]().eval())
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    _, described = dsconv.io.describe(path)
    assert {row.backend for row in described.layers} == {f"integers ({native.isa()})"}
