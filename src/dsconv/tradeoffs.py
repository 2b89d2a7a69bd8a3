"""Comparison of several quantized networks made from one original: size, accuracy and time."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dsconv.benchmarking.machine import machine, machine_notes
from dsconv.benchmarking.measure import Quartiles, Race, quartiles
from dsconv.benchmarking.results import digits, plural
from dsconv.compilation import compile
from dsconv.conversion import Summary, model_info, summary
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cores
from dsconv.data.folder import Images
from dsconv.data.inputs import Batch, call
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ConfigError, ModelError
from dsconv.evaluation import Comparison, Evaluation
from dsconv.evaluation.compare import compare_each
from dsconv.evaluation.measures import is_logits
from dsconv.evaluation.metric import Metric
from dsconv.layers.inputs import as_input_of
from dsconv.modes import check_module, evaluation_mode
from dsconv.names import OnInterrupt, Task
from dsconv.strict_json import finite_or_none
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

FLOAT = "float32"
_KL = "KL divergence"
# Columns without numbers.
_WORDS = ("settings", "front", "verdict")
Cost = Literal["bytes", "ms"]
Columns = Mapping[str, Callable[["Candidate"], str | None]]
"""Functions that return the cells of a table, by heading; a column without cells is omitted."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One network of a comparison.

    Attributes:
        name: the given name; ``float32`` is the reference.
        settings: its preset, or a short description of its config.
        bytes: size of its tensors in a file.
        effective_bits: mean bits per weight over all layers.
        evaluation: the Comparison with the reference, or an Evaluation for the reference itself; None without images.
        times_ms: quartiles of the time of one image, None if not measured.
    """

    name: str
    settings: str
    bytes: int
    effective_bits: float
    evaluation: Evaluation | None = None
    times_ms: Quartiles | None = None

    @property
    def accuracy(self) -> float | None:
        """Accuracy used by the Pareto front; larger is better. :attr:`measure` names it.

        With labels it is top-1, mean intersection over union or PSNR; without labels, the agreement with the reference,
        or the SQNR of outputs that are not logits; with a user's metric, the negative of the metric.
        """
        value = self._accuracy[1]
        return None if value is None or math.isnan(value) else value

    @property
    def measure(self) -> str:
        """Name of ``accuracy``, with its unit; empty if there is none."""
        return self._accuracy[0]

    @property
    def _accuracy(self) -> tuple[str, float | None]:
        found = self.evaluation
        if found is None:
            return "", None
        if isinstance(found, Comparison) and found.metrics:
            return f"-{found.measure}", -found.distance
        for name, title in (("top1", "top-1 in percent"), ("miou", "mIoU in percent"), ("psnr_db", "PSNR in dB")):
            if getattr(found, name) is not None:
                return title, getattr(found, name)
        if not isinstance(found, Comparison):
            return ("agreement in percent", 100.0) if is_logits(found.task) else ("", None)
        if found.agreement is not None:
            return "agreement in percent", found.agreement
        return "SQNR in dB", found.logit_sqnr_db

    @property
    def ms(self) -> float | None:
        """Median time of one image, in milliseconds."""
        return None if self.times_ms is None else self.times_ms.median

    def to_dict(self) -> dict[str, Any]:
        """Return one flat row of plain data; values that were not measured are None."""
        measured = ("top1", "top5", "miou", "psnr_db", "ssim", "agreement", "kl", "logit_sqnr_db", "distance")
        first, median, third = self.times_ms or (None, None, None)
        return {
            "name": self.name,
            "settings": self.settings,
            "bytes": self.bytes,
            "effective_bits": self.effective_bits,
            **{name: finite_or_none(getattr(self.evaluation, name, None)) for name in measured},
            "measure": getattr(self.evaluation, "measure", None),
            "first_quartile_ms": first,
            "median_ms": median,
            "third_quartile_ms": third,
        }


@dataclass(frozen=True, kw_only=True)
class Tradeoff(Printed):
    """Result of :func:`tradeoff`; prints as a table.

    Attributes:
        candidates: the quantized networks, in the order in which they were given.
        reference: the float network, if there was one.
        threads: number of threads used for timing.
        machine: machine used for timing, see :func:`dsconv.benchmarking.machine.machine`; None without times.
        interrupted: whether the measurement was stopped early: figures cover fewer images or turns, or times are
            missing.
    """

    candidates: tuple[Candidate, ...]
    reference: Candidate | None = None
    threads: int = 1
    machine: dict[str, Any] | None = None
    interrupted: bool = False

    def front(self, cost: Cost = "bytes") -> tuple[Candidate, ...]:
        """Return the Pareto front: no other candidate is as cheap and as accurate as these, and better in one of both.

        They are sorted by decreasing cost; candidates whose cost or accuracy is unknown are omitted.
        """
        known = [(getattr(c, cost), c.accuracy, c) for c in self.candidates]
        points = [(x, y, c) for x, y, c in known if x is not None and y is not None]
        best = [c for x, y, c in points if not any(a <= x and b >= y and (a, b) != (x, y) for a, b, _ in points)]
        return tuple(sorted(best, key=lambda c: -getattr(c, cost)))

    @property
    def all(self) -> tuple[Candidate, ...]:
        """The reference, if there is one, and the candidates."""
        return (self.reference, *self.candidates) if self.reference else self.candidates

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        first = next((c.evaluation for c in self.candidates if c.evaluation is not None), None)
        return {
            "networks": self._rows(),
            "images": first and first.images,
            "broken": [entry._asdict() for entry in first.broken] if first else [],
            "threads": self.threads,
            "machine": self.machine,
            "interrupted": self.interrupted,
        }

    def to_csv(self) -> str:
        """Return CSV text: a header line, then one line per network."""
        text = io.StringIO()
        rows = self._rows()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @property
    def costs(self) -> tuple[Cost, ...]:
        """Costs that are known."""
        return ("bytes", "ms") if any(c.ms is not None for c in self.candidates) else ("bytes",)

    def _rows(self) -> list[dict[str, Any]]:
        fronts = {f"on_{cost}_front": self.front(cost) for cost in self.costs}
        return [{**c.to_dict(), **{name: c in front for name, front in fronts.items()}} for c in self.all]

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        fronts = {"size": self.front("bytes"), "time": self.front("ms")}
        columns: Columns = {
            "settings": lambda c: c.settings,
            **columns_of(self.candidates),
            "front": lambda c: ", ".join(name for name, front in fronts.items() if c in front) or None,
        }
        return Group(table_of(self.all, columns), *map(Text, self._notes()))

    def _notes(self) -> Iterator[str]:
        found = self.candidates[0].evaluation
        if self.interrupted:
            yield "Interrupted: the figures cover fewer images or turns, or times are missing."
        if found is not None:
            measure = self.candidates[0].measure.removesuffix(" in percent").removesuffix(" in dB")
            yield f"{found.images:,} images. front: no other network is as cheap and as good in {measure}."
            if found.missing:
                yield found.missing
            if found.broken:
                path, reason = found.broken[0]
                yield f"{len(found.broken)} files could not be read and are not counted; the first, {path}: {reason}"
        if self.machine is not None:
            yield f"Times of one image, compiled, on {plural(self.threads)}; float32 in PyTorch."
            yield from machine_notes(self.machine)


def tradeoff(
    networks: Mapping[str, nn.Module],
    reference: nn.Module | None = None,
    images: Images | None = None,
    *,
    time_shape: Sequence[int] | None = None,
    threads: int = 1,
    seconds: float = 10.0,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    limit: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    on_interrupt: OnInterrupt = "raise",
    task: Task | None = None,
    data_range: float | None = None,
    metric: Metric | None = None,
) -> Tradeoff:
    """Measure size, accuracy and time of several quantized networks made from one float network.

    Args:
        networks: the quantized networks by name.
        reference: the float network; without it there is no accuracy.
        images, preprocess, batch_size, workers, limit, device, progress, task, data_range, metric: as in
            :func:`dsconv.compare`; all networks get the same images. Without images there is no accuracy. Times are CPU
            times.
        time_shape: ``(C, H, W)`` of an image. If given, the networks are compiled and timed on a random image in turns,
            with the reference in PyTorch.
        threads: number of threads used for timing.
        seconds: duration of the timing after warm-up.
        on_interrupt: effect of Ctrl-C: ``"raise"`` raises KeyboardInterrupt, ``"partial"`` returns the results so far.

    Raises:
        ConfigError, DataError: as :func:`dsconv.compare`; or an argument is out of range, or images are given without a
            reference.
        ModelError: as :func:`dsconv.compare` and :func:`dsconv.compile`; or the networks have different originals.

    >>> import dsconv
    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 9, 3), nn.AdaptiveAvgPool2d(1)).eval()
    >>> networks = {bits: dsconv.quantize(net, dsconv.QuantConfig(weight_bits=int(bits))) for bits in "248"}
    >>> found = tradeoff(networks, net, torch.randn(8, 3, 8, 8))
    >>> sorted(candidate.name for candidate in found.front("bytes"))[0]
    '2'
    """
    if not isinstance(networks, Mapping):
        raise ConfigError(f"networks: expected a dictionary of names to networks, got {type(networks).__name__}")
    if not networks or FLOAT in networks:
        raise ConfigError(f"networks: expected one or more, none called {FLOAT!r}, got {', '.join(networks) or 'none'}")
    if images is not None and reference is None:
        raise ConfigError(
            "reference: expected the float network that the quantized ones are compared with on images, got None"
        )
    if not 1 <= threads <= cores() or seconds <= 0:
        limits = f"threads from 1 to {cores()}, the number of cores, and seconds above 0"
        raise ConfigError(f"expected {limits}, got {threads} and {seconds}")
    reference, networks = unwrapped(reference), {name: unwrapped(network) for name, network in networks.items()}
    if reference is not None:
        check_module("reference", reference)
    named = {**({FLOAT: reference} if reference is not None else {}), **networks}
    summaries = {name: summary(network) for name, network in named.items()}
    _check_one_original(summaries)
    evaluations: dict[str, Evaluation] = {}
    times: dict[str, Quartiles] = {}
    if images is not None and reference is not None:
        compared = compare_each(
            reference,
            networks,
            images,
            preprocess=preprocess,
            batch_size=batch_size,
            workers=workers,
            limit=limit,
            device=device,
            progress=progress,
            on_interrupt=on_interrupt,
            per_layer=False,
            task=task,
            data_range=data_range,
            metric=metric,
        )
        evaluations = {FLOAT: next(iter(compared.values())).reference, **compared}
    interrupted = any(found.interrupted for found in evaluations.values())
    if time_shape is not None and not interrupted:
        try:
            x = torch.randn(1, *time_shape, dtype=torch.float32, device="cpu")
            with evaluation_mode(named.values()):
                time_each(named, x, threads, seconds, times)
        except KeyboardInterrupt:
            if on_interrupt == "raise":
                raise
            interrupted = True
    found = [
        Candidate(
            name=name,
            settings=_settings(network),
            bytes=summaries[name].bytes_after,
            effective_bits=summaries[name].effective_bits,
            evaluation=evaluations.get(name),
            times_ms=times.get(name),
        )
        for name, network in named.items()
    ]
    return Tradeoff(
        candidates=tuple(found[reference is not None :]),
        reference=found[0] if reference is not None else None,
        threads=threads,
        machine=machine() if times else None,
        interrupted=interrupted,
    )


def columns_of(candidates: Sequence[Candidate]) -> Columns:
    """Return the columns of sizes, figures and times of some networks."""
    measures = {str(getattr(c.evaluation, "measure", _KL)) for c in candidates} - {_KL}
    return {
        "MB": lambda c: f"{c.bytes / 1e6:.2f}",
        "bits": lambda c: f"{c.effective_bits:.2f}",
        "top-1 %": lambda c: _text("{:.2f}", getattr(c.evaluation, "top1", None)),
        "top-5 %": lambda c: _text("{:.2f}", getattr(c.evaluation, "top5", None)),
        "mIoU %": lambda c: _text("{:.2f}", getattr(c.evaluation, "miou", None)),
        "PSNR dB": lambda c: _text("{:.1f}", getattr(c.evaluation, "psnr_db", None)),
        "SSIM": lambda c: _text("{:.4f}", getattr(c.evaluation, "ssim", None)),
        "agreement %": lambda c: _text("{:.2f}", getattr(c.evaluation, "agreement", None)),
        "KL": lambda c: _text("{:.3g}", getattr(c.evaluation, "kl", None)),
        "SQNR dB": lambda c: _text("{:.1f}", getattr(c.evaluation, "logit_sqnr_db", None)),
        **{measure: lambda c: _text("{:.4g}", getattr(c.evaluation, "distance", None)) for measure in measures},
        "ms": lambda c: None if c.ms is None else digits(c.ms),
        "quartiles": lambda c: c.times_ms and f"{digits(c.times_ms.first)} .. {digits(c.times_ms.third)}",
    }


def table_of(candidates: Sequence[Candidate], columns: Columns) -> "Table":
    """Return a table with one row per network."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    shown = {name: cell for name, cell in columns.items() if any(cell(c) is not None for c in candidates)}
    for name in shown:
        table.add_column(name, justify="left" if name in _WORDS else "right")
    for c in candidates:
        table.add_row(Text(c.name), *(cell(c) or "" for cell in shown.values()))
    return table


def _settings(network: nn.Module) -> str:
    info = model_info(network)
    return "" if info is None else info.config.title


def _check_one_original(summaries: Mapping[str, Summary]) -> None:
    weights = {name: {row.name: math.prod(row.shape) for row in found.layers} for name, found in summaries.items()}
    (first, expected), *others = weights.items()
    for other, got in others:
        for layer in sorted(expected.keys() | got.keys(), key=list({**expected, **got}).index):
            if expected.get(layer) != got.get(layer):
                counts = f"{expected.get(layer, 0):,} weights in {first} and {got.get(layer, 0):,} in {other}"
                raise ModelError(f"{first} and {other} are of different networks: layer {layer!r} has {counts}")


def time_each(
    networks: Mapping[str, nn.Module], x: Batch, threads: int, seconds: float, times: dict[str, Quartiles]
) -> None:
    """Write quartiles of the times in milliseconds to ``times``, also if interrupted."""
    before, race = torch.get_num_threads(), None
    torch.set_num_threads(threads)
    try:
        calls = [
            partial(call, net, as_input_of(net, x)) if name == FLOAT else partial(call, compile(net, x), x)
            for name, net in networks.items()
        ]
        with torch.inference_mode():
            race = Race(calls, threads)
            for _ in race.rounds(seconds=seconds):
                pass
    finally:
        torch.set_num_threads(before)
        if race is not None and min(map(len, race.times)) > 1:
            times |= {
                name: quartiles([1e3 * t for t in taken]) for name, taken in zip(networks, race.times, strict=True)
            }


def _text(show: str, value: float | None) -> str | None:
    return None if value is None else show.format(value)
