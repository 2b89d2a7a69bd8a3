"""What a compiled network consists of, as a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from dsconv import ops
from dsconv.compilation.fusion import INTEGER_OPERATORS
from dsconv.tables import as_text

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Step:
    """One operator of a compiled network.

    Attributes:
        name: of the module it comes from; empty for what the model calls itself.
        operator: what is called.
        backend: ``integers (ISA)`` or ``PyTorch``.
        fused: what it computes besides, in order: ``bias``, ``add``, an activation.
        shape: of its output for a batch of one, or of the example where the batch is fixed.
        weight_bytes: of what it reads besides its input.
    """

    name: str
    operator: str
    backend: str
    fused: tuple[str, ...]
    shape: tuple[int, ...]
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """The steps of a compiled network in the order in which they run; prints as a table."""

    steps: tuple[Step, ...]

    @property
    def in_pytorch(self) -> tuple[Step, ...]:
        """Steps that PyTorch executes."""
        return tuple(step for step in self.steps if step.backend == "PyTorch")

    @property
    def weight_bytes(self) -> int:
        """Of all packed weights, KDS, shifts and biases."""
        return sum(step.weight_bytes for step in self.steps)

    def __rich__(self) -> "Table":
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        backends = sorted({step.backend for step in self.steps})
        counts = [f"{sum(step.backend == name for step in self.steps)} by {name}" for name in backends]
        note = f"{len(self.steps)} steps: {', '.join(counts)}; {self.weight_bytes / 1e6:.2f} MB of weights."
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=escape(note), caption_justify="left")
        for column in ("layer", "operator", "executed by", "fused", "output", "kB"):
            table.add_column(column, justify="right" if column == "kB" else "left", overflow="fold")
        for step in self.steps:
            shape = "x".join(map(str, step.shape))
            size = f"{step.weight_bytes / 1e3:.1f}" if step.weight_bytes else ""
            row = (step.name, step.operator, step.backend, ", ".join(step.fused), shape, size)
            table.add_row(*map(escape, row), style="yellow" if step.backend == "PyTorch" else None)
        return table

    def __str__(self) -> str:
        return as_text(self)


def plan_of(module: fx.GraphModule) -> Plan:
    """Table of a graph after :func:`dsconv.compilation.fusion.fuse`."""
    return Plan(tuple(_step(module, node) for node in module.graph.nodes if _computes(node)))


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def _step(module: fx.GraphModule, node: fx.Node) -> Step:
    integers = node.target in INTEGER_OPERATORS
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    target: Any = node.target
    constants = [_constant(module, value) for value in node.all_input_nodes if value.op == "get_attr"]
    bias = ["bias"] if integers and node.args[4] is not None else []
    return Step(
        name=stack[-1][0],
        operator=str(target.overloadpacket if hasattr(target, "overloadpacket") else target),
        backend=f"integers ({ops.cpu.isa()})" if integers else "PyTorch",
        fused=(*bias, *node.meta.get("fused", ())),
        shape=tuple(1 if not isinstance(n, int) else n for n in node.meta["val"].shape),
        weight_bytes=sum(value.nbytes for value in constants),
    )


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    tensor: Tensor = value
    return tensor
