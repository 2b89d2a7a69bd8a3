"""Attempts of an optimization, and its result."""

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
    """Result of one recipe; its ``name`` is the recipe.

    Attributes:
        evaluation: its figures compared with the float network.
        config: the settings of all layers.
        calibrated, adapted: whether :func:`dsconv.calibrate`, and then :func:`dsconv.adapt`, was applied.
        seconds: duration of its steps; a search shared by several attempts is counted in the first.
        verdict: whether it keeps the budget and meets the target, in a word or two.
    """

    evaluation: Comparison
    config: QuantConfig
    calibrated: bool = False
    adapted: bool = False
    seconds: float = 0.0
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return one flat row of plain data; values that were not measured are None."""
        own = {"calibrated": self.calibrated, "adapted": self.adapted, "seconds": self.seconds, "verdict": self.verdict}
        return {**super().to_dict(), **own, "config": self.config.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Optimization(Printed):
    """Result of :func:`dsconv.optimize`; prints as a table.

    Attributes:
        model: the selected quantized network, ready for :func:`dsconv.save` and :func:`dsconv.compile`.
        best: the attempt that made it.
        attempts: all attempts, in order.
        reference: the float network.
        budget, target: limits by name, as given; if neither was given, a budget of 4.7 effective bits, or more if the
            preset ``default`` takes more.
        shortfall: amount by which ``best`` misses budget or target, in one sentence; None if it meets both.
        images: numbers of images: those available to the steps, and those that the figures are measured on.
        synthetic: whether the latter are noise, because no images were given.
        held_out: batches ``(images, labels)`` that the figures are measured on; labels are None if there are none.
        left_out: recipes that were not tried, with the reason.
        seconds: total duration, including measurements.
        threads: number of threads used for timing.
        machine: machine used for timing, see :func:`dsconv.benchmarking.machine.machine`; None without times.
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
        """Settings of the selected network, for :func:`dsconv.quantize`."""
        return self.best.config

    @property
    def met(self) -> bool:
        """Whether the selected network keeps the budget and meets the target."""
        return self.shortfall is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
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
        """Return the same data as JSON text."""
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
        yield f"Goal: {', '.join(wanted)}. Kept: {self.best.name}, one of {len(self.attempts)} tried."
        if self.shortfall is not None:
            yield f"Not met: {self.shortfall}."
        if self.synthetic:
            yield (
                f"Figures are of {self.images['measured']} images of noise: they rank the networks, but are not "
                "their accuracy on real images."
            )
        else:
            yield (
                f"{self.images['steps']} images are used for search, calibration and adaptation; figures are of "
                f"{self.images['measured']} others."
            )
        if self.best.evaluation.missing:
            yield self.best.evaluation.missing
        for reason in dict.fromkeys(self.left_out.values()):
            yield f"Not tried: {'; '.join(n for n, why in self.left_out.items() if why == reason)}: {reason}."
        if self.machine is not None:
            yield f"ms: one image, compiled, in turns, on {plural(self.threads)}; float32 in PyTorch. s: time of steps."
            yield from machine_notes(self.machine)
