"""Images that a calibration does not see, and how close a network comes to its reference on them."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsconv.calibration.layers import tensors_of
from dsconv.data.inputs import Batch
from dsconv.evaluation.running import forward, logits_in

Measure = Literal["KL divergence", "relative error"]

TEMPERATURE = 4.0
"""Of the logits, for the divergence: at 1, most images that the reference is sure of would count for nothing."""

# One image of so many is held back; of few images more, since one alone tells little.
_ONE_OF, _OF_FEW, _FEW = 8, 4, 4


def split(count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the images to calibrate on, and of those held back, evenly spaced: an eighth of them.

    Of 16 to 32 images four are held back, of fewer a quarter, at least one.

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
    """Distance of networks from a reference on some images.

    Attributes:
        measure: mean KL divergence ``T^2 KL(softmax(f / T) || softmax(q / T))`` of the logits in nats, T being
            :data:`TEMPERATURE`, for networks of which :func:`dsconv.evaluate` takes the logits; of others the relative
            error of the outputs, ``sum (f - q)^2 / sum f^2``.
    """

    def __init__(self, reference: nn.Module, batches: Sequence[Batch]):
        self._batches = batches
        self._expected = [_outputs(forward("reference", reference, x), len(x)) for x in batches]
        classifies = all(len(tensors) == 1 and _are_logits(tensors[0]) for tensors in self._expected)
        self.measure: Measure = "KL divergence" if classifies else "relative error"
        # Of an image on average.
        signal = sum(float(f[f.isfinite()].double().square().sum()) for tensors in self._expected for f in tensors)
        self._signal = signal / sum(map(len, batches)) or 1.0

    def of(self, qmodel: nn.Module) -> Tensor:
        """Return the distance of ``qmodel`` at each image, float64 ``(N,)``, of which the mean counts.

        It is infinite where ``qmodel`` computes a NaN that the reference does not.
        """
        found = torch.cat([self._at(qmodel, *batch) for batch in zip(self._batches, self._expected, strict=True)])
        return torch.where(found < torch.inf, found, torch.inf)

    def _at(self, qmodel: nn.Module, x: Batch, expected: list[Tensor]) -> Tensor:
        outputs = _outputs(forward("qmodel", qmodel, x), len(x))
        if self.measure == "KL divergence":
            f, q = expected[0].double(), outputs[0].double()
            known = f.isfinite().all(1)
            log_f, log_q = ((logits / TEMPERATURE).log_softmax(1) for logits in (f, q))
            divergences = TEMPERATURE**2 * (log_f.exp() * (log_f - log_q)).sum(1)
            return torch.where(known, divergences, 0.0).cpu()
        noise = torch.zeros(len(x), dtype=torch.float64, device="cpu")
        for f, q in zip(expected, outputs, strict=True):
            f, q = f.double().cpu(), q.double().cpu()
            error = torch.where(f.isfinite(), (f - q).square(), 0.0)
            # What is no output of each image counts for all of them alike.
            noise += error.flatten(1).sum(1) if f.dim() and len(f) == len(x) else error.sum() / len(x)
        return noise / self._signal


def _outputs(output: Any, images: int) -> list[Tensor]:
    """Return the logits ``(N, classes)`` alone where there are any, else all tensors."""
    logits = logits_in(output)
    if isinstance(logits, Tensor) and _are_logits(logits) and len(logits) == images:
        return [logits.flatten(1)]
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def _are_logits(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.shape[1] > 1 and tensor.shape[:2].numel() == tensor.numel()


def chance(before: Tensor, after: Tensor) -> float:
    """Return the standard error of the mean of ``after - before`` ``(N,)``; 0 for one image, or where one is infinite.

    >>> round(chance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 5.0])), 4)
    0.5774
    """
    difference = after - before
    if len(difference) < 2 or not difference.isfinite().all():
        return 0.0
    return float(difference.std()) / math.sqrt(len(difference))
