"""Table of the ONNX operators that can be imported, to which the files of this package add."""

from collections.abc import Callable
from typing import Any, TypeVar

Lowering = TypeVar("Lowering", bound=Callable[..., Any])

OPERATORS: dict[str, Callable[..., Any]] = {}
"""Functions by operator type, called with the builder, the node's attributes and its inputs.

They add the operator to a network and return the output, or a tuple of outputs.
"""

ON_SIZES: dict[str, Callable[..., Any]] = {}
"""The same for nodes with :class:`Sizes` among their inputs, which take precedence."""


def operator(*types: str) -> Callable[[Lowering], Lowering]:
    """Add a function to :data:`OPERATORS`; a decorator."""

    def add(lowering: Lowering) -> Lowering:
        OPERATORS.update(dict.fromkeys(types, lowering))
        return lowering

    return add


def on_sizes(*types: str) -> Callable[[Lowering], Lowering]:
    """Add a function to :data:`ON_SIZES`; a decorator."""

    def add(lowering: Lowering) -> Lowering:
        ON_SIZES.update(dict.fromkeys(types, lowering))
        return lowering

    return add
