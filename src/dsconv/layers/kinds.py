"""Registry of the kinds of quantized layers, which all other packages use."""

from typing import TypeVar

from torch import nn

from dsconv.layers.layer import DSLayer
from dsconv.layers.stand_in import StandIn

Kind = TypeVar("Kind", bound=type[DSLayer])

# Methods that a call of a module runs and that an instance attribute can replace.
CALLED = ("forward", "_conv_forward", "_call_impl")

KINDS: dict[str, type[DSLayer]] = {}
"""Kinds of quantized layers, by their names in files."""


def register(kind: Kind) -> Kind:
    """Add a class to the kinds of quantized layers; a decorator."""
    KINDS[kind.__name__] = kind
    kind.plain_call = {name: getattr(kind.float_type, name, None) for name in ("__call__", *CALLED)}
    return kind


def kind_of(module: object) -> type[DSLayer] | None:
    """Return the kind that replaces a float layer, the most specific one; None for any other module.

    It is None for a layer that was split up, so that its weight belongs to a layer inside it.
    """
    if isinstance(vars(module).get("weight") if isinstance(module, nn.Module) else None, StandIn):
        return None
    kinds: dict[type, type[DSLayer]] = {kind.float_type: kind for kind in KINDS.values()}
    return next((kinds[base] for base in type(module).__mro__ if base in kinds), None)
