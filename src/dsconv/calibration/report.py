"""Results of a calibration for each layer, as a table."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from dsconv.strict_json import finite_or_none
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CalibratedLayer:
    """Result for one layer. The figures of a layer that was not calibrated are None.

    Attributes:
        name: name in the model.
        samples: number of output positions that it was fitted to, each with all channels.
        error_before, error_after: mean squared error of its output on the calibration images, with inputs computed by
            the calibrated layers before it; relative to the variance of the float network's output.
        seconds: duration of the rounding, without running the networks.
        reason: why it was not calibrated, else None.
    """

    name: str
    samples: int | None = None
    error_before: float | None = None
    error_after: float | None = None
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Calibration(Printed):
    """All layers of a calibrated model in execution order; prints as a table.

    Attributes:
        layers: results, one per layer.
        images: number of images, including those held back.
        seed: seed of the choice of positions in them.
        held_back: number of images that no layer was fitted to, used to compare the two networks.
        measure: measure of the comparison: ``KL divergence`` of logits in nats, at a temperature of 4, or
            ``relative error`` of outputs that are not logits, or ``KL divergence and relative error``, which are added.
        before, after: distances of the given and of the calibrated network on the images held back; infinite if one
            computes a NaN.
        chance: standard error of their difference, 0 for one image.
    """

    layers: tuple[CalibratedLayer, ...]
    images: int
    seed: int
    held_back: int
    measure: str
    before: float
    after: float
    chance: float

    @property
    def kept(self) -> Literal["calibrated", "given"]:
        """Resulting network: the calibrated one, unless it is further from float by more than the standard error."""
        # If both are infinite, neither is worse.
        return "calibrated" if self.after <= self.before + self.chance else "given"

    @property
    def verdict(self) -> str:
        """Statement which network was kept and by how much it is better, in one sentence without its full stop."""
        what = "the calibrated network" if self.kept == "calibrated" else "the given network"
        return (
            f"{what} is kept: on {self.held_back} held-back images, {self.measure} from the float network is "
            f"{self.before:.4g} before and {self.after:.4g} after calibration (standard error {self.chance:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON; an infinite distance is None."""
        distances = {name: finite_or_none(value) for name, value in self._distances().items()}
        return asdict(self) | distances | {"kept": self.kept}

    def _distances(self) -> dict[str, float]:
        return {"before": self.before, "after": self.after}

    def __rich__(self) -> "Table":
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        left: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason is not None:
                left.setdefault(layer.reason, []).append(layer.name)
        notes = [
            f"Calibrated on {self.images} images, seed {self.seed}. Errors of layer outputs on these images are in "
            "percent of the output variance and include the errors of the layers before.",
            f"{self.verdict[0].upper()}{self.verdict[1:]}.",
            *(f"Not calibrated, {reason}: {', '.join(names)}." for reason, names in left.items()),
        ]
        table = Table(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=escape("\n".join(notes)), caption_justify="left"
        )
        table.add_column("layer", overflow="fold")
        for column in ("samples", "error before", "after", "s"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            figures = (layer.samples, layer.error_before, layer.error_after, layer.seconds)
            shown = ("{:,}", "{:.3%}", "{:.3%}", "{:.1f}")
            cells = ["" if value is None else text.format(value) for text, value in zip(shown, figures, strict=True)]
            table.add_row(escape(layer.name), *cells, style="yellow" if layer.reason else None)
        return table
