"""Choice between direct convolution and Winograd by the noise of each in the output."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.numerics import InputMoments
from dsconv.numerics.balanced import TAP_CORRELATION

MOST_NOISE_DB = 1.0
"""Maximum increase of the output noise by Winograd over a direct convolution, in dB."""
_SIDE = 14  # side, in pixels, of the noise used as input


def added_noise_db(expected: Tensor, direct: Tensor, winograd: Tensor) -> float:
    """Return by how much Winograd raises the noise of a layer's output over that of the direct convolution, in dB.

    Args:
        expected: output of the float layer.
        direct, winograd: outputs of the quantized layer with either algorithm.
    """
    before, after = (float((y - expected).square().sum(dtype=torch.float64)) for y in (direct, winograd))
    if not math.isfinite(before + after):
        return math.inf
    return 10 * math.log10(after / before) if before > 0 < after else 0.0 if after <= before else math.inf


def noise_like(inputs: InputMoments | None, channels: int, device: torch.device) -> Tensor:
    """Return noise ``(1, channels, H, W)`` with the moments of a layer's input, or with default ones if unknown.

    Neighbouring pixels are similar. Channels with a positive mean are rectified, as they are after a ReLU.
    """
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (
        torch.randn(1, channels, side, side, generator=generator, dtype=torch.float32, device="cpu").to(device)
        for side in (_SIDE // 2, _SIDE)
    )
    z = math.sqrt(TAP_CORRELATION) * F.interpolate(coarse, size=(_SIDE, _SIDE)) + math.sqrt(1 - TAP_CORRELATION) * fine
    if inputs is None:
        return z.relu()
    mean, variance = (moment.flatten().to(device).view(1, -1, 1, 1) for moment in inputs)
    power = (mean.square() + variance).sqrt()
    return torch.where(mean > 0, z.relu() * math.sqrt(2) * power, mean + z * variance.sqrt())
