"""Settings of an adaptation: :class:`Recipe` and its named presets."""

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
        weights: how a weight is trained. ``learned``: its integers are trained as float levels that are rounded,
            together with the scale and shift of each block; they start from those of the student. ``recomputed``: a
            float weight is trained, starting from the teacher's, and VQK and KDS are recomputed from it in each step by
            the rule of the layer's config.
        lr: learning rate of Adam. For ``learned`` it is in levels, so that it means the same in each layer, and the
            rates of scales, shifts and biases are derived from it; for ``recomputed`` it is the rate of the weights.
        schedule: ``cosine``, which decays to 0 at the last step, or ``constant``.
        steps: maximum number of steps.
        batch_size: images per step, summed over all processes.
        images: maximum number of images used, None for all.
        held_back: fraction of the images that is not trained on and selects the best state.
        every: steps between two evaluations on the held-back images; each writes a checkpoint if a file is given for
            it.
        patience: stop after this many evaluations without a new best.
        temperature: T of ``T^2 KL(softmax(f / T) || softmax(q / T))`` between the logits f of the teacher and q of the
            student.
        features: weight of the squared errors of the layers' outputs in the loss, relative to the variance of the
            teacher's outputs, averaged over the layers.

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
        """Return the recipe called ``name``, with ``changes`` to its fields.

        ``default``
            Continues from the integers and scales of a quantized or calibrated network.
        ``paper``
            The published recipe: 960 images, Adam with a constant learning rate of 1e-5, VQK and KDS recomputed from
            float weights in each step, logits only. It is meant for the result of :func:`dsconv.quantize`, not for
            calibrated networks.
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
    """Return the recipe for a recipe, a dictionary of its fields, a name, or None for ``default``."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or isinstance(recipe, str):
        return Recipe.preset(recipe or "default")
    if isinstance(recipe, Mapping):
        return Recipe(**recipe)
    raise ConfigError(f"recipe: expected a Recipe, a dictionary or a name, got {type(recipe).__name__}")
