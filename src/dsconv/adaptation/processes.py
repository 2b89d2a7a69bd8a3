"""Processes that train one network together, as started by ``torchrun``; usually there is only one."""

import os
import warnings
from typing import Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """Process group of the processes started by ``torchrun``, which is joined unless this was already done.

    Attributes:
        count: number of processes.
        rank: rank of this process, from 0.
        device: device of this process; a GPU of its own, if ``device`` is ``cuda``.
    """

    def __init__(self, device: torch.device):
        self.count, self.rank, self.device, self._joined = 1, 0, device, False

    def __enter__(self) -> Self:
        if not distributed.is_available():
            return self
        cuda = self.device.type == "cuda"
        if distributed.is_torchelastic_launched() and not distributed.is_initialized():
            distributed.init_process_group("nccl" if cuda else "gloo")
            self._joined = True
        if distributed.is_initialized():
            self.count, self.rank = distributed.get_world_size(), distributed.get_rank()
            if cuda and self.device.index is None and "LOCAL_RANK" in os.environ:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return self

    def __exit__(self, *_: object) -> None:
        if self._joined:
            distributed.destroy_process_group()

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return ``module``, wrapped so that its gradients are averaged over all processes."""
        if self.count == 1:
            return module
        with warnings.catch_warnings():
            # PyTorch 2.6 does not have the new name of the argument.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            return DistributedDataParallel(module, broadcast_buffers=False)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of ``value`` over all processes, on the CPU."""
        if self.count > 1:
            value = value.to(self.device)
            distributed.all_reduce(value)
            value = value / self.count
        return value.cpu()


def is_first() -> bool:
    """Return whether this process has rank 0, or is the only one."""
    return os.environ.get("RANK", "0") == "0"
