"""Quantized layers that take the place of PyTorch's; and ``DSConvModel``, a network of them as the Hub has it."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from dsconv.hub import DSConvModel as DSConvModel

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


def __getattr__(name: str) -> Any:
    # It stands on all that is above layers, and needs an extra: imported by who asks for it.
    if name == "DSConvModel":
        from dsconv.hub import DSConvModel

        return DSConvModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
