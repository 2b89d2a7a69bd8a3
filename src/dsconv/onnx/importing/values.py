"""Values while an ONNX graph is read: constants, tensors of the network, and sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dsconv.errors import import_extra

Number = int | float | bool
Numbers = Sequence[Number | fx.Node]
"""Numbers, each known now or returned by a node when the network runs."""

TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""Dtypes of tensors, by their numbers in ONNX."""


@dataclass(frozen=True)
class Sizes:
    """One-dimensional tensor, or a scalar, of numbers of which some are known only at run time.

    Sizes of inputs are such numbers. They are not tensors, so that :mod:`torch.export` can trace them.
    """

    values: tuple[Number | fx.Node, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Rounded:
    """Result of ``QuantizeLinear`` for a tensor of the network: the tensor before rounding."""

    node: fx.Node


Value = np.ndarray | fx.Node | Sizes | Rounded | None


class Unsupported(Exception):
    """A node has no equivalent in a PyTorch network; the message gives the reason."""


class Attributes:
    """Attributes of a node, by type."""

    def __init__(self, node: Any):
        helper = import_extra("onnx", "onnx").helper
        self._values = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as stored by ONNX."""
        return self._values.get(name, default)

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._values.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Return a list of integers."""
        value = self._values.get(name, default)
        return None if value is None else [int(number) for number in value]


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a copy of an array.

    Raises:
        Unsupported: PyTorch does not support its dtype.
    """
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    try:
        # Zero-dimensional arrays become NumPy numbers on the way.
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError:
        raise Unsupported(f"a constant of {array.dtype}, which PyTorch does not compute with") from None
