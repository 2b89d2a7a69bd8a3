"""Choice of the bits of every layer that minimises the loss of accuracy under a budget."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from dsconv.config import QuantConfig, as_config
from dsconv.data import Images, Preprocess
from dsconv.errors import ConfigError, ModelError, import_extra
from dsconv.evaluation.metric import Metric
from dsconv.mixed.measure import Choice, Sensitivity, Trial, in_words, measure, short, shown, with_overrides
from dsconv.names import Task
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.table import Table

_POINTS = 25
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Point:
    """Figures of a selection of settings.

    Attributes:
        effective_bits: mean bits per weight over all weights of the network, including KDS and layers in float.
        activation_bits: mean over the weights of the bit width of their input; a float input counts 32.
        bytes: size of the network's file without its header.
        ms: sum of the layers' times on one image, None if not measured.
        kl: sum of the divergences caused by the layers alone, in nats; None for outputs that are not logits.
        distance: sum by which selections are ranked, see :attr:`Trial.distance`. Both sums are estimates, since errors
            are not exactly additive.
    """

    effective_bits: float
    activation_bits: float
    bytes: int
    ms: float | None
    kl: float | None
    distance: float


@dataclass(frozen=True)
class SearchResult(Printed):
    """Result of a search; prints as a table.

    Attributes:
        config: for :func:`dsconv.quantize`: the given config with an override for every layer.
        chosen: the choice for each layer.
        point: figures of this selection.
        pareto: the least distance by effective bits, within the other limits of the budget, from the smallest network
            to the largest.
        sensitivity: the measurements.
    """

    config: QuantConfig
    chosen: tuple[Trial, ...]
    point: Point
    pareto: tuple[Point, ...]
    sensitivity: Sensitivity

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "config": self.config.to_dict(),
            "chosen": [asdict(trial) for trial in self.chosen],
            "point": asdict(self.point),
            "pareto": [asdict(point) for point in self.pareto],
            "sensitivity": self.sensitivity.to_dict(),
        }

    @property
    def table(self) -> "Table":
        """Table with a row for every layer, for rich to print."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        point, measured = self.point, self.sensitivity
        times = "" if point.ms is None else f", {point.ms:.2f} ms in these layers"
        images = f"{measured.images} images{' of noise' * measured.synthetic}"
        measure = measured.measure
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption=f"{point.effective_bits:.2f} bits per weight, activations of {point.activation_bits:.2f} bits on "
            f"average over the weights, {point.bytes / 1e6:.2f} MB{times}.\n"
            f"{short(measure)}: {in_words(measure)} with only that layer quantized, on {images}; the sum is "
            f"{shown(point.distance, measure)}.",
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        for column in ("weights", "W", "A", "block", "kB", short(measure), *(["ms"] if point.ms is not None else [])):
            table.add_column(column, justify="right")
        for trial in self.chosen:
            cells = [f"{trial.weights:,}", str(trial.weight_bits), str(trial.activation_bits or "float")]
            cells += [str(trial.block_size), f"{trial.bytes / 1e3:.1f}", shown(trial.distance, measure)]
            table.add_row(escape(trial.layer), *cells, *([] if trial.ms is None else [f"{trial.ms:.3f}"]))
        return table

    def __rich__(self) -> "Table":
        return self.table


class Budget(BaseModel):
    """Limits for a network, at least one; all must hold.

    Attributes:
        effective_bits: bits per weight, see :class:`Point`.
        bytes: size of the file without its header.
        ms: time of the quantized layers on one image, as measured on this machine.
        activation_bits: mean over the weights, see :class:`Point`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    effective_bits: float | None = Field(None, gt=0)
    bytes: float | None = Field(None, gt=0)
    ms: float | None = Field(None, gt=0)
    activation_bits: float | None = Field(None, gt=0)

    @property
    def limits(self) -> dict[str, float]:
        """Limits that are set, by name."""
        return self.model_dump(exclude_none=True)


def choices_of(config: QuantConfig, *, times: bool = False) -> list[Choice]:
    """Return the default choices of :func:`search`: weights of 2 to 8 bits, and layers with 8 bits throughout.

    A layer with 4-bit activations gets 8-bit ones only together with 8-bit weights, since processors multiply numbers
    of one width, and activation bits would otherwise cost nothing. If ``times`` count, each choice is tried with the
    direct algorithm and with Winograd, if that is close enough (``algorithm="auto"``).

    >>> choices_of(QuantConfig(activation_bits=4))[-2:]
    [{'weight_bits': 8}, {'weight_bits': 8, 'activation_bits': 8}]
    >>> choices_of(QuantConfig(activation_bits=8), times=True)[-2:]
    [{'weight_bits': 6, 'algorithm': 'auto'}, {'weight_bits': 8, 'algorithm': 'auto'}]
    """
    choices: list[Choice] = [{"weight_bits": bits} for bits in (2, 3, 4, 5, 6, 8)]
    if config.activation_bits not in (None, 8):
        choices.append({"weight_bits": 8, "activation_bits": 8})
    if not times:
        return choices
    return [{**choice, "algorithm": algorithm} for algorithm in ("direct", "auto") for choice in choices]


def search(
    model: nn.Module,
    config: QuantConfig | Mapping[str, Any] | str | None = None,
    *,
    budget: float | Mapping[str, float] | Budget,
    choices: Sequence[Choice] | None = None,
    images: Images | None = None,
    preprocess: Preprocess | None = None,
    limit: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    task: Task | None = None,
    metric: Metric | None = None,
) -> SearchResult:
    """Search settings for every layer that keep the network closest to float within a budget. No labels are needed.

    Each layer is quantized alone in every way (:func:`dsconv.sensitivity`), and one way is chosen for each layer so
    that the sum of the distances is minimal: a multiple-choice knapsack problem, solved by HiGHS.

    Args:
        model: the float network.
        config: base settings, which the choices override, as in :func:`dsconv.quantize`.
        budget: effective bits per weight, or a dictionary of the fields of :class:`Budget`, such as ``{"bytes": 8e5}``.
        choices: settings to choose from for each layer, see :func:`sensitivity`; None is :func:`choices_of`.
        images, preprocess, limit, batch_size, seed, device, progress, on_trial, task, metric: as in
            :func:`sensitivity`; without images, noise is used.
        state: file written after each trial, so that a stopped search can be resumed.
        resume: continue from ``state``; the result is that of an uninterrupted search. The budget may differ, except
            that ``ms`` cannot be added.

    Raises:
        ConfigError: as in :func:`sensitivity`; or no choice meets the budget; the message states the smallest possible
            one.
        DataError, ModelError, FileFormatError, OSError: as in :func:`sensitivity`.
        MissingExtraError: highspy is not installed.

    >>> import dsconv
    >>> net = dsconv.zoo.build("dsconv/digits_resnet")
    >>> found = search(net, "w4a4", budget=4.5, choices=[{"weight_bits": bits} for bits in (3, 4, 8)])
    >>> dsconv.summary(dsconv.quantize(net, found.config)).effective_bits <= 4.5
    True
    """
    config = as_config(config)
    limits = limits_of(budget)
    _highs()  # raise before minutes of measuring if it is missing
    choices = choices_of(config, times="ms" in limits) if choices is None else choices
    measured = measure(
        "search",
        model,
        config,
        choices=choices,
        images=images,
        preprocess=preprocess,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        times="ms" in limits,
        device=device,
        state=state,
        resume=resume,
        progress=progress,
        on_trial=on_trial,
        task=task,
        metric=metric,
    )
    found, chosen = within(config, measured, limits)
    return SearchResult(
        found, tuple(chosen), point_of(chosen, measured), _pareto(_usable(measured), measured, limits), measured
    )


def within(config: QuantConfig, measured: Sensitivity, limits: Mapping[str, float]) -> tuple[QuantConfig, list[Trial]]:
    """Return the settings with the least distance within the ``limits``, and the trial chosen for each layer.

    Raises:
        ConfigError: there are no such settings.
        ModelError: every choice of a layer makes the network return NaN.
    """
    chosen = select(_usable(measured), measured, limits)
    return with_overrides(config, {trial.layer: trial.settings for trial in chosen}), chosen


def range_of(name: str, measured: Sensitivity) -> tuple[float, float]:
    """Return the least and the largest possible value of a field of :class:`Budget`."""
    layers = _usable(measured)
    ends = [sum(end(_costs(trial, measured)[name] for trial in group) for group in layers) for end in (min, max)]
    return _fixed(measured)[name] + ends[0], _fixed(measured)[name] + ends[1]


def select(layers: Sequence[Sequence[Trial]], measured: Sensitivity, limits: Mapping[str, float]) -> list[Trial]:
    """Return one trial for each layer such that the costs keep the ``limits`` and the sum of distances is minimal.

    Raises:
        ConfigError: there is no such selection.
    """
    highspy = _highs()
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("parallel", "off")
    # A limit must hold to the byte.
    for name in ("primal_feasibility_tolerance", "mip_feasibility_tolerance"):
        solver.setOptionValue(name, 1e-9)
    trials = [trial for group in layers for trial in group]
    largest = max((abs(trial.distance) for trial in trials), default=0.0) or 1.0
    taken = [solver.addBinary(obj=trial.distance / largest) for trial in trials]
    rest = iter(taken)
    for group in layers:
        solver.addConstr(solver.qsum([next(rest) for _ in group]) == 1)
    for name, limit in limits.items():
        costs = [_costs(trial, measured)[name] / limit for trial in trials]
        room = 1 - _fixed(measured)[name] / limit
        solver.addConstr(solver.qsum([x * cost for x, cost in zip(taken, costs, strict=True)]) <= room)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise ConfigError(f"budget: {_why_not(measured, limits)}")
    return [trial for trial, x in zip(trials, solver.getSolution().col_value, strict=True) if x > 0.5]


def point_of(chosen: Sequence[Trial], measured: Sensitivity) -> Point:
    """Return the figures of a selection of one trial for each layer."""
    total = _fixed(measured)
    for trial in chosen:
        for name, cost in _costs(trial, measured).items():
            total[name] += cost
    ms = None if any(trial.ms is None for trial in chosen) else total["ms"]
    known = [trial.kl for trial in chosen if trial.kl is not None]
    kl = sum(known) if len(known) == len(chosen) else None
    distance = sum(trial.distance for trial in chosen)
    return Point(total["effective_bits"], total["activation_bits"], round(total["bytes"]), ms, kl, distance)


def _costs(trial: Trial, measured: Sensitivity) -> dict[str, float]:
    """Return the contribution of a trial to each figure that a budget can limit."""
    return {
        "effective_bits": 8 * trial.bytes / measured.weights,
        "bytes": trial.bytes,
        "ms": trial.ms or 0.0,
        "activation_bits": (trial.activation_bits or _FLOAT_BITS) * trial.weights / measured.weights,
    }


def _fixed(measured: Sensitivity) -> dict[str, float]:
    """Return the contribution of the rest of the network."""
    return {
        "effective_bits": 8 * measured.fixed_bytes / measured.weights,
        "bytes": measured.fixed_bytes + measured.other_bytes,
        "ms": 0.0,
        "activation_bits": _FLOAT_BITS * measured.fixed_weights / measured.weights,
    }


def _why_not(measured: Sensitivity, limits: Mapping[str, float]) -> str:
    for name, limit in limits.items():
        least, _ = range_of(name, measured)
        if least > limit:
            return (
                f"{name} of {limit:g} is less than the {least:.6g} of the smallest choices: allow more, or "
                "pass choices of fewer bits or larger blocks"
            )
    return (
        f"no selection is within all of {', '.join(f'{name} {limit:g}' for name, limit in limits.items())}: allow more"
    )


def _pareto(layers: Sequence[Sequence[Trial]], measured: Sensitivity, limits: Mapping[str, float]) -> tuple[Point, ...]:
    # Bytes and bits are one axis.
    others = {name: limit for name, limit in limits.items() if name not in ("effective_bits", "bytes")}
    ends = [
        point_of([end(group, key=lambda trial: trial.bytes) for group in layers], measured).effective_bits
        for end in (min, max)
    ]
    points: list[Point] = []
    for i in range(_POINTS):
        # The tolerance keeps the size of the smallest network feasible whatever the order of the sum.
        most = (ends[0] + (ends[1] - ends[0]) * i / (_POINTS - 1)) * (1 + 1e-6)
        try:
            point = point_of(select(layers, measured, {**others, "effective_bits": most}), measured)
        except ConfigError:
            continue  # the other limits allow nothing this small
        if not points or point.distance < points[-1].distance:
            points.append(point)
    return tuple(points)


def _usable(measured: Sensitivity) -> list[list[Trial]]:
    """Return trials by layer, without those that made the network return NaN."""
    layers = {name: [t for t in trials if math.isfinite(t.distance)] for name, trials in measured.layers().items()}
    if empty := [name for name, trials in layers.items() if not trials]:
        what = "logits" if measured.measure == "KL divergence" else "outputs"
        raise ModelError(f"layer {empty[0]!r}: every choice makes the {what} NaN or infinite: leave it in float")
    return list(layers.values())


def limits_of(budget: float | Mapping[str, float] | Budget) -> dict[str, float]:
    """Return the limits of a budget by name.

    Raises:
        ConfigError: it has none, or one that is unknown or out of range.
    """
    if not isinstance(budget, Budget):
        fields = dict(budget) if isinstance(budget, Mapping) else {"effective_bits": budget}
        try:
            budget = Budget(**fields)
        except ValidationError as error:
            found = error.errors()[0]
            known = ", ".join(Budget.model_fields)
            raise ConfigError(
                f"budget: {'.'.join(map(str, found['loc']))}: {found['msg']}, got {found['input']!r}; expected a "
                f"number of effective bits, or a dictionary of {known}"
            ) from None
    if not budget.limits:
        raise ConfigError(f"budget: expected at least one of {', '.join(Budget.model_fields)}, got none")
    return budget.limits


def _highs() -> Any:
    return import_extra("search", "highspy")
