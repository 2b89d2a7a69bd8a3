"""Images held back from a calibration, and the distance of a network from its reference on them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsconv.data.inputs import Batch
from dsconv.evaluation.measures import Output, Teller, distances, powers
from dsconv.evaluation.outputs import check_same
from dsconv.evaluation.running import outputs_of
from dsconv.evaluation.scores import total_of
from dsconv.names import Task

TEMPERATURE = 4.0
"""Temperature of the logits for the divergence: at 1, images with a confident reference would hardly count."""

# One of 8 images is held back; of few images more, since a single one is not enough evidence.
_ONE_OF, _OF_FEW, _FEW = 8, 4, 4


def split(count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the images to calibrate on, and of those held back, evenly spaced: an eighth of them.

    From 16 to 32 images four are held back, from fewer a quarter, at least one.

    >>> fitted, held_back = split(20)
    >>> len(fitted), held_back
    (16, tensor([ 2,  7, 12, 17]))
    """
    most = max(1, count // _ONE_OF, min(_FEW, count // _OF_FEW))
    held_back = (torch.arange(most, dtype=torch.int64, device="cpu") * 2 + 1) * count // (2 * most)
    fitted = torch.ones(count, dtype=torch.bool, device="cpu")
    fitted[held_back] = False
    return fitted.nonzero().flatten(), held_back


class Distance:
    """Distance of networks from a reference on some images, see :mod:`dsconv.evaluation.measures`.

    Attributes:
        measure: its name; logits are divided by :data:`TEMPERATURE`.
    """

    def __init__(self, reference: nn.Module, batches: Sequence[Batch], task: Task | None = None):
        self._batches = batches
        teller = Teller("reference", task)
        self._expected = [outputs_of("reference", reference, x, torch.float64) for x in batches]
        for x, outputs in zip(batches, self._expected, strict=True):
            self._kinds = teller.kinds(outputs, len(x))
        self.measure = self._kinds.measure
        images = sum(map(len, batches))
        sums = total_of(powers(outputs, self._kinds) for outputs in self._expected)
        self._power = {name: value / images for name, value in sums.items()}

    def of(self, qmodel: nn.Module) -> Tensor:
        """Return the distance of ``qmodel`` for each image, float64 ``(N,)``; its mean is compared.

        It is infinite if ``qmodel`` computes a NaN that the reference does not.
        """
        found = torch.cat([self._at(qmodel, *batch) for batch in zip(self._batches, self._expected, strict=True)])
        return torch.where(found < torch.inf, found, torch.inf)

    def _at(self, qmodel: nn.Module, x: Batch, expected: dict[str, Output]) -> Tensor:
        outputs = outputs_of("qmodel", qmodel, x, torch.float64)
        check_same(expected, outputs, ("the reference", "qmodel"))
        return distances(expected, outputs, len(x), self._kinds, self._power, TEMPERATURE).cpu()


def chance(before: Tensor, after: Tensor) -> float:
    """Return the standard error of the mean of ``after - before`` ``(N,)``; 0 for one image, or if one is infinite.

    >>> round(chance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 5.0])), 4)
    0.5774
    """
    difference = after - before
    if len(difference) < 2 or not difference.isfinite().all():
        return 0.0
    return float(difference.std()) / math.sqrt(len(difference))
