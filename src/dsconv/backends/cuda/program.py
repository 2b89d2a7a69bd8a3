"""Steps of a network as kernel launches on one block of memory: a :class:`dsconv.backends.base.Executable`."""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.backends.base import MapOperation, Uses
from dsconv.backends.cuda import launch
from dsconv.backends.cuda.launch import Pixels, PostOps, Target, Weights
from dsconv.backends.cuda.layers import form_of
from dsconv.backends.cuda.layouts import Form, Rows, empty_rows, rows_in
from dsconv.numerics import ACTIVATION_SIGNS
from dsconv.ops import ACTIVATIONS, FLOAT_BITS, OPERATIONS
from dsconv.ops.arguments import Sizes

Size = tuple[int, int, int]


class _Value(NamedTuple):
    base: int
    offset: int
    first: int
    size: Size
    strides: tuple[int, int, int, int]

    @property
    def pixels(self) -> int:
        return self.size[1] * self.size[2]


class _Quantized(NamedTuple):
    offset: int
    form: Form
    pixels: int


class Run(NamedTuple):
    """Run: its images, and the tensors that contain the values; the first one is the memory between steps."""

    images: int
    bases: Sequence[Any]


Launch = Callable[[Run], None]


def _kept(values: Sequence[float], dtype: torch.dtype) -> Callable[[torch.device], Tensor]:
    """Return a function for the values as a tensor on a device, made once: CUDA graphs cannot copy lists."""

    @cache
    def on(device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return on


class CudaProgram:
    """Steps that launch kernels, usually one each."""

    def __init__(self) -> None:
        self._values: list[_Value] = []
        self._quantized: list[_Quantized] = []
        self._launches: list[Launch | None] = []
        self._end = 0

    # Tensors

    def values(self, base: int, offset: int, first: int, size: Size, strides: tuple[int, int, int, int]) -> int:
        self._values.append(_Value(base, offset, first, size, strides))
        if not base:
            self._end = max(self._end, offset + 4 * strides[3] * size[1] * size[2])
        return len(self._values) - 1

    def quantized(
        self,
        offset: int,
        depth: int,
        block_size: int,
        groups: int,
        grid: tuple[int, int, int, int],
        lane_bits: int,
        bits: int,
        sign: int,
        shift: bool,
        frames: int = 1,
    ) -> int:
        form = Form(depth, block_size, groups, bits, ACTIVATION_SIGNS[sign], shift)
        self._quantized.append(_Quantized(offset, form, grid[0] * grid[1] * frames))
        self._end = max(self._end, offset + form.bytes(self._quantized[-1].pixels))
        return len(self._quantized) - 1

    def quantized_bytes(
        self, depth: int, block_size: int, groups: int, grid: tuple[int, int, int, int], shift: bool, frames: int = 1
    ) -> int:
        return Form(depth, block_size, groups, 8, "adaptive", shift).bytes(grid[0] * grid[1] * frames)

    def bytes(self, images: int) -> int:
        return self._end * images

    def _pixels(self, value: int, run: Run) -> Pixels:
        """Return a value stored as consecutive pixels."""
        v = self._values[value]
        memory = run.bases[v.base].flatten()
        return Pixels(memory[(0 if v.base else v.offset * run.images // 4) + v.first :], v.strides[3])

    def _in_pixels(self, value: int, run: Run) -> Pixels:
        """Return a value as pixels, copied if it is NCHW, as an input may be."""
        if self._values[value].strides[1] == 1:
            return self._pixels(value, run)
        return Pixels(self._tensor(value, run).contiguous().flatten(), self._values[value].size[0])

    def _tensor(self, value: int, run: Run) -> Tensor:
        """Return a value as ``(N, H, W, C)``."""
        v = self._values[value]
        channels, height, width = v.size
        image, channel, row, pixel = v.strides
        at = (0 if v.base else v.offset * run.images // 4) + v.first
        memory: Tensor = run.bases[v.base].flatten()
        return memory.as_strided((run.images, height, width, channels), (image, row, pixel, channel), at)

    def _rows(self, quantized: int, run: Run) -> Rows:
        q = self._quantized[quantized]
        pixels = q.pixels * run.images
        memory: Tensor = run.bases[0].view(torch.int8)
        return rows_in(memory[q.offset * run.images :], q.form, pixels)

    # Steps

    def skip(self) -> None:
        self._launches.append(None)

    def run(self, images: int, bases: Sequence[Any], first: int, last: int, seconds: Any) -> None:
        made = Run(images, bases)
        timed = isinstance(seconds, Tensor)
        of = next(base for base in bases if base is not None)
        with torch.cuda.device_of(of):  # type: ignore[no-untyped-call]
            for index in range(first, last):
                start = time.perf_counter()
                step = self._launches[index]
                if step is not None:
                    step(made)
                if timed:
                    if of.is_cuda:
                        torch.cuda.synchronize()
                    seconds[index] += time.perf_counter() - start

    def _ends(self, uses: Uses, run: Run, size: Size) -> tuple[PostOps, Pixels | None, list[Target]]:
        result, residual, targets, activation, alpha, beta = uses
        post = PostOps(
            residual=None if residual < 0 else self._pixels(residual, run),
            activation=ACTIVATIONS[activation],
            alpha=alpha,
            beta=beta,
        )
        places = [Target(self._rows(q, run), first) for q, first in targets]
        return post, None if result < 0 else self._pixels(result, run), places

    def _finished(
        self,
        y: Pixels | None,
        targets: list[Target],
        size: Size,
        run: Run,
        compute: Callable[[Pixels | None, Target | None], None],
    ) -> None:
        """Compute a result and write it to float32 and all targets, one of them in the same kernel."""
        along = next((t for t in targets if launch.fits(t)), None)
        others = [t for t in targets if t is not along]
        if others and y is None:
            y = self._scratch(size, run)
        compute(y, along)
        self._quantize(y, others, size, run)

    def _scratch(self, size: Size, run: Run) -> Pixels:
        values = torch.empty(run.images * math.prod(size), dtype=torch.float32, device=run.bases[0].device)
        return Pixels(values, size[0])

    def _quantize(self, y: Pixels | None, targets: Sequence[Target], size: Size, run: Run) -> None:
        channels, height, width = size
        for target in targets:
            assert y is not None
            strides = (height * width * y.stride, 1, width * y.stride, y.stride)
            launch.quantize(y.values, strides, (channels, height, width), target)

    def convolve(
        self,
        sizes: Sizes,
        source: int,
        quantized: int,
        weight: Tensor,
        kds: Tensor,
        kds_shift: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        offset: Tensor | None,
        weight_bits: int,
        activation_bits: int,
        sign: int,
        uses: Uses,
    ) -> None:
        weights = Weights(weight, kds, kds_shift, weight_bits)
        size = (sizes.outputs, sizes.out_height, sizes.out_width)
        if quantized < 0 and activation_bits != FLOAT_BITS:
            form = form_of(sizes, activation_bits, ACTIVATION_SIGNS[sign], kds_shift is not None)
            strides = self._values[source].strides
            windows = launch.windows(sizes, form, strides, weight.device)  # kept here, as long as graphs read it

        def step(run: Run) -> None:
            post, y, targets = self._ends(uses, run, size)
            post = post._replace(bias=bias, gain=gain, offset=offset)
            pixels = run.images * sizes.out_height * sizes.out_width
            if activation_bits == FLOAT_BITS:
                x = self._pixels(source, run)
                self._finished(
                    y, targets, size, run, lambda y, t: launch.depthwise(x, weights, sizes, pixels, post, y, t)
                )
                return
            if quantized >= 0:
                rows = self._rows(quantized, run)
            else:
                rows = empty_rows(form, pixels, weight.device)
                launch.quantize_windows(self._pixels(source, run).values, strides, sizes, rows, windows)
            self._finished(
                y, targets, size, run, lambda y, t: launch.convolve(rows, weights, sizes, pixels, post, y, t)
            )

        self._launches.append(step)

    def join(self) -> None:
        pass  # no benefit on a GPU: all of a step's pixels are computed at once

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
        size = self._values[source].size
        made = (size[0], out[0], out[1])
        how = (divisor or (-1 if count_zeros else 0)) if average else None

        def step(run: Run) -> None:
            post, y, targets = self._ends(uses, run, made)
            x, pixels = self._pixels(source, run), run.images * out[0] * out[1]
            self._finished(
                y, targets, made, run, lambda y, t: launch.pool(x, size, out, window, how, pixels, post, y, t)
            )

        self._launches.append(step)

    def map(self, source: int, operations: Sequence[MapOperation], uses: Uses) -> None:
        v = self._values[source]

        def step(run: Run) -> None:
            post, y, targets = self._ends(uses, run, v.size)
            if y is None and not operations and post.activation == "none":
                for target in targets:
                    launch.quantize(self._pixels(source, run).values, v.strides, v.size, target)
                return
            x, y = self._in_pixels(source, run), y or self._scratch(v.size, run)
            steps = [*operations, (0, ACTIVATIONS.index(post.activation), post.alpha, post.beta, -1, None, None)]
            if operations and post.activation == "none":
                steps.pop()
            for operation in steps:
                self._change(x, y, v, operation, run)
                x = y
            self._quantize(y, targets, v.size, run)

        self._launches.append(step)

    def _change(self, x: Pixels, y: Pixels, v: _Value, operation: MapOperation, run: Run) -> None:
        kind, activation, alpha, beta, value, constants, offset = operation
        pixels, name = run.images * v.pixels, OPERATIONS[kind]
        if name in ("normalize", "softmax"):
            shape, at = (pixels, v.size[0]), x.values.storage_offset()
            rows = x.values.as_strided(shape, (x.stride, 1), at)
            norm = name == "normalize"
            made = F.layer_norm(rows, shape[1:], constants, offset, alpha) if norm else F.softmax(rows, 1)
            y.values.as_strided(shape, (y.stride, 1), y.values.storage_offset()).copy_(made)
            return
        operand = None
        if value >= 0:
            other, of = self._values[value], self._in_pixels(value, run)
            whole = other.pixels == v.pixels
            each = 0 if other.size[0] == 1 < v.size[0] else 1
            operand = (of.values, of.stride if whole else 0, of.stride * other.pixels, each)
        elif constants is not None:
            operand = (constants, 0, 0, 1)
        launch.change(
            x, y, pixels, v.pixels, v.size[0], name, activation=ACTIVATIONS[activation], alpha=alpha, beta=beta,
            operand=operand, offset=offset,
        )  # fmt: skip

    # Steps by PyTorch's own kernels

    def _by_pytorch(self, source: int, compute: Callable[[Tensor], Tensor], uses: Uses) -> None:
        """Compute a step from a value as ``(N, H, W, C)``."""

        def step(run: Run) -> None:
            made = compute(self._tensor(source, run))
            size: Size = (made.shape[3], made.shape[1], made.shape[2])
            post, y, targets = self._ends(uses, run, size)
            dense = Pixels(made.contiguous().flatten(), size[0])
            pixels, each = run.images * size[1] * size[2], size[1] * size[2]
            if y is not None or post.activation != "none":
                to = y or dense
                launch.change(
                    dense,
                    to,
                    pixels,
                    each,
                    size[0],
                    "activate",
                    activation=post.activation,
                    alpha=post.alpha,
                    beta=post.beta,
                )
                dense = to
            self._quantize(dense, targets, size, run)

        self._launches.append(step)

    def _only(self, result: int) -> Uses:
        return result, -1, [], 0, 0.0, 0.0

    def average(self, source: int, lanes: int, result: int) -> None:
        self._by_pytorch(source, lambda x: x.mean((1, 2), keepdim=True), self._only(result))

    def flatten(self, source: int, result: int) -> None:
        values = math.prod(self._values[source].size)
        self._by_pytorch(source, lambda x: x.permute(0, 3, 1, 2).reshape(len(x), 1, 1, values), self._only(result))

    def rearrange(self, source: int, loops: Sequence[tuple[int, ...]], result: int) -> None:
        def step(run: Run) -> None:
            counts = [run.images, *(loop[0] for loop in loops)]
            ends = []
            for value, part in ((source, slice(1, 4)), (result, slice(4, 7))):
                v, of = self._values[value], self._tensor(value, run)
                image, channel, row, pixel = v.strides
                strides = [sum(n * s for n, s in zip(loop[part], (channel, row, pixel), strict=True)) for loop in loops]
                ends.append(of.as_strided(counts, [image, *strides], of.storage_offset()))
            ends[1].copy_(ends[0])

        self._launches.append(step)

    def pick(self, source: int, rows: Sequence[int], columns: Sequence[int], fill: float, uses: Uses) -> None:
        dims = [(dim, _kept(places, torch.int64), min(places) < 0) for dim, places in ((1, rows), (2, columns))]

        def compute(x: Tensor) -> Tensor:
            for dim, places, fills in dims:
                index = places(x.device)
                x = x.index_select(dim, index.clamp(min=0))
                if fills:
                    shape = [1, 1, 1, 1]
                    shape[dim] = -1
                    x = x.masked_fill((index < 0).view(shape), fill)
            return x

        self._by_pytorch(source, compute, uses)

    def moments(self, source: int, groups: int, weight: Tensor | None, epsilon: float, mean: int, scale: int) -> None:
        def step(run: Run) -> None:
            x = self._tensor(source, run)
            parts = torch.unflatten(x.flatten(1, 2), 2, (groups, -1))
            variance, average = torch.var_mean(parts, (1, 3), correction=0, keepdim=True)
            scales = (1.0 / (variance + epsilon).sqrt()).expand(-1, 1, -1, parts.shape[3]).flatten(1)
            self._tensor(mean, run).flatten(1).copy_(average.expand(-1, 1, -1, parts.shape[3]).flatten(1))
            self._tensor(scale, run).flatten(1).copy_(scales if weight is None else scales * weight)

        self._launches.append(step)

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
        def between(dim: int, places: Sequence[tuple[int, int, float, float]]) -> Callable[[Tensor], Tensor]:
            one, other, *factors = zip(*places, strict=True)
            neighbours = [_kept(n, torch.int64) for n in (one, other)]
            weights = [_kept(f, torch.float32) for f in factors]
            shape = [1, 1, 1, 1]
            shape[dim] = -1

            def compute(x: Tensor) -> Tensor:
                a, b = (x.index_select(dim, n(x.device)) * w(x.device).view(shape)
                        for n, w in zip(neighbours, weights, strict=True))  # fmt: skip
                return a + b

            return compute

        in_rows, in_columns = between(1, rows), between(2, columns)
        self._by_pytorch(source, lambda x: in_rows(in_columns(x)), uses)

    def average_windows(
        self,
        source: int,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        at_once: bool,
        uses: Uses,
    ) -> None:
        size = (len(rows), len(columns))
        self._by_pytorch(source, lambda x: F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1), uses)
