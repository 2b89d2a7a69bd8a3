"""Isolation of a model's state from a capture by :mod:`torch.export`, with constant values known during it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from dsconv.compilation.layouts import zeros_like
from dsconv.data.inputs import Inputs, call
from dsconv.errors import ModelError
from dsconv.layers import DSLayer
from dsconv.layers.readonly import writes
from dsconv.layers.stand_in import StandIn

_LARGEST_KNOWN = 1 << 16  # values: weights computed from others are not stored a second time
_WARM_BATCHES = range(3, 1 << 16)  # the first one that is not stored anywhere: a cache of it would not change
# Functions of tensors whose other arguments are sizes.
_TAKE_SIZES = (
    *("expand", "narrow", "permute", "repeat", "reshape", "roll", "select", "tile", "unflatten", "view"),
    *("new_empty", "new_full", "new_ones", "new_zeros"),
)
_RANDOM = ("bernoulli", "dropout", "multinomial", "normal", "poisson", "rand")


class Capturable:
    """Copy of ``model`` for :func:`torch.export.export` with the sizes of ``inputs`` and any batch size.

    Its forward must run within :meth:`traced`.

    - The copy shares parameters and buffers. Attributes set by its forward are restored, since a graph cannot represent
      them: every capture begins with the state of ``model``.
    - Numbers and booleans that depend on parameters and buffers alone are known while the copy is captured, so that it
      may branch on them.
    - Another copy is run before, which fills caches of the model outside itself, such as ``functools.lru_cache``:
      tensors of a capture that remained there would break the model.
    - Attributes whose first size was the batch size of that run are set to those of an empty batch, so that
      ``if self.shape != x.shape`` holds for every batch.

    Attributes:
        model: the copy.
    """

    def __init__(self, model: nn.Module, inputs: Inputs):
        self.model = _as_after_no_images(model, inputs)
        self._values = {name: tensor.detach() for name, tensor in _tensors(self.model)}

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Return a context manager for each call of ``model`` within a capture."""
        restore = _kept(self.model)
        # torch.export treats a buffer that is set as a mutated one.
        watching = vars(nn.modules.module).get("_global_buffer_registration_hooks", {})
        hooks = dict(watching)
        watching.clear()
        known = [(tensor, self._values[name]) for name, tensor in _tensors(self.model) if name in self._values]
        try:
            with _Constants(known):
                yield
        finally:
            watching.update(hooks)
            restore()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _as_after_no_images(model: nn.Module, inputs: Inputs) -> nn.Module:
    made, warm = _copy(model, share=lambda _: True), _copy(model, share=lambda module: isinstance(module, DSLayer))
    before = {name: _seen(module) for name, module in warm.named_modules()}
    taken = {_first_size(value) for seen in before.values() for value in seen.values()}
    batch = next(count for count in _WARM_BATCHES if count not in taken)
    try:
        with torch.inference_mode(False), torch.no_grad():
            call(warm, zeros_like(inputs, batch))
    except ModelError:
        raise
    except Exception:
        return made  # its capture reports the reason, or is for another batch
    modules = dict(made.named_modules())
    for name, module in warm.named_modules():
        for key, after in _seen(module).items():
            then = before.get(name, {}).get(key)
            if then is not None and then is not after and not _equal(then, after):
                setattr(modules[name], key, _of_no_images(getattr(modules[name], key), after, batch))
    return made


def _copy(model: nn.Module, share: Callable[[nn.Module], bool]) -> nn.Module:
    """Return a copy that shares the parameters of ``model`` and the buffers of modules selected by ``share``."""
    shared = [*model.parameters(), *(b for m in model.modules() if share(m) for b in m.buffers(recurse=False))]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _seen(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that may depend on the batch size."""
    found = {**vars(module), **module._buffers}
    return {
        key: list(value) if isinstance(value, list) else value
        for key, value in found.items()
        if isinstance(value, int | tuple | list | Tensor) and not isinstance(value, bool)
    }


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and _numbers(a) and _numbers(b) and bool(a == b)


def _numbers(value: Any) -> bool:
    return isinstance(value, int) or all(isinstance(n, int) for n in value)


def _first_size(value: Any) -> int | None:
    """Return the first size of a value: a number itself, the first of several, the length of a tensor."""
    if isinstance(value, int):
        return value
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    return value[0] if value and isinstance(value[0], int) else None


def _of_no_images(now: Any, after: Any, batch: int) -> Any:
    """Return ``now`` with a first size of 0, if that of ``after`` was the size of the ``batch``."""
    if type(now) is not type(after):
        return now
    if isinstance(now, int):
        return 0 if after == batch else now
    if isinstance(now, Tensor):
        return now[:0] if now.dim() and after.dim() and len(after) == batch else now
    plain = type(now) in (tuple, list, torch.Size) and now and after and _numbers(now) and _numbers(after)
    return type(now)((0, *now[1:])) if plain and after[0] == batch else now


def _kept(model: nn.Module) -> Callable[[], None]:
    """Return a function that resets the attributes of all modules to their current values."""
    kept = [(module, _shallow(vars(module))) for module in model.modules()]

    def restore() -> None:
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)

    return restore


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return attributes, with copies of the containers among them."""
    return {key: copy.copy(value) if type(value) in (dict, list, set) else value for key, value in attributes.items()}


class _Constants(TorchFunctionMode):
    """Evaluates functions of constants on their values as well, while a graph is traced.

    ``known`` are pairs of the traced stand-in for a parameter or buffer, and its value.
    """

    def __init__(self, known: Iterable[tuple[Tensor, Tensor]]):
        super().__init__()
        # By id, which is unique as long as the tensor is kept here.
        self.known = {id(traced): (traced, value) for traced, value in known}
        self.changed: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        values = [leaf if tensors and not isinstance(leaf, Tensor) else self._value(leaf) for leaf in leaves]
        name = getattr(func, "__name__", "")
        if writes(func, kwargs):
            self._forget(tensors)
            return func(*args, **kwargs)
        known = all(value is not None for leaf, value in zip(leaves, values, strict=True) if isinstance(leaf, Tensor))
        if not tensors or not known or any(map(_is_unknown, leaves)) or any(word in name for word in _RANDOM):
            sized = [self._number(leaf, name in _TAKE_SIZES) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(sized, spec)
            return func(*args, **kwargs)
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            given, named = pytree.tree_unflatten(values, spec)
            result = func(*given, **named)
        made, shape = pytree.tree_flatten(result)
        if not any(isinstance(leaf, Tensor) for leaf in made):
            return result
        try:
            traced = pytree.tree_leaves(func(*args, **kwargs))
            same = [a.shape == b.shape for a, b in zip(traced, made, strict=True) if isinstance(b, Tensor)]
        except Exception:  # sizes that depend on values
            same = [False]
        if not all(same):
            traced = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in made]
        for leaf, value in zip(traced, made, strict=True):
            if isinstance(value, Tensor) and value.numel() <= _LARGEST_KNOWN:
                self.known[id(leaf)] = (leaf, value)
        return pytree.tree_unflatten(traced, shape)

    def _value(self, leaf: Any) -> Any:
        """Return the value of a tensor; None if it depends on the input."""
        if not isinstance(leaf, Tensor) or id(leaf) in self.changed:
            return None
        if id(leaf) in self.known:
            return self.known[id(leaf)][1]
        own = type(leaf) in (Tensor, nn.Parameter) and not torch._is_functional_tensor(leaf)
        return leaf if own else None

    def _number(self, leaf: Any, is_size: bool) -> Any:
        """Return a known size, or a slice with known ends, as numbers."""
        if isinstance(leaf, slice):
            return slice(*(self._number(end, True) for end in (leaf.start, leaf.stop, leaf.step)))
        value = self._value(leaf) if is_size else None
        if value is None or value.dim() or value.is_floating_point() or value.is_complex():
            return leaf
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return value.item()

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        """Forget the values of tensors that are changed in place, and of their views."""
        for tensor in tensors[:1]:
            value = self._value(tensor)
            if value is not None:
                self.changed[id(tensor)] = tensor
                memory = value.untyped_storage().data_ptr()
                for key, (traced, other) in self.known.items():
                    if other.untyped_storage().data_ptr() == memory:
                        self.changed[key] = traced


def _is_unknown(leaf: Any) -> bool:
    """Return whether a value depends on the input, or represents the weight of a layer."""
    return _is_of_trace(leaf) or isinstance(leaf, StandIn)


def _is_of_trace(leaf: Any) -> bool:
    """Return whether a number depends on the input."""
    if isinstance(leaf, slice):
        return any(map(_is_of_trace, (leaf.start, leaf.stop, leaf.step)))
    return isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool)
