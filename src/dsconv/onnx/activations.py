"""Block floating point in standard ONNX operators, with the values of :func:`dsconv.numerics.fake_quantize_activation`.

The result does not depend on the accuracy of a runtime's logarithm: it only selects two neighbouring powers of two, and
comparisons choose the right one. Values are equal except for the sign of zeros.
"""

import math
from typing import NamedTuple

import numpy as np

from dsconv.config import LayerConfig
from dsconv.numerics import SMALLEST, block_count
from dsconv.onnx.graph import Nodes, Value

_LARGEST = float(np.finfo(np.float32).max)
# Powers of two that can be the leading one of a block's largest magnitude, and one below them for the estimate.
_POWERS = np.exp2(np.arange(round(math.log2(SMALLEST)) - 1, 128))
_ONE = -round(math.log2(_POWERS[0]))
# Far above the error of any logarithm, far below the distance of two powers of two.
_SLACK = 1e-3


class Magnitude(NamedTuple):
    """Magnitude bits ``m`` of a mantissa.

    Attributes:
        unsigned: in blocks without a negative value.
        signed: in the others.
        symmetric: whether ``-2^m`` is excluded.
    """

    unsigned: int
    signed: int
    symmetric: bool

    @classmethod
    def of(cls, config: LayerConfig) -> "Magnitude":
        """Return the magnitude bits for the settings of a layer, see :func:`dsconv.numerics.quantize_activation`."""
        bits, sign = config.activation_bits, config.activation_sign
        assert bits is not None
        less = bits == 8 or sign == "included"
        return cls(bits - less, bits - (less or sign == "adaptive"), sign == "extra")


def quantize(op: Nodes, x: Value, config: LayerConfig, channels: int, groups: int) -> Value:
    """Quantize and dequantize ``x (N, C, *S)`` in block floating point, with ``channels`` C, in separate operators."""
    of_group = channels // groups
    size = min(config.block_size, of_group)
    count = block_count(of_group, size)
    missing = count * size - of_group
    whole, axis = x, op.shape(2)
    if missing:
        whole = op.Reshape(x, op.shape(0, groups, of_group, -1))
        whole = op.Pad(whole, op.shape(0, 0, 0, 0, 0, 0, missing, 0))
    value = _through_blocks(op, op.Reshape(whole, op.shape(0, groups * count, size, -1)), *_levels(op, config))
    if missing:
        value = op.Reshape(value, op.shape(0, groups, count * size, -1))
        value = op.Slice(value, op.shape(0), op.shape(of_group), axis)
    return op.Reshape(value, op.Shape(x))


Pair = tuple[Value, ...]
"""Values for blocks without a negative value, and for the others."""


def _levels(op: Nodes, config: LayerConfig) -> tuple[Pair, Pair, bool]:
    m = Magnitude.of(config)
    unit = op.constant(2.0 ** (1 - m.unsigned)), op.constant(2.0 ** (1 - m.signed))
    limit = op.constant(2.0**m.unsigned - 1), op.constant(2.0**m.signed - 1)
    return unit, limit, m.symmetric


def _through_blocks(op: Nodes, blocks: Value, units: Pair, limits: Pair, symmetric: "bool | Value") -> Value:
    """Round ``(N, blocks, size, ...)`` to multiples of each block's ``2^E * unit``, up to ``limit`` of them."""
    axis = op.shape(2)
    low = op.ReduceMin(blocks, axis)
    largest = op.Max(op.ReduceMax(blocks, axis), op.Neg(low))
    finite = op.LessOrEqual(largest, op.constant(_LARGEST))
    used = op.And(finite, op.GreaterOrEqual(largest, op.constant(SMALLEST)))
    power = _power_of_two_below(op, op.Where(used, largest, op.constant(1.0)))

    unit, limit = units[0], limits[0]
    if units[0] is not units[1]:
        signed = op.Less(low, op.constant(0.0))
        unit, limit = (op.Where(signed, pair[1], pair[0]) for pair in (units, limits))
    lsb = op.Where(finite, op.Mul(power, unit), op.constant(math.nan))
    value = op.Mul(op.Round(op.Div(blocks, lsb)), lsb)
    # Clamped last and in this order: with one NaN operand runtimes may return the other, and the NaN must be kept.
    top = op.Mul(limit, lsb)
    if symmetric is True:
        value = op.Max(op.Neg(top), value)
    elif symmetric is not False:  # known only at call time: one more negative level unless symmetric
        value = op.Max(op.Sub(op.Mul(op.Sub(symmetric, op.constant(1.0)), lsb), top), value)
    return op.Min(top, value)


def _power_of_two_below(op: Nodes, x: Value) -> Value:
    """Return ``2^floor(log2 x)``, exactly, for ``x`` from ``SMALLEST`` to the largest float."""
    # Truncated, it is the index in the table of that power or of the one below it.
    place = op.Add(op.Mul(op.Log(x), op.constant(1 / math.log(2))), op.constant(_ONE - _SLACK))
    power = op.Gather(op.constant(_POWERS), op.Cast(place, to=op.INT32))
    double = op.Add(power, power)
    return op.Where(op.LessOrEqual(double, x), double, power)


def patches(op: Nodes, x: Value, channels: int, kernel: tuple[int, ...], **where: list[int]) -> Value:
    """Return the patches of a convolution: ``(N, C, *S)`` to ``(N, C * K, *S_out)``, a channel's taps contiguous.

    Each channel is convolved with ones, each at another tap: sums of one value and zeros are exact.
    """
    taps = math.prod(kernel)
    ones = op.Cast(op.constant(np.eye(taps).reshape(1, taps, 1, *kernel), np.uint8), to=op.FLOAT)
    ones = op.Expand(ones, op.shape(channels, taps, 1, *kernel))
    return op.Conv(x, op.Reshape(ones, op.shape(channels * taps, 1, *kernel)), group=channels, **where)


def quantize_of_attributes(op: Nodes, x: Value) -> Value:
    """Return the body of a function: :func:`quantize` with settings that are attributes of its call."""
    block_size, groups, unsigned, signed, symmetric = (
        op.Constant(value_ints=op.attribute(name, "INTS")) for name in ("block_size", "group", *Magnitude._fields)
    )
    one, copied, rest = op.shape(1), op.shape(0), op.shape(-1)
    of_group = op.Div(op.Shape(x, start=1, end=2), groups)
    size = op.Min(block_size, of_group)
    count = op.Div(op.Sub(op.Add(of_group, size), one), size)
    filled = op.Mul(count, size)
    whole = op.Reshape(x, op.Concat(copied, groups, of_group, rest, axis=0))
    missing = op.Concat(op.shape(*[0] * 6), op.Sub(filled, of_group), op.shape(0), axis=0)
    blocks = op.Reshape(op.Pad(whole, missing), op.Concat(copied, op.Mul(groups, count), size, rest, axis=0))

    def power(exponent: Value) -> Value:
        return op.Gather(op.constant(_POWERS), op.Add(exponent, op.shape(_ONE)))

    units = power(op.Sub(one, unsigned)), power(op.Sub(one, signed))
    limits = tuple(op.Sub(power(m), op.constant(1.0)) for m in (unsigned, signed))
    value = _through_blocks(op, blocks, units, limits, op.Cast(symmetric, to=op.FLOAT))
    value = op.Reshape(value, op.Concat(copied, groups, filled, rest, axis=0))
    return op.Reshape(op.Slice(value, copied, of_group, op.shape(2)), op.Shape(x))
