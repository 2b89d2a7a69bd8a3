"""Distributions of a layer's weights, and of other values, before and after quantization."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dsconv.layers import DSLayer
from dsconv.numerics import sqnr_db

BINS = 64
_WEIGHTS = 1 << 17  # number of weights of a layer that are used
# Fraction of values at each end that a histogram counts in its outermost bins.
_TAIL = 5e-4
_WEIGHTS_DIFFER_DB = 3.0


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Values before and after quantization.

    Attributes:
        low, high: ends of the histogram's :data:`BINS` equal bins; values beyond are counted in the outermost.
        before, after: number of values in each.
        figures: values of each statistic before and after.
        sqnr_db: ``10 log10(sum before^2 / sum (before - after)^2)``, value by value.
        moved: first Wasserstein distance between the two distributions divided by the standard deviation of ``before``:
            the mean difference of values after sorting both. 0 means equal distributions.
    """

    low: float
    high: float
    before: list[int]
    after: list[int]
    figures: dict[str, tuple[float, float]]
    sqnr_db: float
    moved: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> "Distribution":
        """Compare finite values, at least one, with their quantized counterparts, in the same order.

        >>> found = Distribution.of(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0]))
        >>> round(found.moved, 2), found.figures["maximum"]
        (0.41, (2.0, 3.0))
        """
        before, after = before.double(), after.double()
        pair = before.sort()[0], after.sort()[0]
        ends = [_quantile(ordered, q) for ordered in pair for q in (_TAIL, 1 - _TAIL)]
        low, high = min(ends), max(ends)
        if low == high:
            low, high = low - 1, high + 1
        counts = [torch.histc(ordered.clamp(low, high), BINS, low, high).long().tolist() for ordered in pair]
        first, second = map(_statistics, pair)
        distance, deviation = float((pair[0] - pair[1]).abs().mean()), first["standard deviation"]
        return cls(
            low=low,
            high=high,
            before=counts[0],
            after=counts[1],
            figures={name: (value, second[name]) for name, value in first.items()},
            sqnr_db=sqnr_db(float(before.square().sum()), float((before - after).square().sum())),
            moved=distance / deviation if deviation else math.inf if distance else 0.0,
        )


def of_weights(before: nn.Module, layer: DSLayer) -> Distribution:
    """Compare the weight of a float layer with that of its quantized ``layer``."""
    pair = [
        weight.detach().float().flatten().cpu() for weight in (cast(Tensor, before.weight), layer.dequantized_weight())
    ]
    if (count := len(pair[0])) > _WEIGHTS:
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(count, (_WEIGHTS,), generator=generator, dtype=torch.int64, device="cpu")
        pair = [weight[places] for weight in pair]
    return Distribution.of(*pair)


def differ(weights: Distribution, layer: DSLayer) -> bool:
    """Return whether they differ by more than they did when ``layer`` was made."""
    known = layer.weight_sqnr_db
    return known is not None and weights.sqnr_db < known - _WEIGHTS_DIFFER_DB


def _quantile(ordered: Tensor, q: float) -> float:
    return float(ordered[round(q * (len(ordered) - 1))])


def _statistics(ordered: Tensor) -> dict[str, float]:
    spread = {"mean": ordered.mean().item(), "standard deviation": ordered.std(correction=0).item()}
    places = {"minimum": 0.0, "1st percentile": 0.01, "median": 0.5, "99th percentile": 0.99, "maximum": 1.0}
    return {**spread, **{name: _quantile(ordered, q) for name, q in places.items()}}
