"""The images on which two networks differ most."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsconv.data import Preprocess
from dsconv.data.inputs import Batch

_SHOWN = 12
_PIXELS = 160


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a network to an image: the class of the largest logit, and its probability."""

    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """An image that the two networks see differently.

    Attributes:
        name: of its file, or its number.
        jpeg: the image as the networks see it, small.
        label: its class, None where unknown.
        kl: KL(softmax(f) || softmax(q)) in nats.
    """

    name: str
    jpeg: bytes
    label: int | None
    kl: float
    reference: Answer
    quantized: Answer


class Worst:
    """The images on which two networks differ most, of those seen so far."""

    def __init__(self) -> None:
        self._seen = 0
        self._kept: list[tuple[float, int, Tensor, int | None, Answer, Answer]] = []

    def add(self, x: Batch, labels: Tensor | None, f: Tensor, q: Tensor) -> None:
        """Look at a batch: images ``(N, C, H, W)``, others are left out; labels, and the logits of both networks."""
        if not isinstance(x, Tensor) or x.dim() != 4:
            return
        log_p, log_q = f.log_softmax(1), q.log_softmax(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        for i in torch.where(kl.isfinite(), kl, 0).topk(min(_SHOWN, len(kl))).indices.tolist():
            if kl[i] > 0:
                label = None if labels is None else int(labels[i])
                answers = _answer(log_p[i]), _answer(log_q[i])
                # A copy: a view would keep the whole batch.
                self._kept.append((float(kl[i]), self._seen + i, x[i].clone(), label, *answers))
        self._seen += len(kl)
        self._kept = sorted(self._kept, key=lambda entry: -entry[0])[:_SHOWN]

    def found(self, files: Sequence[Path], folder: Path | None, preprocess: Preprocess | None) -> list[Disagreement]:
        """Return them, the largest divergence first, with names from ``files`` in ``folder``."""
        return [
            Disagreement(
                name=str(files[number].relative_to(folder)) if folder else f"image {number}",
                jpeg=_jpeg(x, preprocess),
                label=label,
                kl=kl,
                reference=f,
                quantized=q,
            )
            for kl, number, x, label, f, q in self._kept
        ]


def _answer(log_p: Tensor) -> Answer:
    index = int(log_p.argmax())
    return Answer(index=index, probability=float(log_p[index].exp()))


def _jpeg(x: Tensor, preprocess: Preprocess | None) -> bytes:
    if len(x) not in (1, 3):
        x, preprocess = x.mean(0, keepdim=True), None
    if preprocess is None:  # from its darkest value to its brightest
        low, high = x.aminmax()
        std = 1 / max(float(high - low), 1e-30)
        preprocess = Preprocess(mean=-float(low) * std, std=std)
    picture = preprocess.picture(x)
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=80)
    return file.getvalue()
