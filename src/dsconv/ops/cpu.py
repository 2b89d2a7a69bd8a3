"""Integer execution of DSConv on the CPU, by the kernels of the extension ``dsconv._C``.

``dsconv::conv2d``, ``dsconv::convolution``, for any convolution of two or three dimensions, and ``dsconv::linear`` take
packed weights (:func:`pack`) and return ``activation((y + bias) * gain + offset + residual)``, bitwise equal for every
instruction set, number of threads and split of the batch; see the exactness notes in docs/numerics.md. ``gain`` and
``offset`` are a BatchNorm, and rounded once. Their overloads ``out`` write into existing memory.
``dsconv::quantize_activation`` returns the result of :func:`dsconv.numerics.quantize_activation`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dsconv.numerics import ACTIVATION_SIGNS, block_count, check_activation, quantize_activation
from dsconv.ops import native
from dsconv.ops.arguments import (
    ACTIVATIONS,
    PIXEL,
    TOO_LARGE,
    Call,
    Geometry,
    Shapes,
    addresses_of,
    check_algorithm,
    check_geometry,
    check_input,
    check_settings,
    linear_call,
    shapes_of,
    sizes_of,
    takes_floats,
)
from dsconv.ops.packing import MAX_BLOCK_SIZE
from dsconv.ops.packing import pack as pack
from dsconv.ops.views import pixels_format
from dsconv.threads import with_pytorch_on_one_thread

# PyTorch declares no types here.
_library: Any = torch.library.Library("dsconv", "DEF")  # type: ignore[no-untyped-call]
_SETTINGS = (
    "int outputs, int weight_bits, int activation_bits, str sign, int block_size, "
    "Tensor? residual=None, str activation='none', float alpha=0.0, float beta=0.0, "
    "Tensor? gain=None, Tensor? offset=None"
)
_WEIGHTS = "Tensor weight, Tensor kds, Tensor? kds_shift, Tensor? bias"
_WHERE = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool flat"
for _name, _arguments in (
    ("conv2d", f"Tensor x, {_WEIGHTS}, {_WHERE}, {_SETTINGS}, str algorithm='direct'"),
    # Transposed if it has an output padding.
    ("convolution", f"Tensor x, {_WEIGHTS}, {_WHERE}, {_SETTINGS}, str algorithm='direct', int[]? output_padding=None"),
    ("linear", f"Tensor x, {_WEIGHTS}, {_SETTINGS}"),
):
    _library.define(f"{_name}({_arguments}) -> Tensor")
    _library.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")
_library.define(
    "quantize_activation(Tensor x, int bits, int block_size, str sign='adaptive', int groups=1) -> (Tensor, Tensor)"
)


@lru_cache(maxsize=4096)
def _executable(
    isa: str,
    name: str,
    sizes: Any,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    weight_bits: int,
    activation_bits: int,
    sign: str,
    activation: str,
    alpha: float,
    beta: float,
) -> Callable[..., None]:
    """Return a function of the addresses of the input, the weights, the residual and the output."""
    s = sizes
    taps = s.kernel_h * s.kernel_w
    in_float = not s.volume and takes_floats(s.channels, s.groups, taps, s.flat, s.block_size)
    check_settings(name, weight_bits, activation_bits, sign, activation, in_float)
    numbers = (ACTIVATION_SIGNS.index(sign), ACTIVATIONS.index(activation))
    module = native.extension()
    assert module is not None
    run: Callable[..., None] = module.Convolution(
        isa, sizes, x_strides, y_strides, weight_bits, activation_bits, *numbers, alpha, beta
    )
    return run


def _residual(name: str, residual: Tensor, y: Tensor) -> Tensor:
    strided = residual.is_cpu and residual.layout is torch.strided
    if not strided or residual.shape != y.shape or residual.dtype != y.dtype:
        raise ValueError(
            f"dsconv::{name}: residual: expected float32 {tuple(y.shape)} on the CPU, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
    if residual.stride() != y.stride():
        return torch.empty_like(y).copy_(residual)
    # The sum may replace the residual in place, but not overlap it partially.
    if residual.data_ptr() != y.data_ptr() and _meet(residual, y):
        raise ValueError(
            f"dsconv::{name}: out: expected memory of its own, or exactly that of the residual, got a partial overlap"
        )
    return residual


def _meet(a: Tensor, b: Tensor) -> bool:
    """Return whether two dense tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=pixels_format(x.dim()))


def _check_out(name: str, out: Tensor, shape: tuple[int, ...], read: Sequence[Tensor | None]) -> None:
    strided = out.is_cpu and out.layout is torch.strided
    if (
        not strided
        or out.shape != shape
        or out.dtype != torch.float32
        or not (out.is_contiguous() or out.is_contiguous(memory_format=pixels_format(out.dim())))
    ):
        raise ValueError(
            f"dsconv::{name}: out: expected dense float32 {shape} on the CPU, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if any(t is not None and _meet(t, out) for t in read):
        raise ValueError(f"dsconv::{name}: out: expected memory of its own, got an overlap with an input")


def empty_output(x: Tensor, outputs: int, size: Sequence[int], groups: int = 1) -> Tensor:
    """Return memory for the output of a convolution of ``x (N, C, *S)``, in the layout that graphs assume."""
    # Depthwise layers with several filters per channel write NCHW.
    lines = groups == x.shape[1] and groups not in (1, outputs) and x.dim() == 4
    layout = pixels_format(x.dim()) if _channels_last(x) and not lines else torch.contiguous_format
    return torch.empty((x.shape[0], outputs, *size), dtype=x.dtype, device=x.device, memory_format=layout)


class _Ready(NamedTuple):
    """Convolution, and the tensors that it reads and writes."""

    run: Callable[..., None]
    addresses: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    y: Tensor

    def __call__(self) -> Tensor:
        if self.y.numel():
            native.use_threads()
            self.run(*self.addresses)
        return self.y


def _ready(
    name: str, c: Call, shapes: Shapes, weights: Any, addresses: Any, x: Tensor, y: Tensor, strides: Any
) -> _Ready:
    best = native.isa()
    assert best is not None
    numbers = (c.weight_bits, c.activation_bits, c.sign, c.activation, c.alpha, c.beta)
    run = _executable(best, name, shapes.sizes, *strides, *numbers)
    added = None if c.residual is None else _residual(name, c.residual, y)
    ends = (0 if added is None else added.data_ptr(), y.data_ptr())
    return _Ready(run, (x.data_ptr(), *addresses, *ends), (x, *weights, added), y)


def _ready_conv2d(*args: Any, out: Tensor | None = None, **named: Any) -> _Ready:
    c = Call(*args, **named)
    check_input("conv2d", c.x, 4)
    return _ready_convolution("conv2d", c, out)


def _ready_convolution(name: str, c: Call, out: Tensor | None) -> _Ready:
    shapes, weights = c.shapes(c.x.shape), c.weights
    addresses = addresses_of(name, shapes, weights)
    x = c.x if _channels_last(c.x) else c.x.contiguous()
    if out is not None:
        _check_out(name, out, (len(x), c.outputs, *shapes.output), (x, *weights))
    y = out
    transposed = c.output_padding is not None
    if transposed:  # neighbouring pixels of a phase are not contiguous, so their channels must be
        if out is None or not out.is_contiguous(memory_format=pixels_format(out.dim())):
            size = (len(x), c.outputs, *shapes.output)
            y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=pixels_format(x.dim()))
    elif out is None or (c.groups == x.shape[1] > 1 and x.dim() == 4):  # depthwise layers write in the layout of x
        made = empty_output(x, c.outputs, shapes.output, c.groups)
        y = out if out is not None and out.stride() == made.stride() else made
    assert y is not None
    return _ready(name, c, shapes, weights, addresses, x, y, (_strides(x), _strides(y)))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of image, channel, line and pixel. Frames are stacked vertically."""
    return (*x.stride()[:2], *x.stride()[-2:])


@with_pytorch_on_one_thread
def _conv2d(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    y = _ready_conv2d(*args, out=out, **named)()
    return y if out is None or out is y else out.copy_(y)


@with_pytorch_on_one_thread
def _convolution(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    c = _any_convolution(*args, **named)
    y = _ready_convolution("convolution", c, out)()
    if out is None and c.output_padding is not None and not _channels_last(c.x):
        out = empty_output(c.x, c.outputs, y.shape[2:])
    return y if out is None or out is y else out.copy_(y)


def _any_convolution(*args: Any, **named: Any) -> Call:
    c = Call(*args, **named)
    check_input("convolution", c.x, 5 if c.x is not None and c.x.dim() == 5 else 4, anywhere=True)
    return c


# Implementations for compilers and the device meta. All checks except those of the weights' sizes are those of a real
# call.


def _check_fake(name: str, c: Call, dims: int, out: Tensor | None) -> None:
    check_input(name, c.x, dims, anywhere=True)
    taps = math.prod(c.kernel_size)
    in_float = dims == 4 and takes_floats(c.x.shape[1], c.groups, taps, c.flat, c.block_size)
    check_settings(name, c.weight_bits, c.activation_bits, c.sign, c.activation, in_float and c.kds_shift is None)
    for other in (*c.weights, c.residual, out):
        if other is not None and other.device != (here := c.x.device):
            raise ValueError(f"dsconv::{name}: expected all tensors on {here}, as x is, got one on {other.device}")


def _conv2d_fake(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    return _fake_convolution("conv2d", Call(*args, **named), 4, out)


def _convolution_fake(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    c = _any_convolution(*args, **named)
    return _fake_convolution("convolution", c, c.x.dim(), out)


def _fake_convolution(name: str, c: Call, dims: int, out: Tensor | None) -> Tensor:
    _check_fake(name, c, dims, out)
    check_geometry(c.x.shape, c.outputs, c.geometry)
    check_algorithm(c.algorithm, c.geometry, c.flat)
    size = c.geometry.output_size(c.x.shape[2:])
    return empty_output(c.x, c.outputs, size, c.groups) if out is None else out


def _ready_linear(*args: Any, out: Tensor | None = None, **named: Any) -> _Ready:
    c = linear_call(*args, **named)
    check_input("linear", c.x, 2)
    # A row of pixels with contiguous channels. The weights are checked against a row of at least one.
    row = (1, c.x.shape[-1], 1, max(1, c.x.shape[0]))
    shapes, weights = shapes_of(row, c.outputs, PIXEL, c.block_size, False, c.weight_bits), c.weights
    addresses = addresses_of("linear", shapes, weights)
    x, shape = c.x.contiguous(), (len(c.x), c.outputs)
    if out is not None:
        _check_out("linear", out, shape, (x, *weights))
    y = x.new_empty(shape) if out is None else out
    return _ready("linear", c, shapes, weights, addresses, x, y, ((0, 1, 0, x.shape[1]), (0, 1, 0, c.outputs)))


@with_pytorch_on_one_thread
def _linear(*args: Any, **named: Any) -> Tensor:
    return _ready_linear(*args, **named)()


def _linear_fake(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    c = linear_call(*args, **named)
    _check_fake("linear", c, 2, out)
    if not 0 < c.outputs < TOO_LARGE:
        raise ValueError(f"dsconv::linear: outputs: expected a positive number, got {c.outputs}")
    return c.x.new_empty((c.x.shape[0], c.outputs)) if out is None else out


def bind(
    operator: Literal["conv2d", "linear"], x: Tensor, *args: Any, out: Tensor, **named: Any
) -> Callable[[], Tensor]:
    """Return a call of an operator on tensors that stay in place, without PyTorch's overhead per call.

    Args:
        operator: ``conv2d`` or ``linear``.
        x, args, out, named: arguments of its overload ``out``. The contents of the tensors may change between calls.

    Returns:
        A function that writes into ``out`` and returns it, and may be called repeatedly.

    Raises:
        ValueError: the arguments do not match, or a tensor would have to be copied for every call.

    >>> from dsconv import LayerConfig
    >>> x, out = torch.ones(3, 64), torch.empty(3, 8)
    >>> vqk, kds, config = torch.ones(8, 64, dtype=torch.int8), torch.full((8, 1), 0.5), LayerConfig(block_size=64)
    >>> packed = pack(vqk, kds, None, config, 1)
    >>> call = bind("linear", x, *packed, None, 8, 4, 4, "adaptive", 64, out=out)
    >>> float(call()[0, 0])
    32.0
    >>> doubled = x.mul_(2)
    >>> float(call()[0, 0])
    64.0
    """
    if operator not in ("conv2d", "linear"):
        raise ValueError(f"dsconv::bind: operator: expected conv2d or linear, got {operator!r}")
    prepare = _ready_conv2d if operator == "conv2d" else _ready_linear
    ready = prepare(x, *args, out=out, **named)
    given = {id(value) for value in (x, *args, out, *named.values())}
    if any(taken is not None and taken.is_neg() for taken in (*ready.tensors, ready.y)):
        raise ValueError(f"dsconv::{operator}: expected tensors without a pending negation (is_neg()), got one with it")
    if any(taken is not None and id(taken) not in given for taken in (*ready.tensors, ready.y)):
        raise ValueError(
            f"dsconv::{operator}: expected x and the residual dense and in the layout of out, got one that needs a copy"
        )
    return ready.__call__


@with_pytorch_on_one_thread
def _quantize_activation(
    x: Tensor, bits: int, block_size: int, sign: str = "adaptive", groups: int = 1
) -> tuple[Tensor, Tensor]:
    check_activation(x, bits, block_size, sign, groups)
    module, best = native.extension(), native.isa()
    channels = x.shape[1] // groups
    size = block_size if channels > block_size else -(-channels // 8) * 8
    fits = size <= MAX_BLOCK_SIZE and size % 8 == 0 and channels > 1
    covered = fits and x.dtype == torch.float32 and x.is_cpu and x.numel() > 0
    if best is None or module is None or not covered:
        pair = quantize_activation(x, bits, block_size, sign=sign, groups=groups)  # type: ignore[arg-type]
        return pair[0].contiguous(), pair[1].contiguous()
    x = x.contiguous()
    mantissa = torch.empty_like(x, dtype=torch.int8)
    blocks = groups * block_count(channels, block_size)
    exponent = x.new_empty((x.shape[0], blocks, *x.shape[2:]), dtype=torch.int8)
    image = (x.shape[0], x.shape[1], 1, x[0, 0].numel())
    sizes = sizes_of(image, groups, Geometry((1, 1), groups=groups), size, False)
    strides = (image[1] * image[3], image[3], image[3], 1)
    native.use_threads()
    module.quantize_activation(
        best,
        sizes,
        x.data_ptr(),
        strides,
        bits,
        ACTIVATION_SIGNS.index(sign),
        mantissa.data_ptr(),
        exponent.data_ptr(),
    )
    return mantissa, exponent


def _quantize_activation_fake(
    x: Tensor, bits: int, block_size: int, sign: str = "adaptive", groups: int = 1
) -> tuple[Tensor, Tensor]:
    check_activation(x, bits, block_size, sign, groups)
    exponents = groups * block_count(x.shape[1] // groups, block_size)
    mantissa = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return mantissa, x.new_empty((x.shape[0], exponents, *x.shape[2:]), dtype=torch.int8)


for _name, _kernel, _fake in (
    ("conv2d", _conv2d, _conv2d_fake),
    ("convolution", _convolution, _convolution_fake),
    ("linear", _linear, _linear_fake),
    ("conv2d.out", _conv2d, _conv2d_fake),
    ("convolution.out", _convolution, _convolution_fake),
    ("linear.out", _linear, _linear_fake),
    ("quantize_activation", _quantize_activation, _quantize_activation_fake),
):
    # For other devices and layouts as well, so that the checks reject them instead of PyTorch's dispatcher.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsconv::{_name}", _fake, lib=_library)
