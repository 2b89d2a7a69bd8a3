"""Norms and softmax, in float32 and in our own order, which does not depend on layouts and instruction sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.map import Operation, mapped
from dsconv.compilation.operators.operator import Ids, Lowering, OfOne, Step, fixed, register
from dsconv.compilation.values import Value
from dsconv.ops import arguments_of


@dataclass(eq=False, kw_only=True)
class Moments(OfOne):
    """Means of groups of channels over an image, then the scales ``weight / sqrt(variance + epsilon)``, as channels."""

    groups: int
    weight: Tensor | None
    epsilon: float
    parts: tuple[Value, Value]
    name: ClassVar[str | None] = "dsconv.moments"

    def add(self, to: Executable, ids: Ids) -> None:
        of = ids.value(self.source), self.groups, ids.constant(self.weight), self.epsilon
        to.moments(*of, *map(ids.value, self.parts))

    def constants(self) -> Sequence[Tensor | None]:
        return [self.weight]


def _group_norm(lowering: Lowering, node: fx.Node) -> Step | None:
    given = arguments_of(node.target, node.args, node.kwargs)
    return _normalized(lowering, node, "group_norm", given["num_groups"], given)


def _instance_norm(lowering: Lowering, node: fx.Node) -> Step | None:
    given, source = arguments_of(node.target, node.args, node.kwargs), lowering.value(node.args[0])
    if source is None or not given["use_input_stats"]:
        return None
    return _normalized(lowering, node, "instance_norm", source.size[0], given)


def _normalized(lowering: Lowering, node: fx.Node, called: str, groups: int, given: dict[str, Any]) -> Step | None:
    source = lowering.value(node.args[0])
    terms = None if source is None else _terms(lowering, source.size[0], given)
    if source is None or terms is None or lowering.channel_dim(node.args[0]) != 1:
        return None
    weight, bias = terms
    channels = source.size[0]
    whole = Value(node, (2 * channels, 1, 1), in_float=True)
    mean, scale = (Value(node, (channels, 1, 1), in_float=True, home=whole, first=i * channels) for i in (0, 1))
    source.in_float = True
    lowering.steps.append(
        Moments(
            node=node,
            result=whole,
            source=source,
            groups=groups,
            weight=weight,
            epsilon=given["eps"],
            parts=(mean, scale),
        )
    )
    operations = [Operation("subtract", called, value=mean), Operation("multiply", "", value=scale)]
    if bias is not None:
        operations.append(Operation("add", "", constants=bias))
    return mapped(lowering, node, source, *operations)


def _terms(lowering: Lowering, channels: int, given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None] | None:
    """Return copies of weight and bias, each None if missing; None if they are not the model's."""
    terms = []
    for name in ("weight", "bias"):
        tensor = lowering.constant(given[name])
        if given[name] is not None and (tensor is None or tensor.shape != (channels,) or tensor.dtype != torch.float32):
            return None
        terms.append(None if tensor is None else fixed(tensor))
    return terms[0], terms[1]


def _layer_norm(lowering: Lowering, node: fx.Node) -> Step | None:
    given, source = arguments_of(node.target, node.args, node.kwargs), lowering.value(node.args[0])
    if source is None or lowering.channel_dim(node) != node.meta["val"].dim() - 1:
        return None
    channels = source.size[0]
    terms = _terms(lowering, channels, given)
    if list(given["normalized_shape"]) != [channels] or terms is None:
        return None
    weight, bias = terms
    ones = torch.ones(channels, dtype=torch.float32, device="cpu")
    operation = Operation(
        "normalize",
        "layer_norm",
        constants=ones if weight is None else weight,
        offset=torch.zeros_like(ones) if bias is None else bias,
        alpha=given["eps"],
    )
    return mapped(lowering, node, source, operation)


def _softmax(lowering: Lowering, node: fx.Node) -> Step | None:
    given, source = arguments_of(node.target, node.args, node.kwargs), lowering.value(node.args[0])
    dims = node.meta["val"].dim()
    if source is None or given["dim"] % dims != lowering.channel_dim(node) or given.get("dtype") is not None:
        return None
    return mapped(lowering, node, source, Operation("softmax", "softmax"))


register("aten", "group_norm", returns="new", own_bits=True, lower=_group_norm)
register("aten", "instance_norm", returns="new", own_bits=True, lower=_instance_norm)
# PyTorch reads its input row by row, whatever its layout, and writes rows.
_FACTS: dict[str, Any] = {"rounds": "alike", "makes_rows": True, "keeps_channels": True, "own_bits": True}
register(
    "aten", "layer_norm", returns="new", reads_last=lambda node: len(node.args[1]) == 1, lower=_layer_norm, **_FACTS
)
register("aten", "softmax _softmax", returns="new", keeps_channels=True, own_bits=True, lower=_softmax)
