"""Random layers for the integer kernels, called as PyTorch operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dsconv.config import LayerConfig
from dsconv.numerics import (
    Reference,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
    quantize_weight_shifted,
    quantize_winograd_input,
    reference_conv,
    reference_winograd,
    winograd_input,
    winograd_weight,
)
from dsconv.ops import FLOAT_BITS, native, packing, patches

LAYOUTS = ("contiguous", "channels last", "every second", "transposed")


@dataclass
class Case:
    """A layer and its input ``x``: ``run()`` returns the operator's result, ``reference()`` the expected one."""

    x: Tensor
    outputs: int
    kernel: tuple[int, ...]
    config: LayerConfig
    groups: int = 1
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    bias: Tensor | None = None
    weight_scale: float = 1.0
    output_padding: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        config = self.config
        weight = torch.randn(self.outputs, self.x.shape[1] // self.groups, *self.kernel) * self.weight_scale
        rows = weight.flatten(1) if config.blocks == "flat" else weight
        self.shift: Tensor | None = None
        if config.weight_shift:
            vqk, self.kds, self.shift = quantize_weight_shifted(rows, config.weight_bits, config.block_size)
        else:
            vqk, self.kds = quantize_weight(rows, config.weight_bits, config.block_size)
        self.vqk = vqk.view(weight.shape)
        transposed = None if self.output_padding is None else (self.stride, self.dilation)
        self.packed = packing.pack(self.vqk, self.kds, self.shift, config, self.groups, transposed=transposed)

    @property
    def operator(self) -> Any:
        general = len(self.kernel) == 3 or self.output_padding is not None
        return torch.ops.dsconv.convolution if general else torch.ops.dsconv.conv2d

    def arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "x": self.x,
            **self.packed._asdict(),
            "bias": self.bias,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "flat": config.blocks == "flat",
            "outputs": self.outputs,
            "weight_bits": config.weight_bits,
            "activation_bits": config.activation_bits or FLOAT_BITS,
            "sign": config.activation_sign,
            "block_size": packing.kernel_block_size(self.vqk.shape, config),
            "algorithm": config.algorithm,
            **({} if self.output_padding is None else {"output_padding": self.output_padding}),
        }

    def run(self, **changed: Any) -> Tensor:
        y = self.operator(**self.arguments() | changed)
        assert isinstance(y, Tensor)
        return y

    def reference(self) -> Reference:
        config, vqk, kds, shift = self.config, self.vqk, self.kds, self.shift
        if config.algorithm == "winograd":
            return self._reference_winograd()
        if config.activation_bits is None:
            return self._reference_of_floats()
        x, where = self.x, {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if config.blocks == "flat":
            x, where = patches(x, self.kernel, **where), {}
            ones = (1,) * len(self.kernel)
            vqk, kds = vqk.flatten(1).view(len(vqk), -1, *ones), kds.view(*kds.shape, *ones)
            shift = None if shift is None else shift.view(kds.shape)
        size, sign = config.block_size, config.activation_sign
        m, e = quantize_activation(x, config.activation_bits, size, sign=sign, groups=self.groups)
        if self.output_padding is not None:
            # A convolution of pixels with zeros between them, the taps in reverse.
            m, e, where = self._spread(m), self._spread(e), {"dilation": self.dilation}
            last = tuple(range(2, vqk.dim()))
            vqk, kds, shift = vqk.flip(last), kds.flip(last), None if shift is None else shift.flip(last)
        return reference_conv(m, e, vqk, kds, size, kds_shift=shift, bias=self.bias, groups=self.groups, **where)

    def _spread(self, x: Tensor) -> Tensor:
        assert self.output_padding is not None
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)))
        spread[:, :, *(slice(None, None, s) for s in self.stride)] = x
        sides = zip(self.kernel, self.padding, self.dilation, self.output_padding, strict=True)
        border = [(d * (k - 1) - p, d * (k - 1) - p + e) for k, p, d, e in sides]
        return F.pad(spread, [pad for pair in reversed(border) for pad in pair])

    def _reference_of_floats(self) -> Reference:
        x, weight = self.x.double(), self.vqk.double() * self.kds.double().view(-1, 1, 1, 1)
        how: Any = (self.stride, self.padding, self.dilation, self.groups)
        output, size = F.conv2d(x, weight, None, *how), F.conv2d(x.abs(), weight.abs(), None, *how)
        if self.bias is not None:
            bias = self.bias.double().view(-1, 1, 1)
            output, size = output + bias, size + bias.abs()
        return Reference(output, (self.vqk[0].numel() + 2) * 2.0**-24 * size)

    def _reference_winograd(self) -> Reference:
        size, (top, left) = self.config.block_size, self.padding
        weight = winograd_weight(dequantize_weight(self.vqk, self.kds, size, self.shift), size)
        m, e = quantize_winograd_input(winograd_input(self.x, self.padding), size)
        of = (self.x.shape[2] + 2 * top - 2, self.x.shape[3] + 2 * left - 2)
        return reference_winograd(m, e, weight, size, of, bias=self.bias)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw any small layer that the kernels cover; the kernel may be larger than the image, and the batch empty."""

    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    torch.manual_seed(pick(0, 10**6))
    how = draw(st.sampled_from(("depthwise", "grouped", "winograd")))
    depthwise, winograd = how == "depthwise", how == "winograd"
    groups = pick(2, 70) if depthwise else 1 if winograd else pick(1, 3)
    channels = 1 if depthwise else draw(st.integers(1, 40) | st.sampled_from((64, 80, 129, 257)))
    in_float = depthwise and draw(st.booleans())
    config = LayerConfig(
        weight_bits=pick(2, 8),
        activation_bits=None if in_float else pick(2, 8),
        block_size=8 * pick(2 if in_float else 1, 16),
        activation_sign=draw(st.sampled_from(("adaptive", "extra", "included"))),
        weight_shift=not in_float and draw(st.booleans()),
        blocks="tap" if winograd else "flat" if in_float else draw(st.sampled_from(("tap", "flat"))),
        algorithm="winograd" if winograd else "direct",
    )
    kernel = (3, 3) if winograd else (pick(1, 3), pick(1, 4))
    padding, dilation = (pick(0, 3), pick(0, 3)), (1, 1) if winograd else (pick(1, 2), pick(1, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    scale = draw(st.sampled_from((1.0, 2.0**-90, 2.0**90)))
    x = torch.randn(pick(0, 3), groups * channels, least[0] + pick(0, 6), least[1] + pick(0, 18)) * scale
    if draw(st.booleans()):
        x = x.relu()
    if draw(st.booleans()) and x.numel():
        x.view(-1)[pick(0, x.numel() - 1)] = draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    outputs = groups * (pick(1, 3) if depthwise else pick(1, 40))
    bias = torch.randn(outputs) * scale if draw(st.booleans()) else None
    stride = (1, 1) if winograd else (pick(1, 4), pick(1, 4))
    return Case(x, outputs, kernel, config, groups, stride, padding, dilation, bias)


@st.composite
def general_cases(draw: st.DrawFn) -> Case:
    """Draw any small transposed or 3-D convolution that the kernels cover; the batch may be empty."""

    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    torch.manual_seed(pick(0, 10**6))
    dims, transposed = draw(st.sampled_from(((2, True), (3, False), (3, True))))
    config = LayerConfig(
        weight_bits=pick(2, 8),
        activation_bits=pick(2, 8),
        block_size=8 * pick(1, 16),
        activation_sign=draw(st.sampled_from(("adaptive", "extra", "included"))),
        weight_shift=draw(st.booleans()),
        blocks="tap" if transposed else draw(st.sampled_from(("tap", "flat"))),
    )
    groups = pick(1, 3)
    channels = groups * draw(st.integers(1, 40) | st.sampled_from((64, 80, 129)))
    kernel, stride, padding, dilation = (
        tuple(pick(low, high) for _ in range(dims)) for low, high in ((1, 4), (1, 4), (0, 3), (1, 3))
    )
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    extra = None
    if transposed:
        extra = tuple(pick(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        sides = zip(spans, stride, padding, extra, strict=True)
        least = [1 + max(0, -((span - 2 * p + e - 1) // s)) for span, s, p, e in sides]
    else:
        least = [max(1, span - 2 * p) for span, p in zip(spans, padding, strict=True)]
    scale = draw(st.sampled_from((1.0, 2.0**-90, 2.0**90)))
    size = [n + pick(0, 3 if dims == 3 else 6) for n in least]
    x = torch.randn(pick(0, 2), channels, *size) * scale
    if draw(st.booleans()):
        x = x.relu()
    if draw(st.booleans()) and x.numel():
        x.view(-1)[pick(0, x.numel() - 1)] = draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    outputs = groups * pick(1, 40)
    bias = torch.randn(outputs) * scale if draw(st.booleans()) else None
    return Case(x, outputs, kernel, config, groups, stride, padding, dilation, bias, output_padding=extra)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the values of ``x`` in another memory layout."""
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "every second":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two float32 tensors have the same bits, except those of NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def near(y: Tensor, reference: Reference) -> bool:
    """Return whether an output is within the bound of the reference, and NaN in the same places."""
    inside = ((y - reference.output).abs() <= reference.bound) | (y == reference.output)  # also for infinities
    return y.shape == reference.output.shape and bool((inside | (y.isnan() & reference.output.isnan())).all())


def conv_sizes(module: Any, *, flat: bool = False, **changed: int) -> Any:
    """Return sizes for the extension: a 3x3 convolution of 16 channels on 4x4 pixels, with some changed."""
    given = {"images": 1, "channels": 16, "outputs": 16, "groups": 1, "block_size": 16}
    given |= dict.fromkeys(("height", "width", "out_height", "out_width"), 4)
    given |= dict.fromkeys(("kernel_h", "kernel_w"), 3)
    given |= dict.fromkeys(("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"), 1)
    return module.ConvSizes(**given | changed, flat=flat)


def by_isa(call: Callable[[], Any], *, covered: bool = True) -> dict[str, Any]:
    """Return the results of a call by instruction set, and check that only the kernels of that set ran.

    Args:
        call: function to call.
        covered: whether the kernels compute all of it, unless there is nothing to compute.
    """
    module = native.extension()
    assert module is not None
    returned = {}
    for name in module.isa_with_kernels():
        before = module.runs()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "isa", lambda name=name: name)
            returned[name] = call()
        ran = {other for other, count in module.runs().items() if count > before[other]}
        nothing = not covered or is_empty(returned[name])
        assert ran == {name} or (nothing and not ran), f"asked for {name}, {ran or 'nothing'} ran"
    return returned


def is_empty(returned: Any) -> bool:
    """Return whether there was nothing to compute."""
    return not any(t.numel() for t in (returned if isinstance(returned, tuple | list) else (returned,)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_everywhere(case: Case, expected: Tensor) -> None:
    """Check that every instruction set, number of threads, layout and split of the batch gives the expected bits."""
    for isa, y in by_isa(case.run).items():
        assert same_bits(y, expected), isa
    for count in (1, 2, 3, 8):
        with threads(count):
            assert same_bits(case.run(), expected), count
    for layout in LAYOUTS:
        assert same_bits(case.run(x=laid_out(case.x, layout)), expected), layout
    if len(case.x):
        assert same_bits(torch.cat([case.run(x=image) for image in case.x.split(1)]), expected)
