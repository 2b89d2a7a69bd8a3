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
    """How far it had come after a step; the means are over the steps since the look before, None at step 0.

    Attributes:
        step: steps done.
        seconds: since the start, the time before a resumption included.
        lr: learning rate of the last step.
        loss: mean of what is minimised.
        kl: distance of the outputs, as :attr:`Adaptation.measure` names it: of logits, ``T^2 KL`` in nats at the
            recipe's temperature T.
        features: mean error of the layers' outputs, as a part of the variance of the teacher's.
        held_back_kl: the distance at the images held back.
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
    """An adaptation as a whole; prints as a table.

    Attributes:
        recipe: what it was done by.
        images, held_back: images that were trained on, and that were held back.
        seed: of all that is random.
        looks: at the images held back, in order; the first is before training.
        best_step: the step whose state was kept, 0 where training made nothing better.
        stopped: why it ended.
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
        """The look at the state that was kept."""
        return next(look for look in self.looks if look.step == self.best_step)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"recipe": self.recipe.model_dump(mode="json")}

    def __rich__(self) -> "Table":
        from rich import box
        from rich.table import Table

        name = "KL" if self.measure == "KL divergence" else "distance"
        caption = (
            f"Adapted on {self.images} images, seed {self.seed}; {self.held_back} more are held back. "
            f"Kept: step {self.best_step}. Ended: {self.stopped}."
            + f"\ndistance: {self.measure} of the outputs."
            * (name != "KL")
        )
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
        for column in ("step", "s", "learning rate", "loss", name, "features", f"{name} held back"):
            table.add_column(column, justify="right")
        shown = ("{}", "{:.0f}", "{:.2g}", "{:.4f}", "{:.4f}", "{:.2%}", "{:.4f}")
        for look in self.looks:
            values = asdict(look).values()
            cells = ["" if value is None else text.format(value) for value, text in zip(values, shown, strict=True)]
            table.add_row(*cells, style="bold" if look.step == self.best_step else None)
        return table


def write_csv(path: Path, looks: Sequence[Look]) -> None:
    """The looks as CSV, one row each."""
    with replacing(path) as beside, beside.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Look))
        rows.writerows(asdict(look).values() for look in looks)
