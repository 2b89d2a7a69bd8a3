"""Lowering of a captured graph to steps: most for the executable of a backend, the others for PyTorch.

The step that computes a tensor writes it in every required format (:mod:`dsconv.compilation.values`).
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dsconv.compilation.fusion import constant
from dsconv.compilation.operators import Step, operator_of
from dsconv.compilation.operators.map import Map
from dsconv.compilation.operators.pytorch import Call
from dsconv.compilation.operators.renaming import size_of
from dsconv.compilation.values import Quantized, Seen, Value


class Lowered(NamedTuple):
    """Steps of a graph, its inputs, the nodes that it returns, and those for tensors or parts of the model.

    ``batch`` is the batch size, or its symbol; ``values`` are the image tensors by node; ``renamed`` are nodes that
    represent the image tensor of another one, in another shape; ``counts`` those that represent the batch size.
    """

    steps: list[Step]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]
    constants: dict[fx.Node, Any]
    batch: Any
    values: dict[fx.Node, Value]
    renamed: dict[fx.Node, fx.Node]
    counts: tuple[fx.Node, ...]


def lower(module: fx.GraphModule, batch: Any) -> Lowered:
    """Return the steps of a graph after :func:`dsconv.compilation.fusion.fuse`.

    Args:
        module: a graph module whose inputs are tensors.
        batch: the batch size, or its symbol.
    """
    return _Lowering(module, batch).lowered()


def _value(node: fx.Node, seen: Seen) -> Value:
    made: Tensor = node.meta["val"]
    return Value(node, seen.size, dim=seen.dim, frames=made.shape[2] if made.dim() == 5 else 1)


def _may_be_of_any_dim(node: fx.Node) -> bool:
    """Return whether channels may be another dimension than the second in a result, which excludes steps for images."""
    known = operator_of(node)
    return node.op == "call_function" and (known.lower is None or known.keeps_channels or known.renames is not None)


def _is_read_last(node: fx.Node) -> bool:
    """Return whether layer norms or linear layers read a tensor, or results computed from it, by its last dimension."""
    of: Any = node.meta["val"].shape
    reading, seen = list(node.users), {node}
    while reading:
        user = reading.pop()
        known = operator_of(user)
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        if known.reads_last is not None and known.reads_last(user):
            return True
        if known.keeps_channels:
            made: Any = user.meta["val"].shape
            if len(made) == len(of) and made[-1] == of[-1]:
                reading += user.users
    return False


class _Lowering:
    def __init__(self, module: fx.GraphModule, batch: Any):
        self.module, self.batch = module, batch
        self.values: dict[fx.Node, Value] = {}
        self.seen: dict[fx.Node, Seen | None] = {}
        self.renamed: dict[fx.Node, fx.Node] = {}
        self.counts: list[fx.Node] = []
        self.absorbed: set[fx.Node] = set()
        self.steps: list[Step] = []
        self.placeholders = tuple(node for node in module.graph.nodes if node.op == "placeholder")

    def lowered(self) -> Lowered:
        # Tensors that are neither images nor rows are only for PyTorch.
        sources = [value for node in self.placeholders if (value := self.value(node)) is not None]
        for source in sources:
            source.outside = True
        for node in self.module.graph.nodes:
            if node.op == "call_function" and self.constant(node) is None:
                self.value(node)
                if self._is_batch_size(node):
                    self.counts.append(node)
                elif node not in self.renamed and node not in self.absorbed:
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
        self._write_quantized(sources)
        nodes = [node for node in self.module.graph.nodes if node.op in ("get_attr", "call_function")]
        constants: dict[fx.Node, Any] = {node: v for node in nodes if (v := self.constant(node)) is not None}
        # Graphs of regions, such as those of autocast, are called by PyTorch's operators.
        attributes = [node for node in nodes if node.op == "get_attr" and node not in constants]
        constants |= {node: attrgetter(str(node.target))(self.module) for node in attributes}
        made = self.values, self.renamed, tuple(self.counts)
        return Lowered(self.steps, self.placeholders, tuple(output.args[0]), constants, self.batch, *made)

    def value(self, node: Any) -> Value | None:
        """Return the image tensor that a node makes; None if it makes something else."""
        if node not in self.values:
            seen = self._see(node) if isinstance(node, fx.Node) else None
            if seen is None:
                return None
            renamed = self.renamed.get(node)
            made = _value(node, seen) if renamed is None else self.value(renamed)
            assert made is not None
            self.values[node] = made
        return self.values[node]

    def _see(self, node: fx.Node) -> Seen | None:
        if node not in self.seen:
            self.seen[node] = self._look(node)
        return self.seen[node]

    def _look(self, node: fx.Node) -> Seen | None:
        made, known = node.meta.get("val"), operator_of(node)
        if not isinstance(made, Tensor) or made.dtype != torch.float32 or made.dim() not in (2, 3, 4, 5):
            return None
        batch, *sizes = made.shape
        if not all(isinstance(n, int) and n > 0 for n in sizes) or (node.op == "get_attr"):
            return None
        dim = 1
        first = node.args[0] if node.op == "call_function" and node.args else None
        if known.renames is not None and isinstance(first, fx.Node) and (seen := self._see(first)) is not None:
            found = known.renames(node, seen, self.batch)
            # A step that makes a tensor for PyTorch places its channels where PyTorch's layers expect them.
            if found is not None and (found.dim == 1 or self._is_own(first)):
                self.renamed[node] = first
                return found
        inputs = node.all_input_nodes if known.keeps_channels else ()
        alike = [n for n in inputs if self._see(n) is not None and n.meta["val"].dim() == made.dim()]
        if alike:
            # An unusual channel dimension is certain to be right.
            other = max(alike, key=self.channel_dim)
            rows = made.dim() == 2 and str(batch) != str(self.batch)
            if rows and str(batch) == str(other.meta["val"].shape[0]):
                seen = self._see(other)
                assert seen is not None
                return Seen((sizes[0], *seen.size[1:]), 1)
            dim = self.channel_dim(other)
        elif made.dim() in (3, 4) and _may_be_of_any_dim(node) and _is_read_last(node):
            dim = made.dim() - 1
        return Seen(size_of(made.shape, dim), dim) if str(batch) == str(self.batch) else None

    def _is_batch_size(self, node: fx.Node) -> bool:
        if node.target is not torch.ops.aten.sym_size.int:
            return False
        of: Any = node.args[0]
        return bool(node.args[1] == 0) and str(of.meta["val"].shape[0]) == str(self.batch)

    def _is_own(self, node: fx.Node) -> bool:
        """Return whether a step of the program itself makes the tensor of a node."""
        value = self.value(node)
        made = next((step for step in reversed(self.steps) if step.result is value), None)
        return made is not None and not isinstance(made, Call)

    def channel_dim(self, node: Any) -> int:
        """Return the channel dimension of an image tensor."""
        seen = self._see(node) if isinstance(node, fx.Node) else None
        return 1 if seen is None else seen.dim

    def constant(self, node: Any) -> Tensor | None:
        """Return a tensor of the model."""
        return constant(self.module, node)

    # Lowering of a node

    def _steps(self, node: fx.Node) -> list[Step]:
        make = operator_of(node).lower
        step = make(self, node) if make is not None and self.value(node) is not None else None
        if step is None and node in self.absorbed:
            return []
        return [step or self._call(node)]

    def _call(self, node: fx.Node) -> Step:
        reads = tuple(dict.fromkeys(value for n in node.all_input_nodes if (value := self.value(n)) is not None))
        for value in reads:
            value.in_float = True
        result = self.value(node)
        if result is not None:
            result.outside = result.in_float = True
        tensors, fused = list(map(self.constant, node.all_input_nodes)), list(node.meta.get("fused", []))
        return Call(node=node, reads_values=reads, tensors=tensors, result=result, fused=fused)

    def _drop_unread(self, output: fx.Node) -> None:
        """Remove nodes that only lead to steps of the executable, such as batch sizes, or are part of one."""
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

    # Placement in memory

    def _ask_for_layouts(self, output: fx.Node) -> None:
        """Let PyTorch use the layouts of the model for results that depend on them, and for their inputs."""
        asked = set(output.all_input_nodes)
        asked.update(self.values[n].node for n in output.all_input_nodes if n in self.values)
        for step in reversed(self.steps):
            if not isinstance(step, Call):
                continue
            node, known = step.node, operator_of(step.node)
            passed_on = node in asked and not known.makes_rows
            step.faithful = passed_on or known.rounds != "alike" or "alpha" in node.kwargs
            if step.faithful:
                asked.update(node.all_input_nodes)
                asked.update(self.values[n].node for n in node.all_input_nodes if n in self.values)

    def _place_concatenations(self) -> None:
        """Place the pieces of concatenations inside the whole."""
        all_of_them = [value for value in dict.fromkeys(self.values.values()) if value.pieces]
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
                at = home.index_of(value.pieces)
                if at is not None and not value.outside:
                    value.home, value.first = home, home.places()[at][1]
                    break
            else:
                homes.append(value)
                for piece, first in value.places():
                    piece.in_float = True
                    if piece.home is None and not piece.outside:
                        piece.home, piece.first = value, first

    def _write_quantized(self, sources: Sequence[Value]) -> None:
        """Let each step write its result in the required formats, or add a step after it that does."""
        steps = [step for source in sources for step in self._quantizing(source)]
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
        """Return the steps that quantize the float32 value and views of it, as far as this is not ``done`` yet."""
        covered = {id(q) for q, _ in [*done, *(part for piece in value.pieces for part in piece.parts)]}
        targets = [(q, 0) for q in value.quantized.values() if id(q) not in covered]
        steps: list[Step] = []
        if targets:
            value.in_float = True
            steps.append(Map(node=value.node, source=value, fused=["quantize"], targets=targets))
        for view in value.views:
            steps += self._quantizing(view)
        return steps
