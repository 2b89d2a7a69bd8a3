"""Intersection over union of class maps from segmentation."""

import math

import torch
from torch import Tensor

from dsconv.errors import DataError

# Label of pixels without a class in segmentation data sets.
_VOID = 255


def overlaps(wanted: Tensor, got: Tensor, classes: int) -> Tensor:
    """Count, for each class, the pixels that have it in both maps, in ``wanted``, and in ``got``.

    Args:
        wanted: int64 class indices of any shape; pixels below 0 are ignored, as are those of 255 unless that is a
            class.
        got: the same, all from 0 to ``classes - 1``.

    Returns:
        int64 ``(3, classes)``, which can be summed over images.

    Raises:
        DataError: ``wanted`` contains a class out of range.

    >>> overlaps(torch.tensor([0, 1, 1, 255]), torch.tensor([0, 1, 0, 1]), 2)
    tensor([[1, 1],
            [1, 2],
            [2, 1]])
    """
    known = (wanted >= 0) & ((wanted != _VOID) | (classes > _VOID))
    wanted, got = wanted[known], got[known]
    if wanted.numel() and int(wanted.max()) >= classes:
        raise DataError(
            f"labels: expected maps of class indices from 0 to {classes - 1}, and 255 for none, got {int(wanted.max())}"
        )
    return torch.stack([part.bincount(minlength=classes) for part in (wanted[wanted == got], wanted, got)])


def mean_iou(counts: Tensor) -> float:
    """Return the mean over classes of intersection over union in percent, from counts of :func:`overlaps`.

    A class without pixels in either map is ignored; NaN if there is no other.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, section 4.3.

    >>> mean_iou(torch.tensor([[1, 1, 0], [1, 2, 0], [2, 1, 0]]))
    50.0
    """
    both, wanted, got = counts.double()
    union = wanted + got - both
    there = union > 0
    return float((both[there] / union[there]).mean()) * 100 if there.any() else math.nan
