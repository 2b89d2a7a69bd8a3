"""Automatic quantization of a network for a budget or a target."""

from dsconv.optimization.goal import Target
from dsconv.optimization.optimize import optimize
from dsconv.optimization.results import Attempt, Optimization

__all__ = ["Attempt", "Optimization", "Target", "optimize"]
