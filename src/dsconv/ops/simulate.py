"""DSConv in float32: dequantized weights times activations that went through block floating point.

Every function takes the dequantized ``weight`` in the layout ``(O, C/groups, *K)``, computes in float32 and returns the
dtype of ``x``. All are differentiable; the gradient passes straight through the rounding of ``x``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.config import LayerConfig
from dsconv.numerics import fake_quantize_activation

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: LayerConfig,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution of ``x (N, C, *S)``, with ``padding`` zeros on both sides of each dimension."""
    if config.blocks == "flat" and config.activation_bits is not None:
        kernel, ones = weight.shape[2:], (1,) * (weight.dim() - 2)
        x_q = quantized(patches(x, kernel, stride, padding, dilation), config, groups)
        weight = weight.reshape(len(weight), -1, *ones)
        stride, padding, dilation = ones, (0,) * len(ones), ones
    else:
        x_q = quantized(x, config, groups)
    operator = _CONV[weight.dim() - 3]
    return operator(x_q, weight, _float(bias), list(stride), list(padding), list(dilation), groups).to(x.dtype)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: LayerConfig,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Transposed convolution of ``x (N, C, *S)``."""
    torch_weight = transposed_layout(weight, groups)
    operator = _CONV_TRANSPOSE[weight.dim() - 3]
    y = operator(
        quantized(x, config, groups),
        torch_weight,
        _float(bias),
        list(stride),
        list(padding),
        list(output_padding),
        groups,
        list(dilation),
    )
    return y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: LayerConfig) -> Tensor:
    """Linear layer on the last dimension of ``x (..., C)``."""
    rows = x.reshape(-1, x.shape[-1])
    return F.linear(quantized(rows, config, groups=1).view(x.shape), weight, _float(bias)).to(x.dtype)


def transposed_layout(weight: Tensor, groups: int) -> Tensor:
    """``(O, C/groups, *K)`` to PyTorch's layout of transposed convolutions ``(C, O/groups, *K)``, and back.

    >>> import torch
    >>> transposed_layout(torch.zeros(6, 4, 3, 3), groups=2).shape
    torch.Size([8, 3, 3, 3])
    """
    return torch.unflatten(weight, 0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def quantized(x: Tensor, config: LayerConfig, groups: int) -> Tensor:
    """Float32 ``x (N, C, *S)`` after the rounding that ``config`` asks for."""
    if config.activation_bits is None:
        return x.float()
    return fake_quantize_activation(
        x, config.activation_bits, config.block_size, sign=config.activation_sign, groups=groups
    )


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What each output reads, as a view of padded ``x (N, C, *S)``: ``(N, C, *S_out, *kernel)``."""
    x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for d in range(len(kernel)):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    return x


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What each output of a convolution reads: ``(N, C, *S)`` to ``(N, C * prod(kernel), *S_out)``, the taps of a
    channel side by side.
    """
    dims = len(kernel)
    x = windows(x, kernel, stride, padding, dilation)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.flatten(1, 1 + dims)
