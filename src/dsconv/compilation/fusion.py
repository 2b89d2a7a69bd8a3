"""Rewriting of a captured graph: operators are fused into the layer before them, and those without effect removed."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dsconv.compilation.layouts import LAYOUT, in_one_format
from dsconv.compilation.operators import activation_of, only_user, operator_of
from dsconv.compilation.operators.map import batchnorm_terms, per_channel
from dsconv.compilation.operators.views import take_expansions_as_they_are, take_parts_as_slices

_aten = torch.ops.aten
_VIEWS = (_aten.reshape.default, _aten.view.default, _aten.unsqueeze.default)


def fuse(module: fx.GraphModule) -> None:
    """Rewrite the graph of ``module``, which contains functional ATen and ``dsconv`` operators, in place.

    A BatchNorm, a sum with another tensor, and an activation after a convolution or linear layer become its gain and
    offset, its residual and its activation: it computes them in the same order, so that the result is bitwise equal
    except for activations with our own rounding. Their names are kept in ``node.meta["fused"]``.
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
            _name_optional(node)
            _take_batchnorm(module, node)
            _take_constants(module, node)
            _take_residual(node, order)
            _take_activation(module, node)
    graph.lint()


def _does_nothing(node: fx.Node) -> bool:
    equals_input = operator_of(node).equals_input
    if equals_input is None or not node.args:
        return False
    return node.meta.get("strides") == getattr(node.args[0], "meta", {}).get("strides") and equals_input(node)


def _name_optional(node: fx.Node) -> None:
    """Pass arguments with a default by name: a positional argument could not be overridden by name."""
    target: Any = node.target
    required = [argument for argument in target._schema.arguments if not argument.has_default_value()]
    named = target._schema.arguments[len(required) : len(node.args)]
    node.kwargs = {a.name: v for a, v in zip(named, node.args[len(required) :], strict=True)} | node.kwargs
    node.args = node.args[: len(required)]


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
    _affine(module, node, "batch_norm", *terms)
    read: Any = norm.args[0]
    read.meta |= {key: norm.meta[key] for key in LAYOUT if key in norm.meta}
    norm.replace_all_uses_with(read)
    module.graph.erase_node(norm)


def _take_constants(module: fx.GraphModule, node: fx.Node) -> None:
    """Fuse a product or a sum with constants: a layer rounds both together, a model one after the other."""
    follower = only_user(node)
    kinds = {_aten.mul.Tensor: "mul", _aten.add.Tensor: "add"}
    if follower is None or follower.target not in kinds or follower.kwargs or node.kwargs.get("gain") is not None:
        return
    kind, other = kinds[follower.target], follower.args[1] if follower.args[0] is node else follower.args[0]
    operand = per_channel(other, partial(constant, module), follower.meta["val"], 1)
    if operand is None or node.meta["val"].shape != follower.meta["val"].shape:
        return
    values = (
        torch.full((node.meta["val"].shape[1],), 1.0, dtype=torch.float32, device=node.meta["val"].device) * operand
    )
    if not bool(values.isfinite().all()):
        return  # zero times it would not be zero
    nothing = torch.full_like(values, -0.0) if kind == "mul" else torch.ones_like(values)
    _affine(module, node, kind, *((values, nothing) if kind == "mul" else (nothing, values)))
    node.meta |= {key: follower.meta[key] for key in ("val", *LAYOUT) if key in follower.meta}
    follower.replace_all_uses_with(node)
    module.graph.erase_node(follower)


def _affine(module: fx.GraphModule, node: fx.Node, called: str, gain: Tensor, offset: Tensor) -> None:
    for name, value in (("gain", gain), ("offset", offset)):
        module.register_buffer(f"_{node.name}_{name}", value)
        with module.graph.inserting_before(node):
            term = module.graph.get_attr(f"_{node.name}_{name}")
        term.meta["val"] = value
        node.kwargs = {**node.kwargs, name: term}
    node.meta["fused"].append(called)


def constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the tensor of the model that a node represents; None for another node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        if isinstance(node, fx.Node) and node.target in _VIEWS:
            of = constant(module, node.args[0])
            return None if of is None else node.target(of, *node.args[1:])
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
    # It must exist already. If both are convolutions, the later one adds the earlier one.
    if isinstance(other, fx.Node) and other is not node and order[other] < order[node] and _like(node, other):
        _replace(node, add, "add", residual=other)


def _take_activation(module: fx.GraphModule, node: fx.Node) -> None:
    last, user = node, only_user(node)
    while user is not None and operator_of(user).renames is not None and user.args[0] is last:
        last, user = user, only_user(user)
    settings = activation_of(user, partial(constant, module))
    if user is not None and settings is not None and user.args[0] is last:
        _replace(node, user, settings["activation"], seen_as=last, **settings)


def _replace(node: fx.Node, follower: fx.Node, called: str, seen_as: fx.Node | None = None, **arguments: Any) -> None:
    """Replace ``follower``, the only reader of ``node``, by ``node`` with ``arguments``, perhaps in another shape."""
    node.kwargs = {**node.kwargs, **arguments}
    node.meta["fused"].append(called)
    last = node if seen_as is None else seen_as
    last.meta |= {key: follower.meta[key] for key in ("val", *LAYOUT) if key in follower.meta}
    follower.replace_all_uses_with(last)
    follower.graph.erase_node(follower)


def _like(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
