"""Images that a calibration does not see, and how close a network comes to its reference on them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsconv.calibration.layers import forward, tensors_of
from dsconv.evaluation import logits_in

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

    def __init__(self, reference: nn.Module, batches: Sequence[Tensor]):
        self._batches = batches
        self._expected = [_outputs(forward("reference", reference, x), len(x)) for x in batches]
        classifies = all(len(tensors) == 1 and _are_logits(tensors[0]) for tensors in self._expected)
        self.measure: Measure = "KL divergence" if classifies else "relative error"

    def of(self, qmodel: nn.Module) -> float:
        """Return the distance of ``qmodel``; infinite where it computes a NaN that the reference does not."""
        pairs = [
            (_finite(f), q.double().to(f.device))
            for x, expected in zip(self._batches, self._expected, strict=True)
            for f, q in zip(expected, _outputs(forward("qmodel", qmodel, x), len(x)), strict=True)
        ]
        if self.measure == "relative error":
            noise = sum(float((f - q).square()[known].sum()) for (f, known), q in pairs)
            signal = sum(float(f.square()[known].sum()) for (f, known), q in pairs)
            value = noise / signal if signal > 0 else noise
        else:
            rows = [(f[known.all(1)], q[known.all(1)]) for (f, known), q in pairs]
            log_f, log_q = ((torch.cat(side) / TEMPERATURE).log_softmax(1) for side in zip(*rows, strict=True))
            divergences = TEMPERATURE**2 * (log_f.exp() * (log_f - log_q)).sum(1)
            value = float(divergences.mean()) if len(divergences) else 0.0
        return value if value < torch.inf else torch.inf


def _outputs(output: Any, images: int) -> list[Tensor]:
    """Return the logits ``(N, classes)`` alone where there are any, else all tensors."""
    logits = logits_in(output)
    if isinstance(logits, Tensor) and len(logits) == images and _are_logits(logits):
        return [logits.flatten(1)]
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def _are_logits(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.shape[1] > 1 and tensor.shape[:2].numel() == tensor.numel()


def _finite(f: Tensor) -> tuple[Tensor, Tensor]:
    return f.double(), f.isfinite()
