"""From a captured graph to steps: most for the executable of a backend, the others for PyTorch.

The step that makes a tensor writes it in every format that is wanted (:mod:`dsconv.compilation.values`).
"""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dsconv.compilation.fusion import constant
from dsconv.compilation.operators import Step, operator_of
from dsconv.compilation.operators.map import Map
from dsconv.compilation.operators.pytorch import Call
from dsconv.compilation.values import Quantized, Value


class Lowered(NamedTuple):
    """The steps of a graph, its input, the nodes that it returns, and those that stand for tensors of the model.

    ``structure`` makes what the model returns of a list of the outputs; ``batch`` is the batch size, or its symbol;
    ``values`` are the tensors of images by node.
    """

    steps: list[Step]
    input: Value
    outputs: tuple[Any, ...]
    structure: Callable[[Any], Any]
    constants: dict[fx.Node, Tensor]
    batch: Any
    values: dict[fx.Node, Value]


def lower(module: fx.GraphModule, fast_math: bool) -> Lowered:
    """Return the steps of a graph after :func:`dsconv.compilation.fusion.fuse` that takes one tensor of images.

    They have the bits of PyTorch's operators but for ``fast_math``, whose bits are the same everywhere.
    """
    return _Lowering(module, fast_math).lowered()


class _Lowering:
    def __init__(self, module: fx.GraphModule, fast_math: bool):
        self.module, self.fast_math = module, fast_math
        self.values: dict[fx.Node, Value] = {}
        self.steps: list[Step] = []
        self.absorbed: set[fx.Node] = set()
        (self.placeholder,) = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.batch = self.placeholder.meta["val"].shape[0]

    def lowered(self) -> Lowered:
        # What is neither images nor rows is for PyTorch alone.
        source = self.value(self.placeholder) or Value(self.placeholder, (1, 1, 1))
        source.outside = True
        for node in self.module.graph.nodes:
            if node.op == "call_function" and node not in self.absorbed and self.constant(node) is None:
                self.steps += self._steps(node)
        (output,) = [node for node in self.module.graph.nodes if node.op == "output"]
        for node in output.all_input_nodes:
            returned = self.value(node)
            if returned is not None:
                returned.in_float = True
                returned.outside = returned.outside or (not returned.pieces and returned.home is None)
        for view in reversed(self.values.values()):
            if view.home is not None and view.in_float:
                view.home.in_float = True
        self._drop_unread(output)
        self._ask_for_layouts(output)
        self._place_concatenations()
        self._write_quantized(source)
        nodes = [node for node in self.module.graph.nodes if node.op in ("get_attr", "call_function")]
        constants = {node: value for node in nodes if (value := self.constant(node)) is not None}
        outputs, any_one = tuple(output.args[0]), object()
        structure: Callable[[Any], Any] = self.module.graph._codegen.process_outputs
        if len(outputs) == 1 and structure([any_one]) is any_one:
            structure = itemgetter(0)  # faster
        return Lowered(self.steps, source, outputs, structure, constants, self.batch, self.values)

    def value(self, node: Any) -> Value | None:
        """The tensor of images that a node makes; None where it makes something else."""
        if node not in self.values:
            size = self._size(node) if isinstance(node, fx.Node) else None
            if size is None:
                return None
            made = node.meta["val"]
            self.values[node] = Value(node, size, made.shape[2] if made.dim() == 5 else 1)
        return self.values[node]

    def _size(self, node: fx.Node) -> tuple[int, int, int] | None:
        made = node.meta.get("val")
        if not isinstance(made, Tensor) or made.dtype != torch.float32 or made.dim() not in (2, 4, 5):
            return None
        batch, *size = made.shape
        if str(batch) != str(self.batch) or not all(isinstance(n, int) and n > 0 for n in size):
            return None
        channels, *frames, height, width = size if len(size) > 1 else (*size, 1, 1)
        return channels, math.prod(frames) * height, width

    def constant(self, node: Any) -> Tensor | None:
        """A tensor of the model."""
        return constant(self.module, node)

    # What becomes of a node

    def _steps(self, node: fx.Node) -> list[Step]:
        make = operator_of(node).lower
        step = make(self, node) if make is not None and self.value(node) is not None else None
        if step is None and node in self.absorbed:
            return []
        return [step or self._call(node)]

    def _call(self, node: fx.Node) -> Step:
        reads = tuple(value for n in node.all_input_nodes if (value := self.value(n)) is not None)
        for value in reads:
            value.in_float = True
        result = self.value(node)
        if result is not None:
            result.outside = result.in_float = True
        tensors, fused = list(map(self.constant, node.all_input_nodes)), list(node.meta.get("fused", []))
        return Call(node=node, reads_values=reads, tensors=tensors, result=result, fused=fused)

    def _drop_unread(self, output: fx.Node) -> None:
        """Leave out what only led to steps of the executable, such as batch sizes, or is a part of one."""
        read = set(output.all_input_nodes)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if isinstance(step, Call):
                unread = step.result is None and step.node not in read and not step.node.is_impure()
                if unread or step.node in self.absorbed:
                    continue
                read.update(step.node.all_input_nodes)
            kept.append(step)
        self.steps = kept[::-1]

    # Where everything lies

    def _ask_for_layouts(self, output: fx.Node) -> None:
        """Have PyTorch compute in the layouts of the model what depends on them, and all that leads to it."""
        asked = set(output.all_input_nodes)
        for step in reversed(self.steps):
            if not isinstance(step, Call):
                continue
            node, known = step.node, operator_of(step.node)
            passed_on = node in asked and not known.makes_rows
            step.by_vectors = known.rounds == "by_vectors" and not known.by_format and not passed_on
            step.faithful = passed_on or known.rounds != "alike" or "alpha" in node.kwargs
            if step.faithful:
                asked.update(node.all_input_nodes)

    def _place_concatenations(self) -> None:
        """Give pieces a place in what they are concatenated to."""
        all_of_them = [value for value in self.values.values() if value.pieces]
        for value in all_of_them:
            for wanted, quantized in value.quantized.items():
                if value.parts_are_blocks(wanted):
                    for piece, first in value.places():
                        piece.parts.append((quantized, first))
                else:
                    value.in_float = True
        homes: list[Value] = []
        for value in sorted(all_of_them, key=lambda v: -len(v.pieces)):
            if not value.in_float:
                continue
            for home in homes:
                places = dict(home.places())
                at = home.index_of(value.pieces)
                if at is not None and not value.outside:
                    value.home, value.first = home, places[home.pieces[at]]
                    break
            else:
                homes.append(value)
                for piece, first in value.places():
                    piece.in_float = True
                    if piece.home is None and not piece.outside:
                        piece.home, piece.first = value, first

    def _write_quantized(self, source: Value) -> None:
        """Have each step write its result in the formats that are wanted, or put a step behind it that does."""
        steps = self._quantizing(source)
        for step in self.steps:
            result = step.result
            if result is None:
                steps.append(step)
            elif result.pieces:
                whole, at = result.place()
                for piece, first in result.places():
                    first += at
                    if result.in_float and piece.place() != (whole, first):
                        into = Value(step.node, piece.size, in_float=True, home=whole, first=first)
                        steps.append(Map(node=step.node, source=piece, result=into, fused=["copy"]))
                steps += self._quantizing(result)
            else:
                if result.direct:
                    # Groups need not end where the parts do.
                    own = [q for q in result.quantized.values() if not step.writes_parts or q.format.groups == 1]
                    step.targets = [(q, 0) for q in own] + result.parts
                steps.append(step)
                steps += self._quantizing(result, step.targets)
        self.steps = steps

    def _quantizing(self, value: Value, done: Sequence[tuple[Quantized, int]] = ()) -> list[Step]:
        """Return the steps that quantize what is there in float32 and is not done yet, and views of it."""
        covered = {id(q) for q, _ in [*done, *(part for piece in value.pieces for part in piece.parts)]}
        targets = [(q, 0) for q in value.quantized.values() if id(q) not in covered]
        steps: list[Step] = []
        if targets:
            value.in_float = True
            steps.append(Map(node=value.node, source=value, fused=["quantize"], targets=targets))
        for view in value.views:
            steps += self._quantizing(view)
        return steps
