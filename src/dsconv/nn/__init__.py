"""Quantized layers that take the place of PyTorch's."""

from dsconv.nn.affine import Affine
from dsconv.nn.conv import (
    DSConv1d,
    DSConv2d,
    DSConv3d,
    DSConvTranspose1d,
    DSConvTranspose2d,
    DSConvTranspose3d,
)
from dsconv.nn.layer import DSLayer
from dsconv.nn.linear import DSLinear

__all__ = [
    "Affine",
    "DSConv1d",
    "DSConv2d",
    "DSConv3d",
    "DSConvTranspose1d",
    "DSConvTranspose2d",
    "DSConvTranspose3d",
    "DSLayer",
    "DSLinear",
]
