"""Activations: fused into the layer or map before them; a separate one is a map.

Activations without an exponential are bitwise equal to PyTorch's. Those with an exponential have our own rounding,
which is the same for all instruction sets, layouts and numbers of threads: libraries, and PyTorch's vector and scalar
code, differ in it.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from dsconv.compilation.operators.map import activation, mapped
from dsconv.compilation.operators.operator import Constant, Lowering, Settings, Step, activation_of, register
from dsconv.ops import arguments_of


def alone(lowering: Lowering, node: fx.Node) -> Step | None:
    """Return the map of an activation that no layer computes."""
    source, settings = lowering.value(node.args[0]), activation_of(node, lowering.constant)
    return None if source is None or settings is None else mapped(lowering, node, source, activation(settings))


def _named(name: str) -> Callable[[fx.Node, Constant], Settings]:
    return lambda *_: {"activation": name}


def _clamp(node: fx.Node, _: Constant) -> Settings | None:
    given = arguments_of(node.target, node.args, node.kwargs)
    low, high = (
        next((given[name] for name in names if given.get(name) is not None), none)
        for names, none in ((("min", "min_val"), -math.inf), (("max", "max_val"), math.inf))
    )
    if not all(isinstance(bound, int | float) and not math.isnan(bound) for bound in (low, high)):
        return None
    return {"activation": "clamp", "alpha": float(low), "beta": float(high)}


def _relu6(*_: Any) -> Settings:
    return {"activation": "clamp", "alpha": 0.0, "beta": 6.0}


def _leaky_relu(node: fx.Node, _: Constant) -> Settings:
    return {"activation": "leaky_relu", "alpha": node.args[1] if len(node.args) > 1 else 0.01}


def _elu(node: fx.Node, _: Constant) -> Settings | None:
    given = arguments_of(node.target, node.args, node.kwargs)
    return {"activation": "elu", "alpha": given["alpha"]} if given["scale"] == given["input_scale"] == 1 else None


def _gelu(node: fx.Node, _: Constant) -> Settings | None:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    return {"activation": names[arguments_of(node.target, node.args, node.kwargs)["approximate"]]}


def _softplus(node: fx.Node, _: Constant) -> Settings | None:
    given = arguments_of(node.target, node.args, node.kwargs)
    return {"activation": "softplus"} if (given["beta"], given["threshold"]) == (1, 20) else None


_FACTS: dict[str, Any] = {"returns": "new", "in_place": True, "keeps_channels": True, "lower": alone}
for _name in ("relu", "hardswish", "hardsigmoid"):
    register("aten", _name, activation=_named(_name), rounds="alike", by_image=True, **_FACTS)
register("aten", "relu6", activation=_relu6, rounds="alike", by_image=True, **_FACTS)
register("aten", "clamp clamp_min clamp_max hardtanh", activation=_clamp, rounds="alike", by_image=True, **_FACTS)
register("aten", "leaky_relu", activation=_leaky_relu, rounds="alike", by_image=True, **_FACTS)
for _name in ("silu", "sigmoid", "exp", "mish", "tanh"):
    register("aten", _name, activation=_named(_name), own_bits=True, **_FACTS)
register("aten", "elu", activation=_elu, own_bits=True, **_FACTS)
register("aten", "gelu", activation=_gelu, own_bits=True, **_FACTS)
register("aten", "softplus", activation=_softplus, returns="new", keeps_channels=True, own_bits=True, lower=alone)
