"""Operators that PyTorch executes, and the properties of those without a step of their own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dsconv.backends.base import Executable
from dsconv.compilation.operators.convolution import sums_integers
from dsconv.compilation.operators.operator import Ids, Step, operator_of, register
from dsconv.compilation.operators.views import changes_nothing
from dsconv.compilation.values import Value
from dsconv.ops import arguments_of


@dataclass(eq=False, kw_only=True)
class Call(Step):
    """Node that PyTorch computes.

    Attributes:
        reads_values: the image tensors among its inputs.
        tensors: its tensors of the model.
        faithful: whether it gets tensors in the memory layout of the model.
    """

    reads_values: tuple[Value, ...]
    tensors: Sequence[Tensor | None]
    faithful: bool = False
    in_pytorch: ClassVar[bool] = True

    @property
    def in_integers(self) -> bool:  # type: ignore[override]
        return self.of_dsconv and sums_integers(arguments_of(self.node.target, self.node.args, self.node.kwargs))

    @property
    def of_dsconv(self) -> bool:
        """Whether PyTorch only calls an operator of dsconv."""
        return operator_of(self.node).fuses

    def constants(self) -> Sequence[Tensor | None]:
        return self.tensors

    def sources(self) -> Iterator[Value]:
        yield from self.reads_values

    def add(self, to: Executable, ids: Ids) -> None:
        to.skip()  # so that both number the steps equally


def _converts_nothing(node: fx.Node) -> bool:
    of: Any = node.args[0]
    converts = node.target is torch.ops.aten.to.dtype and len(node.args) == 2
    return converts and bool(node.meta["val"].dtype == of.meta["val"].dtype)


register("dsconv", "simulated", returns="new")  # a layer that no backend supports
# These do not round.
register(
    "aten",
    "concat detach_ embedding flip gather index_select lift_fresh_copy masked_fill movedim "
    "reflection_pad1d repeat replication_pad1d roll stack sym_numel t tile unflatten where",
    rounds="alike",
)
register("aten", "sym_size _assert_tensor_metadata", returns="nothing", rounds="alike")
register("aten", "dropout feature_dropout", returns="view", rounds="alike", is_input=lambda node: not node.args[2])
register("aten", "to", returns="view", rounds="alike", is_input=_converts_nothing, equals_input=changes_nothing)
# These round every value independently, and equally in vector and scalar code.
register(
    "aten",
    "abs amax amin ceil eq floor ge gt le logical_and logical_not logical_or lt maximum minimum ne round "
    "sign threshold",
    rounds="alike",
)
# It reads its input row by row, whatever its layout, and writes rows.
register("aten", "native_layer_norm", rounds="alike", makes_rows=True)
