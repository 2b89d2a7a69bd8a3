"""What an optimization tried, and what it kept."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from dsconv.benchmarking.machine import machine_notes
from dsconv.benchmarking.results import plural
from dsconv.config import QuantConfig
from dsconv.data.folder import Labelled
from dsconv.evaluation import Comparison
from dsconv.tables import Printed
from dsconv.tradeoffs import Candidate, Columns, columns_of, table_of

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, kw_only=True)
class Attempt(Candidate):
    """A recipe and what came of it; its ``name`` is the recipe.

    Attributes:
        evaluation: its figures beside the float network.
        config: the settings of all layers.
        calibrated, adapted: whether it went through :func:`dsconv.calibrate`, and :func:`dsconv.adapt` after that.
        seconds: that its steps took; a search that several attempts share is counted in the first.
        verdict: whether it keeps the budget and meets the target, in a word or two.
    """

    evaluation: Comparison
    config: QuantConfig
    calibrated: bool = False
    adapted: bool = False
    seconds: float = 0.0
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """One flat row of plain data; what was not measured is None."""
        own = {"calibrated": self.calibrated, "adapted": self.adapted, "seconds": self.seconds, "verdict": self.verdict}
        return {**super().to_dict(), **own, "config": self.config.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Optimization(Printed):
    """What :func:`dsconv.optimize` did; prints as a table.

    Attributes:
        model: the quantized network that is kept, on which :func:`dsconv.save` and :func:`dsconv.compile` go on.
        best: the attempt that made it.
        attempts: all of them, in their order.
        reference: the float network.
        budget, target: by name, as they were given; where neither was, a budget of 4.7 effective bits, or more if
            the preset ``default`` takes more.
        shortfall: by how much ``best`` misses budget or target, in one sentence; None where it does not.
        images: numbers of images: those that the steps could use, and those that figures are measured on.
        synthetic: whether the latter are noise, in want of images.
        held_out: batches ``(images, labels)`` that figures are measured on, labels None where there are none.
        left_out: recipes that were not tried, and why.
        seconds: that all of it took, measuring included.
        threads: on which the networks were timed.
        machine: where, see :func:`dsconv.benchmarking.machine.machine`; None if they were not.
    """

    model: nn.Module
    best: Attempt
    attempts: tuple[Attempt, ...]
    reference: Candidate
    budget: dict[str, float]
    target: dict[str, float]
    shortfall: str | None
    images: dict[str, int]
    synthetic: bool
    held_out: list[Labelled] = field(compare=False, repr=False)
    left_out: dict[str, str]
    seconds: float
    threads: int = 1
    machine: dict[str, Any] | None = None

    @property
    def config(self) -> QuantConfig:
        """The settings of the network that is kept, for :func:`dsconv.quantize`."""
        return self.best.config

    @property
    def met(self) -> bool:
        """Whether the network that is kept keeps the budget and meets the target."""
        return self.shortfall is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "budget": self.budget,
            "target": self.target,
            "met": self.met,
            "shortfall": self.shortfall,
            "best": self.best.name,
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "reference": self.reference.to_dict(),
            "left_out": self.left_out,
            "images": self.images,
            "synthetic": self.synthetic,
            "seconds": self.seconds,
            "threads": self.threads,
            "machine": self.machine,
        }

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        columns: Columns = {
            **columns_of(self.attempts),
            "s": lambda c: f"{c.seconds:.0f}" if isinstance(c, Attempt) else None,
            "verdict": lambda c: self._verdict(c) if isinstance(c, Attempt) else None,
        }
        return Group(table_of((self.reference, *self.attempts), columns), *map(Text, self._notes()))

    def _verdict(self, attempt: Attempt) -> str:
        if attempt is not self.best:
            return attempt.verdict
        return "kept" if self.met else f"kept, {attempt.verdict}"

    def _notes(self) -> Iterator[str]:
        wanted = [f"{name} {value:g}" for goal in (self.budget, self.target) for name, value in goal.items()]
        yield f"Asked for: {', '.join(wanted)}. Kept: {self.best.name}, of {len(self.attempts)} tried."
        if self.shortfall is not None:
            yield f"Not met: {self.shortfall}."
        if self.synthetic:
            yield (
                f"Figures are of {self.images['measured']} images of noise: they rank the networks, and do not tell "
                "their accuracy on images."
            )
        else:
            yield (
                f"{self.images['steps']} images for search, calibration and adaptation; figures are of "
                f"{self.images['measured']} others."
            )
        if self.best.evaluation.missing:
            yield self.best.evaluation.missing
        for reason in dict.fromkeys(self.left_out.values()):
            yield f"Not tried: {'; '.join(n for n, why in self.left_out.items() if why == reason)}: {reason}."
        if self.machine is not None:
            yield f"ms: one image, compiled, in turns, on {plural(self.threads)}; float32 in PyTorch. s: of the steps."
            yield from machine_notes(self.machine)
