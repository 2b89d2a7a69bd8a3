"""Quantized convolutions with one to three dimensions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.backends import Operation
from dsconv.config import LayerConfig
from dsconv.layers.kinds import register
from dsconv.layers.layer import DSLayer
from dsconv.ops import windows

Size = int | Sequence[int]
Pads = tuple[tuple[int, int], ...]
"""Zero padding before and after each dimension."""
SAME_UPPER = "same_upper"
"""Padding that depends on the size of the input, see :func:`same_upper`."""
_SIZE = ("in_channels", "out_channels", "kernel_size")


class DSConvNd(DSLayer):
    """Base class of quantized convolutions. The arguments are those of ``torch.nn.Conv2d``, and ``config``.

    ``padding`` may also be ``"same_upper"`` (:func:`dsconv.layers.conv.same_upper`), or the zero padding before and
    after each dimension: ``((0, 1), (0, 1))``.
    """

    float_attributes = (*_SIZE, "stride", "padding", "dilation", "groups", "bias", "padding_mode")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size | Pads = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        config: LayerConfig | None = None,
    ):
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"groups: expected a divisor of {name} {channels}, got {groups}")
        kernel = self._per_dim(kernel_size)
        stride, dilation = self._per_dim(stride), self._per_dim(dilation)
        winograd = (kernel, stride, dilation, groups, self.transposed) == ((3, 3), (1, 1), (1, 1), 1, False)
        super().__init__((out_channels, in_channels // groups, *kernel), bias, self._layer_config(config), winograd)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel, stride, dilation
        self.padding_mode = padding_mode
        self.padding: Any = padding if isinstance(padding, str) else self._per_dim(padding)
        pads = self._pads()
        # Padding that the convolution itself does not support is applied before it.
        self._in_front = padding_mode != "zeros" or pads is None or any(a != b for a, b in pads)
        self.zero_padding = (0,) * self.dims if pads is None or self._in_front else tuple(before for before, _ in pads)

    def _per_dim(self, value: int | Sequence[Any]) -> tuple[Any, ...]:
        return (value,) * self.dims if isinstance(value, int) else tuple(value)

    def _pads(self) -> Pads | None:
        """Padding before and after each dimension; ``same`` puts the odd element after, as PyTorch does.

        None if it depends on the input.
        """
        if self.padding == SAME_UPPER:
            return None
        if self.padding == "valid":
            return ((0, 0),) * self.dims
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((t // 2, t - t // 2) for t in total)
        if isinstance(self.padding, str):
            raise ValueError(f"padding: expected 'same', 'same_upper', 'valid' or whole numbers, got {self.padding!r}")
        if len(self.padding) != self.dims:
            raise ValueError(f"padding: expected it for {self.dims} dimensions, got {self.padding!r}")
        return tuple((p, p) if isinstance(p, int) else p for p in self.padding)

    @property
    def given_padding(self) -> Pads | str | None:
        """See the base class."""
        pairs = isinstance(self.padding, tuple) and any(isinstance(p, tuple) for p in self.padding)
        return self.padding if pairs or self.padding == SAME_UPPER else None

    @classmethod
    def float_input_shape(cls, layer: Any, extra: int) -> tuple[int, ...]:
        size = [d * (k - 1) + extra for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return 2, layer.in_channels, *size

    def output_size_for(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return ``S_out`` for an input of ``size`` after :meth:`padded`."""
        sides = zip(size, self.kernel_size, self.stride, self.zero_padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``(N, O, *S_out)``, or ``(O, *S_out)`` for ``x (C, *S)``, in the dtype of ``x``."""
        batched = self.padded(x)
        y = self._run(batched, self.operation)
        return y if x.dim() == batched.dim() else y.squeeze(0)

    def padded(self, x: Tensor) -> Tensor:
        """Return ``x (N, C, *S)``, with a batch dimension added if missing, and all padding but ``zero_padding``."""
        if x.dim() not in (self.dims + 1, self.dims + 2) or x.shape[-self.dims - 1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: expected input (N, {self.in_channels}, ...) of {self.dims + 2} dimensions, "
                f"got {tuple(x.shape)}"
            )
        x = x.unsqueeze(0) if x.dim() == self.dims + 1 else x
        if not self._in_front:
            return x
        pads = self._pads()
        if pads is None:
            pads = same_upper(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        border = [p for pair in reversed(pads) for p in pair]
        return F.pad(x, border, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def windows(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the input window of each output in ``x (N, C, *S)``: ``(N, C, *S_out, *K)``, a view of a padded copy.

        Args:
            x: input.
            size: ``S_out``, which the input of a transposed convolution does not determine.
        """
        return windows(self.padded(x), self.kernel_size, self.stride, self.zero_padding, self.dilation)

    @property
    def operation(self) -> Operation:
        """See the base class."""
        where = self.stride, self.zero_padding, self.dilation
        return Operation(self.vqk.shape, self.config, self.transposed, self.groups, *where)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0,) * self.dims), ("dilation", (1,) * self.dims), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, {self._settings_repr()}"


def same_upper(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pads:
    """Return the least padding for which an input of ``size`` has ``ceil(size / stride)`` outputs; odd element after.

    TensorFlow calls it ``SAME``, ONNX ``SAME_UPPER``.

    >>> same_upper((5, 6), kernel=(3, 3), stride=(2, 2), dilation=(1, 1))
    ((1, 1), (0, 1))
    """
    pads = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        # Sizes may be symbols while a network is exported.
        total = torch.sym_max((n + s - 1) // s * s - s + d * (k - 1) + 1 - n, 0)  # type: ignore[no-untyped-call]
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


@register
class DSConv1d(DSConvNd):
    """Quantized ``torch.nn.Conv1d``: ``x (N, C, L)``; blocks of input channels, see :class:`DSLayer`."""

    dims, float_type, float_function = 1, nn.Conv1d, F.conv1d


@register
class DSConv2d(DSConvNd):
    """Quantized ``torch.nn.Conv2d``: ``x (N, C, H, W)``; blocks of input channels, see :class:`DSLayer`.

    >>> import torch
    >>> layer = DSConv2d.from_float(nn.Conv2d(64, 8, 3, padding=1))
    >>> layer(torch.zeros(1, 64, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    dims, float_type, float_function = 2, nn.Conv2d, F.conv2d


@register
class DSConv3d(DSConvNd):
    """Quantized ``torch.nn.Conv3d``: ``x (N, C, D, H, W)``; blocks of input channels, see :class:`DSLayer`."""

    dims, float_type, float_function = 3, nn.Conv3d, F.conv3d
