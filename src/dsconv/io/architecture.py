"""Construction of the float model that a file names: without a download, and no larger than the file's tensors."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsconv import strict_json, zoo
from dsconv.errors import ModelError, one_line

# Arguments that load something, or wrap the network: they do not describe its shape.
_REFUSED = re.compile(
    r"(?<!init_)weights|pretrained|checkpoint|cfg|cache|url|features_only|feature_cls|scriptable|exportable|jit"
)
_WORD = re.compile(r"[A-Za-z_]+\d{0,3}[A-Za-z_]*")
_LONGEST_NAME, _LONGEST_LIST, _LARGEST = 1000, 256, 4096
# Allowance for temporaries of a constructor: tables, initial values, discarded parts.
_SPARE_ELEMENTS, _SPARE_TENSORS = 1 << 22, 10_000


def build(name: str, shapes: list[tuple[int, ...]], device: str) -> nn.Module:
    """Build a model of torchvision, timm or dsconv by its name, without weights, on ``device``.

    Args:
        name: as for :func:`dsconv.zoo.build`; its arguments describe the network's shape.
        shapes: shapes of all weights and other tensors that the model may have; they limit the size.
        device: ``cpu``, or ``meta`` for a model without memory.

    Raises:
        ModelError: the name has other arguments, or the model exceeds ``shapes`` or does not exist.
    """
    _check_arguments(name, max((size for shape in shapes if 0 not in shape for size in shape), default=0))
    with torch.device(device), _Bounded(name, shapes):
        return zoo.build(name, weights="random")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return the description from which :func:`rebuild` makes the float network of ``model``; None if not from ONNX."""
    if not isinstance(model, fx.GraphModule):
        return None
    from dsconv.onnx.importing import network

    return network.describe(model)


def rebuild(described: dict[str, Any], shapes: list[tuple[int, ...]]) -> nn.Module:
    """Build a network from its description, on the ``meta`` device; ``shapes`` limit it, as for :func:`build`.

    Raises:
        ModelError: the description is not valid, or the network exceeds ``shapes``.
    """
    from dsconv.onnx.importing import network

    with torch.device("meta"), _Bounded("the network", shapes):
        return network.build(described)


def _check_arguments(name: str, largest: int) -> None:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise _refusal(name, f"expected at most {_LONGEST_NAME} printable characters")
    for key, text in parse_qsl(name.partition("?")[2], keep_blank_values=True):
        if _REFUSED.search(key):
            raise _refusal(name, f"its argument {key!r} does not describe the shape of a network")
        try:
            value = strict_json.loads(text)
        except ValueError:
            value = text
        if not _describes_a_shape(value, max(largest, _LARGEST)):
            raise _refusal(
                name,
                f"its argument {key!r} is not a word, a Boolean, a number that the shapes in the file allow, or a "
                f"short list of these",
            )


def _describes_a_shape(value: Any, largest: int) -> bool:
    match value:
        case bool() | None:
            return True
        case int() | float():
            return abs(value) <= largest
        case str():
            return len(value) <= 64 and _WORD.fullmatch(value) is not None
        case list():
            leaves = [leaf for part in value for leaf in (part if isinstance(part, list) else [part])]
            plain = not any(isinstance(leaf, list) for leaf in leaves)
            return plain and len(leaves) <= _LONGEST_LIST and all(_describes_a_shape(leaf, largest) for leaf in leaves)
    return False


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Aborts a construction that makes more, or larger, tensors than a model of these shapes needs."""

    def __init__(self, name: str, shapes: list[tuple[int, ...]]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = name
        self.elements = _SPARE_ELEMENTS + 2 * sum(torch.Size(shape).numel() for shape in shapes)
        self.tensors = _SPARE_TENSORS + 4 * len(shapes)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self.elements -= tensor.numel()
                    self.tensors -= 1
        elif isinstance(made, Tensor) and made.numel() > self.elements + _SPARE_ELEMENTS:
            self.elements = -1
        if self.elements < 0 or self.tensors < 0:
            raise _refusal(self.name, "it is larger than the network in the file")
        return made


def _refusal(name: str, reason: str) -> ModelError:
    return ModelError(
        f"model {one_line(name, 200)!r}, which the file names, is not built: {reason}. "
        "Pass the float model to load the file into"
    )
