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
"""Types of tensors, by their numbers in ONNX."""


@dataclass(frozen=True)
class Sizes:
    """A tensor of one dimension, or a scalar, whose values are numbers and some of them are known only later.

    Sizes of inputs are such numbers. They are no tensors, so that :mod:`torch.export` can follow them.
    """

    values: tuple[Number | fx.Node, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Rounded:
    """What ``QuantizeLinear`` returns for a tensor of the network: the tensor before it is rounded."""

    node: fx.Node


Value = np.ndarray | fx.Node | Sizes | Rounded | None


class Unsupported(Exception):
    """A node has no equivalent in a network of PyTorch; says what of it."""


class Attributes:
    """The attributes of a node, by their types."""

    def __init__(self, node: Any):
        helper = import_extra("onnx", "onnx").helper
        self._values = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value as ONNX has it."""
        return self._values.get(name, default)

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._values.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Return a list of whole numbers."""
        value = self._values.get(name, default)
        return None if value is None else [int(number) for number in value]


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a copy of an array.

    Raises:
        Unsupported: PyTorch has no tensors of its type.
    """
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    try:
        # Arrays without dimensions become numbers of NumPy on the way.
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError:
        raise Unsupported(f"a constant of {array.dtype}, which PyTorch does not compute with") from None
