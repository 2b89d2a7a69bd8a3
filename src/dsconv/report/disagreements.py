"""Images, or other inputs, on which two networks differ most."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dsconv.data import Preprocess
from dsconv.data.inputs import Batch

_SHOWN = 12
_PIXELS = 160


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a network for an image: the class of the largest logit, and its probability."""

    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Image, or another input, on which the two networks differ.

    Attributes:
        name: name of its file, or its number.
        distance: distance of the outputs: KL divergence of logits in nats, otherwise relative error.
        jpeg: thumbnail of the preprocessed image; None if the input is not an image.
        label: its class, None if unknown.
        reference, quantized: answers of classifiers; None for other networks.
    """

    name: str
    distance: float
    jpeg: bytes | None
    label: int | None
    reference: Answer | None
    quantized: Answer | None


class Worst:
    """Inputs on which two networks differ most, among those seen so far; those with two classes come first."""

    def __init__(self) -> None:
        self._seen = 0
        self._kept: list[tuple[tuple[bool, float], int, Tensor | None, int | None, tuple[Answer, Answer] | None]] = []

    def add(self, x: Batch, labels: Tensor | None, far: Tensor, logits: tuple[Tensor, Tensor] | None) -> None:
        """Add a batch, with the arguments that :func:`dsconv.compare` passes to ``each``."""
        same = [True] * len(far)
        if logits is not None:
            same = (logits[0].argmax(1) == logits[1].argmax(1)).tolist()
        ranks = [((same[i], -float(far[i])), i) for i in range(len(far)) if 0 < far[i] < math.inf]
        for rank, i in sorted(ranks)[:_SHOWN]:
            # A copy: a view would keep the whole batch.
            picture = x[i].clone() if isinstance(x, Tensor) and x.dim() == 4 else None
            label = None if labels is None or logits is None else int(labels[i])
            answers = None if logits is None else (_answer(logits[0][i]), _answer(logits[1][i]))
            self._kept.append((rank, self._seen + i, picture, label, answers))
        self._seen += len(far)
        self._kept = sorted(self._kept, key=lambda entry: entry[0])[:_SHOWN]

    def found(self, files: Sequence[Path], folder: Path | None, preprocess: Preprocess | None) -> list[Disagreement]:
        """Return them with names from ``files`` in ``folder``: those with two classes first, each by distance."""
        return [
            Disagreement(
                name=str(files[number].relative_to(folder))
                if folder
                else f"{'input' if x is None else 'image'} {number}",
                distance=-rank[1],
                jpeg=None if x is None else _jpeg(x, preprocess),
                label=label,
                reference=answers and answers[0],
                quantized=answers and answers[1],
            )
            for rank, number, x, label, answers in self._kept
        ]


def _answer(logits: Tensor) -> Answer:
    index = int(logits.argmax())
    return Answer(index=index, probability=float(logits.softmax(0)[index]))


def _jpeg(x: Tensor, preprocess: Preprocess | None) -> bytes:
    if len(x) not in (1, 3):
        x, preprocess = x.mean(0, keepdim=True), None
    if preprocess is None:  # from its darkest to its brightest value
        low, high = x.aminmax()
        std = 1 / max(float(high - low), 1e-30)
        preprocess = Preprocess(mean=-float(low) * std, std=std)
    picture = preprocess.picture(x)
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=80)
    return file.getvalue()
