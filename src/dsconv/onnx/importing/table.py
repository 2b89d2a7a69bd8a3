"""The table of ONNX operators that can be imported, which the files of this package fill."""

from collections.abc import Callable
from typing import Any, TypeVar

Lowering = TypeVar("Lowering", bound=Callable[..., Any])

OPERATORS: dict[str, Callable[..., Any]] = {}
"""By the operator's type: what adds it to a network, called with the builder, the node's attributes and its inputs.

Returns the output, or a tuple of them.
"""

ON_SIZES: dict[str, Callable[..., Any]] = {}
"""The same for nodes that have :class:`Sizes` among their inputs, in the place of the former."""


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
