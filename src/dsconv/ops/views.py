"""Views of tensors for convolutions: input windows of outputs, and layouts of weights."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pixels_format(dims: int) -> torch.memory_format:
    """Return the memory format with contiguous channels for a tensor with ``dims`` spatial dimensions.

    >>> pixels_format(4), pixels_format(2)
    (torch.channels_last, torch.contiguous_format)
    """
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims, torch.contiguous_format)


def transposed_layout(weight: Tensor, groups: int) -> Tensor:
    """Convert ``(O, C/groups, *K)`` to PyTorch's layout of transposed convolutions ``(C, O/groups, *K)``, or back.

    >>> import torch
    >>> transposed_layout(torch.zeros(6, 4, 3, 3), groups=2).shape
    torch.Size([8, 3, 3, 3])
    """
    return torch.unflatten(weight, 0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the input window of each output, as a view of padded ``x (N, C, *S)``: ``(N, C, *S_out, *kernel)``."""
    x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for d in range(len(kernel)):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    return x


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the input window of each output of a convolution, with the taps of a channel contiguous.

    Shapes are ``(N, C, *S)`` for the input and ``(N, C * prod(kernel), *S_out)`` for the result.
    """
    dims = len(kernel)
    x = windows(x, kernel, stride, padding, dilation)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(1, 1 + dims)
