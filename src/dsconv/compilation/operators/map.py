"""Maps of values: scale and shift, BatchNorm, sums, products, and copies."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.layouts import in_one_format
from dsconv.compilation.operators.operator import (
    Ids,
    Lowering,
    Settings,
    Step,
    activation_of,
    address,
    fixed,
    only_user,
    register,
)
from dsconv.compilation.values import Value

_aten = torch.ops.aten


@dataclass(eq=False, kw_only=True)
class Map(Step):
    """``source * scale + shift``, rounded ``once`` or twice, or ``source``; times ``gate``."""

    source: Value
    scale: Tensor | None = None
    shift: Tensor | None = None
    once: bool = False
    gate: Value | None = None
    takes_gaps: ClassVar[bool] = True
    name: ClassVar[str | None] = "dsconv.map"

    def sources(self) -> Iterator[Value]:
        yield self.source
        if self.gate is not None:
            yield self.gate

    def takes_lines(self) -> bool:
        return self.result is None

    def add(self, to: Executable, ids: Ids) -> None:
        scale, shift = address(self.scale), address(self.shift)
        to.map(ids.value(self.source), scale, shift, self.once, ids.value(self.gate), self.uses(ids))

    def constants(self) -> Sequence[Tensor | None]:
        return self.scale, self.shift


def mapped(lowering: Lowering, node: fx.Node, fused: list[str], settings: Settings, **how: Any) -> Step:
    """Return the map of a node, with the activation behind it where ``settings`` has none yet."""
    how["source"].in_float = True
    lowering.absorbed.add(node)
    follower = only_user(node)
    if not settings and (found := activation_of(follower, lowering.constant, lowering.fast_math)) is not None:
        assert follower is not None
        settings, node = found, follower
        lowering.absorbed.add(node)
    result = lowering.value(node)
    assert result is not None
    result.direct = True
    return Map(
        node=node, result=result, fused=fused + [v for k, v in settings.items() if k == "activation"], **how, **settings
    )


def batchnorm_terms(norm: fx.Node, constant: Callable[[Any], Tensor | None]) -> tuple[Tensor, Tensor] | None:
    """Return ``gain`` and ``offset`` of a BatchNorm, which PyTorch computes as ``x * gain + offset``, rounded once.

    None where it is in training mode, or not of numbers that are known and finite in float32.
    """
    arguments: Any = norm.args
    _, *nodes, training, _, eps, _ = arguments
    values = [None if n is None else constant(n) for n in nodes]
    weight, bias, mean, var = values
    given = [value for value, n in zip(values, nodes, strict=True) if n is not None]
    if training or mean is None or var is None or any(v is None or v.dtype != torch.float32 for v in given):
        return None
    # The very bits that PyTorch uses: its results for 1 without a mean and a bias, and for 0 with them.
    zeros = torch.zeros_like(mean)
    with torch.no_grad():
        gain = torch.batch_norm(zeros[None] + 1, weight, None, zeros, var, False, 0.0, eps, False)[0]
        offset = torch.batch_norm(zeros[None], weight, bias, mean, var, False, 0.0, eps, False)[0]
    return (gain, offset) if bool(gain.isfinite().all() and offset.isfinite().all()) else None


def _batchnorm(lowering: Lowering, node: fx.Node) -> Step | None:
    source, terms = lowering.value(node.args[0]), batchnorm_terms(node, lowering.constant)
    if source is None or terms is None or not in_one_format(source.node):
        return None
    scale, shift = terms
    return mapped(lowering, node, ["batch_norm"], {}, source=source, scale=scale, shift=shift, once=True)


def _sum(lowering: Lowering, node: fx.Node) -> Step | None:
    source, other = (lowering.value(n) for n in node.args[:2])
    if source is None or other is None or node.kwargs or source.size != other.size:
        return None
    made = lowering.value(node)
    if made is None or made.size != source.size:  # frames and lines of one may be repeated over those of the other
        return None
    other.in_float = True
    return mapped(lowering, node, ["add"], {}, source=source, residual=other)


def _product(lowering: Lowering, node: fx.Node) -> Step | None:
    return _affine(lowering, node) or _gate(lowering, node)


def _affine(lowering: Lowering, node: fx.Node) -> Step | None:
    """A product and a sum with a number for each channel."""
    add = only_user(node)
    source = lowering.value(node.args[0])
    if source is None or add is None or add.target is not _aten.add.Tensor or add.kwargs or add.args[0] is not node:
        return None
    shape = (source.size[0], *[1] * (node.meta["val"].dim() - 2))
    constants = [lowering.constant(n) for n in (node.args[1], add.args[1])]
    if any(c is None or tuple(c.shape) != shape or c.dtype != torch.float32 for c in constants):
        return None
    scale, shift = (fixed(c).flatten() for c in constants if c is not None)
    lowering.absorbed.add(node)
    return mapped(lowering, add, ["scale", "shift"], {}, source=source, scale=scale, shift=shift)


def _gate(lowering: Lowering, node: fx.Node) -> Step | None:
    """A product of two tensors, one of which may be of one pixel."""
    pair = [value for n in node.args if (value := lowering.value(n)) is not None]
    if len(pair) < 2 or node.kwargs or len({v.node.meta["val"].dim() for v in pair}) > 1:
        return None
    source, gate = sorted(pair, key=lambda value: -math.prod(value.size))
    made = lowering.value(node)
    if gate.size not in (source.size, (source.size[0], 1, 1)) or made is None or made.size != source.size:
        return None
    gate.in_float = True
    return mapped(lowering, node, ["mul"], {}, source=source, gate=gate)


register("aten", "add", returns="new", in_place=True, rounds="alike", lower=_sum)
register("aten", "mul", returns="new", in_place=True, rounds="alike", lower=_product)
register("aten", "batch_norm", returns="new", lower=_batchnorm)
