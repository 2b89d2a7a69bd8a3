"""Kinds of steps, one per file, with the compiler's knowledge of their operators; ``operator.py`` is the base.

A new kind of step is a new file here.
"""

import importlib
import pkgutil

from dsconv.compilation.operators.operator import (
    Operator,
    Step,
    activation_of,
    bits_of_pytorch,
    functional,
    only_user,
    operator_of,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Operator", "Step", "activation_of", "bits_of_pytorch", "functional", "only_user", "operator_of"]
