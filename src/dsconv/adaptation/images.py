"""Choice of the images to train on, and of those in each step, from the seed and the number of the step."""

import torch
from torch import Tensor


def split(count: int, held_back: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the images to train on, and of those held back.

    >>> [len(part) for part in split(64, 0.25, seed=0)]
    [48, 16]
    """
    order = _order(count, seed)
    held = max(1, round(count * held_back))
    return order[held:].sort().values, order[:held].sort().values


def drawn(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Return which of ``count`` images step ``step`` uses: all in random order, and then again in another order.

    >>> torch.cat([drawn(step, 3, 6, seed=0) for step in range(2)]).sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    first = step * batch_size
    orders = {
        epoch: _order(count, seed * 1_000_003 + epoch)
        for epoch in range(first // count, (first + batch_size - 1) // count + 1)
    }
    return torch.stack([orders[place // count][place % count] for place in range(first, first + batch_size)])


def _order(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
