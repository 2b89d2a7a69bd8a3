"""Training of a quantized network on unlabelled images to match its float original."""

from dsconv.adaptation.adapt import adapt
from dsconv.adaptation.report import Adaptation, Look
from dsconv.recipe import Recipe

__all__ = ["Adaptation", "Look", "Recipe", "adapt"]
