"""Graphs of modules traced by :mod:`torch.fx`, without changing the modules."""

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsconv.conversion.copying import copied
from dsconv.layers.stand_in import StandIn

_NOT_THE_USERS = (os.path.dirname(torch.__file__) + os.sep, __file__)


class Traced(fx.Tracer):
    """Graph of a module, in which modules selected by ``is_leaf`` are called and not traced into.

    The same holds for the functions ``called``, if the code of a module has its own name for them.

    Attributes:
        graph: the graph. ``meta["place"]`` of a node is the line of code that created it.
        root: the traced copy of the module, with the same tensors.
        read: ids of the tensors that are read without a call of their owner.

    Raises:
        Exception: any error that forward raises for symbols; :func:`line_of` gives the line.
    """

    def __init__(
        self,
        module: nn.Module,
        is_leaf: Callable[[nn.Module, str], bool],
        called: Collection[Callable[..., Any]] = (),
    ):
        super().__init__(autowrap_functions=tuple(called))
        self.is_leaf, self.read = is_leaf, set[int]()
        # Everything that forward may change is copied, except layers and tensors, to keep symbols out of the model.
        memo: dict[int, Any] = {}
        for name, part in module.named_modules():
            if part is not module and self.is_leaf_module(part, name):
                memo[id(part)] = part
            for value in (*vars(part).values(), *part._parameters.values(), *part._buffers.values()):
                if isinstance(value, Tensor):
                    memo[id(value)] = value
        twin = copied(module, memo, isolate=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Was not able to add assertion")
            self.graph = self.trace(twin)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """Create symbols for the first argument and those without a default, whatever the signature of forward."""
        assert isinstance(self.root, nn.Module)
        positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        first, *others = inspect.signature(self.root.forward).parameters.values()
        names = [first.name, *(p.name for p in others if p.kind in positional and p.default is p.empty)]
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return lambda root, *x: root.forward(*x), [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        if kind == "call_function" and any(isinstance(value, StandIn) for value in (*args, *kwargs.values())):
            return StandIn.__torch_function__(target, (), args, kwargs)
        made: Any = super().create_proxy(kind, target, args, kwargs, *more, **options)
        # Code may iterate over the chunks of a tensor, whose number is known.
        if getattr(target, "__name__", target) == "chunk":
            count = args[1] if len(args) > 1 else kwargs.get("chunks")
            return tuple(made[i] for i in range(count)) if isinstance(count, int) else made
        return made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            frame = frame.f_back
        node.meta["place"] = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return node


def line_of(error: BaseException) -> str:
    """Return `` at FILE:LINE, `CODE` ``: the innermost line of ``error`` outside of PyTorch and this file."""
    ours = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return f" at {ours[-1].filename}:{ours[-1].lineno}, `{ours[-1].line}`" if ours else ""


def reason_of(error: BaseException) -> str:
    """Return the class and the first sentence of ``error``."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
