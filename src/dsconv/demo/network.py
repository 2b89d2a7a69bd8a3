"""Network of the demo, its weights and its images, all read from inside the package.

Created by ``scripts/train_demo.py`` from the test part of *Optical Recognition of Handwritten Digits* (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, CC BY 4.0) as distributed by scikit-learn.
"""

from importlib.resources import files
from typing import Literal, cast, overload

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.data import Preprocess
from dsconv.errors import DataError

PREPROCESS = Preprocess(resize=(8, 8), channels="gray")
"""Preprocessing of a picture of one digit, white ink on black."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., "Deep Residual Learning", CVPR 2016)."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = (
            nn.Identity()
            if stride == 1 and inputs == planes
            else nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class DigitsResNet(nn.Module):
    """ResNet of three stages (32, 64 and 96 channels) for 8x8 grey images, 222,570 parameters.

    Input float32 (N, 1, 8, 8) in 0..1, output float32 (N, 10): one logit per digit.

    >>> import torch
    >>> DigitsResNet().eval()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = BasicBlock(32, 32, 1)
        self.layer2 = BasicBlock(32, 64, 2)
        self.layer3 = BasicBlock(64, 96, 2)
        self.fc = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.fc(x.mean((2, 3))))


def _asset(name: str) -> dict[str, Tensor]:
    return load(files(__package__).joinpath(name).read_bytes())


def digits_resnet(pretrained: bool = True) -> DigitsResNet:
    """Return a ``DigitsResNet`` in eval mode, with the trained weights or random ones: ``dsconv/digits_resnet``."""
    with torch.device("cpu"):
        network = DigitsResNet().float()
    if pretrained:
        network.load_state_dict(_asset("digits_resnet.safetensors"))
    return network.eval()


def load_network() -> nn.Module:
    """Return the trained network: float32, on the CPU, in eval mode.

    >>> images, labels = load_digits()
    >>> bool((load_network()(images).argmax(1) == labels).float().mean() > 0.985)
    True
    """
    return digits_resnet(pretrained=True)


@overload
def load_digits(split: Literal["test"] = "test") -> tuple[Tensor, Tensor]: ...
@overload
def load_digits(split: Literal["unlabelled"]) -> tuple[Tensor, None]: ...
def load_digits(split: str = "test") -> tuple[Tensor, Tensor | None]:
    """Return images float32 (N, 1, 8, 8) in 0..1, ready for the network, and labels int64 (N,) in 0..9.

    ``"test"`` has 540 digits that the network was not trained on; ``"unlabelled"`` has 256 of its training digits,
    without labels (None), for calibration.

    Raises:
        DataError: ``split`` is neither ``"test"`` nor ``"unlabelled"``.

    >>> images, labels = load_digits("test")
    >>> images.shape, labels.shape
    (torch.Size([540, 1, 8, 8]), torch.Size([540]))
    """
    if split not in ("test", "unlabelled"):
        raise DataError(f'split: expected "test" or "unlabelled", got {split!r}')
    digits = _asset("digits.safetensors")
    # The files contain ink counts 0..16. Paper is 0, so that the zero padding of a convolution is paper too.
    return digits[f"{split}_images"].float() / 16, digits.get(f"{split}_labels")
