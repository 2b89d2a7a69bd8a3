"""Convolutions and linear layers in integers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.operator import Ids, Lowering, Step, fixed, register
from dsconv.compilation.values import Format, Quantized, Value
from dsconv.numerics import ACTIVATION_SIGNS
from dsconv.numerics.winograd import PRODUCTS, TILE
from dsconv.ops import FLOAT_BITS, WEIGHTS, arguments_of, checked_sizes

# Minimum size of the tensor between two joined layers; a smaller one stays in the L2 cache anyway.
LEAST_JOINED_BYTES = 1 << 19


@dataclass(eq=False, kw_only=True)
class Convolution(Step):
    """Convolution or linear layer.

    Attributes:
        arguments: arguments of its operator, by name.
        sizes: sizes for one image (:func:`dsconv.ops.checked_sizes`).
        quantized: its input; None for flattened blocks and Winograd, which read ``source``.
    """

    arguments: dict[str, Any]
    sizes: Any
    source: Value
    depthwise: bool
    quantized: Quantized | None = None
    takes_gaps: ClassVar[bool] = True

    @property
    def in_integers(self) -> bool:  # type: ignore[override]
        return sums_integers(self.arguments)

    @property
    def name(self) -> str | None:  # type: ignore[override]
        if self.sizes.transposed:
            return "dsconv.convolution (transposed)"
        return "dsconv.conv2d (winograd)" if self.sizes.winograd else None

    @property
    def writes_parts(self) -> bool:  # type: ignore[override]
        return not self.depthwise

    def sources(self) -> Iterator[Value]:
        if self.quantized is None:
            yield self.source

    def reads(self) -> Quantized | None:
        return self.quantized

    def takes_lines(self) -> bool:
        return self.sizes.flat and not self.depthwise and self.residual is None

    def reads_lines(self) -> bool:
        return self.depthwise and not self.in_integers and self.sizes.outputs == self.sizes.channels

    def makes_lines(self) -> bool:
        """Return whether it can make some lines of float32 outputs at a time, and makes nothing else."""
        sizes = self.sizes
        # The input of the network is never overwritten; any other one might be before the next step.
        there = self.quantized is not None or (sizes.flat and not self.depthwise and self.source.root().outside)
        alone = not self.targets and self.residual is None
        return there and alone and sizes.groups == 1 and not (sizes.winograd or sizes.transposed or sizes.volume)

    def add(self, to: Executable, ids: Ids) -> None:
        given = self.arguments
        weight, kds, kds_shift, bias, gain, offset = (ids.constant(given[name]) for name in WEIGHTS)
        to.convolve(
            self.sizes,
            ids.value(self.source if self.quantized is None else None),
            ids.quantized(self.quantized),
            weight,
            kds,
            kds_shift,
            bias,
            gain,
            offset,
            given["weight_bits"],
            given["activation_bits"],
            ACTIVATION_SIGNS.index(given["sign"]),
            self.uses(ids),
        )

    def constants(self) -> Sequence[Tensor | None]:
        return [self.arguments[name] for name in WEIGHTS]

    def macs(self) -> int:
        s = self.sizes
        if s.winograd:
            return int(s.outputs * s.channels * PRODUCTS * -(-s.out_height // TILE) * -(-s.out_width // TILE))
        pixels = (s.depth, s.height, s.width) if s.transposed else (s.out_depth, s.out_height, s.out_width)
        return int(s.outputs * math.prod(pixels) * s.kernel_d * s.kernel_h * s.kernel_w * (s.channels // s.groups))


def join_steps(steps: Sequence[Step]) -> None:
    """Join steps with the convolution before them, some lines at a time, if only they read its outputs.

    The tensor between them then stays in the caches, which pays if it is large.
    """
    for before, between, step in joinable(steps):
        if 4 * math.prod(between.size) >= LEAST_JOINED_BYTES:
            step.joined = before
            before.fused.append("in the next step")


def joinable(steps: Sequence[Step]) -> Iterator[tuple[Convolution, Value, Step]]:
    """Yield convolutions, the tensor in between, and steps that may be joined with them, whatever its size."""
    for before, step in pairwise(steps):
        between = before.result
        if not isinstance(before, Convolution) or not before.makes_lines() or not step.reads_lines() or between is None:
            continue
        if between.outside or between.home is not None:
            continue
        users = [other for other in steps if any(value.root() is between for value in other.float_values())]
        if users == [before, step] and list(step.sources()) == [between] and step.residual is not between:
            yield before, between, step


def sums_integers(given: dict[str, Any]) -> bool:
    """Return whether such a call sums integers; the activations of depthwise layers may stay float."""
    return bool(given["activation_bits"] != FLOAT_BITS)


def _convolution(lowering: Lowering, node: fx.Node) -> Step | None:
    given = arguments_of(node.target, node.args, node.kwargs)
    source, residual, result = (lowering.value(n) for n in (given["x"], given["residual"], node))
    if source is None or result is None or (given["residual"] is not None and residual is None):
        return None
    if lowering.channel_dim(given["x"]) != 1 or (residual is not None and residual.size != result.size):
        return None
    for name in WEIGHTS:
        tensor = lowering.constant(given[name])
        if tensor is None and given[name] is not None:
            return None
        given[name] = tensor
    if given["bias"] is not None:
        given["bias"] = fixed(given["bias"])
    image = tuple(given["x"].meta["val"].shape[1:])
    sizes = checked_sizes(image if len(image) > 1 else source.size, given)
    groups, flat = sizes.groups, sizes.flat
    depthwise = flat and groups == source.size[0] > 1 and not sizes.volume
    if depthwise and groups != result.size[0]:
        return None  # it writes lines
    quantized = None
    if flat or sizes.winograd:
        source.in_float = True
    else:
        wanted = Format(
            source.size[0] // groups,
            sizes.block_size,
            groups,
            given["weight_bits"] > 4,
            given["activation_bits"],
            given["sign"],
            given["kds_shift"] is not None,
        )
        quantized = source.want(wanted, sizes.border)
    if residual is not None:
        residual.in_float = True
    result.direct = depthwise or groups == 1
    return Convolution(
        node=node,
        arguments=given,
        sizes=sizes,
        source=source,
        depthwise=depthwise,
        quantized=quantized,
        result=result,
        residual=residual,
        activation=given["activation"],
        alpha=given["alpha"],
        beta=given["beta"],
        fused=["bias"] * (given["bias"] is not None) + node.meta.get("fused", []),
    )


_FACTS: dict[str, Any] = {"returns": "new", "rounds": "alike", "fuses": True, "lower": _convolution}
register("dsconv", "conv2d convolution", **_FACTS)
register("dsconv", "linear", makes_rows=True, keeps_channels=True, **_FACTS)
register("dsconv", "quantize_activation", rounds="alike")
