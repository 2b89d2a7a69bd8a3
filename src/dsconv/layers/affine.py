"""Replacement of a BatchNorm in inference that cannot be folded into a layer."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Affine(nn.Module):
    """``x * scale + shift`` with a scale and a shift per channel, rounded after the product and after the sum.

    PyTorch's BatchNorm rounds differently on each processor; a network that must return the same bits everywhere uses
    this module instead.

    Attributes:
        scale, shift: float32 buffers ``(C,)``.

    >>> layer = Affine(2)
    >>> _ = layer.shift.fill_(1.0)
    >>> layer(torch.ones(1, 2, 1, 1)).flatten()
    tensor([2., 2.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("scale", torch.ones(channels, dtype=torch.float32, device="cpu"))
        self.register_buffer("shift", torch.zeros(channels, dtype=torch.float32, device="cpu"))

    @classmethod
    @torch.no_grad()
    def from_batchnorm(cls, batchnorm: _BatchNorm) -> Self:
        """Return ``gamma / sqrt(var + eps)`` and ``beta - mean * scale`` of a BatchNorm with running statistics."""
        assert batchnorm.running_mean is not None
        assert batchnorm.running_var is not None
        made = cls(batchnorm.num_features)
        scale = (batchnorm.running_var.double() + batchnorm.eps).rsqrt()
        if batchnorm.weight is not None:
            scale *= batchnorm.weight.double()
        shift = -batchnorm.running_mean.double() * scale
        if batchnorm.bias is not None:
            shift += batchnorm.bias.double()
        made.scale, made.shift = scale.float(), shift.float()
        return made.train(batchnorm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x (N, C, *)``, with the same shape and dtype."""
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape).to(x.dtype) + self.shift.view(shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.scale)}"
