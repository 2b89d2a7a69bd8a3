"""Constant folding: values that depend on constants alone are computed once, when a graph is made."""

import operator
from typing import Any

import torch
from torch import Tensor, fx


def fold_constants(module: fx.GraphModule) -> None:
    """Replace all nodes that do not depend on the input of ``module`` by their values.

    Examples are grids and anchors of detectors, whose sizes are known once that of the images is. Random values and
    uninitialized memory are not folded.
    """
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(module)
        elif _is_fixed(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    # The caller may write to returned tensors: they are created on each call.
    returned = {node for node in module.graph.nodes if node.op == "output"}
    for node in reversed(module.graph.nodes):
        if node in values and not returned.isdisjoint(node.users):
            returned.add(node)
    for node, value in values.items():
        users = [user for user in node.users if user not in values]
        if node.op == "get_attr" or node in returned or not isinstance(value, Tensor) or not users:
            continue
        module.register_buffer(f"_constant_{node.name}", value.detach(), persistent=False)
        with module.graph.inserting_before(node):
            made = module.graph.get_attr(f"_constant_{node.name}")
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in values)
    module.graph.eliminate_dead_code()


def _is_fixed(node: fx.Node) -> bool:
    target: Any = node.target
    if target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    by_chance = torch.Tag.nondeterministic_seeded in target.tags or "empty" in str(target)
    return bool(target._schema.returns) and not by_chance and not target._schema.is_mutable
