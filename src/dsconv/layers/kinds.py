"""The registry of the kinds of quantized layers, through which all other packages learn what a layer is."""

from typing import TypeVar

from torch import nn

from dsconv.layers.layer import DSLayer
from dsconv.layers.stand_in import StandIn

Kind = TypeVar("Kind", bound=type[DSLayer])

# Methods of a module that its call runs, and that an attribute of the instance replaces.
CALLED = ("forward", "_conv_forward", "_call_impl")

KINDS: dict[str, type[DSLayer]] = {}
"""The kinds of quantized layers, by the names that files have for them."""


def register(kind: Kind) -> Kind:
    """Add a class to the kinds of quantized layers; a decorator."""
    KINDS[kind.__name__] = kind
    kind.plain_call = {name: getattr(kind.float_type, name, None) for name in ("__call__", *CALLED)}
    return kind


def kind_of(module: object) -> type[DSLayer] | None:
    """Return the kind that takes the place of a float layer, the most specific one; None for any other module.

    It is None for a layer whose call was taken apart, so that its weight is that of a layer in it.
    """
    if isinstance(vars(module).get("weight") if isinstance(module, nn.Module) else None, StandIn):
        return None
    kinds: dict[type, type[DSLayer]] = {kind.float_type: kind for kind in KINDS.values()}
    return next((kinds[base] for base in type(module).__mro__ if base in kinds), None)
