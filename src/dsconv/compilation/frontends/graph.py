"""Result of a front end: a graph, and the structure of the model's output."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dsconv.errors import ModelError
from dsconv.structures import PLAIN, leaves, mapped, paths_in

RETURNED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
"""Types of output values that a graph returns; the rest of the output is the same for all inputs."""

_Structure = Callable[[Sequence[Any]], Any]


class Graph(NamedTuple):
    """Graph, and the conversion of its result to the model's output.

    Attributes:
        module: has a placeholder for each tensor of the inputs, and returns a list.
        structure: converts such a list to the model's output.
    """

    module: fx.GraphModule
    structure: _Structure


class _Place:
    """Placeholder for a value that a graph returns."""


def structure_of(output: Any) -> _Structure:
    """Return a function that replaces the tensors of an ``output`` by others.

    Raises:
        ModelError: it has no tensor, or an object that may contain tensors that cannot be found.

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
            f"the model returns {kind}, whose tensors cannot be determined: return tensors, or lists, tuples, "
            "dictionaries or dataclasses of them"
        )
    empty = mapped(lambda _: _Place(), output, RETURNED)

    def structure(made: Sequence[Any]) -> Any:
        remaining = iter(made)
        return mapped(lambda _: next(remaining), empty, _Place)

    return structure


def returned_in(output: Any) -> list[Any]:
    """Return the values of an ``output`` that a graph returns."""
    return [found for _, found in paths_in(output, RETURNED)]
