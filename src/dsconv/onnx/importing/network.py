"""Imported networks: graphs of PyTorch's functions and modules, and their description as plain data in files."""

import copy
import json
import keyword
import math
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsconv.errors import ModelError, one_line
from dsconv.onnx.importing.functions import FUNCTIONS, NAMES
from dsconv.onnx.importing.modules import describe_module, made

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PART = re.compile(r"[A-Za-z0-9_]+")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class ImportedNetwork(fx.GraphModule):
    """Network imported by :func:`dsconv.from_onnx`. Its ``code`` shows the computation, and ``graph`` can be changed.

    Copies keep attributes and hooks, unlike those of other graph modules.
    """

    def recompile(self) -> Any:
        """Regenerate the code of the graph."""
        code = super().recompile()
        # PyTorch's own call wrapper prints to stderr on errors.
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code

    def __deepcopy__(self, memo: Any) -> "ImportedNetwork":
        result: Any = super().__deepcopy__(memo)
        for name, value in vars(self).items():
            if name not in vars(result) or name in _HOOKS:
                vars(result)[name] = copy.deepcopy(value, memo)
        made: ImportedNetwork = result
        return made


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return the description from which :func:`build` makes an imported network, without its weights, as plain data.

    ``model`` may be quantized: its original is described. None if it is not an imported network, or was changed to use
    other functions or modules.
    """
    if not isinstance(model, ImportedNetwork):
        return None
    nodes: list[Any] = []
    modules: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    try:
        for node in model.graph.nodes:
            target: Any = node.target
            match node.op:
                case "call_function":
                    target = NAMES[target]
                case "call_module":
                    modules[target] = describe_module(model.get_submodule(target))
                    if modules[target] is None:
                        return None
                case "get_attr":
                    value = model.get_buffer(target)
                    constants[target] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
                case "call_method":
                    return None
            arguments = {name: _plain(value) for name, value in node.kwargs.items()}
            nodes.append([node.op, node.name, target, [_plain(value) for value in node.args], arguments])
        described = {"nodes": nodes, "modules": modules, "constants": constants}
        # In the form in which it is read again.
        plain: dict[str, Any] = json.loads(json.dumps(described, allow_nan=False))
        return plain
    except (KeyError, AttributeError, TypeError, ValueError):
        return None


def build(described: dict[str, Any]) -> ImportedNetwork:
    """Return the network of a description, with arbitrary weights and constants.

    It contains only functions and modules of imported networks, and no text of the description is executed.

    Raises:
        ModelError: the description is not valid.
    """
    try:
        root, graph, known = nn.Module(), fx.Graph(), dict[str, fx.Node]()
        for name, (kind, values) in described["modules"].items():
            add(root, _checked(name), made(kind, values))
        for name, (dtype, shape) in described["constants"].items():
            add(root, _checked(name), torch.empty(shape, dtype=_DTYPES[dtype], device=torch.get_default_device()))
        for op, name, target, given, named in described["nodes"]:
            arguments = tuple(_values(value, known) for value in given)
            keywords = {_checked(key): _values(value, known) for key, value in named.items()}
            match op:
                case "placeholder":
                    if not target.isidentifier():
                        raise ValueError(f"{target!r} is not the name of an input")
                    target = _checked(target)
                case "call_function":
                    target = FUNCTIONS[target]
                case "call_module" | "get_attr":
                    target = _there(target, described["modules" if op == "call_module" else "constants"])
                case "output":
                    target = "output"
                case _:
                    raise ValueError(f"there are no nodes {op!r}")
            node = graph.create_node(op, target, arguments, keywords, name=_checked(name))
            known[name] = node
        graph.lint()
        network = ImportedNetwork(root, graph, "ImportedNetwork")
    except ModelError:
        raise
    except Exception as error:  # PyTorch may raise anything for invalid arguments
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ModelError(
            f"the file describes no network that dsconv can build ({reason}): get or write it again"
        ) from None
    return network.eval()


def add(root: nn.Module, name: str, part: "nn.Module | Tensor") -> None:
    """Add a module or a buffer to ``root`` under a dotted name, with parent modules as needed."""
    *path, last = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    if isinstance(part, nn.Module):
        root.add_module(last, part)
    else:
        root.register_buffer(last, part)


def _checked(name: str) -> str:
    """Return a valid name from a file; PyTorch writes such names into code."""
    parts = name.split(".")
    if not all(_PART.fullmatch(part) and not keyword.iskeyword(part) for part in parts):
        raise ValueError(f"{name!r} is not a valid name")
    return name


def _there(name: str, described: dict[str, Any]) -> str:
    if name not in described:
        raise ValueError(f"{name!r} is not described")
    return name


def _plain(value: Any) -> Any:
    """Return an argument of a node in JSON form."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case tuple() | list():
            return [_plain(part) for part in value]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{type(value).__name__} cannot be an argument of a node in a file")


def _values(value: Any, known: dict[str, fx.Node]) -> Any:
    match value:
        case {"node": str(name)}:
            return known[name]
        case {"dtype": str(name)}:
            return _DTYPES[name]
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case list():
            return [_values(part, known) for part in value]
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(f"{one_line(repr(value), 80)} is not a valid argument of a node")
