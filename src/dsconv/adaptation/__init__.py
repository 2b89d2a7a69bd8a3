"""Trains a quantized network on unlabelled images to do what its float original does."""

from dsconv.adaptation.adapt import adapt
from dsconv.adaptation.report import Adaptation, Look
from dsconv.recipe import Recipe

__all__ = ["Adaptation", "Look", "Recipe", "adapt"]
