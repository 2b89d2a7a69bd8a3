"""In which order averages of whole images are summed up."""

from functools import cache

import torch
from torch import Tensor

from dsconv.ops import cpu

# The last bits of a sum follow from its order, and that of PyTorch from the lanes of the vectors that it was built for.
_LANES = (8, 16, 4)
_TRIED = 16  # channels: enough that no other order rounds all of them alike, and few even of large images
OWN_LANES = 8  # on every processor


def lanes_of_pytorch(size: tuple[int, int, int]) -> int | None:
    """With how many lanes an ``Average`` of the extension has the bits of PyTorch's, for images ``(C, H, W)``; or None.

    Found by trying, so that another PyTorch with another order goes unharmed.

    >>> lanes_of_pytorch((64, 7, 7)) in (None, 4, 8, 16)
    True
    """
    return _lanes_of_pytorch(size, cpu.isa())


@cache
def _lanes_of_pytorch(size: tuple[int, int, int], isa: str | None) -> int | None:
    channels, height, width = size
    if channels == 1:
        return None  # a sum over all there is, which is cut up among threads
    generator = torch.Generator().manual_seed(0)
    tried = (1, min(channels, _TRIED), height, width)
    x = torch.randn(tried, generator=generator, dtype=torch.float32, device="cpu")
    expected = x.mean((2, 3)).flatten()
    return next((lanes for lanes in _LANES if torch.equal(_averages(x, lanes, isa), expected)), None)


def _averages(x: Tensor, lanes: int, isa: str | None) -> Tensor:
    """Of one image."""
    module = cpu.extension()
    assert module is not None
    _, channels, height, width = x.shape
    pixels = x.contiguous(memory_format=torch.channels_last)
    made = torch.empty(channels, dtype=torch.float32, device="cpu")
    program = module.Program(isa)
    source = program.values(1, 0, 0, (channels, height, width), (x.numel(), 1, width * channels, channels))
    program.average(source, lanes, program.values(2, 0, 0, (channels, 1, 1), (channels, 1, channels, channels)))
    program.run(1, [0, pixels.data_ptr(), made.data_ptr()], 0, 1, 0)
    return made
