"""Execution of the steps of a network: most in one call of an executable, on one block of memory; some in PyTorch."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dsconv.backends import lowering
from dsconv.compilation.layouts import are_pixels, lies_in_lines, restrided
from dsconv.compilation.lowering import Lowered
from dsconv.compilation.memory import ALIGNMENT, Buffer, place
from dsconv.compilation.operators import operator_of
from dsconv.compilation.operators.convolution import join_steps
from dsconv.compilation.operators.pytorch import Call
from dsconv.compilation.values import Quantized, Value
from dsconv.data.inputs import output_name
from dsconv.numerics import ACTIVATION_SIGNS
from dsconv.ops import use_threads
from dsconv.structures import paths_in
from dsconv.threads import PyTorchOnOneThread, threads

_GAP = 16  # values, a cache line
_SPARE = 4  # blocks of memory that are kept for the next calls


class OtherLayout(Exception):
    """PyTorch made a tensor with other strides than recorded: its kernels may depend on batch or threads."""


class _Segment(NamedTuple):
    """Steps ``first`` to ``last``, exclusive: of the executable, or one of PyTorch."""

    first: int
    last: int
    call: Call | None


class _Output:
    """Placeholder for an output."""


class Axis(IntEnum):
    """Meaning of a dimension of an input or output; ONE has a single value."""

    ONE = 0
    CHANNELS = 1
    FRAMES = 2
    ROWS = 3
    COLUMNS = 4


class Port(NamedTuple):
    """Input or output ``(N, *shape)`` and the tensor that it is; None is an input that nothing reads."""

    value: Value | None
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]


class Memory(NamedTuple):
    """Location of a tensor in the memory of a sample.

    Attributes:
        key: tensors with the same key are in the same memory.
        base: index of its address; 0 is the memory between steps.
        pixel: values per pixel.
        lines: whether the pixels of a channel are contiguous, otherwise the channels of a pixel.
        first: the first channel of the tensor there.
    """

    key: object
    base: int
    pixel: int
    lines: bool
    first: int


_PORT_SAMPLES = 2  # number of samples that determines the distance between samples


class Program:
    """Steps of a captured network, ready to run over batches of images.

    Attributes:
        steps: the steps in order.
        backend: backend that executes them, except those of PyTorch.
        memory_bytes: size of the memory between steps, for one image.
        images_at_once: a larger batch is run in parts of this size, or of the number of threads if that is larger. None
            if it is not split, because PyTorch's results may depend on other images.
        cached_bytes: limit for the memory between steps when a batch is split.
        joins: whether steps may be computed together.
    """

    def __init__(self, lowered: Lowered, structure: Callable[[Sequence[Any]], Any], any_batch: bool = True):
        self._inputs, self._outputs, self._structure = lowered.inputs, lowered.outputs, structure
        given = [node.meta["val"] for node in self._inputs]
        self._only = lowered.batch if isinstance(lowered.batch, int) else None
        # For each input, whether it has a row for each sample.
        self._batched = [x.dim() > 0 and str(x.shape[0]) == str(lowered.batch) for x in given]
        self._device = given[0].device
        self.backend, self._executable = lowering(self._device)
        self.steps, self.constants, self._values = lowered.steps, lowered.constants, lowered.values
        self.joins = self.backend.cached_bytes is not None  # there are caches to compute in
        if self.joins:
            join_steps(self.steps)
        self._renamed, self._counts = lowered.renamed, lowered.counts
        self._bases: dict[Value, int] = {}
        self._buffers: dict[Value | Quantized, Buffer] = {}
        self._ids: dict[Value | Quantized, int] = {}
        sources = [self._values[node] for node in self._inputs if node in self._values]
        self._as_they_come = {source for source in sources if self._comes_as_read(source)}
        # Tensors of which an output is all or a part.
        self._returned_from = {self._values[n].root() for n in self._outputs if n in self._values}
        self._spread = self._find_spread()
        self._plan_memory()
        for step in self.steps:
            step.add(self._executable, self)
            if step.joined is not None:
                self._executable.join()
        self._segments = self._segments_of_calls()
        # Results of steps of the executable outside the memory: the network's outputs.
        made = {s.result for s in self.steps if s.result in self._bases and not s.in_pytorch}
        self._returns = {v: base for v, base in self._bases.items() if v in made}
        calls = [step for step in self.steps if step.in_pytorch]
        # Nodes with a tensor of their own, in the layout of the model where that matters.
        self._as_in_model = {*self._inputs, *self.constants, *(step.node for step in calls)}
        nodes = {n for step in calls for n in (step.node, *step.node.all_input_nodes)}
        nodes.update(node for node in self._outputs if isinstance(node, fx.Node))
        self._strides = {node: s for node in nodes if (s := _strides(node, lowered.batch)) is not None}
        self.memory_bytes: int = self._executable.bytes(1)
        self._alone = any_batch and self._treats_images_alone()
        self.cached_bytes = self.backend.cached_bytes if self._alone else None
        self.images_at_once = None if self.cached_bytes is None else self.cached_bytes // max(1, self.memory_bytes)
        self._most_images: int | None = None  # for which there was enough memory
        self._repeated = self.backend.repeated(self._run, not any(step.in_pytorch for step in self.steps))
        self._spare: deque[Tensor] = deque(maxlen=_SPARE)

    def __call__(self, xs: Sequence[Tensor], seconds: Tensor | None = None) -> Any:
        """Run the network on its inputs; add the time of each step to float64 ``seconds (steps,)``, if given.

        A batch that exceeds the memory of a GPU is split, as are later ones of the same size.

        Raises:
            torch.OutOfMemoryError: one image is too large, or the network computes something from several images.
            OtherLayout: the recorded strides do not hold for this batch or number of threads.
        """
        with PyTorchOnOneThread():
            while True:
                at_once = self._at_once(self._count(xs))
                try:
                    return self._structure(self._in_parts(xs, at_once, seconds))
                except torch.OutOfMemoryError:
                    if not self._alone or at_once < 2:
                        raise
                # Memory of the failed run is free here, since nothing refers to the error any more.
                self._most_images = at_once // 2

    def _at_once(self, images: int) -> int:
        most = images if self._most_images is None else min(images, self._most_images)
        if self.images_at_once is None or most <= max(1, self.images_at_once):
            return most
        return min(most, max(self.images_at_once, threads()))

    def _count(self, xs: Sequence[Tensor]) -> int:
        return self._only or next(len(x) for x, batched in zip(xs, self._batched, strict=True) if batched)

    def _in_parts(self, xs: Sequence[Tensor], at_once: int, seconds: Tensor | None) -> list[Any]:
        count = self._count(xs)
        if count <= at_once:
            return self._repeated(xs) if seconds is None else self._run(xs, seconds)
        parts = []
        for first in range(0, count, at_once):
            pairs = zip(xs, self._batched, strict=True)
            part = [x[first : first + at_once] if batched else x for x, batched in pairs]
            parts.append(self._in_parts(part, at_once, seconds))
        joined = zip(self._outputs, map(_joined, zip(*parts, strict=True)), strict=True)
        return [self._in_layout(node, made) for node, made in joined]

    # Memory

    def _comes_as_read(self, source: Value) -> bool:
        """Return whether an input is NCHW and all of its readers accept that as well as NHWC."""
        recorded = source.node.meta
        if not lies_in_lines(source.node) and are_pixels(recorded["sizes"], recorded["strides"]):
            return False
        readers = [step for step in self.steps if any(v.root() is source for v in step.float_values())]
        return all(step.takes_lines() for step in readers)

    def _treats_images_alone(self) -> bool:
        """Return whether the results for parts of a batch are parts of the whole result."""
        return all(node in self._values for node in self._outputs) and all(
            operator_of(step.node).returns == "nothing"
            or (operator_of(step.node).by_image and step.node in self._values)
            for step in self.steps
            if step.in_pytorch
        )

    def _pixel(self, root: Value) -> int:
        """Return the stride from one pixel to the next, in values."""
        return root.size[0] + (_GAP if root in self._spread else 0)

    def _find_spread(self) -> set[Value]:
        """Return the tensors with a gap after each pixel: at power-of-two strides, pixels would share few cache sets.

        Only layers and maps support gaps: PyTorch would sum in another order.
        """
        able, unable = set[Value](), set[Value]()
        for step in self.steps:
            roots = {value.root() for value in step.float_values()}
            (able if step.takes_gaps else unable).update(roots)
        return {
            root
            for root in able - unable
            if root.size[0] % 256 == 0
            and math.prod(root.size[1:]) > 1
            and not root.outside
            and root not in self._returned_from
        }

    def _plan_memory(self) -> None:
        end = len(self.steps)
        # A tensor returned by PyTorch may be a view of its input, which must live as long.
        outputs = [self._own(node) for node in self._outputs if isinstance(node, fx.Node)]
        last: dict[fx.Node, int] = dict.fromkeys([*outputs, *(root.node for root in self._returned_from)], end)
        for index, step in reversed(list(enumerate(self.steps))):
            call = step.in_pytorch
            inputs = map(self._own, step.node.all_input_nodes)
            reads = list(inputs) if call else [v.node for v in step.float_values() if v is not step.result]
            for node in {*reads, *(self._values[n].root().node for n in reads if n in self._values)}:
                last[node] = max(last.get(node, 0), last.get(step.node, index) if call else index)
        for index, step in enumerate(self.steps):
            until = last.get(step.node, index) if step.in_pytorch else index
            for value in step.float_values():
                root = value.root()
                if not root.outside:
                    size = 4 * self._pixel(root) * math.prod(root.size[1:])
                    self._use(root, size, index, end if root in self._returned_from else until)
                elif not step.in_pytorch:
                    self._bases.setdefault(root, len(self._bases) + 1)
            for quantized in step.quantized_tensors():
                self._use(quantized, self.quantized_bytes(quantized), index, index)
        self._sum_in_place()
        place(list(dict.fromkeys(self._buffers.values())))

    def _use(self, of: Value | Quantized, size: int, first: int, last: int) -> None:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        buffer = self._buffers.setdefault(of, Buffer(size, first, last))
        buffer.use(first)
        buffer.use(last)

    def _sum_in_place(self) -> None:
        """Let a sum replace its residual in memory, if that is read for the last time."""
        for index, step in enumerate(self.steps):
            result, other = step.result, step.residual
            if step.reads() is None or result is None or other is None:
                continue
            mine, its = self._buffers.get(result), self._buffers.get(other)
            if mine is None or its is None or mine is its or its.last != index or mine.first != index:
                continue
            alike = result.size == other.size and self._pixel(result) == self._pixel(other)
            if alike and result.home is None and other.home is None:
                its.use(mine.last)
                self._buffers[result] = its

    def quantized_bytes(self, q: Quantized) -> int:
        """Return the size of a quantized tensor in bytes, for an image."""
        form = q.format
        grid = (*q.size, *q.pad)
        return self._executable.quantized_bytes(form.depth, form.block_size, form.groups, grid, form.shift, q.frames)

    # Steps of the executable

    def _segments_of_calls(self) -> list[_Segment]:
        """Return segments for all steps, with PyTorch's steps alone."""
        segments: list[_Segment] = []
        for index, step in enumerate(self.steps):
            call = step if isinstance(step, Call) else None
            if call is None and segments and segments[-1].call is None:
                segments[-1] = segments[-1]._replace(last=index + 1)
            else:
                segments.append(_Segment(index, index + 1, call))
        return segments

    def value(self, of: Value | None) -> int:
        """Return the number of a float32 tensor in the executable; -1 for None."""
        if of is None:
            return -1
        if of not in self._ids:
            self._ids[of] = self._executable.values(*self.place_of(of))
        return self._ids[of]

    def quantized(self, of: Quantized | None) -> int:
        """Return the number of a quantized tensor in the executable; -1 for None."""
        if of is None:
            return -1
        if of not in self._ids:
            self._ids[of] = self._executable.quantized(*self.place_of_quantized(of))
        return self._ids[of]

    def memory_of(self, of: Value) -> Memory:
        """Return the location of a float32 tensor."""
        root, first = of.place()
        lines = root in self._as_they_come
        pixel = root.size[0] if lines else self._pixel(root)
        base = self._bases.get(root, 0)
        return Memory(root if base else self._buffers[root], base, pixel, lines, first)

    def place_of(self, of: Value) -> tuple[int, int, int, tuple[int, int, int], tuple[int, int, int, int]]:
        """Return the arguments of :meth:`~dsconv.backends.base.Executable.values` for a float32 tensor."""
        root, _ = of.place()
        memory = self.memory_of(of)
        offset = 0 if memory.base else self._buffers[root].offset
        _, height, width = root.size
        strides = (memory.pixel * height * width, 1, width * memory.pixel, memory.pixel)
        if memory.lines:
            strides = (memory.pixel * height * width, height * width, width, 1)
        return memory.base, offset, memory.first * strides[1], of.size, strides

    def place_of_quantized(self, of: Quantized) -> tuple[Any, ...]:
        """Return the arguments of :meth:`~dsconv.backends.base.Executable.quantized` for a quantized tensor."""
        form = of.format
        sign, lane_bits = ACTIVATION_SIGNS.index(form.sign), 8 if form.wide else 4
        sizes = form.depth, form.block_size, form.groups, (*of.size, *of.pad)
        return self._buffers[of].offset, *sizes, lane_bits, form.bits, sign, form.shift, of.frames

    def constant(self, tensor: Tensor | None) -> Any:
        """Return a tensor in the form that the executable takes."""
        return self.backend.constant(tensor)

    def output_names(self, taken: Sequence[str]) -> list[str]:
        """Return the names of outputs in a file, different from those already ``taken``."""
        ways = paths_in(self._structure([_Output() for _ in self._outputs]), _Output)
        return [output_name(way, taken) for way, _ in ways]

    def ports(self) -> tuple[list[Port], list[Port | None]]:
        """Return the tensors of its inputs and outputs; None for an output that no step makes for each sample."""
        images, env = _PORT_SAMPLES, dict[fx.Node, Any](self.constants)
        env.update(dict.fromkeys(self._counts, images))
        memory = torch.empty(max(1, self._executable.bytes(images) // 4), dtype=torch.float32, device=self._device)
        inputs = []
        for node in self._inputs:
            source, made = self._values.get(node), node.meta["val"]
            if source is None or source not in self._bases:
                shape = tuple(made.shape[1:])
                inputs.append(Port(None, shape, (Axis.ONE,) * len(shape)))
                continue
            x = torch.empty((images, *made.shape[1:]), dtype=torch.float32, device=self._device)
            env[node] = x if source in self._as_they_come else _pixels(x, source).movedim(-1, source.dim)
            port = self._port(source, env[node])
            assert port is not None
            inputs.append(port)
        for value in self._returns:
            channels, height, width = value.size
            y = torch.empty((images, height, width, channels), dtype=torch.float32, device=self._device)
            env[value.node] = _of_node(y, value)
        return inputs, [self._port_of_output(node, env, memory) for node in self._outputs]

    def _port_of_output(self, node: Any, env: dict[fx.Node, Any], memory: Tensor) -> Port | None:
        own = self._own(node) if isinstance(node, fx.Node) else None
        if own is None or own not in self._values:
            return None
        value = self._values[own]
        if own not in env:
            if value.root().outside and value.root().node not in env:
                return None  # an input that no step reads
            env[own] = self._view(value, _PORT_SAMPLES, env, memory)
        made = self._tensor(node, env)
        if not isinstance(made, Tensor) or made.dim() < 1 or len(made) != _PORT_SAMPLES:
            return None
        return self._port(value, made)

    def _port(self, value: Value, made: Tensor) -> Port | None:
        """Return the port of an input or output that consists of all of a value, with a meaning for each dimension."""
        _, _, _, (channels, height, width), (image, channel, y, x) = self.place_of(value)
        frame = height // value.frames
        over = {
            Axis.CHANNELS: (channels, channel),
            Axis.FRAMES: (value.frames, frame * y),
            Axis.ROWS: (frame, y),
            Axis.COLUMNS: (width, x),
        }
        axes = []
        for size, stride in zip(made.shape[1:], made.stride()[1:], strict=True):
            found = (axis for axis, runs in over.items() if size == 1 or runs == (size, stride))
            axes.append(Axis.ONE if size == 1 else next(found, None))
        values = math.prod(made.shape[1:])
        if None in axes or values != channels * height * width or made.stride(0) != image:
            return None
        return Port(value, tuple(made.shape[1:]), tuple(axis for axis in axes if axis is not None))

    # Running

    def _run(self, xs: Sequence[Tensor], seconds: Tensor | None = None) -> list[Any]:
        # Work done on every call takes long after the network has replaced the contents of the caches: it is kept
        # small.
        images = self._count(xs)
        env: dict[fx.Node, Any] = {**self.constants, **dict.fromkeys(self._counts, images)}
        env.update(zip(self._inputs, xs, strict=True))
        memory = self._memory(self._executable.bytes(images))
        addresses: list[Any] = [self.constant(None)] * (len(self._bases) + 1)
        addresses[0] = self.constant(memory)
        held: list[Tensor] = []  # until the steps are done
        for node, x in zip(self._inputs, xs, strict=True):
            source = self._values.get(node)
            if source in self._bases:
                assert source is not None
                held.append(x.contiguous() if source in self._as_they_come else _pixels(x, source))
                addresses[self._bases[source]] = self.constant(held[-1])
        for value, base in self._returns.items():
            channels, height, width = value.size
            y = torch.empty((images, height, width, channels), dtype=torch.float32, device=self._device)
            env[value.node] = _of_node(y, value)
            addresses[base] = self.constant(y)
        kept: dict[Any, Tensor] = {}
        use_threads()
        for segment in self._segments:
            if segment.call is None:
                times = self.constant(seconds)
                self._executable.run(images, addresses, segment.first, segment.last, times)
            else:
                since = time.perf_counter()
                self._call(segment.call, images, env, kept, memory, addresses)
                if seconds is not None:
                    seconds[segment.first] += time.perf_counter() - since
        outputs = [self._returned(output, images, env, memory) for output in self._outputs]
        if self.backend.keeps_memory:
            self._spare.append(memory)
        return outputs

    def _call(
        self,
        step: Call,
        images: int,
        env: dict[fx.Node, Any],
        kept: dict[Any, Tensor],
        memory: Tensor,
        addresses: list[Any],
    ) -> None:
        """Run a step in PyTorch; ``kept`` has tensors in the model's layouts, and inputs of steps of the executable."""
        for value in step.reads_values:
            if value.node not in env:
                env[value.node] = self._view(value, images, env, memory)
        node: Any = step.node

        def given(n: fx.Node) -> Any:
            x = self._tensor(n, env)
            if not step.faithful or n in self._as_in_model:
                return x
            strides = self._strides.get(n)
            if strides is None:
                return x
            if n not in kept:
                kept[n] = restrided(x, strides)
            return kept[n]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
        env[node] = made = node.target(*args, **kwargs)
        if step.faithful and step.result is not None:
            self._check_layout(node, made)
        if step.result in self._bases:
            made = _pixels(made, step.result)
            kept[step] = made
            addresses[self._bases[step.result]] = self.constant(made)

    def _check_layout(self, node: fx.Node, made: Tensor) -> None:
        strides = self._strides.get(node)
        # Parts of a batch may have one image, whose stride is arbitrary.
        if strides is not None and made.stride()[1:] != strides[1:]:
            raise OtherLayout(f"{node}: recorded {strides}, got {made.stride()}")

    def _in_layout(self, node: Any, made: Any) -> Any:
        """Return an output with its strides in the model."""
        strides = self._strides.get(node)
        return made if strides is None or not isinstance(made, Tensor) else restrided(made, strides)

    def _view(self, value: Value, images: int, env: dict[fx.Node, Any], memory: Tensor) -> Tensor:
        """Return a value of the program as a PyTorch tensor."""
        root, first = value.place()
        channels, height, width = root.size
        if root.outside:
            whole: Tensor = env[root.node]
            part = whole.narrow(root.dim, first, value.size[0])
            if part.dim() == value.node.meta["val"].dim() and value.dim == root.dim:
                return part
            return _of_node(part.movedim(root.dim, -1).reshape(images, height, width, value.size[0]), value)
        at = self._buffers[root].offset * images // 4 + first
        shape = (images, height, width, value.size[0])
        strides = (channels * height * width, width * channels, channels, 1)
        return _of_node(memory.as_strided(shape, strides, at), value)

    def _own(self, node: fx.Node) -> fx.Node:
        """Return the node whose image tensor a node renames, or the node itself."""
        while node in self._renamed:
            node = self._renamed[node]
        return node

    def _tensor(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """Return an existing tensor, perhaps under another shape."""
        if node not in env and node in self._renamed:
            rest: Any = fx.node.map_arg(node.args[1:], lambda n: env[n])
            made: Any = node.target
            env[node] = made(self._tensor(self._renamed[node], env), *rest, **node.kwargs)
        return env[node]

    def _returned(self, node: Any, images: int, env: dict[fx.Node, Any], memory: Tensor) -> Any:
        if not isinstance(node, fx.Node):
            return node
        own = self._own(node)
        if own not in env:
            env[own] = self._view(self._values[own], images, env, memory)
        made = self._tensor(node, env)
        if node not in self._as_in_model:
            made = self._in_layout(node, made)
        inside = isinstance(made, Tensor) and made.untyped_storage().data_ptr() == memory.data_ptr()
        return _copied(made) if inside else made

    def _memory(self, size: int) -> Tensor:
        """Return float32 memory of ``size`` bytes that no other call uses at this time."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = None
        if memory is None or memory.nbytes < size:
            memory = torch.empty(max(1, -(-size // 4)), dtype=torch.float32, device=self._device)
        return memory


def _pixels(x: Tensor, value: Value) -> Tensor:
    """Return the values of a node's tensor with the channels of a pixel contiguous; a copy if necessary."""
    return x.movedim(value.dim, -1).contiguous()


def _of_node(pixels: Tensor, value: Value) -> Tensor:
    """Return a tensor ``(N, H, W, C)`` in the shape of a value's node."""
    dims = value.node.meta["val"].dim()
    if dims < 4:
        pixels = pixels.flatten(0 if dims == 2 else 1, 2)
    if dims == 5:
        pixels = torch.unflatten(pixels, 1, (value.frames, -1))
    return pixels.movedim(-1, value.dim)


def _strides(node: fx.Node, batch: Any) -> tuple[int, ...] | None:
    """Return the strides of an image tensor in the model."""
    made = node.meta.get("val")
    strides: tuple[int, ...] | None = node.meta.get("strides")
    of_images = isinstance(made, Tensor) and made.dim() > 0 and str(made.shape[0]) == str(batch)
    return strides if of_images else None


def _copied(x: Tensor) -> Tensor:
    """Return a copy with the strides of ``x``."""
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    return torch.empty_strided(once.shape, once.stride(), dtype=x.dtype, device=x.device).copy_(once).expand(x.shape)


def _joined(parts: Sequence[Any]) -> Any:
    """Return an output for the whole batch, joined from those of its parts."""
    return torch.cat(list(parts)) if len(parts) > 1 and isinstance(parts[0], Tensor) else parts[0]
