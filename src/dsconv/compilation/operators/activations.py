"""Activations: a layer or a map computes the one behind it; one that stands alone is a map."""

from collections.abc import Callable
from typing import Any

from torch import fx

from dsconv.compilation.operators.map import mapped
from dsconv.compilation.operators.operator import Constant, Lowering, Settings, Step, activation_of, register


def alone(lowering: Lowering, node: fx.Node) -> Step | None:
    """Return the map of an activation that no layer computes."""
    source, settings = lowering.value(node.args[0]), activation_of(node, lowering.constant, lowering.fast_math)
    return None if source is None or settings is None else mapped(lowering, node, [], settings, source=source)


def _leaky_relu(node: fx.Node, _: Constant) -> Settings:
    return {"activation": "leaky_relu", "slope": node.args[1] if len(node.args) > 1 else 0.01}


def _hardtanh(node: fx.Node, _: Constant) -> Settings | None:
    return {"activation": "relu6"} if tuple(node.args[1:]) == (0, 6) and not node.kwargs else None


def _named(name: str) -> Callable[[fx.Node, Constant], Settings]:
    return lambda *_: {"activation": name}


_FACTS: dict[str, Any] = {"returns": "new", "in_place": True, "by_image": True, "lower": alone}
for _name in ("relu", "relu6", "hardswish", "hardsigmoid"):
    register("aten", _name, activation=_named(_name), rounds="alike", **_FACTS)
register("aten", "hardtanh", activation=_hardtanh, rounds="alike", **_FACTS)
register("aten", "leaky_relu", activation=_leaky_relu, rounds="alike", **_FACTS)
for _name in ("silu", "sigmoid"):  # every library rounds an exponential in its own way
    register("aten", _name, activation=_named(_name), rounds="by_vectors", fast_math=True, **_FACTS)
