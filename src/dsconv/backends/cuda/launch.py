"""Launches of kernels on tensors. Pixels are stored one after another, with contiguous channels."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dsconv.backends.cuda import kernels, tuning
from dsconv.backends.cuda.layouts import Form, Rows, empty_rows, filled, whole_panels
from dsconv.ops.arguments import Sizes

_INT32 = (1 << 31) - 1
_SMALL = 1 << 14  # maximum height and width that fit into one number, for kernels that read outside the image
_PIXELS = 32  # of a tile of memory-bound kernels


class Pixels(NamedTuple):
    """Float32 pixels: a tensor that begins with the first channel of the first one, and the stride in values."""

    values: Tensor
    stride: int


class Target(NamedTuple):
    """Destination of quantized outputs: rows, and the channel there of the first output."""

    rows: Rows
    first: int = 0


class Weights(NamedTuple):
    """Packed weights (:func:`dsconv.backends.cuda.layouts.pack`)."""

    weight: Tensor
    kds: Tensor
    kds_shift: Tensor | None
    bits: int


class PostOps(NamedTuple):
    """Epilogue that converts a sum to an output: ``activation((sum + bias) * gain + offset + residual)``."""

    bias: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    residual: Pixels | None = None
    activation: str = "none"
    alpha: float = 0.0
    beta: float = 0.0


_NO_FORM = Form(1, 32, 1, 0, "adaptive", False)


class _Ends(NamedTuple):
    """Arguments of kernels for their outputs."""

    y: Tensor
    y_stride: int
    pointers: tuple[Tensor, ...]
    places: tuple[int, ...]
    constants: dict[str, Any]

    @property
    def row_values(self) -> int:
        """Stride from one pixel to the next, in values, or in bytes for a quantized pixel."""
        return max(self.y_stride, self.places[0])


def _ends(y: Pixels | None, target: Target | None, outputs: int, default: Tensor) -> _Ends:
    values, stride = (default, 0) if y is None else y
    pointers: tuple[Tensor, ...]
    if target is None:
        places, pointers, form = (0, 0, 0, 0), (values,) * 3, _NO_FORM
    else:
        (form, _, *tensors), first = target
        size = filled(form.block_size)
        block = first // form.block_size
        places = (form.row_bytes, block * size, block, (block + -(-outputs // form.block_size)) * size)
        pointers = tuple(tensors)
    constants = {
        "STORE": y is not None,
        "QBLOCK": filled(form.block_size),
        "QBITS": form.bits,
        "QSIGN": form.sign,
        "QSHIFT": form.shift,
    }
    return _Ends(values, stride, pointers, places, constants)


def fits(target: Target, tile: int = 64) -> bool:
    """Return whether a kernel can quantize its outputs for a target: blocks must fit a tile of so many outputs."""
    form = target.rows.form
    whole = filled(form.block_size) == form.block_size or form.blocks == 1
    return form.groups == 1 and whole and filled(form.block_size) <= tile


def quantize(x: Tensor, strides: tuple[int, int, int, int], size: tuple[int, int, int], target: Target) -> None:
    """Quantize float32 images ``size (C, H, W)`` with strides (image, channel, row, pixel) in values."""
    rows, first = target
    form = rows.form
    channels, height, width = size
    groups = max(1, channels // form.depth)
    blocks = -(-min(channels, form.depth) // form.block_size)
    block = first // form.block_size
    image, channel, row, pixel = strides
    images = rows.pixels // max(1, height * width)
    tuning.start(
        kernels.quantize, (triton.cdiv(rows.pixels, _PIXELS), groups * blocks),
        x, rows.mantissa, rows.scale, rows.term, rows.pixels, height * width, width, min(channels, form.depth),
        form.block_size,
        blocks, image, channel, row, pixel, form.row_bytes, block * filled(form.block_size), block,
        QBLOCK=filled(form.block_size), QBITS=form.bits, QSIGN=form.sign, QSHIFT=form.shift,
        WIDE=_is_wide(_reach(strides, (images, *size)), rows.pixels * form.row_bytes), TILE_P=_PIXELS,
    )  # fmt: skip


def windows(sizes: Sizes, form: Form, strides: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Return the offsets of a window's values (:func:`kernels.quantize_windows`), for an input with these strides."""
    s, (_, channel, row, pixel) = sizes, strides
    window = ((s.kernel_h, s.dilation_h * row, s.dilation_h), (s.kernel_w, s.dilation_w * pixel, s.dilation_w))
    return _windows(form, channel, window, device)


def quantize_windows(x: Tensor, strides: tuple[int, int, int, int], sizes: Sizes, rows: Rows, table: Tensor) -> None:
    """Quantize the input window of each output of a convolution, as pixels of ``rows``; see :func:`windows`."""
    s, form = sizes, rows.form
    image, _, row, pixel = strides
    images = rows.pixels // max(1, s.out_height * s.out_width)
    tuning.start(
        kernels.quantize_windows, (triton.cdiv(rows.pixels, _PIXELS), form.blocks),
        x, table, rows.mantissa, rows.scale, rows.term, rows.pixels, s.height, s.width, s.out_height, s.out_width,
        s.stride_h,
        s.stride_w, s.pad_h, s.pad_w, image, row, pixel, form.row_bytes,
        QBLOCK=filled(form.block_size), QBITS=form.bits, QSIGN=form.sign, QSHIFT=form.shift,
        WIDE=_is_wide(_reach(strides, (images, s.channels, s.height, s.width)), rows.pixels * form.row_bytes),
        SMALL=_is_small(s), TILE_P=_PIXELS,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _windows(form: Form, channel: int, window: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """Return the offsets of a window's values, int32 ``(blocks * filled, 3)``: see :func:`kernels.quantize_windows`.

    A window is given by the size, and the values and pixels between taps, for rows and columns. The padding of a block
    refers to positions outside every image.
    """
    (height, row, down), (width, column, right) = window
    table = torch.full((form.blocks, filled(form.block_size), 3), -_SMALL, dtype=torch.int32, device="cpu")
    for k in range(form.depth):
        c, at = divmod(k, height * width)
        kh, kw = divmod(at, width)
        values = torch.tensor(
            [c * channel + kh * row + kw * column, kh * down, kw * right], dtype=torch.int32, device="cpu"
        )
        table[k // form.block_size, k % form.block_size] = values
    return table.flatten(0, 1).to(device)


def _is_small(s: Sizes) -> bool:
    return max(s.height, s.width) + max(s.pad_h, s.pad_w) < _SMALL


def convolve(
    source: Rows,
    weights: Weights,
    sizes: Sizes,
    pixels: int,
    post: PostOps,
    y: Pixels | None,
    target: Target | None = None,
) -> None:
    """Convolve quantized pixels to output pixels, as float32, as a target that :func:`fits`, or both."""
    s, form = sizes, source.form
    flat = s.flat or (s.kernel_h, s.kernel_w) == (1, 1)
    dense = flat and (s.flat or (s.stride_h, s.stride_w, s.pad_h, s.pad_w) == (1, 1, 0, 0))
    taps = 1 if s.flat else s.kernel_h * s.kernel_w
    group_outputs = s.outputs // s.groups
    panels = whole_panels(group_outputs)
    if weights.kds_shift is None:
        scales, shift = "plain", weights.kds
    else:
        scales, shift = ("floats", weights.kds_shift) if weights.kds_shift.numel() else ("halves", weights.kds)
    ends = _ends(y, target, s.outputs, source.scale)
    size = (s.out_height, s.out_width) if s.flat else (s.height, s.width)
    residual, r_stride = post.residual or (source.scale, 0)
    arguments = (
        source.mantissa, source.scale, source.term, weights.weight, weights.kds, shift, *_or(source.scale, post),
        residual, ends.y, *ends.pointers, pixels, source.pixels, *size, s.out_height, s.out_width, form.row_bytes,
        form.blocks,
        s.groups * panels, panels, group_outputs, 1 if s.flat else s.kernel_w, s.stride_h, s.stride_w, s.pad_h, s.pad_w,
        s.dilation_h, s.dilation_w, taps, taps * form.blocks, r_stride, ends.y_stride, *ends.places, post.alpha,
        post.beta,
    )  # fmt: skip
    constants = {
        "BLOCK": filled(form.block_size),
        "NIBBLES": weights.bits <= 4,
        "SCALES": scales,
        "LOOP": taps * form.blocks > 1,
        "ODD": taps * form.blocks % 2 == 1,
        "ONE_TAP": taps == 1,
        "DENSE": dense,
        "SMALL": dense or _is_small(s),
        **_constants(post),
        **ends.constants,
        "WIDE": _is_wide(source.pixels * form.row_bytes, pixels * max(ends.row_values, r_stride)),
        "ASM": source.mantissa.is_cuda and torch.version.hip is None,
    }
    step = filled(target.rows.form.block_size) if target is not None else 0
    problem = tuning.Problem(pixels, panels, s.groups, taps * form.blocks, filled(form.block_size), step)
    tuning.run(kernels.convolve, problem, arguments, constants, group_outputs)


def _or(default: Tensor, post: PostOps) -> tuple[Tensor, ...]:
    return tuple(default if t is None else t for t in (post.bias, post.gain, post.offset))


def _constants(post: PostOps) -> dict[str, Any]:
    return {
        "BIAS": post.bias is not None,
        "BATCHNORM": post.gain is not None,
        "RESIDUAL": post.residual is not None,
        "ACTIVATION": post.activation,
    }


def _tile(channels: int, ends: _Ends) -> dict[str, int]:
    wide = max(
        32, min(64, triton.next_power_of_2(channels)), ends.constants["QBLOCK"] if ends.constants["QBITS"] else 0
    )
    return {"TILE_P": max(1, 1024 // wide), "TILE_O": wide}


def depthwise(
    x: Pixels,
    weights: Weights,
    sizes: Sizes,
    pixels: int,
    post: PostOps,
    y: Pixels | None,
    target: Target | None = None,
) -> None:
    """Convolve float32 pixels channel by channel."""
    s, ends = sizes, _ends(y, target, sizes.outputs, x.values)
    tile = _tile(s.outputs, ends)
    residual, r_stride = post.residual or (x.values, 0)
    tuning.start(
        kernels.depthwise, (triton.cdiv(pixels, tile["TILE_P"]), triton.cdiv(s.outputs, tile["TILE_O"])),
        x.values, weights.weight, weights.kds, *_or(x.values, post), residual, ends.y, *ends.pointers, pixels,
        s.height, s.width,
        s.out_height, s.out_width, x.stride, s.outputs, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.pad_h,
        s.pad_w,
        s.dilation_h, s.dilation_w, r_stride, ends.y_stride, *ends.places, post.alpha, post.beta,
        MULTIPLIER=s.outputs // s.channels, **_constants(post), **ends.constants, **tile,
        WIDE=_is_wide(x.values.numel(), pixels * max(ends.row_values, r_stride)),
    )  # fmt: skip


def pool(
    x: Pixels,
    size: tuple[int, int, int],
    out: tuple[int, ...],
    window: tuple[int, ...],
    divisor: int | None,
    pixels: int,
    post: PostOps,
    y: Pixels | None,
    target: Target | None = None,
) -> None:
    """Compute maxima over windows of images of ``size (C, H, W)``, or averages.

    ``divisor`` is that of averages; None: they are maxima, 0: the pixels in a window, -1: these and zero padding.
    """
    channels, height, width = size
    ends = _ends(y, target, channels, x.values)
    tile = _tile(channels, ends)
    tuning.start(
        kernels.pool, (triton.cdiv(pixels, tile["TILE_P"]), triton.cdiv(channels, tile["TILE_O"])),
        x.values, ends.y, *ends.pointers, pixels, height, width, *out, x.stride, channels, *window, divisor or 0,
        ends.y_stride,
        *ends.places, post.alpha, post.beta, AVERAGE=divisor is not None, ACTIVATION=post.activation,
        **ends.constants, **tile,
        WIDE=_is_wide(x.values.numel(), pixels * ends.row_values),
    )  # fmt: skip


def change(
    x: Pixels,
    y: Pixels,
    pixels: int,
    image_pixels: int,
    channels: int,
    kind: str,
    *,
    activation: str = "none",
    alpha: float = 0.0,
    beta: float = 0.0,
    operand: tuple[Tensor, int, int, int] | None = None,
    offset: Tensor | None = None,
) -> None:
    """Apply one operation to all values.

    ``operand`` is a tensor, and its strides from pixel to pixel, image to image, and channel to channel, in values.
    """
    tile = {"TILE_P": 16, "TILE_O": 64}
    b, *b_strides = operand or (x.values, 0, 0, 0)
    tuning.start(
        kernels.change, (triton.cdiv(pixels, tile["TILE_P"]), triton.cdiv(channels, tile["TILE_O"])),
        x.values, b, x.values if offset is None else offset, y.values, pixels, image_pixels, channels, x.stride,
        *b_strides,
        y.stride, alpha, beta, KIND=kind, ACTIVATION=activation, OPERAND=operand is not None, **tile,
        WIDE=_is_wide(x.values.numel(), y.values.numel(), b.numel()),
    )  # fmt: skip


def _is_wide(*ends: int) -> bool:
    """Return whether an offset does not fit into 32 bits."""
    return max(ends) > _INT32


def _reach(strides: tuple[int, ...], size: tuple[int, ...]) -> int:
    """Return the extent from the first to the last value, which exceeds their number if some are skipped."""
    return sum(abs(stride) * (n - 1) for stride, n in zip(strides, size, strict=True))


def rows_of(x: Tensor, form: Form) -> Rows:
    """Quantize a tensor ``(N, C, H, W)``."""
    rows = empty_rows(form, x.shape[0] * x.shape[2] * x.shape[3], x.device)
    (image, channel, row, pixel), (_, channels, height, width) = x.stride(), x.shape
    quantize(x, (image, channel, row, pixel), (channels, height, width), Target(rows))
    return rows
