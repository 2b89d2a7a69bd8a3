"""Accuracy and speed of a network, and the distance of a quantized network from its float original."""

from dsconv.evaluation.compare import compare
from dsconv.evaluation.evaluate import evaluate
from dsconv.evaluation.results import Closeness, Comparison, Evaluation

__all__ = ["Closeness", "Comparison", "Evaluation", "compare", "evaluate"]
