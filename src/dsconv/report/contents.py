"""Contents of a report on a quantized network, as plain data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsconv.benchmarking.profiling import Profile
from dsconv.benchmarking.results import Bench
from dsconv.config import QuantConfig
from dsconv.conversion import LayerSummary, Summary
from dsconv.data import Preprocess
from dsconv.evaluation import Comparison, Evaluation
from dsconv.names import Task
from dsconv.report.disagreements import Disagreement
from dsconv.report.distribution import Distribution
from dsconv.tables import Printed


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Facts about a quantized layer; None if not measured.

    Attributes:
        summary: its settings and sizes.
        weights: weights of the float network, and those represented by VQK and KDS.
        inputs: inputs of the layer in the float network, and in the quantized one as mantissas and exponents. Without a
            reference, both are from the quantized network.
        exponents: number of blocks of the input by their exponent e, where a value is ``mantissa * 2^e``.
        zero_blocks: number of all-zero blocks, which have no exponent.
        output_sqnr_db: as in :class:`dsconv.evaluation.Comparison`.
        kl: divergence in nats caused by this layer alone; None for outputs that are not logits.
        distance: distance caused by this layer alone, by the report's ``sensitivity_measure``.
    """

    summary: LayerSummary
    weights: Distribution | None = None
    inputs: Distribution | None = None
    exponents: dict[int, int] | None = None
    zero_blocks: int = 0
    output_sqnr_db: float | None = None
    kl: float | None = None
    distance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of a page.

    Attributes:
        name: name of the network.
        reference: name of the float network, None without one.
        images: folder of the images, None if they are not from a folder.
        config: the settings it was quantized with, None if unknown.
        preprocess: preprocessing of the images, or the required one without images; None if unknown.
        accuracy: comparison with the reference, or evaluation without one, or None without images.
        task: task given by the user, None if it is determined from the outputs.
        sensitivity_images: number of images that ``Layer.distance`` was measured on.
        sensitivity_measure: name of that distance, see :class:`dsconv.mixed.Sensitivity`.
        classes: names of the classes.
        optimization: the :class:`dsconv.optimization.Optimization` that made the network, for its table of attempts.
        missing: for each part of the page without data, the reason; commands to type are in backticks.
        warnings: warnings shown at the top of the page.
    """

    name: str
    reference: str | None
    images: str | None
    summary: Summary
    config: QuantConfig | None
    layers: list[Layer]
    preprocess: Preprocess | None = None
    accuracy: Evaluation | None = None
    task: Task | None = None
    sensitivity_images: int = 0
    sensitivity_measure: str = "KL divergence"
    disagreements: list[Disagreement] = field(default_factory=list)
    classes: Sequence[str] = ()
    optimization: Printed | None = None
    profile: Profile | None = None
    benches: Sequence[Bench] = ()
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def int8_bytes(self) -> int:
        """Size with all weights in 8 bits and a float32 scale per output channel, and everything else unchanged."""
        rows = self.summary.layers
        return sum(row.bytes_before // 4 + 4 * row.shape[0] for row in rows if row.shape) + self.summary.other_bytes

    @property
    def comparison(self) -> Comparison | None:
        """``accuracy`` if there is a reference."""
        return self.accuracy if isinstance(self.accuracy, Comparison) else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON: the figures of the page, without its images and attempts."""
        seen = [asdict(disagreement) for disagreement in self.disagreements]
        return {
            "name": self.name,
            "reference": self.reference,
            "images": self.images,
            "config": self.config and self.config.to_dict(),
            "preprocess": self.preprocess and self.preprocess.model_dump(mode="json"),
            "summary": self.summary.to_dict() | {"int8_bytes": self.int8_bytes},
            "layers": [_figures(layer) for layer in self.layers],
            "accuracy": self.accuracy and self.accuracy.to_dict(),
            "sensitivity_images": self.sensitivity_images,
            "sensitivity_measure": self.sensitivity_measure,
            "disagreements": [{name: value for name, value in one.items() if name != "jpeg"} for one in seen],
            "classes": list(self.classes),
            "profile": self.profile and self.profile.to_dict(),
            "benches": [bench.to_dict() for bench in self.benches],
            "missing": self.missing,
            "warnings": self.warnings,
        }


def _figures(layer: Layer) -> dict[str, Any]:
    figures = asdict(layer)
    return {"name": figures.pop("summary")["name"], **figures}
