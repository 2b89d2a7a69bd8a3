"""Recording of the steps of a program, which are otherwise appended to an executable."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from dsconv.backends.base import MapOperation, Uses
from dsconv.compilation.operators.bilinear import Bilinear
from dsconv.compilation.operators.convolution import joinable
from dsconv.compilation.operators.operator import OfOne, Step
from dsconv.compilation.operators.pool import Pool
from dsconv.compilation.program import Port, Program
from dsconv.compilation.saving import schema
from dsconv.compilation.saving.flatbuffer import Table
from dsconv.compilation.values import Quantized, Value

Layer = tuple[Tensor, Tensor, Tensor | None]
"""Weights, KDS and shift of a layer in the layout of the kernels."""


class Recording:
    """Steps of a program as tables.

    An :class:`dsconv.backends.base.Executable` that records its calls, and the
    :class:`~dsconv.compilation.operators.operator.Ids` of its tensors.

    Args:
        program: the program for one size.
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
        self._memory: dict[object, int] = {}
        self.memory: list[schema.Memory] = []
        self.floats: list[schema.FloatTensor] = []
        self.quantizeds: list[schema.QuantizedTensor] = []
        self.steps: list[schema.Step] = []
        self._step: Step
        joined = {step for _, _, step in joinable(program.steps)} if program.joins else set()
        for self._step in program.steps:
            self._step.add(self, self)  # type: ignore[arg-type]
            self.steps[-1].joined = self._step in joined

    def port(self, of: Port) -> schema.Port:
        """Return an input or output as a table."""
        return schema.Port(self.value(of.value), of.axes)

    # Numbers of tensors

    def value(self, of: Value | None) -> int:
        if of is None:
            return -1
        if of not in self._ids:
            key, base, pixel, lines, first = self._program.memory_of(of)
            if key not in self._memory:
                self._memory[key] = len(self.memory)
                self.memory.append(schema.Memory(base, pixel, lines))
            self._ids[of] = len(self.floats)
            self.floats.append(schema.FloatTensor(self._memory[key], first, of.size[0]))
        return self._ids[of]

    def quantized(self, of: Quantized | None) -> int:
        if of is None:
            return -1
        if of not in self._ids:
            _, depth, block_size, groups, (_, _, *pad), *form, _ = self._program.place_of_quantized(of)
            self._ids[of] = len(self.quantizeds)
            self.quantizeds.append(schema.QuantizedTensor(depth, block_size, groups, *pad, *form))
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
        names = [field.name for field in fields(schema.ConvSizes) if not field.name.startswith("more_")]
        given: dict[str, Any] = {name: getattr(sizes, name) for name in names}
        given |= {f"more_{axis}": _more(sizes, axis, size) for axis, size in _AXES.items()}
        made = schema.ConvSizes(**given)
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
        assert isinstance(self._step, Pool)
        made = schema.PoolWindow(*window)
        self._append(schema.Pool(source, made, average, count_zeros, divisor, self._step.ceil), uses)

    def average(self, source: int, lanes: int, result: int) -> None:
        self._append(schema.Average(source, lanes, result))

    def rearrange(self, source: int, loops: Sequence[tuple[int, ...]], result: int) -> None:
        self._append(schema.Rearrange(source, _loops(self._source.size, loops), result))

    def pick(self, source: int, rows: Sequence[int], columns: Sequence[int], fill: float, uses: Uses) -> None:
        _, height, width = self._source.size
        self._append(schema.Pick(source, _places(rows, height), _places(columns, width), fill), uses)

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
        assert isinstance(self._step, Bilinear)
        sizes = zip(self._source.size[1:], (len(rows), len(columns)), self._step.scales, strict=True)
        corners = self._step.corners
        stretched_rows, stretched_columns = (_stretch(have, made, corners, scale) for have, made, scale in sizes)
        small, large = (schema.Order(*((-1, 0, 0) if order is None else order)) for order in self._step.orders())
        self._append(schema.Interpolate(source, stretched_rows, stretched_columns, small, large), uses)

    def average_windows(
        self,
        source: int,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        at_once: bool,
        uses: Uses,
    ) -> None:
        self._append(schema.AverageWindows(source, len(rows), len(columns), at_once), uses)

    @property
    def _source(self) -> Value:
        """Input of the step that is being recorded."""
        assert isinstance(self._step, OfOne)
        return self._step.source


_AXES = {"d": "depth", "h": "height", "w": "width"}


def _more(sizes: Any, axis: str, name: str) -> int:
    """Return how many outputs of a transposed convolution exceed the size given by the formula."""
    kernel, stride, pad, dilation = (getattr(sizes, f"{of}_{axis}") for of in ("kernel", "stride", "pad", "dilation"))
    least = (getattr(sizes, name) - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1
    return int(getattr(sizes, f"out_{name}") - least) if sizes.transposed else 0


def _loops(size: tuple[int, int, int], loops: Sequence[tuple[int, ...]]) -> list[schema.Loop]:
    """Return loops; outermost ones over all rows or columns of the source have no size of their own."""
    made = [schema.Loop(*loop) for loop in loops]
    for dimension, number in enumerate((-1, -2), 1):
        for loop, (turns, *reads) in zip(made, loops, strict=True):
            if reads[dimension] and turns * reads[dimension] == size[dimension]:
                loop.size = number
                break
    return made


def _places(places: Sequence[int], size: int) -> schema.Places:
    """Return rows or columns of a source of ``size`` as a rule, if one applies."""
    repeat = len(places) // size
    if repeat > 1 and list(places) == [i // repeat for i in range(size * repeat)]:
        return schema.Places(step=1, repeat=repeat)
    first, last, step = _longest_run(places)
    if last == first:
        return schema.Places(before=places)
    end = max(0, size - places[last] - step)
    if step > 1 and len(range(places[first], size - end, step)) != last - first + 1:
        return schema.Places(before=places)
    after = [0 if place < 0 else size - place for place in places[last + 1 :]]
    return schema.Places(places[:first], places[first], step, 1, end, after)


def _longest_run(places: Sequence[int]) -> tuple[int, int, int]:
    """Return the first and last index of the longest run of places in equal steps, and the step."""
    best, first = (0, 0, 1), 0
    for last in range(1, len(places)):
        step = places[last] - places[last - 1]
        if step < 1 or places[last - 1] < 0:
            first = last
        elif last - first > 1 and step != places[first + 1] - places[first]:
            first = last - 1
        if last - first > best[1] - best[0]:
            best = first, last, step
    return best


def _stretch(size: int, made: int, corners: bool, scale: float | None) -> schema.Stretch:
    if scale:
        return schema.Stretch(0, 0, scale, corners)
    return schema.Stretch(0, made // size, 0.0, corners) if made % size == 0 else schema.Stretch(made, 0, 0.0, corners)
