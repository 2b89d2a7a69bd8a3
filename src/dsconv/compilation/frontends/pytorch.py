"""The front end of PyTorch's modules: from a model to a graph of functional operators, by :mod:`torch.export`."""

import inspect
import operator
import os
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsconv.compilation.frontends.constants import fold_constants
from dsconv.compilation.frontends.state import capturable
from dsconv.compilation.layouts import in_layout_of
from dsconv.compilation.operators import functional, operator_of
from dsconv.errors import ModelError
from dsconv.ops import simulated_whole

_aten = torch.ops.aten


def takes(model: nn.Module) -> bool:
    """Tell whether this front end is for ``model``: it is for every module."""
    return isinstance(model, nn.Module)


def graph(model: nn.Module, x: Tensor, any_batch: bool) -> fx.GraphModule:
    """Return the graph of ``model`` for inputs of the size and layout of ``x``, and any batch or that of ``x`` alone.

    Raises:
        ModelError: :mod:`torch.export` cannot capture it.
    """
    try:
        with torch.no_grad(), simulated_whole():
            program = exported(model, x, any_batch)
            module = program.module(check_guards=False)
            # PyTorch's own way to functional operators takes three times as long as the capture.
            if not isinstance(module, fx.GraphModule) or not make_functional(module.graph):
                module = program.run_decompositions({}).module(check_guards=False)
                assert isinstance(module, fx.GraphModule)
                _join_batchnorms(module.graph)
    except Exception as error:
        if unknown := unknown_output(error):
            raise ModelError(unknown) from error
        raise ModelError(
            f"the model cannot be captured by torch.export for an input of {tuple(x.shape)}{reason(error)}"
        ) from error
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.target is _aten.view.default:  # of a tensor that has another layout than in the trace, it needs a copy
            node.target = _aten.reshape.default
    with torch.no_grad():
        fold_constants(module)
    return module


def exported(model: nn.Module, x: Tensor, any_batch: bool = True) -> torch.export.ExportedProgram:
    """Program of ``model`` for inputs of the size and memory layout of ``x``, and any batch or that of ``x`` alone.

    Raises:
        Exception: whatever PyTorch raises; :func:`needs_one_batch` tells some of it from the rest.
    """
    # A batch of one would be taken for a constant.
    example = in_layout_of(x, 2 if any_batch else len(x))
    batch = {0: torch.export.Dim("batch", min=1, max=1 << 16)} if any_batch else None
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    # ``forward(*args)`` has its inputs as one tuple.
    shapes: tuple[Any, ...] = ((batch,),) if first is not None and first.kind is first.VAR_POSITIONAL else (batch,)
    with torch.no_grad(), capturable(model, tuple(x.shape[1:])) as made:
        return torch.export.export(made, (example,), dynamic_shapes=shapes, strict=False)


def reason(error: BaseException) -> str:
    """`` at LINE of the model's code: WHY`` of what :func:`exported` raised, as far as it is known."""
    ours = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
    why = str(error).strip().split("\n\n")[0]
    for raised in (error, error.__cause__, error.__context__):
        frames = [] if raised is None else traceback.extract_tb(raised.__traceback__)
        for frame in reversed(frames):
            if not frame.filename.startswith((*ours, "<")):
                return f" at {frame.filename}:{frame.lineno}, {frame.line}: {why}"
    return f": {why}"


def needs_one_batch(error: BaseException) -> bool:
    """Whether :func:`exported` failed since the model takes the batch size as a number."""
    return "Constraints violated" in str(error) or (isinstance(error, TypeError) and "SymInt" in str(error))


def unknown_output(error: BaseException) -> str | None:
    """Return what to do where :mod:`torch.export` raised ``error`` for the type of a model's output, else None."""
    cause: BaseException | None = error
    while cause is not None:
        if found := re.search(r"<class '([^']+)'> in output", str(cause)):
            kind = found[1].rpartition(".")[2]
            return (
                f"the model returns {kind}, a class that torch.export does not know: if it is a dataclass, call "
                f"torch.export.register_dataclass({kind}) before; or return tensors, tuples or dictionaries"
            )
        cause = cause.__cause__
    return None


def make_functional(graph: fx.Graph) -> bool:
    """Replace what changes tensors in place by what returns new ones, and drop what does nothing in inference.

    Returns:
        Whether it was done: it is not where ``graph`` holds another operator than those of common networks, or where
        another tensor may see a change.
    """
    for node in list(graph.nodes):
        is_input = operator_of(node).is_input
        if is_input is not None and is_input(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if not all(functional(node) or operator_of(node).returns for node in nodes):
        return False
    if any(node.target is _aten.batch_norm.default and node.args[5] for node in nodes):
        return False  # it is in training mode, and changes its statistics
    # The node whose memory each may share.
    shared: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if functional(node):
            changed = node.args[0]
            if changed not in shared or list(shared.values()).count(shared[changed]) != 1:
                return False  # it is not the only one, or the model's own
            shared[node] = shared.pop(changed)
        elif operator_of(node).returns == "new":
            shared[node] = node
        elif operator_of(node).returns == "view" and node.args[0] in shared:
            shared[node] = shared[node.args[0]]
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in nodes:
        if twin := functional(node):
            changed = node.args[0]
            node.target = twin
            changed.replace_all_uses_with(node, delete_user_cb=lambda user, of=node: order[user] > order[of])
        elif node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    return True


def _join_batchnorms(graph: fx.Graph) -> None:
    """What decompositions made of a BatchNorm that is not in training mode is one operator again."""
    for node in list(graph.nodes):
        read = node.args[0] if node.target is operator.getitem else None
        if isinstance(read, fx.Node) and read.target is _aten._native_batch_norm_legit_no_training.default:
            *given, momentum, eps = read.args
            with graph.inserting_before(node):
                whole = graph.call_function(_aten.batch_norm.default, (*given, False, momentum, eps, False))
            whole.meta = dict(node.meta)
            node.replace_all_uses_with(whole)
            graph.erase_node(node)
            if not read.users:
                graph.erase_node(read)
