"""Arguments of ``dsconv::conv2d``, ``dsconv::convolution`` and ``dsconv::linear``, and their validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsconv.names import ALGORITHMS
from dsconv.numerics import ACTIVATION_SIGNS
from dsconv.numerics.winograd import PRODUCTS
from dsconv.ops.native import extension

TOO_LARGE = 1 << 31  # for a size, a stride or any count
# Tensors that a layer reads in addition to its input, in the order of csrc/bindings.cpp.
WEIGHTS = ("weight", "kds", "kds_shift", "bias", "gain", "offset")
# In the order of csrc/kernels/kernels.h, like ACTIVATION_SIGNS.
ACTIVATIONS = (
    *("none", "relu", "clamp", "leaky_relu", "hardswish", "silu"),
    *("hardsigmoid", "sigmoid", "elu", "exp", "gelu", "gelu_tanh", "mish", "softplus", "tanh"),
)
OPERATIONS = (
    *("activate", "add", "subtract", "subtract_from", "multiply", "divide", "divide_by", "scale", "slope"),
    *("normalize", "softmax"),
)


FLOAT_BITS = 32
"""Value of the activation bits for activations that stay float32."""


def takes_floats(channels: int, groups: int, taps: int, flat: bool, block_size: int) -> bool:
    """Return whether activations of a 2-D convolution may stay float: it is depthwise, and a filter is one block."""
    return flat and groups == channels > 1 and taps <= block_size


class Geometry(NamedTuple):
    """Windows of a convolution, in depth if it has one, height and width, and its groups.

    ``output_padding`` is that of a transposed convolution, and None for any other.
    """

    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1
    output_padding: Sequence[int] | None = None

    def output_size(self, size: Sequence[int]) -> list[int]:
        if self.output_padding is not None:
            sides = zip(size, *self[:4], self.output_padding, strict=True)
            return [(n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, s, p, d, e in sides]
        sides = zip(size, *self[:4], strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]


PIXEL = Geometry((1, 1))
_NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a 2-D convolution, like ``ConvSizes`` of the extension."""

    images: int
    channels: int
    height: int
    width: int
    outputs: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    block_size: int
    flat: bool
    winograd: bool = False
    transposed: bool = False
    volume: bool = False
    out_depth: int = 1
    kernel_d: int = 1

    @property
    def border(self) -> tuple[int, int]:
        """Zero padding around a quantized input: none, for kernels that read no pixel in the padding."""
        return 0, 0


def sizes_of(
    x: Sequence[int],
    outputs: int,
    geometry: Geometry,
    block_size: int,
    flat: bool,
    algorithm: str = "direct",
    *,
    native: bool = True,
) -> Any:
    """Return the sizes of a convolution of ``x (N, C, H, W)`` or ``(N, C, D, H, W)``.

    They are a ``ConvSizes`` of the extension, or, if not ``native``, the :class:`Sizes` of a 2-D convolution.
    """
    groups, transposed, volume = geometry.groups, geometry.output_padding is not None, len(x) == 5
    # The extension treats the blocks of a tap of depthwise layers as flattened blocks of one value.
    if native and groups == x[1] > 1 and not (flat or transposed or volume):
        flat, block_size = True, 1
    make: Any = Sizes
    if native:
        module = extension()
        assert module is not None
        make = module.ConvSizes
    axes = ("depth", "height", "width")[5 - len(x) :]
    sized = dict(zip(axes, x[2:], strict=True))
    sized |= {f"out_{axis}": n for axis, n in zip(axes, geometry.output_size(x[2:]), strict=True)}
    for name, of in zip(("kernel", "stride", "pad", "dilation"), geometry[:4], strict=True):
        sized |= {f"{name}_{axis[0]}": n for axis, n in zip(axes, of, strict=True)}
    return make(
        images=x[0],
        channels=x[1],
        outputs=outputs,
        groups=groups,
        block_size=block_size,
        flat=flat,
        winograd=algorithm == "winograd",
        transposed=transposed,
        volume=volume,
        **sized,
    )


class Shapes(NamedTuple):
    """Sizes of a call (``ConvSizes`` of the extension), and the shapes of its output and weights."""

    sizes: Any
    output: tuple[int, ...]
    """Height and width, preceded by the depth if there is one."""
    weights: tuple[tuple[str, torch.dtype, tuple[int]], ...]


class Call(NamedTuple):
    """Arguments of ``convolution``. Those of ``linear`` are for a convolution with a kernel of one pixel."""

    x: Tensor
    weight: Tensor
    kds: Tensor
    kds_shift: Tensor | None
    bias: Tensor | None
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    flat: bool
    outputs: int
    weight_bits: int
    activation_bits: int
    sign: str
    block_size: int
    residual: Tensor | None = None
    activation: str = "none"
    alpha: float = 0.0
    beta: float = 0.0
    gain: Tensor | None = None
    offset: Tensor | None = None
    algorithm: str = "direct"
    output_padding: Sequence[int] | None = None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.kds, self.kds_shift, self.bias, self.gain, self.offset

    @property
    def geometry(self) -> Geometry:
        where = tuple(self.kernel_size), tuple(self.stride), tuple(self.padding), tuple(self.dilation)
        extra = None if self.output_padding is None else tuple(self.output_padding)
        return Geometry(*where, self.groups, extra)

    def shapes(self, x: tuple[int, ...]) -> Shapes:
        """Return the shapes for an input of shape ``x (N, C, H, W)`` or ``(N, C, D, H, W)``."""
        return shapes_of(x, self.outputs, self.geometry, self.block_size, self.flat, self.weight_bits, self.algorithm)


def linear_call(x: Any, weight: Any, kds: Any, kds_shift: Any, bias: Any, *rest: Any, **named: Any) -> Call:
    return Call(x, weight, kds, kds_shift, bias, *PIXEL[:5], False, *rest, **named)


# Networks repeat the same few calls.
@lru_cache(maxsize=4096)
def shapes_of(
    x: tuple[int, ...],
    outputs: int,
    geometry: Geometry,
    block_size: int,
    flat: bool,
    weight_bits: int,
    algorithm: str = "direct",
) -> Shapes:
    check_bits("conv2d", "weight_bits", weight_bits)
    check_geometry(x, outputs, geometry)
    check_algorithm(algorithm, geometry, flat)
    module = extension()
    if module is None:
        raise RuntimeError("dsconv::conv2d: the extension dsconv._C is not built")
    sizes = sizes_of(x, outputs, geometry, block_size, flat, algorithm)
    weight_bytes, kds_count = module.packed_sizes(sizes, weight_bits)
    shifts = kds_count // PRODUCTS if algorithm == "winograd" else kds_count
    counts = (weight_bytes, kds_count, shifts, outputs, outputs, outputs)
    dtypes = (torch.uint8, *[torch.float32] * 5)
    weights = tuple((name, dtype, (n,)) for name, dtype, n in zip(WEIGHTS, dtypes, counts, strict=True))
    return Shapes(sizes, tuple(geometry.output_size(x[2:])), weights)


def addresses_of(name: str, shapes: Shapes, weights: Sequence[Tensor | None]) -> list[int]:
    """Return the addresses of valid weights; 0 for missing ones."""
    addresses = []
    for (argument, dtype, shape), value in zip(shapes.weights, weights, strict=True):
        if value is None:
            if argument in ("weight", "kds"):  # PyTorch treats None as a tensor
                raise ValueError(f"dsconv::{name}: {argument}: expected {dtype} {shape}, got None")
            addresses.append(0)
            continue
        strided = value.is_cpu and value.layout is torch.strided
        if value.dtype != dtype or value.shape != shape or not strided or not value.is_contiguous():
            raise ValueError(
                f"dsconv::{name}: {argument}: expected contiguous {dtype} {shape} on the CPU for these settings, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}"
            )
        addresses.append(value.data_ptr())
    return addresses


def arguments_of(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of an operator by name, including defaults."""
    given = {a.name: a.default_value for a in operator._schema.arguments}
    return given | dict(zip(given, args, strict=False)) | kwargs


def checked_sizes(x: tuple[int, ...], given: dict[str, Any]) -> Any:
    """Return the sizes of a call of ``conv2d``, ``convolution`` or ``linear`` for one image of shape ``x``.

    They are a ``ConvSizes`` for weights packed by the extension, otherwise :class:`Sizes`.

    Raises:
        ValueError: the weights do not match such a call.
    """
    call = (Call if "flat" in given else linear_call)(**given)
    if call.weight.dtype != torch.uint8:  # packed by another backend
        check_geometry((1, *x), call.outputs, call.geometry)
        return sizes_of((1, *x), call.outputs, call.geometry, call.block_size, call.flat, native=False)
    shapes = call.shapes((1, *x))
    addresses_of("conv2d", shapes, call.weights)
    return shapes.sizes


def check_input(name: str, x: Tensor | None, dims: int, *, anywhere: bool = False) -> None:
    if x is None:  # which PyTorch treats as a tensor
        raise ValueError(f"dsconv::{name}: expected float32 x of {dims} dimensions, got None")
    here = anywhere or x.is_cpu
    if x.dtype != torch.float32 or x.dim() != dims or not here or x.layout is not torch.strided:
        where = "" if anywhere else " on the CPU"
        layout = "" if x.layout is torch.strided else f", {x.layout}"
        raise ValueError(
            f"dsconv::{name}: expected float32 x of {dims} dimensions{where}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}{layout}"
        )


def check_geometry(x: Sequence[int], outputs: int, geometry: Geometry) -> None:
    """Check the geometry of a convolution of ``x (N, C, H, W)`` or ``(N, C, D, H, W)``."""
    kernel, stride, padding, dilation, groups, extra = geometry
    dims = len(x) - 2
    operator = "conv2d" if dims == 2 and extra is None else "convolution"
    numbers_of = {name: (getattr(geometry, name), 1) for name in ("kernel_size", "stride", "dilation")}
    numbers_of["padding"] = (padding, 0)
    if extra is not None:
        numbers_of["output_padding"] = (extra, 0)
    for name, (numbers, least) in numbers_of.items():
        if len(numbers) != dims or not all(least <= n < TOO_LARGE for n in numbers):
            raise ValueError(
                f"dsconv::{operator}: {name}: expected {_NUMBERS[dims]} whole numbers of at least {least}, "
                f"got {tuple(numbers)}"
            )
    if groups < 1 or x[1] % groups or not 0 < outputs < TOO_LARGE or outputs % groups:
        raise ValueError(
            f"dsconv::{operator}: groups: expected a divisor of {x[1]} channels and {outputs} outputs, got {groups}"
        )
    if extra is not None and not all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(
            f"dsconv::{operator}: output_padding: expected less than stride {tuple(stride)} or dilation "
            f"{tuple(dilation)}, got {tuple(extra)}"
        )
    size = geometry.output_size(x[2:])
    # A compiler may not know the size yet.
    if not all(isinstance(n, int) for n in size):
        return
    if extra is not None and (0 in x[2:] or min(size) < 1):
        raise ValueError(
            f"dsconv::{operator}: expected an image whose output has pixels, got {tuple(x[2:])}, whose output is {size}"
        )
    if min(size) < 1 and 0 not in x:
        raise ValueError(
            f"dsconv::{operator}: an image of {tuple(x[2:])} with padding {tuple(padding)} is smaller than the "
            f"kernel {tuple(kernel)} with dilation {tuple(dilation)} (stride {tuple(stride)})"
        )


def check_algorithm(algorithm: str, geometry: Geometry, flat: bool) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"dsconv::conv2d: algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    plain = geometry._replace(padding=(0, 0)) == Geometry((3, 3))
    if algorithm == "winograd" and (flat or not plain):
        raise ValueError(
            "dsconv::conv2d: algorithm: winograd is for kernels of 3x3 with stride and dilation 1, one group and "
            f"blocks by tap; got {geometry}, flat={flat}"
        )


def check_bits(name: str, argument: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"dsconv::{name}: {argument}: expected 2 to 8 bits, got {bits}")


def check_settings(
    name: str, weight_bits: int, activation_bits: int, sign: str, activation: str, takes_floats: bool
) -> None:
    """Check settings; ``takes_floats``: activations may stay float32 (:func:`takes_floats`)."""
    check_bits(name, "weight_bits", weight_bits)
    if activation_bits == FLOAT_BITS and not takes_floats:
        raise ValueError(
            f"dsconv::{name}: activation_bits: float activations ({FLOAT_BITS}) are for depthwise convolutions of "
            "images with one block a filter and no shift; expected 2 to 8 bits"
        )
    if activation_bits != FLOAT_BITS:
        check_bits(name, "activation_bits", activation_bits)
    for argument, value, known in (("sign", sign, ACTIVATION_SIGNS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"dsconv::{name}: {argument}: expected one of {', '.join(known)}, got {value!r}")
