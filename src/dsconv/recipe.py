"""Settings of an adaptation: :class:`Recipe`, and the recipes that have a name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field

from dsconv.config import Strict
from dsconv.errors import ConfigError, check_choice
from dsconv.names import RECIPES, RecipeName

Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(Strict):
    """Settings of :func:`dsconv.adapt`.

    Attributes:
        weights: what is learned of a weight. ``learned``: its integers, as float levels that are rounded, and the scale
            and shift of each block, from those of the student. ``recomputed``: a float weight, from which VQK and KDS
            are made anew in each step by the rule of the layer's config; it starts from the teacher's.
        lr: learning rate of Adam. For ``learned`` it is in levels, so that it means the same in each layer, and those
            of scales, shifts and biases follow from it; for ``recomputed`` it is that of weights.
        schedule: ``cosine``: down to 0 at the last step; or ``constant``.
        steps: number of them, at most.
        batch_size: images in a step, those of all processes together.
        images: use this many at most, None for all.
        held_back: part of the images that is not trained on, and by which the best state is chosen.
        every: steps between two looks at these; each ends in a checkpoint, where there is a file for it.
        patience: stop after so many looks without a new best.
        temperature: T of ``T^2 KL(softmax(f / T) || softmax(q / T))`` between the logits f of teacher and q of student.
        features: what the squared errors of the layers' outputs weigh beside that, as a part of the variance of the
            teacher's, on average over the layers.

    Raises:
        ConfigError: a value is out of range or a name is unknown.

    >>> Recipe.preset("paper", steps=100).lr
    1e-05
    """

    weights: Literal["learned", "recomputed"] = "learned"
    lr: Positive = 0.005
    schedule: Literal["cosine", "constant"] = "cosine"
    steps: Count = 300
    batch_size: Count = 32
    images: Count | None = None
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.125
    every: Count = 25
    patience: Count = 8
    temperature: Positive = 2.0
    features: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Recipe of a name, with ``changes`` to its fields.

        ``default``
            Continues from the integers and scales of a quantized or calibrated network.
        ``paper``
            The published one: 960 images, Adam with a constant learning rate of 1e-5, VQK and KDS recomputed from
            float weights in each step, logits only. For what :func:`dsconv.quantize` made, not for calibrated networks.
        """
        check_choice("recipe", name, RECIPES)
        return cls(**{**_RECIPES[cast(RecipeName, name)], **changes})


_RECIPES: dict[RecipeName, dict[str, Any]] = {
    "default": {},
    "paper": {
        "weights": "recomputed",
        "lr": 1e-5,
        "schedule": "constant",
        "images": 960,
        "temperature": 1.0,
        "features": 0.0,
    },
}


def as_recipe(recipe: "Recipe | Mapping[str, Any] | str | None") -> Recipe:
    """A recipe from what users pass: one, a dictionary of its fields, a name, or None for ``default``."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or isinstance(recipe, str):
        return Recipe.preset(recipe or "default")
    if isinstance(recipe, Mapping):
        return Recipe(**recipe)
    raise ConfigError(f"recipe: expected a Recipe, a dictionary or a name, got {type(recipe).__name__}")
