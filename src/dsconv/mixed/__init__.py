"""Mixed precision: what each layer's bits cost in accuracy, without labels, and the best of them under a budget."""

from dsconv.mixed.images import synthetic_images
from dsconv.mixed.search import Budget, Point, SearchResult, choices_of, search
from dsconv.mixed.sensitivity import Sensitivity, Trial, sensitivity

__all__ = [
    "Budget",
    "Point",
    "SearchResult",
    "Sensitivity",
    "Trial",
    "choices_of",
    "search",
    "sensitivity",
    "synthetic_images",
]
