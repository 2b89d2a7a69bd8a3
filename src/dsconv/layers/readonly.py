"""Tensors that refuse writes, for values that are recomputed on each read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsconv.errors import ModelError

_CONVERSIONS = ("__index__", "__int__", "__invert__")
# Methods named like in-place methods that change no value.
_WRITE_NOTHING = ("requires_grad_", "rename_", "share_memory_", "pin_memory_")


def writes(function: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a tensor function writes to one of its arguments, as far as its name tells.

    >>> writes(Tensor.mul_, {}), writes(torch.mul, {}), writes(torch.mul, {"out": 1}), writes(Tensor.__setitem__, {})
    (True, False, True, True)
    """
    name = getattr(function, "__name__", "")
    if name in _WRITE_NOTHING:
        return False
    operator = name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _CONVERSIONS)
    return operator or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs


class ReadOnly(Tensor):
    """Tensor whose values, and those of its views, cannot be written. Results computed from it are plain tensors.

    >>> weight = torch.ones(2, dtype=torch.float32).as_subclass(ReadOnly)
    >>> weight.data.mul_(2)
    Traceback (most recent call last):
    ...
    dsconv.errors.ModelError: the weight of a quantized layer is computed from vqk and kds, and mul_ to it would be \
lost: write the weight of the float model before quantizing it, or call quantize_(weight) of the layer
    >>> type(weight + 1)
    <class 'torch.Tensor'>
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if writes(func, kwargs) and not (func.__name__ == "__set__" and func is not Tensor.data.__set__):  # type: ignore[attr-defined]
            written = kwargs.get("out", next((value for value in given if isinstance(value, Tensor | list)), None))
            if any(isinstance(value, cls) for value in (written if isinstance(written, tuple | list) else (written,))):
                what = "an assignment" if func.__name__.startswith("__") else func.__name__
                raise ModelError(
                    f"the weight of a quantized layer is computed from vqk and kds, and {what} to it would be lost: "
                    "write the weight of the float model before quantizing it, or call quantize_(weight) of the layer"
                )
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__deepcopy__:
                return args[0].detach().as_subclass(Tensor).clone()
            result = func(*args, **kwargs)
            homes = {value.untyped_storage().data_ptr() for value in given if isinstance(value, cls)}

            def kept(value: Any) -> Any:
                shares = value.untyped_storage().data_ptr() in homes
                return value.as_subclass(cls if shares else Tensor)

            if isinstance(result, tuple | list) and all(isinstance(value, Tensor) for value in result):
                values = map(kept, result)
                return type(result)(values) if type(result) in (tuple, list) else result
            return kept(result) if isinstance(result, Tensor) else result
