"""Front end for PyTorch modules: converts a model to a graph of functional operators, by :mod:`torch.export`."""

import operator
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dsconv.compilation.frontends.constants import fold_constants
from dsconv.compilation.frontends.graph import Graph, returned_in, structure_of
from dsconv.compilation.frontends.state import Capturable
from dsconv.compilation.layouts import zeros_like
from dsconv.compilation.operators import functional, operator_of
from dsconv.data.inputs import Inputs
from dsconv.errors import ModelError, one_line
from dsconv.ops import simulated_whole

_aten = torch.ops.aten


def takes(model: nn.Module) -> bool:
    """Return whether this front end supports ``model``: it supports every module."""
    return isinstance(model, nn.Module)


def graph(model: nn.Module, inputs: Inputs, any_batch: bool) -> Graph:
    """Return the graph of ``model`` for sizes and layouts of ``inputs``, and any batch size or theirs alone.

    Raises:
        ModelError: :mod:`torch.export` cannot capture it.
    """
    try:
        with torch.no_grad(), simulated_whole(), warnings.catch_warnings():
            # PyTorch warns of its own use of a deprecated feature.
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            captured = exported(model, inputs, any_batch)
            module = captured.program.module(check_guards=False)
            # PyTorch's own functionalization takes three times as long as the capture.
            if not isinstance(module, fx.GraphModule) or not make_functional(module.graph):
                module = captured.program.run_decompositions({}).module(check_guards=False)
                assert isinstance(module, fx.GraphModule)
                _join_batchnorms(module.graph)
    except ModelError:
        raise
    except Exception as error:
        shapes = " and ".join(str(tuple(x.shape)) for x in inputs.tensors)
        raise ModelError(
            f"the model cannot be captured by torch.export for an input of {shapes}{reason(error)}"
        ) from error
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.target is _aten.view.default:  # for a tensor with another layout than in the trace, it needs a copy
            node.target = _aten.reshape.default
    with torch.no_grad():
        fold_constants(module)
    return Graph(module, captured.structure)


class Exported(NamedTuple):
    """Program that takes the tensors of a model's arguments one by one and returns a tuple.

    Attributes:
        program: its names of modules are those of the model.
        structure: converts the tuple to the model's output.
        output: output of the model, with tensors of the trace.
    """

    program: torch.export.ExportedProgram
    structure: Callable[[Sequence[Any]], Any]
    output: Any


def exported(model: nn.Module, inputs: Inputs, any_batch: bool = True) -> Exported:
    """Export ``model`` for sizes and memory layouts of ``inputs``, and any batch size or theirs alone.

    Raises:
        Exception: any error of PyTorch; :func:`needs_one_batch` identifies one cause.
    """
    # A batch of one would be treated as a constant.
    example = zeros_like(inputs, 2 if any_batch else len(inputs))
    batch = {0: torch.export.Dim("batch", min=1, max=1 << 16)} if any_batch else None
    shapes = tuple(batch if batched else None for batched in inputs.batched)
    with torch.no_grad():
        capturable = Capturable(model, inputs)
        # Not by hooks of the model: hooks after a failed forward do not run within a capture.
        flat = Flat(capturable.model, example, capturable.traced)
        # ``forward(*tensors)`` has its inputs as one tuple.
        program = torch.export.export(flat, tuple(example.tensors), dynamic_shapes=(shapes,), strict=False)
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        for key, (name, *kind) in stack.items():
            stack[key] = ("" if name == "model" else name.removeprefix("model."), *kind)
    return Exported(program, structure_of(flat.latest.output), flat.latest.output)


class Flat(nn.Module):
    """Model that takes tensors and returns a tuple, whatever the classes of the original arguments and outputs.

    Args:
        model: its parameters get names that begin with ``model.``.
        inputs: provide the arguments other than tensors.
        around: context manager for each call.

    Attributes:
        latest: the output of the latest call, if no capture resets it.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ):
        super().__init__()
        self.model, self.inputs, self.around = model, inputs, around
        self.training = model.training  # which exporters reset, in the model too
        self.latest = SimpleNamespace(output=None)

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        args, kwargs = self.inputs.arguments(tensors)
        with self.around():
            self.latest.output = self.model(*args, **kwargs)
        return tuple(returned_in(self.latest.output))


def reason(error: BaseException) -> str:
    """Return `` at LINE of the model's code: WHY`` for an error of :func:`exported`, as far as known."""
    ours = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
    why = one_line(str(error).strip().split("\n\n")[0].replace("\n", " "), 600)
    for raised in (error, error.__cause__, error.__context__):
        frames = [] if raised is None else traceback.extract_tb(raised.__traceback__)
        for frame in reversed(frames):
            if not frame.filename.startswith((*ours, "<")):
                return f" at {frame.filename}:{frame.lineno}, {frame.line}: {why}"
    return f": {why}"


def needs_one_batch(error: BaseException) -> bool:
    """Return whether :func:`exported` failed because the model uses the batch size as a number."""
    return "Constraints violated" in str(error) or (isinstance(error, TypeError) and "SymInt" in str(error))


def make_functional(graph: fx.Graph) -> bool:
    """Replace in-place operators by functional ones, and remove those without effect in inference.

    Returns:
        Whether this was done: not if ``graph`` has an operator that common networks do not use, or if the change may be
        visible in another tensor.
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
                return False  # there are other tensors, or it belongs to the model
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
    """Replace the decomposition of a BatchNorm that is not in training mode by one operator."""
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
