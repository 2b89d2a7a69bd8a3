"""Goals of an optimization: a budget of size or time, and a target of accuracy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from dsconv.config import Strict
from dsconv.errors import ConfigError, DataError
from dsconv.evaluation import Comparison
from dsconv.mixed.selection import Budget, limits_of
from dsconv.optimization.results import Attempt

LIMITS = ("effective_bits", "bytes", "ms")


class Target(Strict):
    """Figures that a network must reach on images that no step has used; all given figures must hold.

    Attributes:
        agreement: minimum percentage of images with the same class as the float network.
        kl: maximum mean KL divergence of the logits from those of the float network, in nats.
        top1_drop: maximum difference of top-1 between the float network and the quantized one, in percentage points; it
            needs labels.
        distance: maximum distance from the float network, as in :class:`dsconv.evaluation.Comparison`: for outputs that
            are not logits, and for a metric of your own.

    Raises:
        ConfigError: a value is out of range or a name is unknown.
    """

    agreement: Annotated[float, Field(gt=0, le=100)] | None = None
    kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    top1_drop: Annotated[float, Field(ge=0, le=100)] | None = None
    distance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class Goal:
    """A budget and a target, by name; either may be empty.

    Attributes:
        budget: maximum cost of a network.
        target: fields of :class:`Target`.
    """

    budget: dict[str, float]
    target: dict[str, float]

    @classmethod
    def of(
        cls,
        budget: float | Mapping[str, float] | Budget | None,
        target: Mapping[str, float] | Target | None,
        *,
        images: bool,
    ) -> "Goal":
        """Return the goal described by the arguments of users.

        Raises:
            ConfigError: a name is unknown, a value is out of range, or a target is given without ``images``.
        """
        wanted = _target_of(target)
        limits = {} if budget is None else limits_of(budget)
        if other := limits.keys() - set(LIMITS):
            raise ConfigError(f"budget: {min(other)} cannot be limited here: use {', '.join(LIMITS)}")
        if wanted and not images:
            raise ConfigError(
                f"target: {min(wanted)} is measured on images, got none: pass images (--data), which need labels for "
                "top1_drop alone, or a budget"
            )
        return cls(limits, wanted)

    def check_labels(self, labelled: bool) -> None:
        """Raise DataError if the target needs labels and there are none."""
        if "top1_drop" in self.target and not labelled:
            raise DataError(
                "target: top1_drop needs labels, got images without: pass labelled ones (class folders, labels.csv or "
                "pairs), or a target of agreement or kl"
            )

    def check_figures(self, found: Comparison) -> None:
        """Raise ConfigError if the outputs of the network do not have a figure of the target."""
        for name in self.target:
            if _figure(name, found) is None:
                raise ConfigError(
                    f"target: {name} is not defined for the outputs of this network ({found.task}): pass a target of "
                    f"distance, which is their {found.measure}"
                )

    @property
    def by_time(self) -> bool:
        """Whether the fastest network is wanted, rather than the smallest."""
        return "ms" in self.budget

    def cost(self, attempt: Attempt) -> float:
        """Return the cost to minimise: milliseconds or bytes."""
        return _taken("ms", attempt) if self.by_time else attempt.bytes

    def over(self, attempt: Attempt) -> dict[str, float]:
        """Return the excess over the budget, by name; empty if it is kept."""
        excess = {name: _taken(name, attempt) - limit for name, limit in self.budget.items()}
        return {name: value for name, value in excess.items() if not value <= 1e-9}

    def short(self, attempt: Attempt) -> dict[str, float]:
        """Return the distance from the target, by name; empty if it is met."""
        missed = {name: self._missed(name, attempt) for name in self.target}
        return {name: value for name, value in missed.items() if not value <= 1e-9}

    def _missed(self, name: str, attempt: Attempt) -> float:
        value = _figure(name, attempt.evaluation)
        if value is None or math.isnan(value):
            return math.inf
        return self.target[name] - value if name == "agreement" else value - self.target[name]

    def verdict(self, attempt: Attempt) -> str:
        """Return whether an attempt keeps the budget and meets the target, in a word or two."""
        if self.over(attempt):
            return "over budget"
        return "misses target" if self.short(attempt) else "meets target" if self.target else ""

    def best(self, attempts: Sequence[Attempt]) -> Attempt:
        """Return the best attempt, see :meth:`rank`."""
        return min(attempts, key=self.rank)

    def rank(self, attempt: Attempt) -> tuple[int, float, float]:
        """Return a key that is smaller for the better attempt.

        Attempts that keep the budget and meet the target come first; the smallest (or fastest) of them is best, or
        without a target the closest to float. They are followed by those that keep the budget, ordered by the distance
        from the target, and those that do not, ordered by the excess.
        """
        distance = attempt.evaluation.distance
        distance = math.inf if math.isnan(distance) else distance
        if over := self.over(attempt):
            return 2, max(value / self.budget[name] for name, value in over.items()), distance
        if short := self.short(attempt):
            # Percentage points are used without scaling.
            scales = {name: self.target[name] if name in ("kl", "distance") else 1.0 for name in short}
            return 1, max(value / scales[name] for name, value in short.items()), distance
        return (0, self.cost(attempt), distance) if self.target else (0, distance, self.cost(attempt))

    def shortfall(self, attempt: Attempt) -> str | None:
        """Return the amount by which an attempt misses budget and target, without a full stop; None if it does not."""
        said = [
            f"{_said(name, _taken(name, attempt))}, {_number(name, value)} above the budget of {self.budget[name]:g}"
            for name, value in self.over(attempt).items()
        ]
        for name, value in self.short(attempt).items():
            figure, side = _figure(name, attempt.evaluation), "below" if name == "agreement" else "above"
            said.append(f"{_said(name, figure)}, {_number(name, value)} {side} the target of {self.target[name]:g}")
        return "; ".join(said) or None


_WORDS = {
    "effective_bits": ("size", " bits per weight"),
    "bytes": ("size", " bytes"),
    "ms": ("time", " ms"),
    "agreement": ("agreement", " %"),
    "kl": ("KL divergence", " nats"),
    "top1_drop": ("drop of top-1", " points"),
    "distance": ("distance", ""),
}


def _said(name: str, value: float | None) -> str:
    word, unit = _WORDS[name]
    return f"{word} is {_number(name, math.nan if value is None else value)}{unit}"


def _number(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "bytes" else f"{value:.4g}"


def _taken(name: str, attempt: Attempt) -> float:
    """Return the cost of an attempt for a limit; infinite if unknown."""
    taken = getattr(attempt, name)
    return math.inf if taken is None else float(taken)


def _figure(name: str, found: Comparison) -> float | None:
    if name == "top1_drop":
        return None if found.top1 is None or found.reference.top1 is None else found.reference.top1 - found.top1
    value: float | None = getattr(found, name)
    return value


def _target_of(target: Mapping[str, Any] | Target | None) -> dict[str, float]:
    if target is not None and not isinstance(target, Mapping | Target):
        raise ConfigError(
            f"target: expected a dictionary of {', '.join(Target.model_fields)}, got {type(target).__name__}"
        )
    try:
        found = target if isinstance(target, Target) else Target(**(target or {}))
    except ConfigError as error:
        raise ConfigError(f"target: {error}") from None
    wanted: dict[str, float] = found.model_dump(exclude_none=True)
    if target is not None and not wanted:
        raise ConfigError(f"target: expected at least one of {', '.join(Target.model_fields)}, got none")
    return wanted
