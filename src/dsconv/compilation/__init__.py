"""A whole quantized network as one graph of integer operators with what follows them fused."""

from dsconv.compilation.compiled import CompiledModel, compile
from dsconv.compilation.plan import Plan, Step

__all__ = ["CompiledModel", "Plan", "Step", "compile"]
