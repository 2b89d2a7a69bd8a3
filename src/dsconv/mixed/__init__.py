"""Mixed precision: what each layer's bits cost in accuracy, without labels, and the best of them under a budget."""

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
