"""The interface of backends, and the operation of a layer that they execute."""

from collections.abc import Callable, Sequence
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
            of each dimension. Whether a backend covers a layer depends on none of them but ``groups``, and on these
            where its input stays float and ``shape[1]`` is 1: depthwise layers have several.
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
    """The steps of a network over one piece of memory; a run executes some that follow one another.

    Tensors have numbers, -1 of none, and every step is one call that appends it. Sizes are of one image: channels,
    height and width; the frames of a volume lie one below the other. Weights and other constants are what
    :meth:`Backend.constant` makes of tensors that the caller keeps.
    """

    def values(
        self, base: int, offset: int, first: int, size: tuple[int, int, int], strides: tuple[int, int, int, int]
    ) -> int:
        """Return the number of a float32 tensor.

        Args:
            base: the address of a run that it lies at. Base 0 is the memory between steps.
            offset: bytes from there, for an image.
            first: values from there to its first one.
            strides: of image, channel, row and pixel, in values.
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
            grid: height and width, and how many zeros lie around it in each.
            lane_bits: of the weights that it meets, 4 or 8.
            sign: number in :data:`dsconv.numerics.ACTIVATION_SIGNS`.
            shift: whether its blocks are summed up for a KDS shift.
            frames: that an image has, one grid each.
        """

    def quantized_bytes(
        self, depth: int, block_size: int, groups: int, grid: tuple[int, int, int, int], shift: bool, frames: int = 1
    ) -> int:
        """Return how much memory such a tensor takes, for an image."""

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
        """Say that nobody but the last step reads what the step before writes: both may be computed together.

        The last one is a depthwise layer of float activations or a pooling, the one before a convolution.
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
        """Return how much memory the steps need between them."""

    def run(self, images: int, bases: Sequence[Any], first: int, last: int, seconds: Any) -> None:
        """Execute steps ``first`` to ``last``, not included, for so many images.

        Args:
            bases: tensors that values lie in, as constants are.
            seconds: a float64 for each step, to which its time is added, or none, likewise.
        """


class Backend(Protocol):
    """A module of these functions, or an object with these methods.

    A graph that :mod:`torch.export` captures holds the operators that :meth:`run` calls. The compiler makes steps of
    those that it knows (``dsconv::conv2d``, ``convolution`` and ``linear``), appends them to what :meth:`lower`
    returns, and leaves all others to PyTorch.

    Attributes:
        device: type of the devices that it computes on; None is all of them.
        keeps_memory: whether programs keep the memory of a run for the next ones; else PyTorch does, which knows the
            stream and the graph that use it.
        cached_bytes: a larger batch is run in parts whose memory between steps is about this large; None: as a whole.
    """

    device: str | None
    keeps_memory: bool
    cached_bytes: int | None

    def describe(self, in_integers: bool = True) -> str:
        """Return the name that summaries and plans show, for what computes in integers or in float32."""

    def covers(self, operation: Operation) -> str:
        """Return why it cannot execute an operation; an empty text where it can."""

    def pack(self, operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> Any:
        """Return the weights in the form that :meth:`run` reads: of VQK int8 ``(O, C/groups, *K)``, KDS and shift.

        Raises:
            ValueError: shapes or dtypes that do not belong together.
        """

    def run(self, operation: Operation, packed: Any, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return the output for ``x (N, C, *S)``, or ``(..., C)`` for a linear layer, in the dtype of ``x``."""

    def lower(self) -> Executable | None:
        """Return an executable for the steps of a network; None where it executes layers alone."""

    def constant(self, tensor: Tensor | None) -> Any:
        """Return a tensor as its executables take it: its address, 0 of none, or the tensor itself."""

    def repeated(self, run: Callable[[Sequence[Tensor]], Any], alone: bool) -> Callable[[Sequence[Tensor]], Any]:
        """Return what does as ``run``, a function of a network's input, in less time when it is called again.

        ``alone`` says that no step of it is PyTorch's.
        """
