"""Rewrites a captured graph: what follows a convolution moves into it, what does nothing goes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dsconv.compilation.layouts import LAYOUT, in_one_format

_aten, _dsconv = torch.ops.aten, torch.ops.dsconv
INTEGER_OPERATORS = (_dsconv.conv2d.default, _dsconv.linear.default)


def fuse(module: fx.GraphModule, activations: "Activations") -> None:
    """Rewrite the graph of ``module``, which holds functional ATen and ``dsconv`` operators, in place.

    A BatchNorm, a sum with another tensor, and one of ``activations``, that follow a convolution or linear layer become
    its gain and offset, its residual and its activation: it computes them in the same order, so that no bit changes but
    by :data:`INEXACT`. What they are called is kept in ``node.meta["fused"]``.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target in INTEGER_OPERATORS:
            node.meta["fused"] = []
            _take_batchnorm(module, node)
            _take_residual(node, order)
            _take_activation(node, activations)
    graph.lint()


def _does_nothing(node: fx.Node) -> bool:
    if not node.args or node.meta.get("strides") != getattr(node.args[0], "meta", {}).get("strides"):
        return False
    if node.target is _aten.clone.default:  # what dropout is in inference
        return not node.kwargs
    if node.target is not _aten.adaptive_avg_pool2d.default:
        return False
    read: Any = node.args[0]
    return tuple(read.meta["val"].shape[-2:]) == tuple(node.args[1])  # type: ignore[arg-type]  # averages of one value


def _take_batchnorm(module: fx.GraphModule, node: fx.Node) -> None:
    follower = only_user(node)
    squeezed = follower is not None and follower.target is _aten.squeeze.dim  # a layer over sequences
    norm = only_user(follower) if follower is not None and squeezed else follower
    if norm is None or norm.target is not _aten.batch_norm.default or norm.args[0] not in (node, follower):
        return
    if not in_one_format(norm.args[0]):
        return
    terms = batchnorm_terms(module, norm)
    if terms is None:
        return
    for name, value in zip(("gain", "offset"), terms, strict=True):
        module.register_buffer(f"_{node.name}_{name}", value)
        with module.graph.inserting_before(node):
            term = module.graph.get_attr(f"_{node.name}_{name}")
        term.meta["val"] = value
        node.kwargs = {**node.kwargs, name: term}
    node.meta["fused"].append("batch_norm")
    read: Any = norm.args[0]
    read.meta |= {key: norm.meta[key] for key in LAYOUT if key in norm.meta}
    norm.replace_all_uses_with(read)
    module.graph.erase_node(norm)


def batchnorm_terms(module: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """``gain`` and ``offset`` of a BatchNorm, which PyTorch computes as ``x * gain + offset``, rounded once.

    None where it is in training mode, or not of numbers that are known and finite in float32.
    """
    arguments: Any = norm.args
    _, *nodes, training, _, eps, _ = arguments
    values = [None if n is None else constant(module, n) for n in nodes]
    weight, bias, mean, var = values
    given = [value for value, n in zip(values, nodes, strict=True) if n is not None]
    if training or mean is None or var is None or any(v is None or v.dtype != torch.float32 for v in given):
        return None
    # The very bits that PyTorch uses: what it makes of 1 without a mean and a bias, and of 0 with them.
    zeros = torch.zeros_like(mean)
    with torch.no_grad():
        gain = torch.batch_norm(zeros[None] + 1, weight, None, zeros, var, False, 0.0, eps, False)[0]
        offset = torch.batch_norm(zeros[None], weight, bias, mean, var, False, 0.0, eps, False)[0]
    return (gain, offset) if bool(gain.isfinite().all() and offset.isfinite().all()) else None


def constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor of the model that a node stands for; None where it is another one."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        if isinstance(node, fx.Node) and node.target in (_aten.reshape.default, _aten.view.default):
            of = constant(module, node.args[0])
            return None if of is None else of.reshape(node.args[1])  # type: ignore[arg-type]
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def _take_residual(node: fx.Node, order: dict[fx.Node, int]) -> None:
    add = only_user(node)
    if add is None or add.target is not _aten.add.Tensor or add.kwargs:
        return
    other = add.args[1] if add.args[0] is node else add.args[0]
    # It has to be there already. Where both are convolutions, the later one takes the earlier one.
    if isinstance(other, fx.Node) and other is not node and order[other] < order[node] and _like(node, other):
        _replace(node, add, "add", residual=other)


def _take_activation(node: fx.Node, activations: "Activations") -> None:
    user = only_user(node)
    if user is not None and user.target in activations:
        found = activations[user.target](user)
        if found is not None:
            _replace(node, user, found["activation"], **found)


def _leaky_relu(node: fx.Node) -> dict[str, Any]:
    return {"activation": "leaky_relu", "slope": node.args[1] if len(node.args) > 1 else 0.01}


def _hardtanh(node: fx.Node) -> dict[str, Any] | None:
    return {"activation": "relu6"} if tuple(node.args[1:]) == (0, 6) and not node.kwargs else None


Activations = dict[Any, Callable[[fx.Node], dict[str, Any] | None]]
"""Of an operator, what makes the arguments ``activation`` and ``slope`` of a layer of it."""
EXACT: Activations = {
    _aten.relu.default: lambda _: {"activation": "relu"},
    _aten.leaky_relu.default: _leaky_relu,
    _aten.hardtanh.default: _hardtanh,
    _aten.relu6.default: lambda _: {"activation": "relu6"},
    _aten.hardswish.default: lambda _: {"activation": "hardswish"},
    _aten.hardsigmoid.default: lambda _: {"activation": "hardsigmoid"},
}
"""Activations of which our kernels and PyTorch compute the same bits."""
INEXACT: Activations = {
    _aten.silu.default: lambda _: {"activation": "silu"},
    _aten.sigmoid.default: lambda _: {"activation": "sigmoid"},
}
"""Activations that hold an exponential, which every library rounds in its own way."""


def _replace(node: fx.Node, follower: fx.Node, called: str, **arguments: Any) -> None:
    """Let ``node`` with ``arguments`` stand for ``follower``, its only user, as well."""
    node.kwargs = {**node.kwargs, **arguments}
    node.meta["fused"].append(called)
    node.meta |= {key: follower.meta[key] for key in ("val", *LAYOUT) if key in follower.meta}
    follower.replace_all_uses_with(node)
    follower.graph.erase_node(follower)


def only_user(node: fx.Node) -> fx.Node | None:
    """What reads a node, if it is one alone."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _like(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
