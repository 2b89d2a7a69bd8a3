"""Figures of a network on a set of images, and of a quantized one beside its reference: as tables and plain data."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsconv.data.folder import BrokenImage
from dsconv.strict_json import finite_or_none


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one network on a set of images.

    Attributes:
        images: number of images evaluated, without the broken ones.
        top1, top5: percent of images whose label is the largest logit, or among the five largest (equal logits rank
            by class index); None without labels, and ``top5`` also below 6 classes. A non-finite image is wrong.
        nonfinite: number of images with a NaN or an infinity among the logits.
        seconds: time in the network's forward passes, without reading and preprocessing images.
        broken: files that could not be read, each with ``.path`` and ``.reason``.
        interrupted: True if the evaluation was stopped early and covers only some of the images.
    """

    images: int
    top1: float | None
    top5: float | None
    nonfinite: int
    seconds: float
    broken: list[BrokenImage] = field(default_factory=list)
    interrupted: bool = False

    @property
    def images_per_second(self) -> float:
        """Throughput of the forward passes."""
        return self.images / self.seconds if self.seconds else math.inf

    def _figures(self) -> dict[str, float | None]:
        names = ("top1", "top5", "nonfinite", "seconds", "images_per_second")
        return {name: finite_or_none(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON; an infinite or undefined one is None."""
        broken = [entry._asdict() for entry in self.broken]
        return {"images": self.images, **self._figures(), "broken": broken, "interrupted": self.interrupted}

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(_table({"": self}), *_remarks(self))


@dataclass(frozen=True, kw_only=True)
class Comparison(Evaluation):
    """A quantized network beside its reference; the figures of `Evaluation` are those of the quantized one.

    With f the reference's logits and q the quantized network's:

    Attributes:
        reference: the same figures of the reference network.
        agreement: percent of images with the same top-1 class; a non-finite image does not agree.
        kl: mean of KL(softmax(f) || softmax(q)) in nats, over the images that are finite in both.
        logit_sqnr_db: 10 log10(sum f^2 / sum (f - q)^2) in dB over the same images; infinite where f = q.
        layer_sqnr_db: the same for the outputs of every DSConv layer that ran, by name; each network's layer sees
            that network's own inputs, so errors of earlier layers are included.
    """

    reference: Evaluation
    agreement: float
    kl: float
    logit_sqnr_db: float
    layer_sqnr_db: dict[str, float]

    @property
    def quantized(self) -> Evaluation:
        """The figures of the quantized network alone."""
        return Evaluation(**{name: getattr(self, name) for name in Evaluation.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON; an infinite or undefined one is None."""
        common = super().to_dict()
        return {
            **{name: common[name] for name in ("images", "broken", "interrupted")},
            "agreement": self.agreement,
            "kl": finite_or_none(self.kl),
            "logit_sqnr_db": finite_or_none(self.logit_sqnr_db),
            "layer_sqnr_db": {name: finite_or_none(value) for name, value in self.layer_sqnr_db.items()},
            "reference": self.reference._figures(),
            "quantized": self._figures(),
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table

        closeness = Table("", Column("quantized against reference", justify="right"))
        closeness.add_row("agreement", f"{self.agreement:.2f} %")
        closeness.add_row("KL divergence", f"{self.kl:.4f} nats")
        closeness.add_row("logit SQNR", f"{self.logit_sqnr_db:.2f} dB")
        worst = sorted(self.layer_sqnr_db.items(), key=lambda entry: (not math.isnan(entry[1]), entry[1]))
        for name, value in worst[:5]:
            closeness.add_row(f"output SQNR of {name or 'the model'}", f"{value:.2f} dB")
        if len(worst) > 5:
            closeness.caption = f"the 5 lowest of {len(worst)} layers"
        both = _table({"reference": self.reference, "quantized": self})
        return Group(both, closeness, *_remarks(self))


def _table(columns: Mapping[str, Evaluation]) -> Any:
    from rich.table import Column, Table

    def row(title: str, show: str, attribute: str) -> None:
        values = [getattr(result, attribute) for result in columns.values()]
        table.add_row(title, *("-" if value is None else show.format(value) for value in values))

    table = Table("", *(Column(name, justify="right") for name in columns))
    row("images", "{:,}", "images")
    row("top-1", "{:.2f} %", "top1")
    row("top-5", "{:.2f} %", "top5")
    row("non-finite images", "{:,}", "nonfinite")
    row("images per second", "{:.1f}", "images_per_second")
    return table


def _remarks(result: Evaluation) -> Iterator[Any]:
    from rich.text import Text

    if result.interrupted:
        yield Text(f"Interrupted: the figures cover the first {result.images:,} images only.", style="bold")
    if result.broken:
        yield Text(f"{len(result.broken)} files could not be read and are not counted:", style="bold")
        for path, reason in result.broken[:5]:
            yield Text(f"  {path}: {reason}")
        if len(result.broken) > 5:
            yield Text("  ...")
