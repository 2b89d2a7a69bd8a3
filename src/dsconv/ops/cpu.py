"""DSConv in integers on the CPU, by the kernels of the extension ``dsconv._C``.

``dsconv::conv2d`` and ``dsconv::linear`` take packed weights (:func:`pack`) and return ``activation((y + bias) * gain +
offset + residual)``, the same bits on every instruction set, number of threads and split of the batch; see the
exactness notes in docs/numerics.md. ``gain`` and ``offset`` are a BatchNorm, and rounded once. Their overloads ``out``
write into memory that is there. ``dsconv::quantize_activation`` returns what
:func:`dsconv.numerics.quantize_activation` does.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.errors import ConfigError
from dsconv.numerics import ACTIVATION_SIGNS, block_count, check_activation, quantize_activation
from dsconv.numerics.balanced import Model, solve
from dsconv.numerics.rounding import HELD
from dsconv.threads import PyTorchOnOneThread as PyTorchOnOneThread
from dsconv.threads import parallel, torch_parallel_for, with_pytorch_on_one_thread
from dsconv.threads import threads as threads

MAX_BLOCK_SIZE = 512
_TOO_LARGE = 1 << 31  # for a size, a stride or a number of anything
# What a layer reads besides its input, in the order of csrc/bindings.cpp.
WEIGHTS = ("weight", "kds", "kds_shift", "bias", "gain", "offset")
# In the order of csrc/kernels/kernels.h, and so is ACTIVATION_SIGNS.
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "silu", "sigmoid")


class Packed(NamedTuple):
    """A layer's weight, KDS and shift in the order in which the kernels read them."""

    weight: Tensor
    kds: Tensor
    kds_shift: Tensor | None


@cache
def extension() -> ModuleType | None:
    """``dsconv._C``, ready to run; None where it is not built."""
    try:
        import dsconv._C as module
    except ImportError:
        return None
    module.use_parallel_for(torch_parallel_for() if parallel() == "torch" else 0)
    return module


def use_threads() -> None:
    """Have the next tasks run on as many threads as PyTorch has."""
    module = extension()
    if module is not None and parallel() == "pool":
        module.use_pool(threads())


class _KernelThreads:
    """Lets kernels use all of PyTorch's threads inside a :class:`PyTorchOnOneThread`."""

    def __enter__(self) -> None:
        use_threads()
        before, wanted = torch.get_num_threads(), threads()
        # Threads that start later take the number that any thread set last, so it is set only where it differs.
        self._before = before if parallel() == "torch" and wanted != before else None
        if self._before is not None:
            torch.set_num_threads(wanted)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)


@cache
def isa() -> str | None:
    """The instruction set that convolutions use: the best that has kernels, but none above ``DSCONV_MAX_ISA``.

    Raises:
        ConfigError: ``DSCONV_MAX_ISA`` is not the name of an instruction set.
    """
    known = ("scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "neondotprod")
    cap = os.environ.get("DSCONV_MAX_ISA")
    if cap is not None and cap not in known:
        raise ConfigError(f"DSCONV_MAX_ISA: expected one of {', '.join(known)}, got {cap!r}")
    module = extension()
    if module is None:
        return None
    usable = [name for name in module.isa_with_kernels() if cap is None or known.index(name) <= known.index(cap)]
    return usable[-1] if usable else None


def kernel_block_size(weight_shape: Sequence[int], config: LayerConfig) -> int | None:
    """Block size as the kernels see it; a single short block is filled up. None where they do not cover it."""
    taps = torch.Size(weight_shape[2:]).numel()
    depth = weight_shape[1] * (taps if config.blocks == "flat" else 1)
    size = config.block_size if block_count(depth, config.block_size) > 1 else -(-depth // 8) * 8
    return size if size % 8 == 0 and size <= MAX_BLOCK_SIZE else None


class _Geometry(NamedTuple):
    """The windows of a convolution, in height and width, and its groups."""

    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int]) -> list[int]:
        sides = zip(size, *self[:4], strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]


_PIXEL = _Geometry((1, 1))


def _sizes(x: Sequence[int], outputs: int, geometry: _Geometry, block_size: int, flat: bool) -> Any:
    """Sizes of a convolution of ``x (N, C, H, W)``: a ``ConvSizes`` of the extension."""
    kernel, stride, padding, dilation, groups = geometry
    if groups == x[1] > 1 and not flat:  # depthwise: blocks of a tap are flattened blocks of one value
        flat, block_size = True, 1
    module = extension()
    assert module is not None
    (images, channels, height, width), (kernel_h, kernel_w) = x, kernel
    out_height, out_width = geometry.output_size(x[2:])
    return module.ConvSizes(
        images=images,
        channels=channels,
        height=height,
        width=width,
        outputs=outputs,
        out_height=out_height,
        out_width=out_width,
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        stride_h=stride[0],
        stride_w=stride[1],
        pad_h=padding[0],
        pad_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        groups=groups,
        block_size=block_size,
        flat=flat,
    )


@with_pytorch_on_one_thread
def pack(vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig, groups: int) -> Packed:
    """Weights of a covered layer as the kernels read them, on the CPU.

    Args:
        vqk: int8 ``(O, C/groups, *K)`` with up to two kernel dimensions.
        kds, kds_shift: ``(O, CB, *K)``, or ``(O, CB)`` for flattened blocks.
        config: its settings, which the kernels cover (:mod:`dsconv.backends.cpu`).
        groups: convolution groups.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    _check_layer(vqk, kds, kds_shift, config)
    module = extension()
    block_size = kernel_block_size(vqk.shape, config)
    assert module is not None
    assert block_size is not None
    kernel = [1] * (4 - vqk.dim()) + list(vqk.shape[2:])
    # Any image will do whose output has a pixel: the packed layout does not depend on it.
    x = (1, vqk.shape[1] * groups, *kernel)
    sizes = _sizes(x, vqk.shape[0], _Geometry(kernel, groups=groups), block_size, config.blocks == "flat")
    weight_bytes, kds_count = module.packed_sizes(sizes, config.weight_bits)
    vqk = vqk.detach().cpu().contiguous()
    weight = torch.empty(weight_bytes, dtype=torch.uint8, device="cpu")
    module.pack_weight(sizes, vqk.data_ptr(), config.weight_bits, weight.data_ptr())

    def packed(scale: Tensor) -> Tensor:
        scale = scale.detach().cpu().float().contiguous()
        result = torch.empty(kds_count, dtype=torch.float32, device="cpu")
        module.pack_kds(sizes, scale.data_ptr(), result.data_ptr())
        return result

    return Packed(weight, packed(kds), None if kds_shift is None else packed(kds_shift))


# The kernels' normal equations grow with the square of the taps, and their memory with taps and channels of a block.
_MOST_TAPS, _MOST_COLUMNS = 128, 1 << 18


def solve_balanced(w: Tensor, model: Model, held: Model, half: int, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Do as :func:`dsconv.numerics.balanced.solve`, which defines it, by the kernels where they cover it.

    The kernels sum in another order, the same on every processor. They cover weights on the CPU, of up to 128 taps.

    >>> from dsconv.numerics import quantize_weight
    >>> w = torch.randn(8, 32, 3, 3)
    >>> vqk, kds = quantize_weight(w, bits=4, block_size=32, rule="balanced", solver=solve_balanced)
    """
    module = extension()
    taps, channels, rows = w.shape
    if module is None or not w.is_cpu or taps > _MOST_TAPS or taps * channels > _MOST_COLUMNS:
        return solve(w, model, held, half, shift)
    w = w.float().contiguous()
    kinds = max(value.shape[1] for value in (*model, *held))
    model, held = (Model(*(value.double().expand(-1, kinds).contiguous() for value in of)) for of in (model, held))
    q = torch.empty(w.shape, dtype=torch.int8, device="cpu")
    scale, offset = (torch.empty(taps, 1, rows, dtype=torch.float32, device="cpu") for _ in range(2))
    addresses = [[value.data_ptr() for value in of] for of in ((w,), model, held, (q, scale, offset))]
    with _KernelThreads():
        module.round_balanced(isa(), (*w.shape, kinds), half.bit_length(), shift, HELD, *addresses)
    return q, scale, offset


def _check_layer(vqk: Tensor, kds: Tensor, kds_shift: Tensor | None, config: LayerConfig) -> None:
    flat = config.blocks == "flat"
    blocks = block_count(vqk[:1].numel() if flat else vqk.shape[1], config.block_size)
    shape = (vqk.shape[0], blocks) if flat else (vqk.shape[0], blocks, *vqk.shape[2:])
    if vqk.dtype != torch.int8:
        raise ValueError(f"vqk: expected int8, got {vqk.dtype}")
    half = 1 << (config.weight_bits - 1)
    low, high = (int(v) for v in vqk.aminmax()) if vqk.numel() else (0, 0)
    if low < -half or high >= half:
        raise ValueError(f"vqk: expected {config.weight_bits}-bit integers {-half}..{half - 1}, got {low}..{high}")
    for name, scale in (("kds", kds), ("kds_shift", kds_shift)):
        if scale is not None and (scale.shape != shape or not scale.is_floating_point()):
            raise ValueError(f"{name}: expected floats of shape {shape}, got {scale.dtype} {tuple(scale.shape)}")


# PyTorch declares no types here.
_library: Any = torch.library.Library("dsconv", "DEF")  # type: ignore[no-untyped-call]
_SETTINGS = (
    "int outputs, int weight_bits, int activation_bits, str sign, int block_size, "
    "Tensor? residual=None, str activation='none', float slope=0.01, Tensor? gain=None, Tensor? offset=None"
)
_WEIGHTS = "Tensor weight, Tensor kds, Tensor? kds_shift, Tensor? bias"
_WHERE = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool flat"
for _name, _arguments in (
    ("conv2d", f"Tensor x, {_WEIGHTS}, {_WHERE}, {_SETTINGS}"),
    ("linear", f"Tensor x, {_WEIGHTS}, {_SETTINGS}"),
):
    _library.define(f"{_name}({_arguments}) -> Tensor")
    _library.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")
_library.define(
    "quantize_activation(Tensor x, int bits, int block_size, str sign='adaptive', int groups=1) -> (Tensor, Tensor)"
)


def _check_input(name: str, x: Tensor | None, dims: int, *, anywhere: bool = False) -> None:
    if x is None:  # which PyTorch takes for a tensor
        raise ValueError(f"dsconv::{name}: expected float32 x of {dims} dimensions, got None")
    here = anywhere or x.is_cpu
    if x.dtype != torch.float32 or x.dim() != dims or not here or x.layout is not torch.strided:
        where = "" if anywhere else " on the CPU"
        layout = "" if x.layout is torch.strided else f", {x.layout}"
        raise ValueError(
            f"dsconv::{name}: expected float32 x of {dims} dimensions{where}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}{layout}"
        )


def _check_geometry(x: Sequence[int], outputs: int, geometry: _Geometry) -> None:
    """Check the geometry of a convolution of ``x (N, C, H, W)``."""
    kernel, stride, padding, dilation, groups = geometry
    for name, numbers, least in zip(_Geometry._fields, geometry[:4], (1, 1, 0, 1), strict=False):
        if len(numbers) != 2 or not all(least <= n < _TOO_LARGE for n in numbers):
            raise ValueError(
                f"dsconv::conv2d: {name}: expected two whole numbers of at least {least}, got {tuple(numbers)}"
            )
    if groups < 1 or x[1] % groups or not 0 < outputs < _TOO_LARGE or outputs % groups:
        raise ValueError(
            f"dsconv::conv2d: groups: expected a divisor of {x[1]} channels and {outputs} outputs, got {groups}"
        )
    size = geometry.output_size(x[2:])
    # A compiler may not know the size yet.
    if all(isinstance(n, int) for n in size) and min(size) < 1 and 0 not in x:
        raise ValueError(
            f"dsconv::conv2d: an image of {tuple(x[2:])} with padding {tuple(padding)} is smaller than the "
            f"kernel {tuple(kernel)} with dilation {tuple(dilation)} (stride {tuple(stride)})"
        )


def _check_bits(name: str, argument: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"dsconv::{name}: {argument}: expected 2 to 8 bits, got {bits}")


def _check_settings(name: str, weight_bits: int, activation_bits: int, sign: str, activation: str) -> None:
    _check_bits(name, "weight_bits", weight_bits)
    _check_bits(name, "activation_bits", activation_bits)
    for argument, value, known in (("sign", sign, ACTIVATION_SIGNS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"dsconv::{name}: {argument}: expected one of {', '.join(known)}, got {value!r}")


class _Plan(NamedTuple):
    """The sizes of a call (``ConvSizes`` of the extension), and what its output and the weights have to be."""

    sizes: Any
    output: tuple[int, ...]
    """Height and width."""
    expected: tuple[tuple[str, torch.dtype, tuple[int]], ...]


# Networks make the same few calls over and over.
@lru_cache(maxsize=4096)
def _plan(
    x: tuple[int, ...], outputs: int, geometry: _Geometry, block_size: int, flat: bool, weight_bits: int
) -> _Plan:
    _check_bits("conv2d", "weight_bits", weight_bits)
    _check_geometry(x, outputs, geometry)
    module = extension()
    if module is None:
        raise RuntimeError("dsconv::conv2d: the extension dsconv._C is not built")
    sizes = _sizes(x, outputs, geometry, block_size, flat)
    weight_bytes, kds_count = module.packed_sizes(sizes, weight_bits)
    counts = (weight_bytes, kds_count, kds_count, outputs, outputs, outputs)
    dtypes = (torch.uint8, *[torch.float32] * 5)
    expected = tuple((name, dtype, (n,)) for name, dtype, n in zip(WEIGHTS, dtypes, counts, strict=True))
    return _Plan(sizes, (sizes.out_height, sizes.out_width), expected)


def _addresses(name: str, plan: _Plan, weights: Sequence[Tensor | None]) -> list[int]:
    """Of weights that are what they have to be; 0 where there are none."""
    addresses = []
    for (argument, dtype, shape), value in zip(plan.expected, weights, strict=True):
        if value is None:
            if argument in ("weight", "kds"):  # PyTorch takes None for a tensor
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
    """All arguments of a call of an operator by name, those left out with their defaults."""
    given = {a.name: a.default_value for a in operator._schema.arguments}
    return given | dict(zip(given, args, strict=False)) | kwargs


def checked_sizes(x: tuple[int, int, int], given: dict[str, Any]) -> Any:
    """Return the ``ConvSizes`` of a call of ``conv2d``, or of ``linear``, on one image of shape ``x``.

    Raises:
        ValueError: the weights do not belong to such a call.
    """
    call = (_Call if "flat" in given else _linear_call)(**given)
    plan = call.plan((1, *x))
    _addresses("conv2d", plan, call.weights)
    return plan.sizes


@lru_cache(maxsize=4096)
def _convolution(
    isa: str,
    name: str,
    sizes: Any,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    weight_bits: int,
    activation_bits: int,
    sign: str,
    activation: str,
    slope: float,
) -> Callable[..., None]:
    """Takes the addresses of the input, the weights, the residual and the output."""
    _check_settings(name, weight_bits, activation_bits, sign, activation)
    numbers = (ACTIVATION_SIGNS.index(sign), ACTIVATIONS.index(activation))
    module = extension()
    assert module is not None
    run: Callable[..., None] = module.Convolution(
        isa, sizes, x_strides, y_strides, weight_bits, activation_bits, *numbers, slope
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
    # The sum may take the place of what is added, but not lie across it.
    if residual.data_ptr() != y.data_ptr() and _meet(residual, y):
        raise ValueError(f"dsconv::{name}: out: expected memory of its own, or that of the residual, it shares a part")
    return residual


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _check_out(name: str, out: Tensor, shape: tuple[int, ...], read: Sequence[Tensor | None]) -> None:
    strided = out.is_cpu and out.layout is torch.strided
    if (
        not strided
        or out.shape != shape
        or out.dtype != torch.float32
        or not (out.is_contiguous() or (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)))
    ):
        raise ValueError(
            f"dsconv::{name}: out: expected dense float32 {shape} on the CPU, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if any(t is not None and _meet(t, out) for t in read):
        raise ValueError(f"dsconv::{name}: out: expected memory of its own, it shares some with what is read")


def _empty_output(x: Tensor, outputs: int, size: Sequence[int], groups: int = 1) -> Tensor:
    # Depthwise with several filters a channel writes lines.
    lines = groups == x.shape[1] and groups not in (1, outputs)
    layout = torch.channels_last if _channels_last(x) and not lines else torch.contiguous_format
    return torch.empty((x.shape[0], outputs, *size), dtype=x.dtype, device=x.device, memory_format=layout)


class _Call(NamedTuple):
    """The arguments of ``conv2d``. Those of ``linear`` are of a convolution with a kernel of one pixel."""

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
    slope: float = 0.01
    gain: Tensor | None = None
    offset: Tensor | None = None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.kds, self.kds_shift, self.bias, self.gain, self.offset

    @property
    def geometry(self) -> _Geometry:
        where = tuple(self.kernel_size), tuple(self.stride), tuple(self.padding), tuple(self.dilation)
        return _Geometry(*where, self.groups)

    def plan(self, x: tuple[int, ...]) -> _Plan:
        """Return the plan for an input of the shape ``x (N, C, H, W)``."""
        return _plan(x, self.outputs, self.geometry, self.block_size, self.flat, self.weight_bits)


def _linear_call(x: Any, weight: Any, kds: Any, kds_shift: Any, bias: Any, *rest: Any, **named: Any) -> _Call:
    return _Call(x, weight, kds, kds_shift, bias, *_PIXEL, False, *rest, **named)


class _Ready(NamedTuple):
    """A convolution, and the tensors that it reads and writes."""

    run: Callable[..., None]
    addresses: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    y: Tensor

    def __call__(self) -> Tensor:
        if self.y.numel():
            use_threads()
            self.run(*self.addresses)
        return self.y


def _ready(
    name: str, c: _Call, plan: _Plan, weights: Any, addresses: Any, x: Tensor, y: Tensor, strides: Any
) -> _Ready:
    best = isa()
    assert best is not None
    numbers = (c.weight_bits, c.activation_bits, c.sign, c.activation, c.slope)
    run = _convolution(best, name, plan.sizes, *strides, *numbers)
    added = None if c.residual is None else _residual(name, c.residual, y)
    ends = (0 if added is None else added.data_ptr(), y.data_ptr())
    return _Ready(run, (x.data_ptr(), *addresses, *ends), (x, *weights, added), y)


def _ready_conv2d(*args: Any, out: Tensor | None = None, **named: Any) -> _Ready:
    c = _Call(*args, **named)
    _check_input("conv2d", c.x, 4)
    plan, weights = c.plan(c.x.shape), c.weights
    addresses = _addresses("conv2d", plan, weights)
    x = c.x if _channels_last(c.x) else c.x.contiguous()
    if out is not None:
        _check_out("conv2d", out, (len(x), c.outputs, *plan.output), (x, *weights))
    y = out
    if out is None or c.groups == x.shape[1] > 1:  # depthwise writes in the layout of x
        made = _empty_output(x, c.outputs, plan.output, c.groups)
        y = out if out is not None and out.stride() == made.stride() else made
    assert y is not None
    return _ready("conv2d", c, plan, weights, addresses, x, y, (x.stride(), y.stride()))


@with_pytorch_on_one_thread
def _conv2d(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    y = _ready_conv2d(*args, out=out, **named)()
    return y if out is None or out is y else out.copy_(y)


# What compilers and the device meta see. All checks but those of the weights' sizes are those of a real call.


def _check_fake(name: str, c: _Call, dims: int, out: Tensor | None) -> None:
    _check_input(name, c.x, dims, anywhere=True)
    _check_settings(name, c.weight_bits, c.activation_bits, c.sign, c.activation)
    for other in (*c.weights, c.residual, out):
        if other is not None and other.device != (here := c.x.device):
            raise ValueError(f"dsconv::{name}: expected all tensors on {here}, as x is, got one on {other.device}")


def _conv2d_fake(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    c = _Call(*args, **named)
    _check_fake("conv2d", c, 4, out)
    _check_geometry(c.x.shape, c.outputs, c.geometry)
    size = c.geometry.output_size(c.x.shape[2:])
    return _empty_output(c.x, c.outputs, size, c.groups) if out is None else out


def _ready_linear(*args: Any, out: Tensor | None = None, **named: Any) -> _Ready:
    c = _linear_call(*args, **named)
    _check_input("linear", c.x, 2)
    # A row of pixels whose channels lie side by side. The weights are checked against a row of at least one.
    row = (1, c.x.shape[-1], 1, max(1, c.x.shape[0]))
    plan, weights = _plan(row, c.outputs, _PIXEL, c.block_size, False, c.weight_bits), c.weights
    addresses = _addresses("linear", plan, weights)
    x, shape = c.x.contiguous(), (len(c.x), c.outputs)
    if out is not None:
        _check_out("linear", out, shape, (x, *weights))
    y = x.new_empty(shape) if out is None else out
    return _ready("linear", c, plan, weights, addresses, x, y, ((0, 1, 0, x.shape[1]), (0, 1, 0, c.outputs)))


@with_pytorch_on_one_thread
def _linear(*args: Any, **named: Any) -> Tensor:
    return _ready_linear(*args, **named)()


def _linear_fake(*args: Any, out: Tensor | None = None, **named: Any) -> Tensor:
    c = _linear_call(*args, **named)
    _check_fake("linear", c, 2, out)
    if not 0 < c.outputs < _TOO_LARGE:
        raise ValueError(f"dsconv::linear: outputs: expected a positive number, got {c.outputs}")
    return c.x.new_empty((c.x.shape[0], c.outputs)) if out is None else out


def bind(
    operator: Literal["conv2d", "linear"], x: Tensor, *args: Any, out: Tensor, **named: Any
) -> Callable[[], Tensor]:
    """A call of an operator on tensors that stay where they are, without what PyTorch does for every call.

    Args:
        operator: ``conv2d`` or ``linear``.
        x, args, out, named: what its overload ``out`` takes. What the tensors hold may change from call to call.

    Returns:
        What writes into ``out`` and returns it, as often as it is called.

    Raises:
        ValueError: the arguments do not belong together, or a tensor would have to be copied for every call.

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
        raise ValueError(f"dsconv::{operator}: expected tensors that hold their values, got one that PyTorch negates")
    if any(taken is not None and id(taken) not in given for taken in (*ready.tensors, ready.y)):
        raise ValueError(
            f"dsconv::{operator}: expected x and the residual dense and in the layout of out: one had to be copied"
        )
    return ready.__call__


@with_pytorch_on_one_thread
def _quantize_activation(
    x: Tensor, bits: int, block_size: int, sign: str = "adaptive", groups: int = 1
) -> tuple[Tensor, Tensor]:
    check_activation(x, bits, block_size, sign, groups)
    module, best = extension(), isa()
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
    sizes = _sizes(image, groups, _Geometry((1, 1), groups=groups), size, False)
    strides = (image[1] * image[3], image[3], image[3], 1)
    use_threads()
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
    ("linear", _linear, _linear_fake),
    ("conv2d.out", _conv2d, _conv2d_fake),
    ("linear.out", _linear, _linear_fake),
    ("quantize_activation", _quantize_activation, _quantize_activation_fake),
):
    # Of other devices and layouts as well, so that the checks refuse them and not PyTorch's dispatcher.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsconv::{_name}", _fake, lib=_library)
