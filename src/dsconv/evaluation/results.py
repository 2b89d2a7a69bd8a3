"""Figures of a network on a set of images, and comparison of a quantized network with its reference."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.data.folder import BrokenImage
from dsconv.names import Task
from dsconv.strict_json import finite_or_none
from dsconv.tables import Printed


@dataclass(frozen=True, kw_only=True)
class Evaluation(Printed):
    """Figures of one network on a set of images.

    Attributes:
        images: number of images evaluated, without the broken ones.
        task: kind of the outputs, which selects the measures, see :class:`Closeness`.
        top1, top5: percentage of images whose label has the largest logit, or one of the five largest (equal logits
            rank by class index); None without labels, and ``top5`` also below 6 classes. A non-finite image counts as
            wrong.
        miou: mean intersection over union in percent, over all classes that occur in labels or outputs; None unless
            labels are class maps ``(N, H, W)``.
        psnr_db, ssim: peak signal-to-noise ratio and structural similarity of images; None unless labels are target
            images ``(N, C, H, W)``.
        nonfinite: number of images with a NaN or an infinity among the logits, or among the outputs of a network that
            is not a classifier.
        seconds: duration of the network's forward passes, without reading and preprocessing images.
        broken: files that could not be read, each with ``.path`` and ``.reason``.
        interrupted: True if the evaluation was stopped early and covers only some of the images.
    """

    images: int
    task: Task = "classification"
    top1: float | None
    top5: float | None
    miou: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    nonfinite: int
    seconds: float
    broken: list[BrokenImage] = field(default_factory=list)
    interrupted: bool = False

    @property
    def images_per_second(self) -> float:
        """Throughput of the forward passes, in images per second."""
        return self.images / self.seconds if self.seconds else math.inf

    @property
    def missing(self) -> str | None:
        """Reason why a network that is not a classifier has no accuracy, in a sentence; None if it has one."""
        if self.miou is not None or self.psnr_db is not None:
            return None
        return _MISSING.get(self.task)

    def _figures(self) -> dict[str, float | None]:
        return {name: finite_or_none(getattr(self, name)) for name in ("top1", "top5", *_ACCURACIES, *_OTHERS)}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON; an infinite or undefined one is None."""
        broken = [entry._asdict() for entry in self.broken]
        facts = {"images": self.images, "task": self.task}
        return {**facts, **self._figures(), "broken": broken, "interrupted": self.interrupted}

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(_table({"": self}), *_remarks(self))


_ACCURACIES = ("miou", "psnr_db", "ssim")
_OTHERS = ("nonfinite", "seconds", "images_per_second")
_MISSING: dict[Task, str] = {
    "segmentation": "No accuracy: pass labels as maps of classes (N, H, W) for the mean intersection over union.",
    "images": "No accuracy: pass labels as target images (N, C, H, W) for PSNR and SSIM.",
    "other": "No accuracy: these outputs are neither logits nor images. Name the task if they are, or compare the "
    "network with its reference, with a custom metric if the outputs have one.",
}


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """Closeness of an output q of the quantized network to the output f of its reference.

    Attributes:
        kind: ``classification``, ``segmentation``, ``images`` or ``other``: see :mod:`dsconv.evaluation.measures`.
        images: number of images whose outputs are finite and have the same shape in both networks; figures are
            over these unless stated otherwise.
        differing: number of images for which the shapes of the output differ.
        sqnr_db: 10 log10(sum f^2 / sum (f - q)^2) in dB; infinite if f = q. None for outputs that are not
            floating-point.
        relative_error: sum (f - q)^2 / sum f^2; an image with a different shape counts as zeros.
        agreement: percentage of images with the same largest logit, or of pixels with the same class, averaged over
            images; a non-finite image does not agree. For integers, percentage of equal values. Otherwise None.
        kl: mean of KL(softmax(f) || softmax(q)) in nats, over pixels and images; None unless these are logits.
        miou: mean intersection over union of the largest logits in percent; None unless they are per pixel.
        psnr_db, ssim: peak signal-to-noise ratio and structural similarity, None unless these are images.
    """

    kind: Task
    images: int
    differing: int = 0
    sqnr_db: float | None = None
    relative_error: float | None = None
    agreement: float | None = None
    kl: float | None = None
    miou: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None

    @property
    def distance(self) -> float:
        """Divergence of logits, otherwise the relative error; NaN for integers."""
        found = self.relative_error if self.kl is None else self.kl
        return math.nan if found is None else found

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON; an infinite or undefined one is None."""
        return {name: finite_or_none(value) if name in _MEASURES else value for name, value in asdict(self).items()}


# With their titles, in the order of tables.
_MEASURES = {
    "agreement": ("agreement", "{:.2f} %"),
    "kl": ("KL divergence", "{:.3g} nats"),
    "miou": ("mIoU", "{:.2f} %"),
    "psnr_db": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "sqnr_db": ("SQNR", "{:.2f} dB"),
    "relative_error": ("relative error", "{:.3g}"),
}


@dataclass(frozen=True, kw_only=True)
class Comparison(Evaluation):
    """Comparison of a quantized network with its reference; the figures of `Evaluation` are those of the quantized one.

    Attributes:
        reference: the same figures for the reference network.
        agreement, kl: measures of the logits, see :class:`Closeness`; None if the main output is not logits.
        logit_sqnr_db: SQNR of the logits, or else of the main output; NaN if there is nothing to compare.
        layer_sqnr_db: SQNR of the outputs of every DSConv layer that ran, by name; each network's layer gets that
            network's own inputs, so errors of earlier layers are included.
        outputs: closeness of every output, by name, such as ``output`` for a single tensor, or ``boxes.0``.
        main: name of the main output.
        counted: names of the outputs that contribute to ``distance``.
        measure: name of ``distance``: ``KL divergence``, ``relative error``, both, or the name of the metric.
        distance: distance used to compare networks: the first value of a metric, otherwise see
            :mod:`dsconv.evaluation.measures`.
        metrics: means over the images of the values returned by a user's metric, by name.
    """

    reference: Evaluation
    agreement: float | None
    kl: float | None
    logit_sqnr_db: float
    layer_sqnr_db: dict[str, float]
    outputs: dict[str, Closeness] = field(default_factory=dict)
    main: str | None = None
    counted: tuple[str, ...] = ()
    measure: str = "KL divergence"
    distance: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def quantized(self) -> Evaluation:
        """Figures of the quantized network alone."""
        return Evaluation(**{name: getattr(self, name) for name in Evaluation.__dataclass_fields__})

    @property
    def missing(self) -> str | None:
        """The outputs that differ in shape, and what to do, in two sentences; None if there are none."""
        differing = {name: found.differing for name, found in self.outputs.items() if found.differing}
        if not differing or self.metrics:
            return None
        said = ", ".join(f"{name} for {count} of {self.images} images" for name, count in differing.items())
        return (
            f"Outputs differ in shape between the two networks: {said}, for example because a network returns a "
            "variable number of results. They are compared where the shapes match: pass a custom metric for the rest."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON; an infinite or undefined one is None."""
        common = super().to_dict()
        return {
            **{name: common[name] for name in ("images", "task", "broken", "interrupted")},
            "agreement": finite_or_none(self.agreement),
            "kl": finite_or_none(self.kl),
            "logit_sqnr_db": finite_or_none(self.logit_sqnr_db),
            "layer_sqnr_db": {name: finite_or_none(value) for name, value in self.layer_sqnr_db.items()},
            "measure": self.measure,
            "distance": finite_or_none(self.distance),
            "outputs": {name: found.to_dict() for name, found in self.outputs.items()},
            "metrics": {name: finite_or_none(value) for name, value in self.metrics.items()},
            "reference": self.reference._figures(),
            "quantized": self._figures(),
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Column, Table

        closeness = Table("", Column("quantized against reference", justify="right"))
        if self.task == "classification" and len(self.outputs) <= 1:
            closeness.add_row("agreement", f"{self.agreement:.2f} %")
            closeness.add_row("KL divergence", f"{self.kl:.3g} nats")
            closeness.add_row("logit SQNR", f"{self.logit_sqnr_db:.2f} dB")
        for name, value in self.metrics.items():
            closeness.add_row(escape(name), f"{value:.6g}")
        worst = sorted(self.layer_sqnr_db.items(), key=lambda entry: (not math.isnan(entry[1]), entry[1]))
        for name, value in worst[:5]:
            closeness.add_row(escape(f"output SQNR of {name or 'the model'}"), f"{value:.2f} dB")
        if len(worst) > 5:
            closeness.caption = f"the 5 lowest of {len(worst)} layers"
        tables = [closeness] if closeness.row_count else []
        if self.task != "classification" or len(self.outputs) > 1:
            tables.insert(0, _by_output(self))
        both = _table({"reference": self.reference, "quantized": self})
        return Group(both, *tables, *_remarks(self))


def _by_output(result: Comparison) -> Any:
    from rich.markup import escape
    from rich.table import Column, Table

    rows = result.outputs
    shown = [name for name in _MEASURES if any(getattr(found, name) is not None for found in rows.values())]
    differs = any(found.differing for found in rows.values())
    headings = [_MEASURES[name][0] for name in shown] + ["other shapes"] * differs
    table = Table("output", "kind", *(Column(heading, justify="right") for heading in headings))
    for output, found in rows.items():
        values = [(getattr(found, name), _MEASURES[name][1]) for name in shown]
        cells = ["-" if value is None or math.isnan(value) else text.format(value) for value, text in values]
        table.add_row(escape(output), found.kind, *cells, *([f"{found.differing:,}"] if differs else []))
    table.caption = f"quantized against reference; task: {result.task}; distance: {result.measure}"
    return table


def _table(columns: Mapping[str, Evaluation]) -> Any:
    from rich.table import Column, Table

    def row(title: str, show: str, attribute: str, *, always: bool = True) -> None:
        values = [getattr(result, attribute) for result in columns.values()]
        if always or any(value is not None for value in values):
            table.add_row(title, *("-" if value is None else show.format(value) for value in values))

    table = Table("", *(Column(name, justify="right") for name in columns))
    row("images", "{:,}", "images")
    classifies = any(result.task == "classification" for result in columns.values())
    row("top-1", "{:.2f} %", "top1", always=classifies)
    row("top-5", "{:.2f} %", "top5", always=classifies)
    row("mIoU", "{:.2f} %", "miou", always=False)
    row("PSNR", "{:.2f} dB", "psnr_db", always=False)
    row("SSIM", "{:.4f}", "ssim", always=False)
    row("non-finite images", "{:,}", "nonfinite")
    row("images per second", "{:.1f}", "images_per_second")
    return table


def _remarks(result: Evaluation) -> Iterator[Any]:
    from rich.text import Text

    if result.missing:
        yield Text(result.missing)
    if result.interrupted:
        yield Text(f"Interrupted: the figures cover the first {result.images:,} images only.", style="bold")
    if result.broken:
        yield Text(f"{len(result.broken)} files could not be read and are not counted:", style="bold")
        for path, reason in result.broken[:5]:
            yield Text(f"  {path}: {reason}")
        if len(result.broken) > 5:
            yield Text("  ...")
