"""Layers on GPU tensors: the operators of :mod:`dsconv.ops` by Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from dsconv.backends.cuda import launch
from dsconv.backends.cuda.launch import Pixels, PostOps, Weights
from dsconv.backends.cuda.layouts import Form, empty_rows, filled, whole_panels
from dsconv.ops.arguments import (
    FLOAT_BITS,
    Call,
    Sizes,
    check_algorithm,
    check_geometry,
    check_input,
    check_settings,
    linear_call,
    sizes_of,
    takes_floats,
)
from dsconv.ops.cpu import empty_output


def run(name: str, *args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    """Execute ``conv2d`` or ``linear``.

    Raises:
        ValueError: the arguments do not match.
    """
    if name == "linear":
        c = linear_call(*args, **named)
        check_input(name, c.x, 2, anywhere=True)
        residual = None if c.residual is None else c.residual[..., None, None]
        y = _convolved(name, c._replace(x=c.x[:, :, None, None], residual=residual)).flatten(1)
        return y if out is None else out.copy_(y)
    c = Call(*args, **named)
    check_input(name, c.x, 4, anywhere=True)
    y = _convolved(name, c)
    made = empty_output(c.x, c.outputs, y.shape[2:], c.groups) if out is None else out
    return y if out is None and y.stride() == made.stride() else made.copy_(y)


def _convolved(name: str, c: Call) -> Tensor:
    """Return ``(N, O, H, W)`` in channels_last."""
    in_float = c.activation_bits == FLOAT_BITS
    floats = takes_floats(
        c.x.shape[1], c.groups, c.geometry.kernel_size[0] * c.geometry.kernel_size[1], c.flat, c.block_size
    )
    check_settings(name, c.weight_bits, c.activation_bits, c.sign, c.activation, floats and c.kds_shift is None)
    check_geometry(c.x.shape, c.outputs, c.geometry)
    check_algorithm(c.algorithm, c.geometry, c.flat)
    if c.algorithm != "direct":
        raise ValueError(f"dsconv::{name}: algorithm: expected direct on a GPU, got {c.algorithm!r}")
    s: Sizes = sizes_of(c.x.shape, c.outputs, c.geometry, c.block_size, c.flat, native=False)
    _check_weights(name, c, s)
    images = len(c.x)
    y = torch.empty(
        (images, c.outputs, s.out_height, s.out_width), dtype=torch.float32, device=c.x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    if not y.numel():
        return y
    residual = None
    if c.residual is not None:
        if c.residual.shape != y.shape or c.residual.dtype != torch.float32:
            raise ValueError(
                f"dsconv::{name}: residual: expected float32 {tuple(y.shape)}, "
                f"got {c.residual.dtype} {tuple(c.residual.shape)}"
            )
        residual = Pixels(c.residual.contiguous(memory_format=torch.channels_last), c.outputs)
    post = PostOps(c.bias, c.gain, c.offset, residual, c.activation, c.alpha, c.beta)
    weights, pixels = Weights(c.weight, c.kds, c.kds_shift, c.weight_bits), images * s.out_height * s.out_width
    with torch.cuda.device_of(c.x):  # type: ignore[no-untyped-call]
        if in_float:
            x = Pixels(c.x.contiguous(memory_format=torch.channels_last), s.channels)
            launch.depthwise(x, weights, s, pixels, post, Pixels(y, c.outputs))
            return y
        form = form_of(s, c.activation_bits, c.sign, c.kds_shift is not None)
        if s.flat:
            rows = empty_rows(form, pixels, c.x.device)
            strides = _strides(c.x)
            launch.quantize_windows(c.x, strides, s, rows, launch.windows(s, form, strides, c.x.device))
        else:
            rows = launch.rows_of(c.x, form)
        launch.convolve(rows, weights, s, pixels, post, Pixels(y, c.outputs))
    return y


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    image, channel, row, pixel = x.stride()
    return image, channel, row, pixel


def form_of(s: Sizes, bits: int, sign: str, shift: bool) -> Form:
    """Return the quantization format of a convolution's input."""
    depth = s.channels // s.groups * (s.kernel_h * s.kernel_w if s.flat else 1)
    return Form(depth, s.block_size, s.groups, bits, sign, shift)


def _check_weights(name: str, c: Call, s: Sizes) -> None:
    taps = s.kernel_h * s.kernel_w
    if c.activation_bits == FLOAT_BITS:
        expected: tuple[int, ...] = (taps, c.outputs)
        scales: tuple[int, ...] = (c.outputs,)
        dtype = torch.float32
    else:
        form = form_of(s, c.activation_bits, c.sign, False)
        terms, outputs = form.blocks * (1 if s.flat else taps), s.groups * whole_panels(c.outputs // s.groups)
        expected = (terms if c.weight_bits > 4 else (terms + 1) // 2, outputs, filled(c.block_size))
        scales, dtype = (terms, outputs), torch.int8
    for argument, value, shape in (("weight", c.weight, expected), ("kds", c.kds, scales)):
        if value is None or value.shape != shape or not value.is_contiguous() or value.device != c.x.device:
            raise ValueError(
                f"dsconv::{name}: {argument}: expected a contiguous tensor {shape} on {c.x.device}, as x is, for these "
                f"settings, got {None if value is None else (tuple(value.shape), str(value.device))}"
            )
    if c.weight.dtype != dtype:
        raise ValueError(
            f"dsconv::{name}: weight: expected {dtype}, got {c.weight.dtype}: it was packed for another device"
        )
    together = c.kds_shift is not None and not c.kds_shift.numel()  # KDS and shift share one number
    if c.kds.dtype != (torch.int32 if together else torch.float32):
        raise ValueError(f"dsconv::{name}: kds: expected float32, or int32 beside an empty shift, got {c.kds.dtype}")
    each, shifts = (c.outputs,), (0,) if together else scales
    others = (("kds_shift", c.kds_shift, shifts), ("bias", c.bias, each), ("gain", c.gain, each))
    for argument, other, shape in (*others, ("offset", c.offset, each)):
        if other is None:
            continue
        if other.shape != shape or not other.is_contiguous() or other.device != c.x.device:
            raise ValueError(
                f"dsconv::{name}: {argument}: expected a contiguous tensor {shape} on {c.x.device}, as x is, "
                f"got {tuple(other.shape)} on {other.device}"
            )
        if other.dtype != torch.float32 and not (together and argument == "kds_shift"):
            raise ValueError(f"dsconv::{name}: {argument}: expected float32, got {other.dtype}")
    if (c.gain is None) != (c.offset is None):
        raise ValueError(f"dsconv::{name}: offset: expected a tensor with a gain, and None without one")
    if c.residual is not None and c.residual.device != c.x.device:
        raise ValueError(f"dsconv::{name}: residual: expected it on {c.x.device}, as x is, got {c.residual.device}")
