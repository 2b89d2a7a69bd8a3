"""Comparison of images: squared error and structural similarity.

torchmetrics provides both, but brings three packages and its own way to keep sums for two short formulas.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# From Wang et al.: a window of 11 x 11 Gaussian weights.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def ranges(wanted: Tensor, data_range: float | None) -> Tensor:
    """Return the range of each of the images ``(N, C, H, W)``: ``data_range``, or its maximum minus its minimum.

    A constant image has the range 1.
    """
    if data_range is not None:
        return torch.full_like(wanted[:, 0, 0, 0], data_range)
    low, high = wanted.flatten(1).aminmax(dim=1)
    return torch.where(high > low, high - low, 1.0)


def squared_error(wanted: Tensor, got: Tensor, data_range: float | None) -> Tensor:
    """Return the mean squared error of each image in units of its squared range, ``(N,)``.

    The peak signal-to-noise ratio of images is ``-10 log10`` of its mean.

    >>> x = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    >>> squared_error(x, x + 1, None), squared_error(x, x + 1, 8.0)
    (tensor([0.0625]), tensor([0.0156]))
    """
    return (wanted - got).square().flatten(1).mean(1) / ranges(wanted, data_range).square()


def ssim(wanted: Tensor, got: Tensor, data_range: float | None) -> Tensor:
    """Return the structural similarity of images ``(N, C, H, W)`` of 11 x 11 pixels or more, ``(N,)``; 1 if equal.

    It is the mean, over channels and all positions of an 11 x 11 window of Gaussian weights with standard deviation
    1.5, of ``(2 mx my + c1) (2 sxy + c2) / ((mx^2 + my^2 + c1) (sx^2 + sy^2 + c2))``, where ``c1 = (0.01 R)^2`` and
    ``c2 = (0.03 R)^2`` for a range R.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE Transactions
    on Image Processing 13 (4), 2004.

    >>> x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    >>> ssim(x, x, 1.0)
    tensor([1.], dtype=torch.float64)
    """
    offsets = torch.arange(_WINDOW, dtype=wanted.dtype, device=wanted.device) - _WINDOW // 2
    weights = (-offsets.square() / (2 * _SIGMA**2)).exp()
    weights = weights / weights.sum()
    maps = torch.stack([wanted, got, wanted * wanted, got * got, wanted * got]).flatten(0, 2)[:, None]
    means = F.conv2d(F.conv2d(maps, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = means.view(5, *wanted.shape[:2], *means.shape[2:])
    c1, c2 = ((k * ranges(wanted, data_range).view(-1, 1, 1, 1)).square() for k in (_K1, _K2))
    luminance = (2 * mx * my + c1) / (mx.square() + my.square() + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx.square() + yy - my.square() + c2)
    similarity: Tensor = luminance * structure
    return similarity.flatten(1).mean(1)


def has_windows(images: Tensor) -> bool:
    """Return whether images ``(N, C, H, W)`` are large enough for :func:`ssim`."""
    return min(images.shape[2:]) >= _WINDOW
