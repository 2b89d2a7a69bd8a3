"""Named tensors in the output of a network."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from dsconv.errors import ModelError
from dsconv.structures import leaves

ONE = "output"
"""Name of the tensor if a network returns only one."""


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Return every tensor in the output of a network, in order.

    Names are the keys of a dictionary, the fields of a dataclass or named tuple, and indices in a tuple or list, joined
    by dots if these are nested; a single tensor is called ``output``. Values that are not tensors are omitted.

    >>> import torch
    >>> x = torch.zeros(1)
    >>> list(named_outputs(x)), list(named_outputs((x, {"boxes": [x, x], "count": 2})))
    (['output'], ['0', '1.boxes.0', '1.boxes.1'])
    """
    found: dict[str, Tensor] = {}
    for way, leaf in leaves(output):
        name = ".".join(map(str, way))
        if isinstance(leaf, Tensor):
            found[name or ONE] = leaf
        else:
            parts = named_outputs(_parts(leaf))
            found |= {f"{name}.{part}" if name else part: tensor for part, tensor in parts.items()}
    return found


def _parts(leaf: Any) -> dict[str, Any]:
    """Split an object of a class registered with PyTorch's pytree, or take the ``logits`` of another object."""
    held = tree_leaves(leaf)
    if len(held) != 1 or held[0] is not leaf:
        return {str(place): part for place, part in enumerate(held)}
    return {"logits": leaf.logits} if isinstance(getattr(leaf, "logits", None), Tensor) else {}


def main_output(outputs: Mapping[str, Tensor]) -> str | None:
    """Return the name of the main output: ``logits``, or else the first floating-point one; None if there is none.

    >>> import torch
    >>> x = torch.zeros(1)
    >>> main_output({"features": x, "logits": x}), main_output({"loss": x.long(), "scores": x}), main_output({})
    ('logits', 'scores', None)
    """
    floating = [name for name, tensor in outputs.items() if tensor.is_floating_point()]
    return next((name for name in floating if name.rpartition(".")[2] == "logits"), next(iter(floating), None))


def outputs_by_image(output: Any, images: int) -> dict[str, Tensor | list[Tensor]]:
    """Return `named_outputs` of a batch; a list with an entry per image becomes named lists of tensors.

    Detectors return such lists: dictionaries whose tensors may differ in shape from image to image.

    >>> import torch
    >>> found = outputs_by_image([{"boxes": torch.zeros(n, 4)} for n in (3, 1)], images=2)
    >>> {name: [tuple(tensor.shape) for tensor in tensors] for name, tensors in found.items()}
    {'boxes': [(3, 4), (1, 4)]}
    """
    if _is_list_of_images(output, images):
        each = [named_outputs(entry) for entry in output]
        if all(list(one) == list(each[0]) for one in each):
            return {name: [one[name] for one in each] for name in each[0]}
    return dict(named_outputs(output))


def _is_list_of_images(output: Any, images: int) -> bool:
    if not isinstance(output, list) or len(output) != images:
        return False
    # A tensor with an entry for each image is one output of the batch.
    return not any(isinstance(entry, Tensor) and entry.dim() and len(entry) == images for entry in output)


def check_outputs(name: str, output: Any, found: Mapping[str, object]) -> None:
    """Raise ModelError if a network called ``name`` returned no tensor.

    >>> check_outputs("model", "text", {})
    Traceback (most recent call last):
    ...
    dsconv.errors.ModelError: model: expected a tensor, or a container or dataclass of tensors, as output, got str
    """
    if not found:
        expected = "a tensor, or a container or dataclass of tensors, as output"
        raise ModelError(f"{name}: expected {expected}, got {type(output).__name__}")


def check_same(expected: Iterable[str], got: Iterable[str], names: tuple[str, str]) -> None:
    """Raise ModelError if two calls, of ``names``, returned different outputs.

    >>> check_same(["out"], ["out", "aux"], ("reference", "qmodel"))
    Traceback (most recent call last):
    ...
    dsconv.errors.ModelError: expected the same outputs at every call: reference returns out, qmodel returns out, aux
    """
    expected, got = list(expected), list(got)
    if expected != got:
        said = (
            f"{name} returns {', '.join(found) or 'none'}" for name, found in zip(names, (expected, got), strict=True)
        )
        raise ModelError(f"expected the same outputs at every call: {', '.join(said)}")
