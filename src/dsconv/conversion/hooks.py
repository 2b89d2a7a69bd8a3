"""Hooks that write the weight of a layer, detected by running candidates on a copy."""

import dis
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dsconv.conversion.copying import HOOKS, copied, held, is_of_torch
from dsconv.layers.kinds import kind_of

# Hooks of PyTorch that compute a layer's weight before it runs.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
# A function that uses none of these names cannot write a weight.
_PARTS = ("weight", "bias", "param", "state_dict", "attr", "__dict__", "kernel")
_WHOLE = {"vars", "data", "apply", "modules", "children", "_modules", "_buffers", "buffers", "named_buffers"}
_NAMES = ("weight", "bias")
_LISTS = ("parameters", "named_parameters")
_NO_CODE = ("CACHE", "PRECALL", "EXTENDED_ARG", "NOP", "PUSH_NULL")
# Number of times hooks run: a write in both runs is taken to occur in every run.
_TURNS = 2


class Written(NamedTuple):
    """Effect of a layer's hooks on its weight.

    Attributes:
        weight: the weight that the layer runs with, None if unknown.
        keys: the forward pre-hooks that write it.
        reason: why it is unknown.
    """

    weight: Tensor | None
    keys: frozenset[int] = frozenset()
    reason: str = ""


def written(layer: nn.Module, make_input: Callable[[], Tensor]) -> Written | None:
    """Return the effect of the hooks of ``layer`` on its weight, None if they do not change it.

    Hooks whose code names nothing by which a weight can be reached are not run. The others run on a copy, on the input
    that ``make_input`` returns.
    """
    if not any(may_write(hook) for kind in HOOKS for hook in getattr(layer, kind).values()):
        return None
    hook: Any = None
    keys: set[int] = set()
    try:
        x = make_input()
        # A mask that is already applied has no visible effect; it shows when the weights are disturbed.
        for disturbed, turn in itertools.product((True, False), range(_TURNS)):
            if turn == 0:
                probed: Any = copied(layer, isolate=True).eval()
                weights: list[Tensor | None] = []
                if disturbed:
                    _disturb(probed)
            given = x * (1 + turn)
            for key, hook in list(probed._forward_pre_hooks.items()):
                if not isinstance(hook, WEIGHT_HOOKS) and not may_write(hook):
                    continue
                before = _stored(probed)
                output = _call(probed, "_forward_pre_hooks", key, hook, given)
                changed = _changed(before, _stored(probed))
                if isinstance(hook, WEIGHT_HOOKS) or not changed:
                    continue
                if changed != ["weight"] or output is not None:
                    also = "its bias" if "bias" in changed else "its input"
                    return Written(None, reason=f"a hook writes its weight or bias: {_name(hook)} changes {also}, too")
                keys.add(key)
            weight = getattr(probed, "weight", None)
            weights.append(None if weight is None else weight.detach().clone())
            output = probed.forward(given)
            for key, hook in list(probed._forward_hooks.items()):
                before = _stored(probed)
                if may_write(hook):
                    _call(probed, "_forward_hooks", key, hook, given, output)
                if _changed(before, _stored(probed)):
                    return Written(None, reason=f"its weight is changed after each call by a hook, {_name(hook)}")
    except Exception as error:
        return Written(None, reason=_failed(hook, error))
    if not keys:
        return None
    if not _same(weights[0], weights[-1]):
        return Written(None, reason="a hook makes another weight of it at each call")
    return Written(weights[-1], frozenset(keys))


def written_by_others(model: nn.Module, layers: type | tuple[type, ...]) -> dict[nn.Module, str]:
    """Return each of the ``layers`` in ``model`` whose weight another module writes, with the reason.

    Any module may write it in a hook, which is run on a copy; a parent module may also write it in its forward, whose
    code is inspected.
    """
    found: dict[nn.Module, str] = {}
    everything = [module for module in model.modules() if isinstance(module, layers)]
    for name, module in model.named_modules():
        inside: list[nn.Module] = [*filter(lambda m: isinstance(m, layers), module.modules())]
        around = bool(inside) and not isinstance(module, layers)
        for function, owners in _writing_methods(type(module)) if around else ():
            children = {child: m for child, m in module._modules.items() if m is not None}
            # An object without a name of its own, such as a loop variable, may be part of any named one.
            names = owners if owners <= children.keys() else set(names_of(function.__code__))
            parts = [child for name_of_child, child in children.items() if name_of_child in names]
            line = f"{function.__qualname__} ({function.__code__.co_filename}:{function.__code__.co_firstlineno})"
            for part in parts or [module]:
                for layer in filter(lambda m: isinstance(m, layers), part.modules()):
                    found[layer] = f"its weight or bias may be written by the code of {line}"
        for kind in HOOKS:
            for key in [key for key, hook in getattr(module, kind).items() if may_write(hook)]:
                memo: dict[int, Any] = {}
                owner = f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
                hook: Any = getattr(module, kind)[key]
                reached = inside if around else []
                try:
                    probed = copied(module, memo, isolate=True).eval()
                    # `written` handles the module's own weight.
                    reached = [layer for layer in everything if layer is not module and id(layer) in memo]
                    if not reached:
                        continue
                    hook, x = getattr(probed, kind)[key], _input_of((inside or reached)[0])
                    before = [_stored(memo[id(layer)]) for layer in reached]
                    for turn in range(_TURNS):
                        _call(probed, kind, key, hook, x * (1 + turn), *[x] * (kind == "_forward_hooks"))
                    after = [_stored(memo[id(layer)]) for layer in reached]
                except Exception as error:
                    found |= dict.fromkeys(reached, f"{_failed(hook, error)}; it belongs to {owner}")
                    continue
                wrote = f"its weight or bias is written by a hook of {owner}, {_name(hook)}: run it once and remove it"
                changed = [one for one, *states in zip(reached, before, after, strict=True) if _changed(*states)]
                # A layer whose hook writes other layers keeps the hook, and thus its own weight, which the hook may
                # also write.
                found |= dict.fromkeys([*changed, module] if changed and not around else changed, wrote)
    return found


def may_write(hook: Any) -> bool:
    """Return whether the code of a hook names an object through which it could write a weight."""
    if isinstance(hook, WEIGHT_HOOKS):
        return False
    names: set[str] = set()
    reached: dict[int, Any] = {id(hook): hook}
    size = 0
    while size != (size := len(names) + len(reached)):
        for value in list(reached.values()):
            if isinstance(value, FunctionType):
                names.update(names_of(value.__code__))
            for part in _code_of(value, names):
                reached.setdefault(id(part), part)
    opaque = any(callable(part) and not _is_known(part) for part in reached.values())
    parameter = any(isinstance(part, nn.Parameter) for part in reached.values())
    return opaque or parameter or any(name in _WHOLE or any(part in name for part in _PARTS) for name in names)


def _writing_methods(kind: type) -> Iterator[tuple[FunctionType, set[str]]]:
    """Yield the functions that a class's forward runs and that write weights, with the names of the weights' owners."""
    methods: dict[str, Any] = {
        name: inspect.unwrap(value)
        for base in reversed(kind.__mro__)
        for name, value in vars(base).items()
        if base.__module__.partition(".")[0] != "torch" and isinstance(value, FunctionType)
    }
    names, size = {"forward"}, 0
    while size != (size := len(names)):
        for name in names & methods.keys():
            names |= set(names_of(methods[name].__code__))
    for name in sorted(names & methods.keys()):
        code = methods[name].__code__
        # Writes to the module's own weight do not affect layers.
        if owners := _writes(code) - set(code.co_varnames[:1]):
            yield methods[name], owners


def _writes(code: CodeType) -> set[str]:
    """Return the names of objects whose ``weight`` or ``bias`` code assigns, or changes by an in-place method."""
    found: set[str] = set()
    owners: dict[str, str] = {}
    last, owner = "", ""  # the name loaded last, and the owner of the weight loaded last
    listed = looped = False  # whether parameters were listed last, and whether the loop variables over them follow
    for op in dis.get_instructions(code):
        name = str(op.argval)
        if op.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if owner and name.endswith("_") and not name.endswith("__"):
                found.add(owner)
            owner = last if name in _NAMES else owner if name == "data" else ""
            last, listed = name, name in _LISTS
        elif op.opname == "STORE_ATTR":
            if name in _NAMES or (owner and name == "data"):
                found.add(last if name in _NAMES else owner)
            owner = ""
        elif op.opname == "STORE_FAST":
            owners[name], owner = _LISTS[0] if looped else owner, ""
        elif op.opname == "GET_ITER":
            looped, listed = listed, False
        elif op.opname not in (*_NO_CODE, "FOR_ITER", "UNPACK_SEQUENCE"):
            owner, last = (owners.get(name, ""), name) if op.opname.startswith("LOAD_FAST") else ("", "")
            looped = False
    return found.union(*(_writes(const) for const in code.co_consts if isinstance(const, CodeType)))


def _code_of(value: Any, names: set[str]) -> Iterator[Any]:
    """Yield what code that reaches ``value`` can run or change, if it uses ``names``."""
    if isinstance(value, FunctionType | MethodType) or type(value).__module__ == "functools":
        yield from held(value)
    elif isinstance(value, list | tuple | set | dict):
        yield from (part for part in held(value) if callable(part))
    elif isinstance(value, ModuleType):
        functions = (vars(value)[name] for name in names if isinstance(vars(value).get(name), FunctionType))
        yield from (function for function in functions if not is_of_torch(function))
    elif hasattr(value, "__dict__") and not isinstance(value, type | Tensor):
        yield from (part for name, part in vars(value).items() if name in names)
        for base in type(value).__mro__:
            if base.__module__.partition(".")[0] not in ("torch", "builtins"):
                methods = (vars(base)[name] for name in (*names, "__call__") if name in vars(base))
                yield from (method for method in methods if isinstance(method, FunctionType | property))
        if isinstance(value, property):
            yield value.fget


def _is_known(value: Any) -> bool:
    """Return whether the names in ``value`` determine the effect of calling it."""
    if isinstance(value, FunctionType | MethodType | BuiltinMethodType | type | nn.Module | Tensor):
        return True
    return type(value).__module__ == "functools" or isinstance(vars(type(value)).get("__call__"), FunctionType)


def names_of(code: CodeType) -> Iterator[str]:
    """Yield the names of variables, attributes and modules that code uses, including nested functions."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from names_of(const)
        elif isinstance(const, str) and const.isidentifier():
            yield const


def _call(module: Any, kind: str, key: int, hook: Any, x: Tensor, *output: Any) -> Any:
    with torch.no_grad():
        if key in getattr(module, f"{kind}_with_kwargs"):
            return hook(module, (x,), {}, *output)
        return hook(module, (x,), *output)


def _disturb(layer: nn.Module) -> None:
    """Give the parameters of ``layer`` values with other signs, magnitudes and order."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu")
            value.data = value.data * -3 + noise.to(value)


def _stored(layer: nn.Module) -> dict[str, tuple[Any, Tensor]]:
    """Return the tensors in which ``layer`` stores its weight and bias, and their values."""
    found: dict[str, tuple[Any, Tensor]] = {}
    for name in _NAMES:
        value = getattr(layer, name, None)
        if isinstance(value, Tensor):
            places = vars(layer), layer._parameters, layer._buffers
            stored = next((place[name] for place in places if name in place), None)
            found[name] = stored, value.detach().clone()
    return found


def _changed(before: dict[str, tuple[Any, Tensor]], after: dict[str, tuple[Any, Tensor]]) -> list[str]:
    """Return the names of tensors that were replaced, added, removed or written."""
    none = (None, None)
    pairs = {name: (before.get(name, none), after.get(name, none)) for name in _NAMES}
    return [name for name, ((a, old), (b, new)) in pairs.items() if a is not b or not _same(old, new)]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _failed(hook: Any, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return (
        f"it is not known whether a hook, {_name(hook)}, writes its weight: on a random input it raised "
        f"{type(error).__name__} ({first})"
    )


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _input_of(layer: Any) -> Tensor:
    """Return a random input of a container that begins with ``layer``."""
    kind = kind_of(layer)
    assert kind is not None
    shape = (*kind.float_input_shape(layer, 1)[:2], *[16] * kind.dims)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
