"""Trials of steps on noise, to compare their results with those of PyTorch.

PyTorch does not document its order of summation. A step that supports several uses the one that is bitwise equal.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsconv.backends import lowering
from dsconv.backends.base import Uses


def backend() -> str:
    """Return the name of the backend, for which alone results of trials hold."""
    found, _ = lowering()
    return found.describe()


def noise(size: tuple[int, int, int], pixels: bool = False) -> Tensor:
    """Return an image ``(1, C, H, W)``, the same at each call; ``pixels``: in channels-last format."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, *size), generator=generator, dtype=torch.float32, device="cpu")
    return x.contiguous(memory_format=torch.channels_last) if pixels else x


def made(x: Tensor, out: tuple[int, int], add: Callable[[Any, int, int], None]) -> Tensor:
    """Return the result of a step for an image: ``(1, C, *out)``.

    Args:
        x: the image, ``(1, C, H, W)``.
        out: height and width of the result.
        add: appends the step to an executable, given the numbers of the image and of the result.
    """
    executing, program = lowering()
    x = x.contiguous(memory_format=torch.channels_last)
    size = (1, x.shape[1], *out)
    y = torch.empty(size, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    numbers = []
    for base, tensor in enumerate((x, y), 1):
        _, channels, height, width = tensor.shape
        strides = (tensor.numel(), 1, width * channels, channels)
        numbers.append(program.values(base, 0, 0, (channels, height, width), strides))
    add(program, *numbers)
    bases = [executing.constant(tensor) for tensor in (None, x, y)]
    program.run(1, bases, 0, 1, executing.constant(None))
    return y


def alone(result: int) -> Uses:
    """Return the uses of a step that writes this float32 tensor and nothing else."""
    return result, -1, [], 0, 0.0, 0.0
