"""Which images a step sees, and how they are varied. All of it follows from the seed and the number of the step."""

import torch
from torch import Tensor
from torch.nn import functional as F

# The least side that is cut out of an image, as a part of the whole.
_LEAST_SIDE = 0.75


def split(count: int, held_back: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images to train on, and of those that are held back.

    >>> [len(part) for part in split(64, 0.25, seed=0)]
    [48, 16]
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(count * held_back))
    return order[held:].sort().values, order[:held].sort().values


def drawn(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Which of ``count`` images step ``step`` sees: all in random order, and then again in another one.

    >>> torch.cat([drawn(step, 3, 6, seed=0) for step in range(2)]).sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    first = step * batch_size
    orders = {
        epoch: torch.randperm(count, generator=_generator(seed, epoch))
        for epoch in range(first // count, (first + batch_size - 1) // count + 1)
    }
    return torch.stack([orders[place // count][place % count] for place in range(first, first + batch_size)])


def varied(x: Tensor, step: int, seed: int, part: slice, batch_size: int) -> Tensor:
    """The ``part`` of a batch that one process has, each image cut at random, resized back and, half of them, mirrored.

    Args:
        x: float images ``(N, C, H, W)``, those of ``part``.
        step, seed: what is random depends on these and on the place in the whole batch.
        part: where ``x`` lies in the batch.
        batch_size: of the whole batch.
    """
    generator = _generator(seed, -1 - step)
    side, *middle, mirror = torch.rand(4, batch_size, generator=generator)[:, part]
    side = 1 - (1 - _LEAST_SIDE) * side
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = torch.where(mirror < 0.5, -side, side)
    theta[:, 1, 1] = side
    for axis, place in enumerate(middle):
        theta[:, axis, 2] = (2 * place - 1) * (1 - side)
    grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 63))
