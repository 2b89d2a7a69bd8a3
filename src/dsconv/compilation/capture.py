"""From a model to a graph of functional ATen and ``dsconv`` operators."""

import inspect
import operator
import os
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsconv.compilation.state import capturable
from dsconv.errors import ModelError

_aten, _dsconv = torch.ops.aten, torch.ops.dsconv
_IN_PLACE = {
    getattr(_aten, f"{name}_").default: getattr(_aten, name).default
    for name in ("relu", "relu6", "hardtanh", "leaky_relu", "silu", "hardswish", "hardsigmoid", "sigmoid")
} | {_aten.add_.Tensor: _aten.add.Tensor, _aten.mul_.Tensor: _aten.mul.Tensor}
# What returns a tensor of its own,
_FRESH = (
    *_IN_PLACE.values(),
    _dsconv.conv2d.default,
    _dsconv.linear.default,
    _aten.cat.default,
    _aten.max_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.mean.dim,
    _aten.softmax.int,
    _aten.batch_norm.default,
)
# and what may return a view of its input.
_VIEWS = (
    _aten.flatten.using_ints,
    _aten.reshape.default,
    _aten.view.default,
    _aten.contiguous.default,
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.to.dtype,
)
_NEITHER = (_aten.sym_size.int, _aten._assert_tensor_metadata.default)


def capture(model: nn.Module, x: Tensor, any_batch: bool = True) -> fx.GraphModule:
    """Graph of ``model`` for inputs of the size and memory layout of ``x``, and any batch or that of ``x`` alone.

    Raises:
        ModelError: :mod:`torch.export` cannot capture it.
    """
    try:
        with torch.no_grad():
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
    ours = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
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


def order_in_memory(x: Tensor) -> tuple[int, ...]:
    """Dimensions of ``x``, those with the largest strides first; images come one after another where there is but one.

    >>> order_in_memory(torch.zeros(1, 3, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    """
    strides = x.stride()
    order = sorted(range(len(x) == 1, len(strides)), key=lambda dim: -strides[dim])
    return (0, *order) if len(x) == 1 else tuple(order)


def in_layout_of(x: Tensor, images: int) -> Tensor:
    """Zeros for so many images, whose values lie in the order of those of ``x``."""
    order, sizes = order_in_memory(x), [images, *x.shape[1:]]
    zeros = torch.zeros([sizes[dim] for dim in order], dtype=x.dtype, device=x.device)
    return zeros.permute([order.index(dim) for dim in range(x.dim())])


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
        if _does_nothing(node):  # it returns its very input
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if not all(node.target in (*_IN_PLACE, *_FRESH, *_VIEWS, *_NEITHER) for node in nodes):
        return False
    if any(node.target is _aten.batch_norm.default and node.args[5] for node in nodes):
        return False  # it is in training mode, and changes its statistics
    # The node whose memory each may share.
    shared: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.target in _VIEWS and node.args[0] in shared:
            shared[node] = shared[node.args[0]]
        elif node.target in _IN_PLACE:
            changed = node.args[0]
            if changed not in shared or list(shared.values()).count(shared[changed]) != 1:
                return False  # it is not the only one, or the model's own
            shared[node] = shared.pop(changed)
        elif node.target in _FRESH:
            shared[node] = node
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in nodes:
        if node.target in _IN_PLACE:
            changed = node.args[0]
            node.target = _IN_PLACE[node.target]
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


def _does_nothing(node: fx.Node) -> bool:
    if node.target in (_aten.dropout.default, _aten.feature_dropout.default):
        return not node.args[2]
    made: Any = node.meta.get("val")
    return node.target is _aten.to.dtype and len(node.args) == 2 and made.dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]
