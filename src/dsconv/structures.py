"""Tensors within lists, tuples, dictionaries and dataclasses, as used for model inputs and outputs."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

Way = tuple[str | int, ...]
"""Keys, indices and names of fields on the path to a value."""

PLAIN = (int, float, complex, str, bytes, slice, Enum, torch.dtype, torch.device, type(None))
"""Types that cannot contain tensors."""

_Kinds = type | tuple[type, ...]


def mapped(change: Callable[[Any], Any], tree: Any, leaf: _Kinds = Tensor) -> Any:
    """Return ``tree`` with everything of the type ``leaf`` replaced by the result of ``change``; the rest is copied.

    >>> mapped(lambda n: n + 1, {"a": [1, 2.5], "b": (3,)}, int)
    {'a': [2, 2.5], 'b': (4,)}
    """
    items = None if isinstance(tree, leaf) else _items(tree)
    if items is None:
        return change(tree) if isinstance(tree, leaf) else tree
    made = {key: mapped(change, value, leaf) for key, value in items.items()}
    if _is_dataclass(tree):
        return replace(tree, **made)
    if isinstance(tree, Mapping):
        whole: Any = copy.copy(tree)
        for key, value in made.items():
            whole[key] = value
        return whole
    return type(tree)(*made.values()) if hasattr(tree, "_fields") else type(tree)(made.values())


def leaves(tree: Any) -> Iterator[tuple[Way, Any]]:
    """Yield everything that is not a container, in the order of :func:`mapped`, with its path.

    >>> list(leaves({"a": [1, None], "b": (3,)}))
    [(('a', 0), 1), (('a', 1), None), (('b', 0), 3)]
    """
    items = None if isinstance(tree, Tensor) else _items(tree)
    if items is None:
        yield (), tree
        return
    for key, value in items.items():
        for way, found in leaves(value):
            yield (key, *way), found


def paths_in(tree: Any, leaf: _Kinds = Tensor) -> list[tuple[Way, Any]]:
    """Return everything of the type ``leaf``, with its path.

    >>> paths_in({"a": [1, 2.5], "b": (3,)}, int)
    [(('a', 0), 1), (('b', 0), 3)]
    """
    return [(way, found) for way, found in leaves(tree) if isinstance(found, leaf)]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors of a structure, in order."""
    return [tensor for _, tensor in paths_in(tree)]


def _is_dataclass(tree: Any) -> bool:
    return is_dataclass(tree) and not isinstance(tree, type)


def _items(tree: Any) -> Mapping[Any, Any] | None:
    """Return the contents of a container by key, field or index; None if ``tree`` is not a container."""
    if _is_dataclass(tree):
        return {field.name: getattr(tree, field.name) for field in fields(tree) if field.init}
    if isinstance(tree, Mapping):
        return tree
    if isinstance(tree, list | tuple):
        return dict(zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True))
    return None
