"""Quantized transposed convolutions with one to three dimensions."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dsconv.config import LayerConfig
from dsconv.layers.conv import DSConvNd, Size
from dsconv.layers.kinds import register
from dsconv.ops import transposed_layout, windows


class DSConvTransposeNd(DSConvNd):
    """Base class of transposed convolutions. ``vqk`` has the layout of a convolution; blocks are always per tap."""

    transposed, onnx_operator = True, "ConvTranspose"
    float_attributes = (*DSConvNd.float_attributes[:5], "output_padding", "groups", "bias", "dilation")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        config: LayerConfig | None = None,
    ):
        if padding_mode != "zeros" or isinstance(padding, str):
            raise ValueError(
                "padding, padding_mode: expected whole numbers and 'zeros' for a transposed convolution, "
                f"got {padding!r} and {padding_mode!r}"
            )
        config = self._layer_config(config).model_copy(update={"blocks": "tap"})
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, config=config)
        self.output_padding = self._per_dim(output_padding)

    def conv_layout(self, weight: Tensor) -> Tensor:
        return transposed_layout(weight, self.groups)

    def dequantized_weight(self) -> Tensor:
        """Return the float32 weight ``(C, O/groups, *K)`` that VQK and KDS represent, in the float layer's layout."""
        return transposed_layout(self.conv_weight(), self.groups)

    def windows(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """See the base class. The taps are reversed: this is a convolution of inputs with zeros between them."""
        taken = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)))
        spread[:, :, *(slice(None, None, s) for s in self.stride)] = x
        before = [t - p for t, p in zip(taken, self.zero_padding, strict=True)]
        after = [wanted + t - b - n for wanted, t, b, n in zip(size, taken, before, spread.shape[2:], strict=True)]
        border = [pad for pair in reversed(list(zip(before, after, strict=True))) for pad in pair]
        return windows(F.pad(spread, border), self.kernel_size, (1,) * self.dims, (0,) * self.dims, self.dilation)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the output ``(N, O, *S_out)``; ``output_size`` selects the size that the stride leaves ambiguous."""
        batched = self.padded(x)
        padding = self.output_padding_for(batched, output_size)
        y = self._run(batched, self.operation._replace(output_padding=padding))
        return y if x.dim() == batched.dim() else y.squeeze(0)

    def output_size_for(self, size: Sequence[int], output_padding: Sequence[int] | None = None) -> tuple[int, ...]:
        """See the base class; ``output_padding`` defaults to that of the layer."""
        more = self.output_padding if output_padding is None else output_padding
        sides = zip(size, self.kernel_size, self.stride, self.zero_padding, self.dilation, more, strict=True)
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, s, p, d, e in sides)

    def output_padding_for(self, x: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        """Return the output padding of ``x`` for ``output_size``, by default the layer's ``output_padding``.

        Raises:
            ValueError: the stride does not allow that size.
        """
        if output_size is None:
            return self.output_padding
        output_size = tuple(output_size)[-self.dims :]
        smallest = self.output_size_for(x.shape[2:], (0,) * self.dims)
        extra = tuple(want - least for want, least in zip(output_size, smallest, strict=True))
        if not all(0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            largest = [least + s - 1 for least, s in zip(smallest, self.stride, strict=True)]
            raise ValueError(f"output_size: expected {list(smallest)} to {largest}, got {list(output_size)}")
        return extra


@register
class DSConvTranspose1d(DSConvTransposeNd):
    """Quantized ``torch.nn.ConvTranspose1d``: ``x (N, C, L)``."""

    dims, float_type, float_function = 1, nn.ConvTranspose1d, F.conv_transpose1d


@register
class DSConvTranspose2d(DSConvTransposeNd):
    """Quantized ``torch.nn.ConvTranspose2d``: ``x (N, C, H, W)``."""

    dims, float_type, float_function = 2, nn.ConvTranspose2d, F.conv_transpose2d


@register
class DSConvTranspose3d(DSConvTransposeNd):
    """Quantized ``torch.nn.ConvTranspose3d``: ``x (N, C, D, H, W)``."""

    dims, float_type, float_function = 3, nn.ConvTranspose3d, F.conv_transpose3d
