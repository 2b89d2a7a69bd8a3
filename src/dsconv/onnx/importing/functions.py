"""Functions that imported networks call: those of PyTorch, and additional ones of ONNX."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconv.layers.conv import same_upper

Size = Sequence[int]


def size(x: Tensor, dim: int) -> int:
    """Return a size of a tensor, as a number."""
    return x.size(dim)


def tensor_of(values: Sequence[Any], scalar: bool, dtype: torch.dtype) -> Tensor:
    """Return a tensor of numbers: one-dimensional, or a scalar."""
    parts = [torch.scalar_tensor(value, dtype=dtype, device="cpu") for value in values]
    return parts[0] if scalar else torch.stack(parts)


def of_batch(x: Tensor, count: int) -> Tensor:
    """Return ``x``, whose first size must be ``count``.

    Raises:
        ValueError: it is another size.
    """
    if x.size(0) != count:
        raise ValueError(
            f"the ONNX file has a fixed batch size and indexes the batch: expected a first size of {count}, got "
            f"{x.size(0)}: run the network with the batch size of the file, or export it with a free one"
        )
    return x


def for_batch(value: Tensor, like: Tensor) -> Tensor:
    """Repeat ``value``, with a batch size of one, for the batch of ``like``."""
    return value.expand(like.size(0), *[-1] * (value.dim() - 1))


def sliced(x: Tensor, dim: int, start: int, end: int | None, step: int) -> Tensor:
    """Return ``x[start:end:step]`` along a dimension, with Python's semantics for lists; ``step`` may be negative."""
    if step > 0:
        rest = [slice(None)] * (x.dim() - 1 - dim if dim >= 0 else -dim - 1)
        return x[(..., slice(start, end, step), *rest)]
    places = range(*slice(start, end, step).indices(int(x.size(dim))))
    return x.index_select(dim, torch.tensor(places, dtype=torch.int64, device=x.device))


def gathered(x: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Return ``x`` at ``indices`` along a dimension, which gets the shape of ``indices``; negative ones count back."""
    dim = dim % x.dim()
    indices = torch.where(indices < 0, indices + x.size(dim), indices)
    shape = (*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])
    return x.index_select(dim, indices.reshape(-1)).reshape(shape)


def gathered_elements(x: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Return ``torch.gather``, with support for negative ``indices``."""
    return torch.gather(x, dim, torch.where(indices < 0, indices + x.size(dim), indices))


def expanded(x: Tensor, shape: Size) -> Tensor:
    """Broadcast ``x`` and ``shape`` to each other: a size of one in either becomes that of the other."""
    own = [1] * (len(shape) - x.dim()) + list(x.shape)
    given = [1] * (x.dim() - len(shape)) + list(shape)
    return x.expand(
        [n if isinstance(there, int) and there == 1 else there for n, there in zip(given, own, strict=True)]
    )


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Move channels ``(N, b * b * C, H, W)`` into blocks of pixels ``(N, C, b * H, b * W)``, where C varies fastest."""
    n, c, h, w = x.shape
    parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """Move blocks of pixels ``(N, C, b * H, b * W)`` into channels ``(N, b * b * C, H, W)``, where C varies fastest."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


def flat_softmax(x: Tensor, dim: int) -> Tensor:
    """Return the softmax over all dimensions from ``dim`` on, as in ONNX before opset 13."""
    return F.softmax(x.flatten(dim), -1).reshape(x.shape)


def flat_log_softmax(x: Tensor, dim: int) -> Tensor:
    """Return the logarithm of :func:`flat_softmax`."""
    return F.log_softmax(x.flatten(dim), -1).reshape(x.shape)


def flattened(x: Tensor, dim: int) -> Tensor:
    """Return a matrix: the dimensions before ``dim`` merged into one, and the others into another."""
    dim = dim % (x.dim() + 1)
    return x.reshape(math.prod(x.shape[:dim]), math.prod(x.shape[dim:]))


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Return ``x`` if it is not negative, else ``x * slope``; ``slope`` is broadcast."""
    return torch.where(x < 0, x * slope, x)


def same_padded(
    x: Tensor, kernel: Size, stride: Size, dilation: Size, value: float = 0.0, lower: bool = False
) -> Tensor:
    """Pad ``x (N, C, *S)`` as :func:`dsconv.layers.conv.same_upper`; ``lower``: odd element before instead of after."""
    pads = same_upper(x.shape[2:], kernel, stride, dilation)
    return F.pad(x, [p for pair in reversed(pads) for p in (reversed(pair) if lower else pair)], value=value)


def average_pool(
    x: Tensor, kernel: Size, stride: Size, pads: Size | None, ceil: bool, counts_padding: bool, lower: bool = False
) -> Tensor:
    """Return averages over windows of ``x (N, C, *S)``.

    Args:
        x, kernel, stride: as in PyTorch.
        pads: zero padding as for :func:`torch.nn.functional.pad`; None is the least for ``ceil(S / stride)`` windows.
        ceil: include windows that only begin in the input.
        counts_padding: divide by the size of the window, otherwise by that of its part in the input.
        lower: without ``pads``, an odd zero is put before.
    """
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]

    def sums(x: Tensor) -> Tensor:
        ones = (1,) * len(kernel)
        padded = same_padded(x, kernel, stride, ones, 0.0, lower) if pads is None else F.pad(x, list(pads))
        averages: Tensor = pool(padded, kernel, stride, 0, ceil, False)
        return averages

    return sums(x) if counts_padding else sums(x) / sums(torch.ones_like(x))


def places(result: int, source: int, scale: float | None, coordinates: str, device: torch.device) -> Tensor:
    """Return the position in ``source`` pixels of each of ``result`` pixels, float32 ``(result,)``.

    Args:
        result, source: numbers of pixels.
        scale: scale factor of the result; None is the ratio of both.
        coordinates: ``coordinate_transformation_mode`` of ONNX.
        device: device of the result.
    """
    x = torch.arange(result, dtype=torch.float32, device=device)
    if coordinates == "align_corners":
        return x * ((source - 1) / max(result - 1, 1))
    step = source / result if scale is None else 1 / scale
    if coordinates == "asymmetric":
        return x * step
    if coordinates == "pytorch_half_pixel" and result == 1:
        return x
    return (x + 0.5) * step - 0.5


def resized_nearest(x: Tensor, sizes: Size, scales: Sequence[float] | None, coordinates: str, rounding: str) -> Tensor:
    """Resize ``x (N, C, *S)`` to ``sizes`` by nearest neighbour, with the rounding modes of ONNX's ``Resize``."""
    for place, result in enumerate(sizes):
        dim, scale = place + 2, None if scales is None else scales[place]
        at = places(result, x.size(dim), scale, coordinates, x.device)
        match rounding:
            case "floor":
                at = at.floor()
            case "ceil":
                at = at.ceil()
            case "round_prefer_ceil":
                at = (at + 0.5).floor()
            case _:
                at = (at - 0.5).ceil()
        x = x.index_select(dim, at.long().clamp(0, x.size(dim) - 1))
    return x


def resized_linear(x: Tensor, sizes: Size, scales: Sequence[float] | None, coordinates: str) -> Tensor:
    """Resize ``x (N, C, *S)`` to ``sizes`` by linear interpolation along each dimension."""
    for place, result in enumerate(sizes):
        dim, scale = place + 2, None if scales is None else scales[place]
        last = x.size(dim) - 1
        at = places(result, last + 1, scale, coordinates, x.device).clamp(0, last)
        before = at.floor()
        weight = (at - before).to(x.dtype).reshape(-1, *[1] * (x.dim() - dim - 1))
        first = before.long()
        a, b = (x.index_select(dim, where) for where in (first, (first + 1).clamp(max=last)))
        x = a * (1 - weight) + b * weight
    return x


def _named(prefix: str, module: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": getattr(module, name) for name in names.split()}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_named(
        "torch",
        torch,
        "abs add amax amin arange argmax argmin broadcast_to cat ceil chunk clamp cos cumsum div einsum eq erf exp "
        "flatten floor full full_like ge gt index_select isnan le log logical_and logical_not logical_or logical_xor "
        "logsumexp lt matmul maximum mean minimum mul ne neg permute pow prod reciprocal reshape round rsqrt select "
        "sigmoid sign sin split sqrt square squeeze stack sub sum t tanh tile topk transpose tril triu unsqueeze where "
        "fmod remainder floor_divide",
    ),
    **_named(
        "F",
        F,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d celu conv1d "
        "conv2d conv3d elu gelu grid_sample hardsigmoid hardswish hardtanh interpolate leaky_relu local_response_norm "
        "log_softmax max_pool1d max_pool2d max_pool3d mish normalize pad pixel_shuffle relu relu6 selu silu "
        "softmax softplus softsign threshold",
    ),
    **_named("operator", operator, "add sub mul floordiv truediv mod getitem"),
    **_named("math", math, "floor ceil trunc"),
    **_named("torch", torch, "sym_float sym_max sym_min"),
    "torch.to": Tensor.to,
    **{
        f"dsconv.{function.__name__}": function
        for function in (
            size,
            tensor_of,
            of_batch,
            for_batch,
            sliced,
            gathered,
            gathered_elements,
            expanded,
            depth_to_space,
            space_to_depth,
            flat_softmax,
            flat_log_softmax,
            flattened,
            prelu,
            same_padded,
            average_pool,
            resized_nearest,
            resized_linear,
        )
    },
}
"""Functions by their names in files. No other function is part of a network, whatever a file contains."""

NAMES = {function: name for name, function in FUNCTIONS.items()}
