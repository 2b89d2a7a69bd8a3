"""Replacement for a parameter whose functions became a layer."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dsconv.errors import ModelError

# The arguments of the layer functions, in order, without the input.
_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
# Python operators used to compute weights; each has a reflected form for two tensors.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul")
_UNARY = ("neg", "pos", "abs")


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of a convolution or linear ``function`` by name.

    >>> arguments(torch.conv2d, ("x", "w"), {"padding": 1})["padding"], arguments(torch.conv2d, (), {})["stride"]
    (1, 1)
    """
    name = function.__name__
    names = _TRANSPOSED if "transpose" in name else _CONVOLUTION if "conv" in name else _CONVOLUTION[:2]
    given = dict(zip(("input", *names), args, strict=False)) | dict(kwargs)
    return {key: value for key, value in _DEFAULTS.items() if key in names} | given


class StandIn:
    """Represents a parameter from which the weight or bias of a layer was computed, once.

    Each result of a computation with it is also a stand-in. The layer function calls the layer if its weight is a
    stand-in.

    Args:
        layer: the layer.
        function: the function that was called in its place.
        geometry: its arguments other than tensors, by name.
        like: a tensor on ``meta`` with the reported shape and dtype.
        operations: names of the functions that computed the weight and bias; others are refused.

    >>> from torch.nn import functional as F
    >>> layer = nn.Linear(2, 3)
    >>> weight = StandIn(layer, F.linear, {}, torch.empty(2, 3, dtype=torch.float32, device="meta"), frozenset({"t"}))
    >>> F.linear(torch.ones(1, 2), weight.t()).equal(layer(torch.ones(1, 2))), weight.t().shape
    (True, torch.Size([3, 2]))
    """

    def __init__(
        self,
        layer: nn.Module,
        function: Callable[..., Any],
        geometry: Mapping[str, Any],
        like: Tensor,
        operations: frozenset[str],
    ):
        self._layer, self._function, self._geometry = layer, function, geometry
        self._like, self._operations = like, operations

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, cls)]
        self, alike = ours[0], all(one._layer is ours[0]._layer for one in ours)
        name = getattr(func, "__name__", str(func))
        if func is self._function and alike:
            given = arguments(func, args, kwargs)
            x, weight, _ = (given.pop(key, None) for key in ("input", "weight", "bias"))
            if isinstance(weight, cls) and not isinstance(x, cls) and given == self._geometry:
                return self._layer(x)
        if name not in self._operations or not alike:
            raise ModelError(
                f"a parameter became the weight of a layer, {self._layer}, and is now used in another way, by {name}: "
                "quantize the network in the mode in which it runs"
            )
        return self._computed(func, leaves, spec)

    def _computed(self, func: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        # Not recorded in a graph that is being captured.
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                result = _result(func, leaves, spec, "meta")
            except TypeError:  # for std_mean, among others, PyTorch infers no shape without values after an export
                result = _result(func, leaves, spec, "cpu")
        return pytree.tree_map_only(Tensor, self._as, result)

    def _as(self, like: Tensor) -> "StandIn":
        return StandIn(self._layer, self._function, self._geometry, like.to("meta"), self._operations)

    @property
    def device(self) -> torch.device:
        """Device of the layer."""
        return next(tensor.device for tensor in (*self._layer.parameters(), *self._layer.buffers()))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layer's weight, or the one that it would have in float."""
        like: Any = getattr(self._layer, "weight_like", None)
        weight: Tensor = self._layer.weight if like is None else like  # type: ignore[assignment]
        return weight.dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle query these before the attributes exist
            raise AttributeError(name)
        value = getattr(self._like, name)
        if callable(value):
            return lambda *args, **kwargs: _method(getattr(Tensor, name), self, *args, **kwargs)
        return self._as(value) if isinstance(value, Tensor) else value

    def __len__(self) -> int:
        return len(self._like)

    def __getitem__(self, index: Any) -> Any:
        return _method(operator.getitem, self, index)


def _result(func: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, device: str) -> Any:
    """Return the result of ``func`` on tensors of the same shapes."""

    def shaped(leaf: Any) -> Any:
        leaf = leaf._like if isinstance(leaf, StandIn) else leaf
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) if isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_unflatten(list(map(shaped, leaves)), spec)
    return func(*args, **kwargs)


# Methods that read no values.
_TOLD = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_contiguous")


def _method(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if function.__name__ in _TOLD:
        return function(args[0]._like, *args[1:], **kwargs)
    return StandIn.__torch_function__(function, (), args, kwargs)


def _operators() -> None:
    def binary(function: Callable[..., Any], reflected: bool) -> Callable[[Any, Any], Any]:
        return lambda a, b: _method(function, b, a) if reflected else _method(function, a, b)

    def unary(function: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda a: _method(function, a)

    for name in _BINARY:
        setattr(StandIn, f"__{name}__", binary(getattr(operator, name), False))
        setattr(StandIn, f"__r{name}__", binary(getattr(operator, name), True))
    for name in _UNARY:
        setattr(StandIn, f"__{name}__", unary(getattr(operator, name)))


_operators()
