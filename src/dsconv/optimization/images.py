"""Images of an optimization: one part for its steps, and one for measurements, which no step uses."""

from typing import NamedTuple

import torch
from torch import nn

from dsconv.calibration.images import labels_at, read_labelled
from dsconv.data import Images, Preprocess
from dsconv.data.folder import Labelled, Labels
from dsconv.data.inputs import Batch, in_batches

_FEWEST, _ENOUGH, _GOOD = 8, 64, 500
# Maximum number of images to measure on: more add little information, and take time at each attempt.
_MOST_MEASURED = 500


class Parts(NamedTuple):
    """Images in two disjoint parts.

    Attributes:
        steps: images for search, calibration and adaptation, in random order; None if ``measured`` is noise.
        labels: their labels, which a metric may use; None if there are none.
        measured: batches to measure on, with labels if there are any.
    """

    steps: Batch | None
    labels: Labels | None
    measured: list[Labelled]

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each part."""
        steps = 0 if self.steps is None else len(self.steps)
        return {"steps": steps, "measured": sum(len(x) for x, _ in self.measured)}

    def searched(self, count: int, batch_size: int) -> list[Labelled] | None:
        """Return ``count`` of the images for the steps in batches, with labels if there are any."""
        return None if self.steps is None else _batches(self.steps[:count], self.labels, batch_size)


def split(
    images: Images,
    preprocess: Preprocess | None,
    limit: int,
    seed: int,
    batch_size: int,
    model: nn.Module,
    progress: bool,
) -> Parts:
    """Return at most ``limit`` images in two parts of equal size, drawn at random; copies of an image are omitted.

    Raises:
        DataError: there are fewer than 8 different images, or unusable ones.
    """
    x, labels = read_labelled(
        images, preprocess, limit, model, fewest=_FEWEST, enough=_ENOUGH, good=_GOOD, progress=progress
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
    count = min(len(x) // 2, _MOST_MEASURED)
    measured, steps = order[:count], order[count:]
    parts = [(x[at], None if labels is None else labels_at(labels, at)) for at in (steps, measured)]
    return Parts(*parts[0], _batches(*parts[1], batch_size))


def _batches(x: Batch, labels: Labels | None, size: int) -> list[Labelled]:
    batches = in_batches(x, size)
    return [
        (batch, None if labels is None else labels[i * size : i * size + len(batch)]) for i, batch in enumerate(batches)
    ]
