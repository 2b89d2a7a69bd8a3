"""Trainable substitutes for a layer's VQK and KDS: float values that are quantized each time they are used.

The gradient passes straight through the rounding. A shadow returns the weight that its layer uses, float32
``(O, C/groups, *K)``, and finally the integers, scales and shifts that represent the same weight.
"""

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from dsconv.layers import DSLayer
from dsconv.numerics import dequantize_weight

# Maximum distance of a level from its integer: beyond, it would be rounded to another one.
_WITHIN = 0.49
# Maximum initial distance of a level from its integer, so that many steps in one direction are needed to change it:
# after a calibration the integers are seldom those nearest to the weight.
_START = 0.25


class Stored(NamedTuple):
    """Stored form of a weight: VQK int8, KDS and shift float32."""

    vqk: Tensor
    kds: Tensor
    kds_shift: Tensor | None


class Shadow(Protocol):
    """Module that represents the weight of a layer."""

    def __call__(self) -> Tensor: ...
    def stored(self) -> Stored: ...
    def bound_(self) -> None:
        """Limit the parameters after each step."""


class LearnedWeight(nn.Module):
    """Trainable integers, scales and shifts, initialized from those of ``layer``.

    All parameters are relative, so that one learning rate suits all layers: ``level`` is the weight in units of its
    scale, which is rounded to VQK; ``gain`` multiplies the scale, and ``offset`` moves the shift in units of the scale.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, with levels instead of weights.
    """

    def __init__(self, layer: DSLayer, weight: Tensor):
        super().__init__()
        config = layer.config
        self.bits, self.block_size, self.kds_dtype = config.weight_bits, config.block_size, config.torch_kds_dtype
        self.shape = layer.vqk.shape
        vqk = layer.blockwise(layer.vqk).float()
        self.register_buffer("kds", layer.kds.float())
        self.register_buffer("kds_shift", None if layer.kds_shift is None else layer.kds_shift.float())
        # The initial position of a level in its interval reflects the distance of the weight from the next level.
        zero = torch.zeros_like(vqk)
        offset = 0.0 if self.kds_shift is None else dequantize_weight(zero, self.kds, self.block_size, self.kds_shift)
        step = dequantize_weight(zero + 1, self.kds, self.block_size)
        exact = (layer.blockwise(weight) - offset) / torch.where(step == 0, torch.inf, step)
        self.level = nn.Parameter(vqk + (exact - vqk).clamp_(-_START, _START))
        self.gain = nn.Parameter(torch.ones_like(self.kds))
        self.offset = None if self.kds_shift is None else nn.Parameter(torch.zeros_like(self.kds))
        self.bound_()

    kds: Tensor
    kds_shift: Tensor | None

    def forward(self) -> Tensor:
        level = self.level + (self.level.round() - self.level).detach()
        kds, shift = self._scale_and_shift()
        return dequantize_weight(level, kds, self.block_size, shift).view(self.shape)

    def stored(self) -> Stored:
        return Stored(self.level.detach().round().to(torch.int8).view(self.shape), *self._scale_and_shift())

    @torch.no_grad()
    def bound_(self) -> None:
        half = 1 << (self.bits - 1)
        self.level.clamp_(-half - _WITHIN, half - 1 + _WITHIN)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        kds = self._as_stored(self.kds * self.gain)
        if self.kds_shift is None:
            return kds, None
        return kds, self._as_stored(self.kds_shift + self.kds * cast(Tensor, self.offset))

    def _as_stored(self, value: Tensor) -> Tensor:
        """Return ``value`` in the precision of files."""
        return value + (value.detach().to(self.kds_dtype).float() - value.detach())


class RecomputedWeight(nn.Module):
    """Trainable float weight that the rule of the layer's config quantizes on each use.

    Source: Gennari do Nascimento et al., "DSConv: Efficient Convolution Operator", ICCV 2019, section 3.5.
    """

    def __init__(self, layer: DSLayer, weight: Tensor):
        super().__init__()
        # Not a submodule: its parameters are trained with those of the network that it belongs to.
        self._layer = (layer,)
        self.weight = nn.Parameter(weight.clone())

    def forward(self) -> Tensor:
        (layer,) = self._layer
        vqk, kds, shift = self.stored()
        size, dtype = layer.config.block_size, layer.config.torch_kds_dtype
        shift = None if shift is None else shift.to(dtype)
        value = dequantize_weight(layer.blockwise(vqk), kds.to(dtype), size, shift).view_as(self.weight)
        return self.weight + (value - self.weight.detach())

    @torch.no_grad()
    def stored(self) -> Stored:
        return Stored(*self._layer[0].quantized(self.weight))

    def bound_(self) -> None:
        pass
