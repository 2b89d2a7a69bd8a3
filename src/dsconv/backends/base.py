"""The interface of backends, and the operation of a layer that they execute."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dsconv.config import LayerConfig


class Operation(NamedTuple):
    """The computation of a quantized layer, without its tensors.

    Attributes:
        shape: of VQK, ``(O, C/groups, *K)``; a linear layer has no ``K``.
        config: the settings of the layer.
        transposed: whether it is a transposed convolution.
        groups, stride, padding, dilation, output_padding: those of a convolution, with ``padding`` zeros on both sides
            of each dimension. Whether a backend covers a layer does not depend on them.
    """

    shape: tuple[int, ...]
    config: LayerConfig
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()


class Backend(Protocol):
    """A module of these functions, or an object with these methods.

    A graph that :mod:`torch.export` captures holds the operators that :meth:`run` calls. The compiler makes steps of
    its own of those that it knows (``dsconv::conv2d`` and ``dsconv::linear``) and leaves all others to PyTorch.

    Attributes:
        device: type of the devices that it computes on; None is all of them.
    """

    device: str | None

    def describe(self) -> str:
        """Return the name that summaries and plans show."""

    def covers(self, operation: Operation) -> str:
        """Return why it cannot execute an operation; an empty text where it can."""

    def pack(self, operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> Any:
        """Return the weights in the form that :meth:`run` reads: of VQK int8 ``(O, C/groups, *K)``, KDS and shift.

        Raises:
            ValueError: shapes or dtypes that do not belong together.
        """

    def run(self, operation: Operation, packed: Any, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return the output for ``x (N, C, *S)``, or ``(..., C)`` for a linear layer, in the dtype of ``x``."""
