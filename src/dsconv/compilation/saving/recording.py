"""Writes down the steps of a program, where it otherwise appends them to an executable."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from dsconv.backends.base import MapOperation, Uses
from dsconv.compilation.operators.operator import Step
from dsconv.compilation.program import Program
from dsconv.compilation.saving import schema
from dsconv.compilation.saving.flatbuffer import Table
from dsconv.compilation.values import Quantized, Value

Layer = tuple[Tensor, Tensor, Tensor | None]
"""Weights, KDS and shift of a layer as the kernels read them."""


class Recording:
    """The steps of a program as tables.

    An :class:`dsconv.backends.base.Executable` that keeps what it is told, and the
    :class:`~dsconv.compilation.operators.operator.Ids` of its tensors.

    Args:
        program: that of one size.
        constant: returns the number of a constant in the file.
        weights: returns the number of the weights of a layer.
    """

    def __init__(
        self,
        program: Program,
        constant: Callable[[Tensor], int],
        weights: Callable[[Layer, schema.ConvSizes, int], int],
    ):
        self._program, self._constant, self._weights = program, constant, weights
        self._ids: dict[Value | Quantized, int] = {}
        self.floats: list[schema.FloatTensor] = []
        self.quantizeds: list[schema.QuantizedTensor] = []
        self.steps: list[schema.Step] = []
        for step in program.steps:
            self._add(step)

    def _add(self, step: Step) -> None:
        step.add(self, self)  # type: ignore[arg-type]
        if step.joined is not None:
            self.steps[-1].joined = True

    # Numbers of tensors

    def value(self, of: Value | None) -> int:
        if of is None:
            return -1
        if of not in self._ids:
            base, offset, first, size, strides = self._program.place_of(of)
            self._ids[of] = len(self.floats)
            self.floats.append(schema.FloatTensor(base, offset, first, *size, *strides))
        return self._ids[of]

    def quantized(self, of: Quantized | None) -> int:
        if of is None:
            return -1
        if of not in self._ids:
            offset, depth, block_size, groups, grid, *form, frames = self._program.place_of_quantized(of)
            self._ids[of] = len(self.quantizeds)
            made = schema.QuantizedTensor(offset, depth, block_size, groups, frames, *grid, *form)
            self.quantizeds.append(made)
        return self._ids[of]

    def constant(self, tensor: Tensor | None) -> Tensor | None:
        return tensor

    def _number(self, tensor: Tensor | None) -> int:
        return -1 if tensor is None else self._constant(tensor)

    # Steps

    def _append(self, operation: Table, uses: Uses | None = None) -> None:
        made = None
        if uses is not None:
            values, residual, targets, activation, alpha, beta = uses
            all_targets = [schema.Target(*target) for target in targets]
            made = schema.Uses(values, residual, all_targets, activation, alpha, beta)
        self.steps.append(schema.Step(operation, made))

    def convolve(
        self,
        sizes: Any,
        source: int,
        quantized: int,
        weight: Any,
        kds: Any,
        kds_shift: Any,
        bias: Any,
        gain: Any,
        offset: Any,
        weight_bits: int,
        activation_bits: int,
        sign: int,
        uses: Uses,
    ) -> None:
        made = schema.ConvSizes(**{field.name: getattr(sizes, field.name) for field in fields(schema.ConvSizes)})
        weights = self._weights((weight, kds, kds_shift), made, weight_bits)
        constants = self._number(bias), self._number(gain), self._number(offset)
        settings = weight_bits, activation_bits, sign
        self._append(schema.Convolve(made, source, quantized, weights, *constants, *settings), uses)

    def map(self, source: int, operations: Sequence[MapOperation], uses: Uses) -> None:
        made = [
            schema.MapOperation(kind, activation, alpha, beta, tensor, self._number(constants), self._number(offset))
            for kind, activation, alpha, beta, tensor, constants, offset in operations
        ]
        self._append(schema.Map(source, made), uses)

    def pool(
        self,
        source: int,
        window: tuple[int, ...],
        average: bool,
        count_zeros: bool,
        divisor: int,
        out: tuple[int, ...],
        uses: Uses,
    ) -> None:
        self._append(schema.Pool(source, schema.PoolWindow(*window), average, count_zeros, divisor, *out), uses)

    def average(self, source: int, lanes: int, result: int) -> None:
        self._append(schema.Average(source, lanes, result))

    def rearrange(self, source: int, loops: Sequence[tuple[int, ...]], result: int) -> None:
        self._append(schema.Rearrange(source, [schema.Loop(*loop) for loop in loops], result))

    def pick(self, source: int, rows: Sequence[int], columns: Sequence[int], fill: float, uses: Uses) -> None:
        self._append(schema.Pick(source, rows, columns, fill), uses)

    def moments(self, source: int, groups: int, weight: Any, epsilon: float, mean: int, scale: int) -> None:
        self._append(schema.Moments(source, groups, self._number(weight), epsilon, mean, scale))

    def flatten(self, source: int, result: int) -> None:
        self._append(schema.Flatten(source, result))

    def interpolate(
        self,
        source: int,
        rows: Sequence[tuple[int, int, float, float]],
        columns: Sequence[tuple[int, int, float, float]],
        split: int,
        first: int,
        rest: int,
        uses: Uses,
    ) -> None:
        all_rows, all_columns = ([schema.Between(*one) for one in of] for of in (rows, columns))
        self._append(schema.Interpolate(source, all_rows, all_columns, split, first, rest), uses)

    def average_windows(
        self,
        source: int,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        at_once: bool,
        uses: Uses,
    ) -> None:
        all_rows, all_columns = ([schema.Span(*one) for one in of] for of in (rows, columns))
        self._append(schema.AverageWindows(source, all_rows, all_columns, at_once), uses)
