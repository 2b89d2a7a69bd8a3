"""Figures of an adaptation, as a table and as CSV."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.files import replacing
from dsconv.recipe import Recipe
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Look:
    """Figures after a step; means are over the steps since the previous look, None at step 0.

    Attributes:
        step: number of steps done.
        seconds: time since the start, including that before a resumption.
        lr: learning rate of the last step.
        loss: mean of the loss.
        kl: distance of the outputs, as named by :attr:`Adaptation.measure`: for logits, ``T^2 KL`` in nats at the
            recipe's temperature T.
        features: mean error of the layers' outputs, relative to the variance of the teacher's.
        held_back_kl: the distance on the images held back.
    """

    step: int
    seconds: float
    lr: float
    loss: float | None
    kl: float | None
    features: float | None
    held_back_kl: float


@dataclass(frozen=True)
class Adaptation(Printed):
    """Result of an adaptation; prints as a table.

    Attributes:
        recipe: its settings.
        images, held_back: numbers of images trained on, and held back.
        seed: seed of all random choices.
        looks: evaluations on the images held back, in order; the first is before training.
        best_step: step whose state was kept, 0 if training improved nothing.
        stopped: reason why it ended.
        measure: distance of the outputs that is minimised: ``KL divergence``, ``relative error``, or their sum.
    """

    recipe: Recipe
    images: int
    held_back: int
    seed: int
    looks: tuple[Look, ...]
    best_step: int
    stopped: str
    measure: str = "KL divergence"

    @property
    def best(self) -> Look:
        """Look at the state that was kept."""
        return next(look for look in self.looks if look.step == self.best_step)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self) | {"recipe": self.recipe.model_dump(mode="json")}

    def __rich__(self) -> "Table":
        from rich import box
        from rich.table import Table

        name = "KL" if self.measure == "KL divergence" else "distance"
        caption = (
            f"Adapted on {self.images} images, seed {self.seed}; {self.held_back} more are held back. "
            f"Kept: step {self.best_step}. Stopped: {self.stopped}."
            + f"\ndistance: {self.measure} of the outputs."
            * (name != "KL")
        )
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
        for column in ("step", "s", "learning rate", "loss", name, "features", f"{name} held back"):
            table.add_column(column, justify="right")
        shown = ("{}", "{:.0f}", "{:.2g}", "{:.3g}", "{:.3g}", "{:.2%}", "{:.3g}")
        for look in self.looks:
            values = asdict(look).values()
            cells = ["" if value is None else text.format(value) for value, text in zip(values, shown, strict=True)]
            table.add_row(*cells, style="bold" if look.step == self.best_step else None)
        return table


def write_csv(path: Path, looks: Sequence[Look]) -> None:
    """Write the looks as CSV, one row each."""
    with replacing(path) as beside, beside.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Look))
        rows.writerows(asdict(look).values() for look in looks)
