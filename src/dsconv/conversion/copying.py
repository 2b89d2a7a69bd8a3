"""Copies of models that never run modules of the original.

``copy.deepcopy`` does not copy functions. A hook, a forward that replaces the one of its class or a lambda in an
attribute would keep references to modules of the original in its closure, its defaults or a global variable. This
module creates such functions anew for the copy, with references to its modules.
"""

import copy
import dis
import os
import sysconfig
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache, partial
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsconv.errors import ModelError
from dsconv.layers.kinds import CALLED

Model = TypeVar("Model", bound=nn.Module)

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Attribute in which a callable made by torch.compile stores the original one.
_COMPILED = "_torchdynamo_orig_callable"
# Global variables of installed packages do not refer to the user's model.
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_TORCH = os.path.dirname(torch.__file__) + os.sep
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Types without references, or without references to parts of one model.
_ATOMS = (Tensor, type, ModuleType, str, bytes, int, float, complex, type(None))


def copied(model: Model, memo: dict[int, Any] | None = None, *, isolate: bool = False) -> Model:
    """Return a deep copy of ``model`` whose functions refer to the modules of the copy.

    Args:
        model: the model, which is unchanged.
        memo: as in :func:`copy.deepcopy`: maps the ``id`` of an object that is not copied to its replacement.
        isolate: also copy the containers and objects referenced by functions, so that calling them has no side effects.

    Raises:
        ModelError: an object that cannot be copied refers to modules of ``model``, so that the copy would run them.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> net.forward = lambda x, linear=net[0]: linear(x)
    >>> made = copied(net)
    >>> made.forward.__defaults__[0] is made[0]
    True
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            # Left by hooks that compute a weight, such as weight_norm; PyTorch refuses to copy such tensors.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    carrier = _Carrier(memo, isolate)
    result = copy.deepcopy(model, memo)
    if isolate:
        carrier.carry(result)
    elif carrier.reaches(_attributes(result)):
        carrier.carry(result)
        _check(result, carrier)
    return result


def replaced(module: nn.Module) -> str | None:
    """Return the name of a method that an instance attribute of ``module`` replaces in its calls, None without one.

    The method of the class itself, bound or wrapped by ``torch.compile``, does not count.
    """
    for name in CALLED:
        value = vars(module).get(name)
        value = getattr(value, _COMPILED, value)
        own = isinstance(value, MethodType) and value.__self__ is module
        if value is not None and not (own and value.__func__ is getattr(type(module), name, None)):
            return name
    return None


class _Carrier:
    """Rebinds functions of a copy to the copy's parts. ``memo`` is that of :func:`copy.deepcopy`, before it runs."""

    def __init__(self, memo: dict[int, Any], isolate: bool):
        self.memo, self.isolate = memo, isolate
        # Only the hooks of these modules are handled here; the caller made the rest.
        self._given = {id(value): value for value in memo.values() if isinstance(value, nn.Module)}
        self._made: dict[int, tuple[Any, Any]] = {}
        self._cells: dict[int, CellType] = {}
        self._originals: set[int] = set()
        self._copies: set[int] = set()
        self._known = -1

    def reaches(
        self, value: Any, kinds: type | tuple[type, ...] = (nn.Module, Tensor), beside: Iterable[Any] = ()
    ) -> bool:
        """Return whether ``value`` refers to a module or tensor of the original, at any depth, except in ``beside``."""
        self._look()
        seen = {id(one): one for one in beside}
        stack = [value]
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            if id(value) in self._originals and isinstance(value, kinds):
                return True
            if isinstance(value, MethodType) and self._is_foreign(value):
                return True
            seen[id(value)] = value
            stack.extend(self.attributes(value).values() if id(value) in self._given else held(value))
        return False

    def attributes(self, module: nn.Module) -> dict[str, Any]:
        """Return what may refer to modules of the original: attributes, or the hooks of modules from ``memo``."""
        names = HOOKS if id(module) in self._given else vars(module)
        return {name: vars(module)[name] for name in names if name != "_modules"}

    def carry(self, value: Any) -> Any:
        """Return the replacement of ``value``, a part of the copy; containers and objects are changed in place."""
        result = self._function(value)
        work, seen = [result], dict[int, Any]()
        while work:
            holder = work.pop()
            if id(holder) in seen or not self._is_copy(holder):
                continue
            seen[id(holder)] = holder
            fields: Any = holder if isinstance(holder, dict | list) else getattr(holder, "__dict__", {})
            for key, one in list(enumerate(fields) if isinstance(fields, list) else fields.items()):
                now = self._function(one)
                if now is not one:
                    fields[key] = now
                work.append(now)
                work.extend(held(now) if isinstance(now, tuple | partial | MethodType) else ())
        return result

    def _look(self) -> None:
        if self._known == len(self.memo):
            return
        self._known = len(self.memo)
        parts = [(key, value) for key, value in self.memo.items() if key != id(value)]
        self._originals = {key for key, value in parts if isinstance(value, nn.Module | Tensor)}
        self._copies = {id(value) for _, value in parts}

    def _is_copy(self, value: Any) -> bool:
        self._look()
        return id(value) in self._copies

    def _ours(self, value: Any) -> Any:
        """Return the copy's counterpart of ``value``, to which a function refers."""
        if self.isolate and not self.reaches(value):
            try:
                return self.carry(copy.deepcopy(value, self.memo))
            except Exception:  # a lock or a file: it is shared
                return value
        return self.carry(copy.deepcopy(value, self.memo))

    def _is_foreign(self, method: MethodType) -> bool:
        """Return whether this is a method of the class of a module that was replaced by another one."""
        owner, name = method.__self__, getattr(method.__func__, "__name__", "")
        if id(owner) not in self._given or isinstance(method.__func__, MethodType):
            return False
        return is_of_torch(method.__func__) and getattr(type(owner), name, None) is not method.__func__

    def _is_ours(self, value: Any) -> bool:
        """Return whether the copy has its own counterpart of ``value``, to which a function refers."""
        if self.isolate and not isinstance(value, _ATOMS):
            return not (isinstance(value, FunctionType) and _is_installed(value))
        return self.reaches(value)

    def _function(self, value: Any) -> Any:
        """Return the replacement of a function or of an immutable object with functions; other values unchanged."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        result = value
        if isinstance(value, FunctionType):
            return self._remade(value) if self._is_ours(value) else value
        if isinstance(value, MethodType) and self._is_foreign(value):
            result = getattr(value.__self__, value.__func__.__name__, value)
        elif isinstance(value, MethodType):
            function = self._function(value.__func__)
            result = value if function is value.__func__ else MethodType(function, value.__self__)
        elif type(value) is partial:
            parts = (value.func, *value.args, *value.keywords.values(), *vars(value).values())
            new = [self._function(part) for part in parts]
            if any(a is not b for a, b in zip(new, parts, strict=True)):
                first, last = 1 + len(value.args), 1 + len(value.args) + len(value.keywords)
                result = partial(new[0], *new[1:first], **dict(zip(value.keywords, new[first:last], strict=True)))
                vars(result).update(zip(vars(value), new[last:], strict=True))
        elif type(value) is tuple:
            items = tuple(map(self._function, value))
            result = items if any(a is not b for a, b in zip(items, value, strict=True)) else value
        elif isinstance(value, weakref.ref):
            target = value()
            if id(target) in self.memo and type(value) is weakref.ref:
                result = weakref.ref(self.memo[id(target)])
        self._made[id(value)] = value, result
        return result

    def _remade(self, function: FunctionType) -> Any:
        if compiled := vars(function).get(_COMPILED):
            return self._ours(compiled)
        cells = function.__closure__ or ()
        # A cell shared by several functions stays shared.
        ours = [self._cells.setdefault(id(cell), CellType()) if self._changes(cell) else cell for cell in cells]
        names = [name for name, value in _globals(function) if self._is_ours(value)]
        namespace = _Overlay(function.__globals__) if names else function.__globals__
        made = FunctionType(function.__code__, namespace, function.__name__, None, tuple(ours) or None)
        self._made[id(function)] = function, made
        for attribute in ("__doc__", "__module__", "__qualname__", "__annotations__"):
            setattr(made, attribute, getattr(function, attribute))
        for name in names:
            namespace[name] = self._ours(function.__globals__[name])
        for cell, own in zip(cells, ours, strict=True):
            if own is not cell and _is_empty(own):
                own.cell_contents = self._ours(cell.cell_contents)

        def kept(value: Any) -> Any:
            return self._ours(value) if self._is_ours(value) else value

        made.__defaults__ = None if function.__defaults__ is None else tuple(map(kept, function.__defaults__))
        by_name = function.__kwdefaults__
        made.__kwdefaults__ = None if by_name is None else {name: kept(value) for name, value in by_name.items()}
        vars(made).update({name: kept(value) for name, value in vars(function).items()})
        return made

    def _changes(self, cell: CellType) -> bool:
        return not _is_empty(cell) and self._is_ours(cell.cell_contents)


class _Overlay(dict[str, Any]):
    """Global variables of a function: some are its own, and the others are always those of its module."""

    def __init__(self, below: dict[str, Any]):
        super().__init__()
        self._below = below

    def __missing__(self, name: str) -> Any:
        return self._below[name]


def held(value: Any) -> Iterable[Any]:
    """Return the objects that ``value`` refers to and that calling it or an attribute of it may reach."""
    if isinstance(value, _ATOMS):
        return ()
    if isinstance(value, FunctionType):
        if compiled := vars(value).get(_COMPILED):
            return (compiled,)
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return *cells, *defaults, *vars(value).values(), *(used for _, used in _globals(value))
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, BuiltinMethodType):
        return (value.__self__,)
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values(), *vars(value).values()
    if isinstance(value, weakref.ref):
        return (value(),)
    inside = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        return *value, *value.values(), *inside
    if isinstance(value, _CONTAINERS):
        return *value, *inside
    return inside


def _attributes(model: nn.Module) -> list[Any]:
    """Return the model and the functions that its classes define."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if not is_torch_class(base)}
    # Effects of methods on other objects are unknown: only functions that refer to modules count among these.
    return [model, *(_Method(value) for base in classes for _, value in _methods(base))]


class _Method:
    """A function of a class and its references: modules, and objects that run them."""

    def __init__(self, function: Any):
        parts, seen = [function], dict[int, Any]()
        while parts:
            part = parts.pop()
            if id(part) in seen:
                continue
            seen[id(part)] = part
            if _runs(part) or isinstance(part, _CONTAINERS):
                parts.extend(held(part))
        self.modules = [part for part in seen.values() if isinstance(part, nn.Module)]


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield names and functions that a user's class defines, except those that construct its instances."""
    for name, value in vars(kind).items() if not is_torch_class(kind) else ():
        if _runs(value) and name not in ("__init__", "__new__"):
            yield name, value


def _runs(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | partial)


def is_torch_class(kind: type) -> bool:
    """Return whether a class belongs to PyTorch or Python."""
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _check(model: nn.Module, carrier: _Carrier) -> None:
    """Raise ModelError if the copy ``model`` still refers to modules of the original."""
    modules = list(model.modules())
    for name, module in model.named_modules():
        owner = f"module {name!r} ({type(module).__name__})" if name else f"model {type(module).__name__}"
        for attribute, value in carrier.attributes(module).items():
            if carrier.reaches(value, nn.Module, beside=modules):
                raise ModelError(
                    f"{owner}: its attribute {attribute!r} holds modules of the model in a way that cannot be copied"
                    f"{_place(value)}, so that a copy would run the layers of the original: write it as a method of a "
                    "class that gets the module as self"
                )
        for base in type(module).__mro__:
            for attribute, value in _methods(base):
                if carrier.reaches(_Method(value).modules, nn.Module):
                    raise ModelError(
                        f"{owner}: {base.__name__}.{attribute} holds modules of this one model{_place(value)}, so that "
                        "a copy would run the layers of the original: use self in it, or replace the method of the "
                        "instance: module.forward = types.MethodType(function, module)"
                    )


def _place(value: Any) -> str:
    code = getattr(getattr(value, "func", value), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if isinstance(code, CodeType) else ""


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def is_of_torch(function: Any) -> bool:
    """Return whether PyTorch defines a function, as opposed to a patch of its classes."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH)


def _is_installed(function: FunctionType) -> bool:
    return function.__code__.co_filename.startswith(_INSTALLED)


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the global variables that a user's function reads."""
    if _is_installed(function):
        return
    for name in _names_of_globals(function.__code__):
        try:
            yield name, function.__globals__[name]
        except KeyError:  # a builtin, or not defined yet
            continue


@cache
def _names_of_globals(code: CodeType) -> tuple[str, ...]:
    names = [op.argval for op in dis.get_instructions(code) if op.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    nested = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names_of_globals(const)]
    return tuple(dict.fromkeys([*names, *nested]))
