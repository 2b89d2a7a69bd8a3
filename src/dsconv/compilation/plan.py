"""Table of the steps of a compiled network."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsconv.backends import Backend
from dsconv.compilation.operators import Step
from dsconv.compilation.operators.pytorch import Call
from dsconv.compilation.program import Program
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PlanStep:
    """One operator of a compiled network.

    Attributes:
        name: name of the module it comes from; empty for operators called by the model itself.
        operator: the operator that is called.
        backend: ``integers (ISA)``, ``float32 (ISA)`` for our own kernels, or ``PyTorch``.
        fused: other operations that it computes, in order: ``bias``, ``batch_norm``, ``add``, an activation, and
            ``quantize``: it writes its output as mantissas and exponents for the layers that read it.
            ``in the next step``: the next one computes both, some lines at a time, without writing the tensor between
            them.
        shape: shape of its output for a batch of one.
        weight_bytes: size of its operands other than its input.
    """

    name: str
    operator: str
    backend: str
    fused: tuple[str, ...]
    shape: tuple[int, ...]
    weight_bytes: int


@dataclass(frozen=True)
class Plan(Printed):
    """Steps of a compiled network in execution order; prints as a table.

    Attributes:
        memory_bytes: size of all tensors between its steps, for one image.
        weight_bytes: size of all packed weights, KDS, shifts and biases; shared ones are counted once.
    """

    steps: tuple[PlanStep, ...]
    memory_bytes: int
    weight_bytes: int

    @property
    def in_pytorch(self) -> tuple[PlanStep, ...]:
        """Steps that PyTorch executes."""
        return tuple(step for step in self.steps if step.backend == "PyTorch")

    def __rich__(self) -> "Table":
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        backends = sorted({step.backend for step in self.steps})
        counts = [f"{sum(step.backend == name for step in self.steps)} by {name}" for name in backends]
        sizes = f"{self.weight_bytes / 1e6:.2f} MB of weights, {self.memory_bytes / 1e6:.2f} MB between steps per image"
        note = f"{len(self.steps)} steps: {', '.join(counts)}; {sizes}."
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=escape(note), caption_justify="left")
        for column in ("layer", "operator", "executed by", "fused", "output", "kB"):
            table.add_column(column, justify="right" if column == "kB" else "left", overflow="fold")
        for step in self.steps:
            shape = "x".join(map(str, step.shape))
            size = f"{step.weight_bytes / 1e3:.1f}" if step.weight_bytes else ""
            row = (step.name, step.operator, step.backend, ", ".join(step.fused), shape, size)
            table.add_row(*map(escape, row), style="yellow" if step.backend == "PyTorch" else None)
        return table


def plan_of(program: Program) -> Plan:
    """Return the table of the steps of a program."""
    constants = {c.data_ptr(): c.nbytes for step in program.steps for c in step.constants() if c is not None}
    steps = tuple(_row(step, program.backend) for step in program.steps)
    return Plan(steps, program.memory_bytes, sum(constants.values()))


def _called(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def _row(step: Step, lowered_to: Backend) -> PlanStep:
    by_pytorch = isinstance(step, Call) and not step.of_dsconv
    backend = "PyTorch" if by_pytorch else lowered_to.describe(step.in_integers)
    node: Any = step.node
    quantizes = ["quantize"] if step.targets and "quantize" not in step.fused else []
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    value = node.meta.get("val")
    made = tuple(value.shape) if isinstance(value, Tensor) else ()
    return PlanStep(
        name=stack[-1][0],
        operator=step.name or _called(node.target),
        backend=backend,
        fused=(*step.fused, *quantizes),
        shape=tuple(n if isinstance(n, int) else 1 for n in made),
        weight_bytes=sum(constant.nbytes for constant in step.constants() if constant is not None),
    )
