"""Rewrites a captured graph: an operator behind a layer moves into it, and one without an effect goes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dsconv.compilation.layouts import LAYOUT, in_one_format
from dsconv.compilation.operators import activation_of, only_user, operator_of
from dsconv.compilation.operators.map import batchnorm_terms
from dsconv.compilation.operators.views import take_expansions_as_they_are, take_parts_as_slices

_aten = torch.ops.aten


def fuse(module: fx.GraphModule, fast_math: bool) -> None:
    """Rewrite the graph of ``module``, which holds functional ATen and ``dsconv`` operators, in place.

    A BatchNorm, a sum with another tensor, and an activation, that follow a convolution or linear layer become its gain
    and offset, its residual and its activation: it computes them in the same order, so that no bit changes but by
    ``fast_math``. Their names are kept in ``node.meta["fused"]``.
    """
    graph = module.graph
    take_parts_as_slices(graph)
    take_expansions_as_they_are(graph)
    for node in list(graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if operator_of(node).fuses:
            node.meta["fused"] = []
            _take_batchnorm(module, node)
            _take_residual(node, order)
            _take_activation(module, node, fast_math)
    graph.lint()


def _does_nothing(node: fx.Node) -> bool:
    equals_input = operator_of(node).equals_input
    if equals_input is None or not node.args:
        return False
    return node.meta.get("strides") == getattr(node.args[0], "meta", {}).get("strides") and equals_input(node)


def _take_batchnorm(module: fx.GraphModule, node: fx.Node) -> None:
    follower = only_user(node)
    squeezed = follower is not None and follower.target is _aten.squeeze.dim  # a layer over sequences
    norm = only_user(follower) if follower is not None and squeezed else follower
    if norm is None or norm.target is not _aten.batch_norm.default or norm.args[0] not in (node, follower):
        return
    if not in_one_format(norm.args[0]):
        return
    terms = batchnorm_terms(norm, partial(constant, module))
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


def _take_activation(module: fx.GraphModule, node: fx.Node, fast_math: bool) -> None:
    user = only_user(node)
    settings = activation_of(user, partial(constant, module), fast_math)
    if user is not None and settings is not None:
        _replace(node, user, settings["activation"], **settings)


def _replace(node: fx.Node, follower: fx.Node, called: str, **arguments: Any) -> None:
    """Let ``node`` with ``arguments`` stand for ``follower``, its only user, as well."""
    node.kwargs = {**node.kwargs, **arguments}
    node.meta["fused"].append(called)
    node.meta |= {key: follower.meta[key] for key in ("val", *LAYOUT) if key in follower.meta}
    follower.replace_all_uses_with(node)
    follower.graph.erase_node(follower)


def _like(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
