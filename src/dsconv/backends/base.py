"""Interface of backends, and the operation of a layer that they execute."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dsconv.config import LayerConfig


class Operation(NamedTuple):
    """Computation of a quantized layer, without its tensors.

    Attributes:
        shape: shape of VQK, ``(O, C/groups, *K)``; a linear layer has no ``K``.
        config: the settings of the layer.
        transposed: whether it is a transposed convolution.
        groups, stride, padding, dilation, output_padding: those of a convolution, with ``padding`` zeros on both sides
            of each dimension. Of these, only ``groups`` affects whether a backend supports a layer, and only if its
            input stays float and ``shape[1]`` is 1: depthwise layers have several.
    """

    shape: tuple[int, ...]
    config: LayerConfig
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()


Uses = tuple[int, int, list[tuple[int, int]], int, float, float]
"""Numbers of the result and the residual; the quantized tensors with the first channel of the result in each; number of
the activation in :data:`dsconv.ops.ACTIVATIONS`, its alpha and its beta.
"""
MapOperation = tuple[int, int, float, float, int, Any, Any]
"""Number in :data:`dsconv.ops.OPERATIONS`; number of the activation, its alpha and beta; number of the tensor or the
per-channel constants that are the operand, otherwise it is alpha; constants that are added.
"""


class Executable(Protocol):
    """Steps of a network on one block of memory; a run executes a range of them.

    Tensors have numbers, -1 for None, and every step is appended by one call. Sizes are for one image: channels, height
    and width; the frames of a volume are stacked vertically. Weights and other constants are the results of
    :meth:`Backend.constant` for tensors that the caller keeps alive.
    """

    def values(
        self, base: int, offset: int, first: int, size: tuple[int, int, int], strides: tuple[int, int, int, int]
    ) -> int:
        """Return the number of a float32 tensor.

        Args:
            base: index of its address in a run. Base 0 is the memory between steps.
            offset: offset from there in bytes, for an image.
            first: offset from there to its first value, in values.
            strides: strides of image, channel, row and pixel, in values.
        """

    def quantized(
        self,
        offset: int,
        depth: int,
        block_size: int,
        groups: int,
        grid: tuple[int, int, int, int],
        lane_bits: int,
        bits: int,
        sign: int,
        shift: bool,
        frames: int = 1,
    ) -> int:
        """Return the number of a quantized tensor in the memory between steps.

        Args:
            depth: channels of a group.
            grid: height and width, and the zero padding around each.
            lane_bits: bits of the weights that it is multiplied with, 4 or 8.
            sign: number in :data:`dsconv.numerics.ACTIVATION_SIGNS`.
            shift: whether its blocks are summed for a KDS shift.
            frames: number of frames of an image, one grid each.
        """

    def quantized_bytes(
        self, depth: int, block_size: int, groups: int, grid: tuple[int, int, int, int], shift: bool, frames: int = 1
    ) -> int:
        """Return the memory of such a tensor in bytes, for an image."""

    def convolve(
        self,
        sizes: Any,
        source: int,
        quantized: int,
        weight: Any,
        kds: Any,
        kds_shift: Any,
        bias: Any,
        gain: Any,
        offset: Any,
        weight_bits: int,
        activation_bits: int,
        sign: int,
        uses: Uses,
    ) -> None:
        """Append a convolution of :func:`dsconv.ops.checked_sizes`, of a float32 or a quantized tensor."""

    def join(self) -> None:
        """Join the last two steps: only the last step reads the result of the one before, so both may run together.

        The last one is a depthwise layer with float activations or a pooling, the one before a convolution.
        """

    def map(self, source: int, operations: Sequence[MapOperation], uses: Uses) -> None:
        """Append a :class:`dsconv.compilation.operators.map.Map`."""

    def pool(
        self,
        source: int,
        window: tuple[int, ...],
        average: bool,
        count_zeros: bool,
        divisor: int,
        out: tuple[int, ...],
        uses: Uses,
    ) -> None:
        """Append a :class:`dsconv.compilation.operators.pool.Pool` with ``out`` pixels in height and width."""

    def average(self, source: int, lanes: int, result: int) -> None:
        """Append a :class:`dsconv.compilation.operators.average.Average`."""

    def rearrange(self, source: int, loops: Sequence[tuple[int, ...]], result: int) -> None:
        """Append a :class:`dsconv.compilation.operators.shuffles.Shuffle`."""

    def pick(self, source: int, rows: Sequence[int], columns: Sequence[int], fill: float, uses: Uses) -> None:
        """Append a :class:`dsconv.compilation.operators.pixels.Pixels`."""

    def moments(self, source: int, groups: int, weight: Any, epsilon: float, mean: int, scale: int) -> None:
        """Append a :class:`dsconv.compilation.operators.norms.Moments`."""

    def flatten(self, source: int, result: int) -> None:
        """Append a :class:`dsconv.compilation.operators.flatten.Flatten`."""

    def interpolate(
        self,
        source: int,
        rows: Sequence[tuple[int, int, float, float]],
        columns: Sequence[tuple[int, int, float, float]],
        split: int,
        first: int,
        rest: int,
        uses: Uses,
    ) -> None:
        """Append a :class:`dsconv.compilation.operators.bilinear.Bilinear`."""

    def average_windows(
        self,
        source: int,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        at_once: bool,
        uses: Uses,
    ) -> None:
        """Append a :class:`dsconv.compilation.operators.adaptive.AdaptiveAverage`."""

    def skip(self) -> None:
        """Append a step that the caller executes."""

    def bytes(self, images: int) -> int:
        """Return the size of the memory between the steps."""

    def run(self, images: int, bases: Sequence[Any], first: int, last: int, seconds: Any) -> None:
        """Execute steps ``first`` to ``last``, exclusive, for ``images`` images.

        Args:
            bases: tensors that contain the values, in the form of constants.
            seconds: float64 tensor, or None, in the form of constants; the time of each step is added to it.
        """


class Backend(Protocol):
    """Module of these functions, or an object with these methods.

    A graph captured by :mod:`torch.export` contains the operators that :meth:`run` calls. The compiler converts those
    that it supports (``dsconv::conv2d``, ``convolution`` and ``linear``) to steps, appends them to the result of
    :meth:`lower`, and leaves all others to PyTorch.

    Attributes:
        device: type of the devices that it supports; None is all of them.
        keeps_memory: whether programs keep the memory of a run for the next ones; otherwise PyTorch does, which knows
            the stream and the graph that use it.
        cached_bytes: a larger batch is split so that the memory between steps has about this size; None: it is not
            split.
    """

    device: str | None
    keeps_memory: bool
    cached_bytes: int | None

    def describe(self, in_integers: bool = True) -> str:
        """Return the name that summaries and plans show, for computations in integers or in float32."""

    def covers(self, operation: Operation) -> str:
        """Return why it cannot execute an operation; an empty string if it can."""

    def pack(self, operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> Any:
        """Return the weights in the form that :meth:`run` reads: from VQK int8 ``(O, C/groups, *K)``, KDS and shift.

        Raises:
            ValueError: shapes or dtypes do not match.
        """

    def run(self, operation: Operation, packed: Any, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return the output for ``x (N, C, *S)``, or ``(..., C)`` for a linear layer, in the dtype of ``x``."""

    def lower(self) -> Executable | None:
        """Return an executable for the steps of a network; None if it only executes single layers."""

    def constant(self, tensor: Tensor | None) -> Any:
        """Return a tensor in the form that its executables take: its address, 0 for None, or the tensor itself."""

    def repeated(self, run: Callable[[Sequence[Tensor]], Any], alone: bool) -> Callable[[Sequence[Tensor]], Any]:
        """Return a function equivalent to ``run``, a function of a network's input, that is faster when called again.

        ``alone`` means that PyTorch executes none of its steps.
        """
