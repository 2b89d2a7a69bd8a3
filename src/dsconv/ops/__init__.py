"""Operators on tensors: integer kernels on the CPU (:mod:`dsconv.ops.cpu`), and views for convolutions.

:mod:`dsconv.backends` determines which of them executes a layer; within :func:`simulated`, none does.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dsconv.ops import cpu
from dsconv.ops.arguments import ACTIVATIONS, FLOAT_BITS, OPERATIONS, WEIGHTS, arguments_of, checked_sizes
from dsconv.ops.native import isa, peak_rate, use_threads
from dsconv.ops.packing import winograd_weights
from dsconv.ops.rounding import round_winograd, solve_balanced
from dsconv.ops.views import patches, pixels_format, transposed_layout, windows


class _State(threading.local):
    # Set per thread, and not in the class: torch.compile guards the attributes of an instance.
    def __init__(self) -> None:
        self.simulated = False
        self.whole = False


_state = _State()


@contextmanager
def simulated() -> Iterator[None]:
    """Simulate the layers that this thread runs in the block in float, for comparison or export to other formats.

    >>> import torch, dsconv
    >>> layer, x = dsconv.nn.DSConv2d.from_float(torch.nn.Conv2d(64, 8, 3)), torch.randn(1, 64, 5, 5)
    >>> with torch.inference_mode():
    ...     y = layer(x)
    ...     with simulated():
    ...         bool(torch.allclose(layer(x), y, atol=1e-5))
    True
    """
    before, _state.simulated = _state.simulated, True
    try:
        yield
    finally:
        _state.simulated = before


@contextmanager
def simulated_whole() -> Iterator[None]:
    """Make each simulated layer that this thread runs in the block one graph operator, ``dsconv::simulated``."""
    before, _state.whole = _state.whole, True
    try:
        yield
    finally:
        _state.whole = before


def is_simulated_whole() -> bool:
    """Return whether :func:`simulated_whole` is active in this thread."""
    return _state.whole


def is_simulated() -> bool:
    """Return whether :func:`simulated` is active in this thread."""
    return _state.simulated


__all__ = [
    "ACTIVATIONS",
    "FLOAT_BITS",
    "OPERATIONS",
    "WEIGHTS",
    "arguments_of",
    "checked_sizes",
    "cpu",
    "is_simulated",
    "is_simulated_whole",
    "isa",
    "patches",
    "peak_rate",
    "pixels_format",
    "round_winograd",
    "simulated",
    "simulated_whole",
    "solve_balanced",
    "transposed_layout",
    "use_threads",
    "windows",
    "winograd_weights",
]
