"""The choice between a direct convolution and Winograd, by the noise that each leaves in the output."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv import backends
from dsconv.numerics import InputMoments
from dsconv.numerics.balanced import TAP_CORRELATION

MOST_NOISE_DB = 1.0
"""Noise that Winograd may add to that of a direct convolution, in its output."""
_SIDE = 14  # pixels of the noise that stands for the input


def winograd_noise_db(operation: backends.Operation, quantized: Tensor, weight: Tensor, x: Tensor) -> float:
    """Return by how much Winograd raises the noise of a layer's output over that of the direct convolution, in dB.

    Args:
        operation: of a quantized 3x3 convolution.
        quantized: its weight as VQK, KDS and shift have it, float32 ``(O, C, 3, 3)``.
        weight: the float weight that it was made of, of the same shape.
        x: its input, float32 ``(N, C, H, W)``.
    """
    expected = F.conv2d(x, weight.float(), padding=list(operation.padding))
    noise = []
    for algorithm in ("direct", "winograd"):
        config = operation.config.model_copy(update={"algorithm": algorithm})
        y = backends.SIMULATION.run(operation._replace(config=config), quantized, None, x)
        noise.append(float((y - expected).square().sum(dtype=torch.float64)))
    direct, winograd = noise
    if not math.isfinite(direct + winograd):
        return math.inf
    return 10 * math.log10(winograd / direct) if direct > 0 < winograd else 0.0 if winograd <= direct else math.inf


def noise_like(inputs: InputMoments | None, channels: int, device: torch.device) -> Tensor:
    """Return noise that stands for the input of a layer ``(1, channels, H, W)``, of which moments are known, or not.

    Neighbouring pixels are alike. Channels with a positive mean are rectified, as they are behind a ReLU.
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
