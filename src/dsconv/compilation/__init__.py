"""Compilation of a quantized network to one graph of integer operators with fused epilogues."""

import warnings
from typing import Any

from dsconv.compilation.compiled import CompiledModel, compile
from dsconv.compilation.plan import Plan, PlanStep

__all__ = ["CompiledModel", "Plan", "PlanStep", "compile"]


def __getattr__(name: str) -> Any:
    if name == "Step":
        warnings.warn("dsconv.compilation.Step is PlanStep now, and goes in 0.2", DeprecationWarning, stacklevel=2)
        return PlanStep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
