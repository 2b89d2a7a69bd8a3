"""The compiler's facts about operators, and the base of the steps of a program.

A file holds the facts about some ATen or ``dsconv`` operators (:func:`register`), the steps that execute them, and the
way from a node of a captured graph to such a step. The passes of the compiler ask for these by node.
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
"""Returns the tensor of the model that a node stands for; None where it is another one."""


class Ids(Protocol):
    """Numbers of tensors in an executable."""

    def constant(self, tensor: Tensor | None) -> Any:
        """Return a tensor of the model as the executable takes it."""

    def value(self, of: Value | None) -> int:
        """Return the number of a float32 tensor; -1 of none."""

    def quantized(self, of: Quantized | None) -> int:
        """Return the number of a quantized tensor; -1 of none."""


class Lowering(Protocol):
    """The graph that is being lowered to steps."""

    module: fx.GraphModule
    absorbed: set[fx.Node]
    """Nodes that need no step of their own."""
    steps: list["Step"]

    def value(self, node: Any) -> Value | None:
        """Return the tensor of images that a node makes; None where it makes something else."""

    def channel_dim(self, node: Any) -> int:
        """Return the dimension of a tensor of images that is that of the channels."""

    def constant(self, node: Any) -> Tensor | None:
        """Return the tensor of the model that a node stands for; None where it is another one."""


@dataclass(eq=False, kw_only=True)
class Step:
    """One thing to do; ``result`` and ``targets`` are written by it.

    Attributes:
        node: the last one of the graph that it computes.
        residual: a tensor that is added before the activation.
        fused: names of what it computes besides.
        targets: quantized tensors, and the channel there that its first one becomes.
        joined: the step before, where both are computed together, some lines at a time.
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
    """Whether its float32 tensors may have a gap behind each pixel."""
    writes_parts: ClassVar[bool] = False
    """Whether it makes some channels of its result after others."""
    name: ClassVar[str | None] = None
    """As the plan calls it; None: as its operator is called."""
    in_integers: ClassVar[bool] = False

    def sources(self) -> Iterable[Value]:
        """Float32 tensors that it reads, but for the residual."""
        raise NotImplementedError

    def reads(self) -> Quantized | None:
        """The quantized tensor that it reads."""
        return None

    def takes_lines(self) -> bool:
        """Tell whether its input may lie in lines of channels (NCHW)."""
        return False

    def reads_lines(self) -> bool:
        """Tell whether it can be computed together with a step that makes lines of what it reads."""
        return False

    def add(self, to: Executable, ids: Ids) -> None:
        """Append it to an executable."""
        raise NotImplementedError

    def constants(self) -> Sequence[Tensor | None]:
        """Tensors of the model that it reads."""
        return ()

    def macs(self) -> int:
        """Multiply-adds for an image; 0 where it is no layer."""
        return 0

    def bytes(self, quantized_bytes: Callable[[Quantized], int]) -> int:
        """Return how much it reads and writes for an image, constants included, each tensor once."""
        values = sum(4 * math.prod(value.size) for value in self.float_values())
        tensors = sum(constant.nbytes for constant in self.constants() if constant is not None)
        return values + tensors + sum(map(quantized_bytes, self.quantized_tensors()))

    def float_values(self) -> Iterator[Value]:
        """Tensors that it reads and writes in float32."""
        yield from self.sources()
        if self.residual is not None:
            yield self.residual
        if self.result is not None and self.result.in_float:
            yield self.result

    def quantized_tensors(self) -> Iterator[Quantized]:
        """Tensors that it reads and writes quantized."""
        if (read := self.reads()) is not None:
            yield read
        if self.joined is not None and (read := self.joined.reads()) is not None:
            yield read
        yield from (quantized for quantized, _ in self.targets)

    def uses(self, ids: Ids) -> Uses:
        """Return its result, residual, targets and activation as an executable takes them."""
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
    """A step that puts values elsewhere, as they are; ``kind`` is what the plan calls it."""

    kind: str

    @property
    def name(self) -> str | None:  # type: ignore[override]
        return f"dsconv.{self.kind}"

    def takes_lines(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Facts about an operator of PyTorch or of dsconv, whoever executes it.

    Attributes:
        returns: a ``new`` tensor, perhaps a ``view`` of its first input, or ``nothing`` of tensors; None: unknown.
        in_place: whether PyTorch has a twin of it that writes to its first input.
        rounds: ``alike``: PyTorch gives the same bits for every layout of its input; None: it may not.
        makes_rows: the layout of its result does not follow from that of its input.
        by_image: it treats every image as if it were alone, where it makes a tensor of images.
        fuses: it takes a BatchNorm, a sum and an activation behind it.
        is_input, equals_input: whether a node returns its very input, or a tensor of the same values.
        activation: the settings of a layer that computes it last, for a node; None: the layer cannot.
        keeps_channels: its result has its channels in the dimension in which its first input of images has them.
        reads_last: whether a node takes the last dimension of its input for that of the channels.
        renames: a node whose result is that very tensor of images under another shape, or with its channels in another
            dimension: its :class:`~dsconv.compilation.values.Seen`, for that of its input and the batch size; or None.
        lower: makes a step of a node; None: PyTorch executes the node.
        own_bits: that step may round in another way than PyTorch (docs/kernels.md).
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
    """Say what is known of some operators: ``register("aten", "relu relu6", returns="new")``.

    Raises:
        ValueError: something is known of one already.
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
    """Return what is known of the operator of a node."""
    packet = getattr(node.target, "overloadpacket", None)
    return _PYTHON if packet is None else _operators.get(packet, _UNKNOWN)


@contextmanager
def bits_of_pytorch() -> Iterator[None]:
    """Leave operators that have bits of our own to PyTorch: what is compiled meanwhile has the bits of the model."""
    before = dict(_operators)
    own = {packet: known for packet, known in before.items() if known.own_bits}
    _operators.update({packet: replace(known, lower=None, activation=None) for packet, known in own.items()})
    try:
        yield
    finally:
        _operators.update(before)


def functional(node: fx.Node) -> Any:
    """Return the operator that does the same as the in-place one of a node; None where it is none."""
    return _in_place.get(node.target)


def activation_of(node: fx.Node | None, constant: Constant) -> Settings | None:
    """Return the settings of a layer that computes a node last; None where it cannot."""
    known = _UNKNOWN if node is None else operator_of(node)
    return None if node is None or known.activation is None else known.activation(node, constant)


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the node that reads a node, if it is one alone."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def fixed(tensor: Tensor) -> Tensor:
    """Return a dense copy for a step that keeps its address: a model's own moves when it is shared with a process."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def of_images(lowering: Lowering, node: fx.Node) -> bool:
    """Tell whether a node makes a tensor ``(N, C, H, W)`` of one."""
    return node.meta["val"].dim() == 4 and lowering.channel_dim(node) == lowering.channel_dim(node.args[0]) == 1
