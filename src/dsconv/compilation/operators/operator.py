"""Properties of operators for the compiler, and the base class of a program's steps.

A file registers the properties of some ATen or ``dsconv`` operators (:func:`register`), the steps that execute them,
and the lowering from a node of a captured graph to such a step. The passes of the compiler look these up by node.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable, Uses
from dsconv.compilation.values import Quantized, Seen, Value
from dsconv.ops import ACTIVATIONS

Settings = dict[str, Any]
"""Arguments ``activation``, ``alpha`` and ``beta`` of a layer."""
Constant = Callable[[Any], Tensor | None]
"""Returns the tensor of the model that a node represents; None for another node."""


class Ids(Protocol):
    """Numbers of tensors in an executable."""

    def constant(self, tensor: Tensor | None) -> Any:
        """Return a tensor of the model in the form that the executable takes."""

    def value(self, of: Value | None) -> int:
        """Return the number of a float32 tensor; -1 for None."""

    def quantized(self, of: Quantized | None) -> int:
        """Return the number of a quantized tensor; -1 for None."""


class Lowering(Protocol):
    """Graph that is being lowered to steps."""

    module: fx.GraphModule
    absorbed: set[fx.Node]
    """Nodes that need no step of their own."""
    steps: list["Step"]

    def value(self, node: Any) -> Value | None:
        """Return the image tensor that a node makes; None if it makes something else."""

    def channel_dim(self, node: Any) -> int:
        """Return the channel dimension of an image tensor."""

    def constant(self, node: Any) -> Tensor | None:
        """Return the tensor of the model that a node represents; None for another node."""


@dataclass(eq=False, kw_only=True)
class Step:
    """One step of a program, which writes ``result`` and ``targets``.

    Attributes:
        node: the last node of the graph that it computes.
        residual: a tensor that is added before the activation.
        fused: names of other operations that it computes.
        targets: quantized tensors, and the first channel of the result in each.
        joined: the step before, if both are computed together, some lines at a time.
    """

    node: fx.Node
    result: Value | None = None
    residual: Value | None = None
    activation: str = "none"
    alpha: float = 0.0
    beta: float = 0.0
    fused: list[str] = field(default_factory=list)
    targets: list[tuple[Quantized, int]] = field(default_factory=list)
    joined: "Step | None" = None

    in_pytorch: ClassVar[bool] = False
    takes_gaps: ClassVar[bool] = False
    """Whether its float32 tensors may have a gap after each pixel."""
    writes_parts: ClassVar[bool] = False
    """Whether it makes some channels of its result after others."""
    name: ClassVar[str | None] = None
    """Its name in the plan; None uses the name of its operator."""
    in_integers: ClassVar[bool] = False

    def sources(self) -> Iterable[Value]:
        """Return the float32 tensors that it reads, except the residual."""
        raise NotImplementedError

    def reads(self) -> Quantized | None:
        """Return the quantized tensor that it reads."""
        return None

    def takes_lines(self) -> bool:
        """Return whether its input may be NCHW."""
        return False

    def reads_lines(self) -> bool:
        """Return whether it can be joined with a step that makes its input line by line."""
        return False

    def add(self, to: Executable, ids: Ids) -> None:
        """Append it to an executable."""
        raise NotImplementedError

    def constants(self) -> Sequence[Tensor | None]:
        """Return the tensors of the model that it reads."""
        return ()

    def macs(self) -> int:
        """Multiply-adds per image; 0 if it is not a layer."""
        return 0

    def bytes(self, quantized_bytes: Callable[[Quantized], int]) -> int:
        """Return the number of bytes read and written per image, including constants, each tensor once."""
        values = sum(4 * math.prod(value.size) for value in self.float_values())
        tensors = sum(constant.nbytes for constant in self.constants() if constant is not None)
        return values + tensors + sum(map(quantized_bytes, self.quantized_tensors()))

    def float_values(self) -> Iterator[Value]:
        """Yield the tensors that it reads and writes in float32."""
        yield from self.sources()
        if self.residual is not None:
            yield self.residual
        if self.result is not None and self.result.in_float:
            yield self.result

    def quantized_tensors(self) -> Iterator[Quantized]:
        """Yield the quantized tensors that it reads and writes."""
        if (read := self.reads()) is not None:
            yield read
        if self.joined is not None and (read := self.joined.reads()) is not None:
            yield read
        yield from (quantized for quantized, _ in self.targets)

    def uses(self, ids: Ids) -> Uses:
        """Return its result, residual, targets and activation in the form that an executable takes."""
        result = self.result if self.result is not None and self.result.in_float else None
        targets = [(ids.quantized(quantized), first) for quantized, first in self.targets]
        activation = ACTIVATIONS.index(self.activation)
        return ids.value(result), ids.value(self.residual), targets, activation, self.alpha, self.beta


@dataclass(eq=False, kw_only=True)
class OfOne(Step):
    """A step that reads one float32 tensor."""

    source: Value

    def sources(self) -> Iterator[Value]:
        yield self.source


@dataclass(eq=False, kw_only=True)
class Moves(OfOne):
    """Step that moves values unchanged; ``kind`` is its name in the plan."""

    kind: str

    @property
    def name(self) -> str | None:  # type: ignore[override]
        return f"dsconv.{self.kind}"

    def takes_lines(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Properties of an operator of PyTorch or of dsconv, whatever executes it.

    Attributes:
        returns: a ``new`` tensor, perhaps a ``view`` of its first input, or ``nothing`` of tensors; None: unknown.
        in_place: whether PyTorch has a variant that writes to its first input.
        rounds: ``alike``: PyTorch returns the same bits for every layout of its input; None: it may not.
        makes_rows: the layout of its result does not depend on that of its input.
        by_image: it processes every image independently, if it makes an image tensor.
        fuses: a BatchNorm, a sum and an activation after it can be fused into it.
        is_input, equals_input: whether a node returns its input itself, or a tensor with the same values.
        activation: for a node, the settings of a layer that computes it last; None: the layer cannot.
        keeps_channels: the channel dimension of its result is that of its first image input.
        reads_last: whether a node uses the last dimension of its input as the channels.
        renames: for a node whose result is the same image tensor under another shape, or with another channel
            dimension: returns its :class:`~dsconv.compilation.values.Seen` from that of its input and the batch size;
            or None.
        lower: makes a step from a node; None: PyTorch executes the node.
        own_bits: that step may round differently from PyTorch (docs/kernels.md).
    """

    returns: Literal["new", "view", "nothing"] | None = None
    in_place: bool = False
    rounds: Literal["alike"] | None = None
    makes_rows: bool = False
    by_image: bool = False
    fuses: bool = False
    is_input: Callable[[fx.Node], bool] | None = None
    equals_input: Callable[[fx.Node], bool] | None = None
    activation: Callable[[fx.Node, Constant], Settings | None] | None = None
    keeps_channels: bool = False
    reads_last: Callable[[fx.Node], bool] | None = None
    renames: Callable[[fx.Node, Seen, Any], Seen | None] | None = None
    lower: Callable[[Lowering, fx.Node], Step | None] | None = None
    own_bits: bool = False


_UNKNOWN = Operator()
_PYTHON = Operator(rounds="alike", returns="view")  # on numbers, or an item of several tensors
_operators: dict[Any, Operator] = {}
_in_place: dict[Any, Any] = {}


def register(namespace: str, names: str, **facts: Any) -> None:
    """Register properties of some operators: ``register("aten", "relu relu6", returns="new")``.

    Raises:
        ValueError: one is already registered.
    """
    for name in names.split():
        packet = getattr(getattr(torch.ops, namespace), name)
        if packet in _operators:
            raise ValueError(f"{namespace}.{name} is registered already")
        _operators[packet] = operator = Operator(**facts)
        if operator.in_place:
            twin = getattr(getattr(torch.ops, namespace), f"{name}_")
            kinds = set(twin.overloads()) & set(packet.overloads())
            _in_place.update({getattr(twin, kind): getattr(packet, kind) for kind in kinds})


def operator_of(node: fx.Node) -> Operator:
    """Return the properties of the operator of a node."""
    packet = getattr(node.target, "overloadpacket", None)
    return _PYTHON if packet is None else _operators.get(packet, _UNKNOWN)


@contextmanager
def bits_of_pytorch() -> Iterator[None]:
    """Let PyTorch run operators with our own rounding: models compiled in the block equal PyTorch bitwise."""
    before = dict(_operators)
    own = {packet: known for packet, known in before.items() if known.own_bits}
    _operators.update({packet: replace(known, lower=None, activation=None) for packet, known in own.items()})
    try:
        yield
    finally:
        _operators.update(before)


def functional(node: fx.Node) -> Any:
    """Return the functional variant of a node's in-place operator; None if there is none."""
    return _in_place.get(node.target)


def activation_of(node: fx.Node | None, constant: Constant) -> Settings | None:
    """Return the settings of a layer that computes a node last; None if it cannot."""
    known = _UNKNOWN if node is None else operator_of(node)
    return None if node is None or known.activation is None else known.activation(node, constant)


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the node that reads a node, if it is the only one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def fixed(tensor: Tensor) -> Tensor:
    """Return a dense copy for a step that stores its address: sharing a model with a process moves its tensors."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def of_images(lowering: Lowering, node: fx.Node) -> bool:
    """Return whether a node makes a tensor ``(N, C, H, W)`` from one."""
    return node.meta["val"].dim() == 4 and lowering.channel_dim(node) == lowering.channel_dim(node.args[0]) == 1
