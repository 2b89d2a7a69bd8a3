"""Mixed precision: accuracy cost of each layer's bits, without labels, and the best choice under a budget."""

from dsconv.mixed.measure import Sensitivity, Trial, sensitivity
from dsconv.mixed.selection import Budget, Point, SearchResult, choices_of, search

__all__ = [
    "Budget",
    "Point",
    "SearchResult",
    "Sensitivity",
    "Trial",
    "choices_of",
    "search",
    "sensitivity",
]
