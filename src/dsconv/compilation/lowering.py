"""From a captured graph to steps: what the program of the extension computes, and what is left to PyTorch.

A tensor of images ``(N, C, H, W)`` or ``(N, C)`` is a :class:`Value`. It exists as float32, whose channels lie side by
side, where somebody wants it so, and quantized in every :class:`Format` in which a layer wants it; the step that makes
it writes all of them. What is concatenated is written where it will be needed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dsconv.compilation.averages import OWN_LANES, lanes_of_pytorch
from dsconv.compilation.fusion import Activations, batchnorm_terms, constant, only_user
from dsconv.compilation.layouts import in_one_format, is_by_format, is_by_vectors, is_exact, lies_in_lines, makes_rows
from dsconv.ops import cpu

_aten, _dsconv = torch.ops.aten, torch.ops.dsconv


class Format(NamedTuple):
    """How a layer wants its input quantized: blocks of ``block_size`` over ``depth`` values of each of the groups."""

    depth: int
    block_size: int
    groups: int
    wide: bool
    bits: int
    sign: str
    shift: bool


@dataclass(eq=False)
class Quantized:
    """A value in one format, with a border of zeros as wide as any layer that reads it needs."""

    format: Format
    size: tuple[int, int]
    pad: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Value:
    """A tensor of images.

    Attributes:
        size: channels, height and width.
        direct: whether the step that makes it can quantize it as well.
        in_float: whether it is wanted in float32.
        outside: it is not in the program's memory: an input, an output, or what PyTorch makes.
        quantized: it in every format that is wanted.
        pieces: what it is a concatenation of.
        home: the concatenation whose memory it is a part of, from channel ``first`` on.
    """

    node: fx.Node
    size: tuple[int, int, int]
    direct: bool = False
    in_float: bool = False
    outside: bool = False
    quantized: dict[Format, Quantized] = field(default_factory=dict)
    pieces: tuple["Value", ...] = ()
    home: "Value | None" = None
    first: int = 0
    # Quantized concatenations that this is a part of, and from which channel on.
    parts: list[tuple[Quantized, int]] = field(default_factory=list)

    def want(self, wanted: Format, pad: tuple[int, int] = (0, 0)) -> Quantized:
        """It in that format, with a border of at least ``pad``."""
        found = self.quantized.setdefault(wanted, Quantized(wanted, self.size[1:]))
        found.pad = (max(found.pad[0], pad[0]), max(found.pad[1], pad[1]))
        return found


@dataclass(eq=False)
class Convolution:
    """A convolution or linear layer; ``quantized`` is what it reads, but for flattened blocks."""

    arguments: dict[str, Any]
    sizes: tuple[int, ...]
    source: Value
    depthwise: bool
    quantized: Quantized | None = None


@dataclass(eq=False)
class Map:
    """``source * scale + shift``, rounded ``once`` or twice, or ``source``; times ``gate``."""

    source: Value
    scale: Tensor | None = None
    shift: Tensor | None = None
    once: bool = False
    gate: Value | None = None


@dataclass(eq=False)
class Pool:
    """A maximum or an average over windows: (kernel, stride, padding, dilation), each of height and width."""

    source: Value
    window: tuple[int, ...]
    average: bool = False
    count_zeros: bool = False
    divisor: int = 0


@dataclass(eq=False)
class Average:
    """The average of every channel of an image, in the order that so many lanes give."""

    source: Value
    lanes: int


@dataclass(eq=False)
class Flatten:
    """All values of an image as channels of one pixel, those of a channel one after another."""

    source: Value


@dataclass(eq=False)
class Call:
    """Something that PyTorch computes, of native values ``reads``.

    Attributes:
        faithful: whether it is given tensors in the memory layout that they have in the model.
        by_vectors: whether another layout will do where it leaves nothing beside full vectors.
    """

    reads: tuple[Value, ...]
    faithful: bool = False
    by_vectors: bool = False


@dataclass(eq=False)
class Step:
    """One thing to do; ``result`` and ``targets`` are written by it.

    Attributes:
        node: the last one of the graph that it computes.
        fused: names of what it computes besides.
        targets: quantized tensors, and the channel there that its first one becomes.
    """

    node: fx.Node
    does: Convolution | Map | Pool | Average | Flatten | Call
    result: Value | None = None
    residual: Value | None = None
    activation: str = "none"
    slope: float = 0.0
    fused: list[str] = field(default_factory=list)
    targets: list[tuple[Quantized, int]] = field(default_factory=list)

    def float_values(self) -> Iterable[Value]:
        """What it reads and writes in float32."""
        if isinstance(self.does, Call):
            yield from self.does.reads
        elif not isinstance(self.does, Convolution) or self.does.quantized is None:
            yield self.does.source
        if isinstance(self.does, Map) and self.does.gate is not None:
            yield self.does.gate
        if self.residual is not None:
            yield self.residual
        if self.result is not None and self.result.in_float:
            yield self.result

    def quantized_tensors(self) -> Iterable[Quantized]:
        """What it reads and writes quantized."""
        if isinstance(self.does, Convolution) and self.does.quantized is not None:
            yield self.does.quantized
        yield from (quantized for quantized, _ in self.targets)


class Lowered(NamedTuple):
    """The steps of a graph, its input, the nodes that it returns, and those that stand for tensors of the model.

    ``structure`` makes what the model returns of a list of the outputs; ``batch`` is the batch size, or its symbol.
    """

    steps: list[Step]
    input: Value
    outputs: tuple[Any, ...]
    structure: Callable[[Any], Any]
    constants: dict[fx.Node, Tensor]
    batch: Any


def lower(module: fx.GraphModule, activations: Activations, own_averages: bool) -> Lowered:
    """Steps of a graph after :func:`dsconv.compilation.fusion.fuse` that takes one tensor of images.

    Averages of whole images have the bits of PyTorch's but for ``own_averages``, which are the same everywhere.
    """
    return _Lowering(module, activations, own_averages).lowered()


class _Lowering:
    def __init__(self, module: fx.GraphModule, activations: Activations, own_averages: bool):
        self.module, self.activations, self.own_averages = module, activations, own_averages
        self.values: dict[fx.Node, Value] = {}
        self.steps: list[Step] = []
        self.absorbed: set[fx.Node] = set()
        (self.placeholder,) = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.batch = self.placeholder.meta["val"].shape[0]

    def lowered(self) -> Lowered:
        # What is neither images nor rows is for PyTorch alone.
        source = self._value(self.placeholder) or Value(self.placeholder, (1, 1, 1))
        source.outside = True
        for node in self.module.graph.nodes:
            if node.op == "call_function" and node not in self.absorbed and self._constant(node) is None:
                self.steps.append(self._step(node))
        (output,) = [node for node in self.module.graph.nodes if node.op == "output"]
        for node in output.all_input_nodes:
            returned = self._value(node)
            if returned is not None:
                returned.in_float = True
                returned.outside = returned.outside or not returned.pieces
        self._ask_for_layouts(output)
        self._place_concatenations()
        self._write_quantized(source)
        nodes = [node for node in self.module.graph.nodes if node.op in ("get_attr", "call_function")]
        constants = {node: value for node in nodes if (value := self._constant(node)) is not None}
        outputs, any_one = tuple(output.args[0]), object()
        structure: Callable[[Any], Any] = self.module.graph._codegen.process_outputs
        if len(outputs) == 1 and structure([any_one]) is any_one:
            structure = itemgetter(0)  # faster
        return Lowered(self.steps, source, outputs, structure, constants, self.batch)

    def _value(self, node: fx.Node) -> Value | None:
        """The tensor of images that a node makes; None where it makes something else."""
        if node not in self.values:
            size = self._size(node)
            if size is None:
                return None
            self.values[node] = Value(node, size)
        return self.values[node]

    def _size(self, node: fx.Node) -> tuple[int, int, int] | None:
        made = node.meta.get("val")
        if not isinstance(made, Tensor) or made.dtype != torch.float32 or made.dim() not in (2, 4):
            return None
        batch, *size = made.shape
        if str(batch) != str(self.batch) or not all(isinstance(n, int) and n > 0 for n in size):
            return None
        channels, *image = size
        return (channels, *(image or (1, 1)))

    def _constant(self, node: Any) -> Tensor | None:
        """A tensor of the model."""
        return constant(self.module, node)

    # What becomes of a node

    def _step(self, node: fx.Node) -> Step:
        make = _Lowering._activation if node.target in self.activations else _NATIVE.get(node.target)
        step = make(self, node) if make is not None and self._value(node) is not None else None
        return step or self._call(node)

    def _call(self, node: fx.Node) -> Step:
        reads = tuple(value for n in node.all_input_nodes if (value := self._value(n)) is not None)
        for value in reads:
            value.in_float = True
        result = self._value(node)
        if result is not None:
            result.outside = result.in_float = True
        return Step(node, Call(reads), result, fused=list(node.meta.get("fused", [])))

    def _native(self, node: Any) -> Value | None:
        return self._value(node) if isinstance(node, fx.Node) else None

    def _convolution(self, node: fx.Node) -> Step | None:
        given = cpu.arguments_of(node.target, node.args, node.kwargs)
        source, residual = self._native(given["x"]), self._native(given["residual"])
        result = self._value(node)
        if source is None or result is None or (given["residual"] is not None and residual is None):
            return None
        for name in cpu.WEIGHTS:
            tensor = self._constant(given[name])
            if tensor is None and given[name] is not None:
                return None
            given[name] = tensor
        sizes = cpu.checked_sizes(source.size, given)
        groups, flat = sizes[-3], bool(sizes[-1])
        depthwise = flat and groups == source.size[0] > 1
        if depthwise and groups != result.size[0]:
            return None  # it writes lines
        layer = Convolution(given, sizes, source, depthwise)
        if flat:
            source.in_float = True
        else:
            wanted = Format(
                source.size[0] // groups,
                sizes[-2],
                groups,
                given["weight_bits"] > 4,
                given["activation_bits"],
                given["sign"],
                given["kds_shift"] is not None,
            )
            layer.quantized = source.want(wanted, (sizes[11], sizes[12]))
        if residual is not None:
            residual.in_float = True
        result.direct = depthwise or groups == 1
        fused = ["bias"] * (given["bias"] is not None) + node.meta.get("fused", [])
        return Step(node, layer, result, residual, given["activation"], given["slope"], fused)

    def _product(self, node: fx.Node) -> Step | None:
        return self._affine(node) or self._gate(node)

    def _gate(self, node: fx.Node) -> Step | None:
        """A product of two tensors, one of which may be of one pixel."""
        pair = [value for n in node.args if (value := self._native(n)) is not None]
        if len(pair) < 2 or node.kwargs or len({v.node.meta["val"].dim() for v in pair}) > 1:
            return None
        source, gate = sorted(pair, key=lambda value: -math.prod(value.size))
        if gate.size not in (source.size, (source.size[0], 1, 1)):
            return None
        gate.in_float = True
        return self._map(node, Map(source, gate=gate), ["mul"])

    def _affine(self, node: fx.Node) -> Step | None:
        """A product and a sum with a number for each channel."""
        add = only_user(node)
        source = self._native(node.args[0])
        if source is None or add is None or add.target is not _aten.add.Tensor or add.kwargs or add.args[0] is not node:
            return None
        shape = (source.size[0], *[1] * (node.meta["val"].dim() - 2))
        constants = [self._constant(n) for n in (node.args[1], add.args[1])]
        if any(c is None or tuple(c.shape) != shape or c.dtype != torch.float32 for c in constants):
            return None
        scale, shift = (c.flatten().contiguous() for c in constants if c is not None)
        self.absorbed.add(node)
        return self._map(add, Map(source, scale, shift), ["scale", "shift"])

    def _batchnorm(self, node: fx.Node) -> Step | None:
        source, terms = self._native(node.args[0]), batchnorm_terms(self.module, node)
        if source is None or terms is None or not in_one_format(source.node):
            return None
        return self._map(node, Map(source, *terms, once=True), ["batch_norm"])

    def _sum(self, node: fx.Node) -> Step | None:
        source, other = (self._native(n) for n in node.args[:2])
        if source is None or other is None or node.kwargs or source.size != other.size:
            return None
        other.in_float = True
        return self._map(node, Map(source), ["add"], residual=other)

    def _activation(self, node: fx.Node) -> Step | None:
        source, found = self._native(node.args[0]), self.activations[node.target](node)
        return None if source is None or found is None else self._map(node, Map(source), [], **found)

    def _map(self, node: fx.Node, does: Map, fused: list[str], **settings: Any) -> Step | None:
        does.source.in_float = True
        self.absorbed.add(node)
        follower = only_user(node)
        if "activation" not in settings and follower is not None and follower.target in self.activations:
            found = self.activations[follower.target](follower)
            if found is not None:
                settings |= found
                node = follower
                self.absorbed.add(node)
        result = self._value(node)
        assert result is not None
        result.direct = True
        if "activation" in settings:
            fused = [*fused, settings["activation"]]
        return Step(node, does, result, fused=fused, **settings)

    def _pool(self, node: fx.Node) -> Step | None:
        given = cpu.arguments_of(node.target, node.args, node.kwargs)
        source, result = self._native(node.args[0]), self._value(node)
        if source is None or result is None or node.meta["val"].dim() != 4:
            return None
        average = node.target is _aten.avg_pool2d.default
        kernel = _pair(given["kernel_size"])
        stride = _pair(given["stride"]) if given["stride"] else kernel
        dilation = (1, 1) if average else _pair(given["dilation"])
        window = (*kernel, *stride, *_pair(given["padding"]), *dilation)
        zeros, divisor = (given["count_include_pad"], given["divisor_override"] or 0) if average else (False, 0)
        source.in_float = True
        result.direct = True
        return Step(node, Pool(source, window, average, zeros, divisor), result)

    def _average(self, node: fx.Node) -> Step | None:
        source, result = self._native(node.args[0]), self._value(node)
        if source is None or result is None or result.size != (source.size[0], 1, 1):
            return None
        given = cpu.arguments_of(node.target, node.args, node.kwargs)
        over_images = sorted(dim % 4 for dim in given.get("dim") or (2, 3)) == [2, 3]
        if node.args[0].meta["val"].dim() != 4 or not over_images:  # type: ignore[union-attr]
            return None
        lanes: int | None = OWN_LANES
        if not self.own_averages:
            # Of another layout, PyTorch takes an average in another order.
            lanes = lanes_of_pytorch(source.size) if lies_in_lines(source.node) else None
        if lanes is None:
            return None
        source.in_float = result.in_float = True
        return Step(node, Average(source, lanes), result)

    def _flatten(self, node: fx.Node) -> Step | None:
        source, result = self._native(node.args[0]), self._value(node)
        if source is None or result is None or result.size != (math.prod(source.size), 1, 1):
            return None
        source.in_float = result.in_float = True
        return Step(node, Flatten(source), result)

    def _concatenation(self, node: fx.Node) -> Step | None:
        nodes, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        result = self._value(node)
        pieces = [self._native(n) for n in nodes]  # type: ignore[union-attr]
        if result is None or dim not in (1, 1 - node.meta["val"].dim()) or any(p is None for p in pieces):
            return None
        if any(p.size[1:] != result.size[1:] for p in pieces if p is not None):
            return None
        result.pieces = tuple(inner for p in pieces if p is not None for inner in p.pieces or (p,))
        # Its pieces are put together where this step stands, as far as they are not.
        return Step(node, Map(result), result)

    # Where everything lies

    def _ask_for_layouts(self, output: fx.Node) -> None:
        """Have PyTorch compute in the layouts of the model what depends on them, and all that leads to it."""
        asked = set(output.all_input_nodes)
        for step in reversed(self.steps):
            if not isinstance(step.does, Call):
                continue
            node, does = step.node, step.does
            passed_on = node in asked and not makes_rows(node)
            does.by_vectors = is_by_vectors(node) and not is_by_format(node) and not passed_on
            does.faithful = passed_on or not is_exact(node)
            if does.faithful:
                asked.update(node.all_input_nodes)

    def _place_concatenations(self) -> None:
        """Gives pieces a place in what they are concatenated to."""
        all_of_them = [value for value in self.values.values() if value.pieces]
        for value in all_of_them:
            for wanted, quantized in value.quantized.items():
                if _parts_are_blocks(value, wanted):
                    for piece, first in _with_places(value):
                        piece.parts.append((quantized, first))
                else:
                    value.in_float = True
        homes: list[Value] = []
        for value in sorted(all_of_them, key=lambda v: -len(v.pieces)):
            if not value.in_float:
                continue
            for home in homes:
                places = dict(_with_places(home))
                at = _index(home.pieces, value.pieces)
                if at is not None and not value.outside:
                    value.home, value.first = home, places[home.pieces[at]]
                    break
            else:
                homes.append(value)
                for piece, first in _with_places(value):
                    piece.in_float = True
                    if piece.home is None and not piece.outside:
                        piece.home, piece.first = value, first

    def _write_quantized(self, source: Value) -> None:
        """Has each step write what is wanted of its result, or puts a step behind it that does."""
        steps = self._quantizing(source)
        for step in self.steps:
            result = step.result
            if result is None:
                steps.append(step)
            elif result.pieces:
                whole = result.home or result
                for piece, first in _with_places(result):
                    first += result.first
                    if result.in_float and (piece.home is not whole or piece.first != first):
                        into = Value(step.node, piece.size, in_float=True, home=whole, first=first)
                        steps.append(Step(step.node, Map(piece), into, fused=["copy"]))
                steps += self._quantizing(result)
            else:
                if result.direct:
                    # A convolution makes some outputs after others, and groups need not end where those do.
                    in_parts = isinstance(step.does, Convolution) and not step.does.depthwise
                    own = [q for q in result.quantized.values() if not in_parts or q.format.groups == 1]
                    step.targets = [(q, 0) for q in own] + result.parts
                steps.append(step)
                steps += self._quantizing(result, step.targets)
        self.steps = steps

    def _quantizing(self, value: Value, done: Sequence[tuple[Quantized, int]] = ()) -> list[Step]:
        """The step that quantizes what is there in float32 and is not done yet."""
        covered = {id(q) for q, _ in [*done, *(part for piece in value.pieces for part in piece.parts)]}
        targets = [(q, 0) for q in value.quantized.values() if id(q) not in covered]
        if not targets:
            return []
        value.in_float = True
        return [Step(value.node, Map(value), fused=["quantize"], targets=targets)]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    one, other = value * 2 if len(value) == 1 else value
    return one, other


def _with_places(value: Value) -> list[tuple[Value, int]]:
    """Each piece, and its first channel in the whole."""
    ends = [0]
    for piece in value.pieces:
        ends.append(ends[-1] + piece.size[0])
    return list(zip(value.pieces, ends, strict=False))


def _parts_are_blocks(value: Value, wanted: Format) -> bool:
    """Whether each piece, as it is made, can be quantized for its part."""
    alone = len(set(value.pieces)) == len(value.pieces)
    whole = all(first % wanted.block_size == 0 for _, first in _with_places(value))
    return alone and whole and wanted.groups == 1 and all(piece.direct for piece in value.pieces)


def _index(whole: Sequence[Value], part: Sequence[Value]) -> int | None:
    """Where ``part`` lies in ``whole``, one after another."""
    for at in range(len(whole) - len(part) + 1):
        if all(a is b for a, b in zip(whole[at:], part, strict=False)):
            return at
    return None


_NATIVE: dict[Any, Callable[[_Lowering, fx.Node], Step | None]] = {
    _dsconv.conv2d.default: _Lowering._convolution,
    _dsconv.linear.default: _Lowering._convolution,
    _aten.mul.Tensor: _Lowering._product,
    _aten.batch_norm.default: _Lowering._batchnorm,
    _aten.add.Tensor: _Lowering._sum,
    _aten.max_pool2d.default: _Lowering._pool,
    _aten.avg_pool2d.default: _Lowering._pool,
    _aten.adaptive_avg_pool2d.default: _Lowering._average,
    _aten.mean.dim: _Lowering._average,
    _aten.cat.default: _Lowering._concatenation,
    _aten.flatten.using_ints: _Lowering._flatten,
    _aten.reshape.default: _Lowering._flatten,
}
