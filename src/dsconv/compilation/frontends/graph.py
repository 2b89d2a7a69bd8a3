"""The result of a front end: a graph, and the structure of the model's output."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dsconv.errors import ModelError
from dsconv.structures import PLAIN, leaves, mapped, paths_in

RETURNED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
"""The types that a graph returns of a model's output; the rest of it is the same for all inputs."""

_Structure = Callable[[Sequence[Any]], Any]


class Graph(NamedTuple):
    """A graph, and what makes the model's output of what the graph returns.

    Attributes:
        module: has a placeholder for each tensor of the inputs, and returns a list.
        structure: takes such a list.
    """

    module: fx.GraphModule
    structure: _Structure


class _Place:
    """Stands for something that a graph returns."""


def structure_of(output: Any) -> _Structure:
    """Return what puts other tensors in the places of those of an ``output``.

    Raises:
        ModelError: there is no tensor in it, or an object that may hold some out of sight.

    >>> x = torch.zeros(1, dtype=torch.float32)
    >>> structure_of({"a": x, "b": [x, "c"]})([1, 2])
    {'a': 1, 'b': [2, 'c']}
    """
    if isinstance(output, RETURNED):
        return itemgetter(0)
    others = [leaf for _, leaf in leaves(output) if not isinstance(leaf, (*RETURNED, *PLAIN))]
    if others or not returned_in(output):
        kind = type(others[0] if others else output).__name__
        raise ModelError(
            f"the model returns {kind}, and what tensors that holds is not known: return tensors, or lists, tuples, "
            "dictionaries or dataclasses of them"
        )
    empty = mapped(lambda _: _Place(), output, RETURNED)

    def structure(made: Sequence[Any]) -> Any:
        remaining = iter(made)
        return mapped(lambda _: next(remaining), empty, _Place)

    return structure


def returned_in(output: Any) -> list[Any]:
    """Return what a graph returns of an ``output``."""
    return [found for _, found in paths_in(output, RETURNED)]
