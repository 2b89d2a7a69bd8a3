"""Quantizes a network as well as a budget or a target asks for, by itself."""

from dsconv.optimization.goal import Target
from dsconv.optimization.optimize import optimize
from dsconv.optimization.results import Attempt, Optimization

__all__ = ["Attempt", "Optimization", "Target", "optimize"]
