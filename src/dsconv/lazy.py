"""Lazy imports of a package's names, so that code without computations does not wait for PyTorch."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` (PEP 562) of a package that imports its names and modules at first use.

    Args:
        package: its ``__name__``.
        homes: maps modules to the names that the package has from each.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def getattr_(name: str) -> Any:
        if name in home_of:
            value = getattr(importlib.import_module(home_of[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        module = f"{package}.{name}"
        if not name.startswith("__"):
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def dir_() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return getattr_, dir_


def import_with(triggers: Sequence[str], module: str) -> None:
    """Import ``module`` now if the first of ``triggers`` is imported already, otherwise as soon as one of them is.

    While a trigger is being imported, ``module`` waits for it, so that it may depend on all of them.
    """
    if triggers[0] in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _After(triggers, module))


class _After:
    """Finds ``triggers`` as the other finders do; imports ``module`` when none of them is being executed any more."""

    def __init__(self, triggers: Sequence[str], module: str):
        self.triggers, self.module, self.asking, self.executing = triggers, module, False, 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.triggers or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(executed: ModuleType) -> None:
            self.executing += 1
            try:
                execute(executed)
            finally:
                self.executing -= 1
            if not self.executing and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(self.module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign, assignment]
        return spec
