"""Quantized layers that replace PyTorch's."""

from dsconv.layers.affine import Affine
from dsconv.layers.conv import DSConv1d, DSConv2d, DSConv3d
from dsconv.layers.layer import DSLayer
from dsconv.layers.linear import DSLinear
from dsconv.layers.transposed import DSConvTranspose1d, DSConvTranspose2d, DSConvTranspose3d

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
