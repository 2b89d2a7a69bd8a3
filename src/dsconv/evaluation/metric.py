"""User-defined metric for comparing a quantized network with its reference."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsconv.data.folder import Labels
from dsconv.errors import ConfigError, ModelError, first_line
from dsconv.evaluation.scores import Sums

Metric = Callable[[Any, Any, Any], Any]
"""Distance of a quantized network from its reference on a batch: smaller is better.

Its arguments are the reference's outputs for the batch, those of the quantized network, and the labels or None. It
returns a number for the batch, or a tensor ``(N,)`` with a number per image, or a dictionary of names to such values;
the first one is the distance, and the others are only shown.
"""


def check_metric(metric: object) -> None:
    """Raise ConfigError unless ``metric`` is callable or None."""
    if metric is not None and not callable(metric):
        raise ConfigError(
            f"metric: expected a function of the reference's outputs, the quantized network's and labels, got "
            f"{type(metric).__name__}"
        )


def name_of(metric: Metric) -> str:
    """Return the name of a metric.

    >>> name_of(max)
    'max'
    """
    return str(getattr(metric, "__name__", type(metric).__name__))


def measured(
    metric: Metric | None, f: Any, q: Any, labels: Labels | None, images: int, first: int, *, finite: bool = True
) -> Sums:
    """Return the values for a batch, multiplied by the number of ``images``, by name; empty without a metric.

    Args:
        metric, f, q, labels: the function and its arguments.
        first: number of the first image.
        finite: reject non-finite values; they are allowed for a network that returned NaN.

    Raises:
        ModelError: the metric raised an error, or returned something other than numbers.
    """
    if metric is None:
        return {}
    where = f"metric {name_of(metric)}: for the batch of images {first} to {first + images - 1}"
    try:
        found = metric(f, q, labels)
    except Exception as error:
        raise ModelError(f"{where}, it raised {type(error).__name__}: {first_line(error)}") from error
    named = found if isinstance(found, Mapping) else {name_of(metric): found}
    if not named:
        raise ModelError(f"{where}, it returned an empty dictionary: expected a number, or names and numbers")
    return {str(name): _sum(value, images, str(name), where, finite) for name, value in named.items()}


def _sum(value: Any, images: int, name: str, where: str, finite: bool) -> float:
    expected = f"expected a number, or a tensor of one for each of the {images} images"
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ModelError(f"{where}, it returned a {type(value).__name__} as {name}: {expected}") from None
    if numbers.numel() != 1 and numbers.shape != (images,):
        raise ModelError(f"{where}, it returned a tensor {tuple(numbers.shape)} as {name}: {expected}")
    total = float(numbers.sum()) if numbers.shape == (images,) else float(numbers) * images
    if finite and not math.isfinite(total):
        raise ModelError(f"{where}, it returned {total} as {name}: expected finite numbers")
    return total
