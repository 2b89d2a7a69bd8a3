"""Results of the integer kernels. Calls of their operators: test_cpu_calls.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, assert_same_everywhere, by_isa, cases, laid_out, near, same_bits
from torch import Tensor
from torch.nn import functional as F

from dsconv import ops
from dsconv.config import LayerConfig
from dsconv.numerics import quantize_activation, quantize_weight
from dsconv.ops import native, packing

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

any_layout = st.sampled_from(LAYOUTS)


@given(cases(), any_layout)
def test_output_is_within_the_bound_of_the_reference_and_nan_where_it_is(case: Case, layout: str) -> None:
    assert near(case.run(x=laid_out(case.x, layout)), case.reference())


@given(cases())
def test_every_instruction_set_thread_count_batch_split_and_layout_gives_the_same_bits(case: Case) -> None:
    assert_same_everywhere(case, case.run())


@given(cases(), any_layout)
def test_output_has_the_memory_layout_of_the_input(case: Case, layout: str) -> None:
    x = laid_out(case.x, layout)
    y = case.run(x=x)
    several = case.groups == case.x.shape[1] > 1 and case.outputs > case.groups
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last) and not several
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


WHERE = ("kernel", "stride", "padding", "dilation")
DEPTHWISE = [
    (2, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (33, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    (17, 2, (3, 3), (1, 2), (1, 0), (2, 1)),
    (16, 3, (1, 5), (1, 3), (0, 2), (1, 2)),
    (31, 1, (7, 7), (1, 1), (3, 3), (1, 1)),
    (32, 1, (7, 7), (2, 1), (6, 0), (1, 2)),
    (48, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (5, 4, (7, 7), (3, 3), (3, 3), (1, 1)),
    (20, 1, (3, 3), (1, 3), (1, 1), (1, 1)),
    (20, 1, (5, 5), (3, 4), (2, 2), (1, 1)),
]


@pytest.mark.parametrize(("channels", "filters", *WHERE), DEPTHWISE)
@pytest.mark.parametrize(("blocks", "size", "shift"), [("tap", 32, False), ("flat", 16, True), ("flat", 32, False)])
def test_depthwise_is_exact_and_the_same_everywhere(
    channels: int,
    filters: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    blocks: Any,
    size: int,
    shift: bool,
) -> None:
    torch.manual_seed(0)
    config = LayerConfig(block_size=size, blocks=blocks, weight_bits=8, activation_bits=5, weight_shift=shift)
    x, outputs = torch.randn(2, channels, 13, 21), channels * filters
    x[0, 1, 6, 9] = torch.nan
    case = Case(x, outputs, kernel, config, channels, stride, padding, dilation, bias=torch.randn(outputs))
    y = case.run()
    assert near(y, case.reference())
    assert_same_everywhere(case, y)
    # The NaN does not affect other channels and images.
    assert y[0, filters : 2 * filters].isnan().any()
    y[0, filters : 2 * filters] = 0
    assert not y.isnan().any()


@pytest.mark.parametrize(("channels", "filters", *WHERE), DEPTHWISE)
def test_depthwise_of_float_activations_is_exact_and_the_same_everywhere(
    channels: int, filters: int, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    torch.manual_seed(0)
    config = LayerConfig(block_size=64, blocks="flat", weight_bits=8, activation_bits=None)
    x, outputs = torch.randn(2, channels, 13, 21), channels * filters
    x[0, 1, 6, 9], x[1, 0, 0, 0] = torch.nan, torch.inf
    case = Case(x, outputs, kernel, config, channels, stride, padding, dilation, bias=torch.randn(outputs))
    y = case.run()
    assert near(y, case.reference())
    assert_same_everywhere(case, y)
    # Only windows that read the NaN are NaN, or those that read the infinity where VQK is zero.
    assert y[0, filters : 2 * filters].isnan().any()
    y[0, filters : 2 * filters] = y[1, :filters] = 0
    assert y.isfinite().all()


def test_float_activations_are_for_depthwise_layers_of_one_block_without_a_shift() -> None:
    config = LayerConfig(block_size=16, blocks="flat", weight_bits=8, activation_bits=None)
    case = Case(torch.randn(1, 8, 5, 5), 8, (3, 3), config, 8)
    assert case.run().isfinite().all()
    # For tensors with values, the sizes differ between layers.
    meta = {name: value.to("meta") for name, value in case.arguments().items() if isinstance(value, Tensor)}
    for changed in ({"groups": 1}, {"block_size": 8}, {"flat": False}):
        with pytest.raises(ValueError, match="activation_bits: float activations"):
            case.run(**meta | changed)
    with pytest.raises(ValueError, match="no shift"):
        case.run(kds_shift=case.packed.kds)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("channels", [5, 16, 17, 40])
@pytest.mark.parametrize("bits", [4, None])
def test_every_channel_of_a_depthwise_layer_has_terms_and_a_residual_of_its_own(
    channels: int, kernel: Any, bits: int | None
) -> None:
    torch.manual_seed(0)
    config = LayerConfig(activation_bits=bits, blocks="tap" if bits else "flat")
    case = Case(torch.randn(2, channels, 7, 9), channels, kernel, config, channels)
    plain, bias = case.run(), torch.randn(channels)
    residual = torch.randn(plain.shape)
    for layout in LAYOUTS:
        given = {"x": laid_out(case.x, layout), "residual": laid_out(residual, layout), "bias": bias}
        for isa, y in by_isa(lambda given=given: case.run(**given)).items():
            assert same_bits(y, plain + bias[:, None, None] + residual), (isa, layout)


@pytest.mark.parametrize("groups", [1, 24])
@pytest.mark.parametrize("x_scale", [1e38, 1e35, 1.8 * 2.0**111, 1.8 * 2.0**110, 1e-28, 1e-30])
def test_numbers_near_both_ends_of_float32_are_within_the_bound(groups: int, x_scale: float) -> None:
    torch.manual_seed(0)
    # VQK times x must be exact in float32: VQK of two bits are -2..1, and a pixel is large in only one channel.
    x = (torch.rand(2, 24, 7, 9) + 0.1) * x_scale
    keep = torch.randint(24, (2, 1, 7, 9))
    x = torch.where(torch.arange(24).view(1, -1, 1, 1) == keep, x, -0.0) if groups == 1 else x
    config = LayerConfig(weight_bits=2, activation_bits=8, block_size=8)
    bias, weight_scale = torch.randn(24) * x_scale / 1e3, 1e-3 if x_scale > 1 else 1.0
    case = Case(x, 24, (3, 3), config, groups, padding=(1, 1), bias=bias, weight_scale=weight_scale)
    y = case.run()
    assert y.isfinite().all() and y.any()
    assert near(y, case.reference())
    assert_same_everywhere(case, y)


@pytest.mark.parametrize("activation_bits", [4, 7, 8])
@pytest.mark.parametrize(("weight_bits", "size"), [(4, 64), (4, 512), (8, 248), (8, 256), (8, 512)])
def test_the_largest_integers_in_the_largest_blocks_are_within_the_bound(
    weight_bits: int, size: int, activation_bits: int
) -> None:
    torch.manual_seed(0)
    config = LayerConfig(weight_bits=weight_bits, activation_bits=activation_bits, block_size=size)
    for sign, value in (("adaptive", 1.999), ("adaptive", -1.999), ("extra", -1.999), ("included", -1.999)):
        changed = config.model_copy(update={"activation_sign": sign})
        case = Case(torch.full((1, size + 40, 3, 7), value), 40, (1, 1), changed, padding=(1, 1))
        largest = 2 ** (weight_bits - 1)
        case.vqk[::2], case.vqk[1::2] = -largest, largest - 1
        case.packed = packing.pack(case.vqk, case.kds, case.shift, changed, 1)
        expected = case.reference()
        for isa, y in by_isa(case.run).items():
            assert near(y, expected), (isa, sign, value)


def test_a_layer_of_more_outputs_than_tasks_is_within_the_bound() -> None:
    torch.manual_seed(0)
    case = Case(torch.randn(1, 16, 1, 3), 40 * 32 + 5, (1, 1), LayerConfig(block_size=16))
    y = case.run()
    assert near(y, case.reference())
    assert_same_everywhere(case, y)


@given(cases())
def test_the_sign_of_a_zero_makes_no_difference(case: Case) -> None:
    x = torch.where(torch.rand(case.x.shape) < 0.5, 0.0, case.x.abs())
    assert same_bits(case.run(x=x), case.run(x=torch.where(x == 0, -0.0, x)))


ACTIVATIONS = {
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "clamp": lambda y, slope: y.clamp(slope, 0.75),
    "leaky_relu": F.leaky_relu,
    "hardswish": lambda y, slope: F.hardswish(y),
    "hardsigmoid": lambda y, slope: F.hardsigmoid(y),
}
WITH_EXPONENTIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "elu": partial(F.elu, alpha=0.75),
    "exp": torch.exp,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


@given(st.data(), cases(), any_layout)
def test_what_follows_a_layer_is_what_pytorch_makes_of_the_plain_output(
    data: st.DataObject, case: Case, layout: str
) -> None:
    case.x = laid_out(case.x, layout)
    plain = case.run(bias=None)
    expected = plain if case.bias is None else plain + case.bias[:, None, None]
    norm: dict[str, Tensor] = {}
    # Without AVX2, PyTorch's BatchNorm rounds twice.
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT" and expected.numel() and data.draw(st.booleans()):
        gain, offset = torch.randn(2, case.outputs)
        zeros, ones = torch.zeros(case.outputs), torch.ones(case.outputs)
        expected = F.batch_norm(expected, zeros, ones, gain, offset, eps=0.0)
        norm = {"gain": gain, "offset": offset}
    residual = None
    if data.draw(st.booleans()):
        finite = plain.nan_to_num(0.0, 0.0, 0.0)
        residual = laid_out(
            torch.randn(plain.shape) * finite.std() if finite.numel() else finite, data.draw(any_layout)
        )
        if data.draw(st.booleans()) and residual.numel():
            residual[-1, 0, 0, 0] = data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
        expected = expected + residual
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    slope = data.draw(st.sampled_from((0.01, 0.0, 0.3, 1.0, 2.0, -0.5)))
    expected = ACTIVATIONS[activation](expected, slope)
    for isa, y in by_isa(
        lambda: case.run(residual=residual, activation=activation, alpha=slope, beta=0.75, **norm)
    ).items():
        assert same_bits(y, expected), (isa, activation)


@pytest.mark.parametrize("groups", [1, 40])
@pytest.mark.parametrize("activation", WITH_EXPONENTIAL)
def test_exponentials_are_near_and_the_same_everywhere(activation: str, groups: int) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([0.0, -0.0, 1e-30, 1e-45, 80.0, 87.5, 88.8, 104.0, 1e3, 1e30, 3e38, torch.inf])
    x = torch.cat([torch.randn(1000), torch.randn(1000) * 30, torch.arange(-110, 110), ends, -ends])
    # The output of a layer for zeros is its bias.
    case = Case(torch.zeros(1, 40, 1, 64), 40, (1, 1), LayerConfig(), groups)
    for bias in x[: len(x) // 40 * 40].view(-1, 40).unbind():
        found = by_isa(lambda bias=bias: case.run(bias=bias, activation=activation, alpha=0.75))
        first = next(iter(found.values()))
        assert all(same_bits(y, first) for y in found.values())
        exact = WITH_EXPONENTIAL[activation](bias.double()).float()[:, None].expand(40, 64)
        # silu(-infinity) is NaN, and silu is 0 below -88.7, both as in PyTorch.
        tolerance = 2e-7 if "gelu" in activation else 1e-36
        torch.testing.assert_close(first[0, :, 0], exact, rtol=4e-7, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 40])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_stays_nan_through_activations(activation: str, groups: int) -> None:
    x = torch.randn(1, 40, 1, 40)
    x[..., ::3] = torch.nan
    case = Case(x, 40, (1, 1), LayerConfig(), groups)
    for layout in LAYOUTS:
        case.x = laid_out(x, layout)
        for isa, y in by_isa(lambda: case.run(activation=activation)).items():
            assert torch.equal(y[0, 0, 0].isnan(), x[0, 0, 0].isnan()), (isa, layout)


@given(st.data())
def test_linear_equals_a_convolution_of_one_pixel(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    rows, features, outputs = (data.draw(st.integers(low, 100)) for low in (0, 1, 1))
    config = LayerConfig(weight_bits=data.draw(st.integers(2, 8)), activation_bits=8, block_size=32)
    x, y_shape = torch.randn(rows, features), (rows, outputs)
    if data.draw(st.booleans()):
        x = torch.randn(features, rows).t()
    vqk, kds = quantize_weight(torch.randn(outputs, features), config.weight_bits, 32)
    size = packing.kernel_block_size(vqk.shape, config)
    bias = torch.randn(outputs) if data.draw(st.booleans()) else None
    settings = (outputs, config.weight_bits, 8, "adaptive", size)
    activation = (data.draw(st.sampled_from(ops.ACTIVATIONS)), 0.2)
    residual = data.draw(st.sampled_from((None, torch.randn(y_shape), torch.randn(y_shape[::-1]).t())))
    packed = packing.pack(vqk, kds, None, config, groups=1)
    one = [1, 1]
    pixel = None if residual is None else residual[..., None, None]
    where = (one, one, [0, 0], one, 1, False)
    conv = torch.ops.dsconv.conv2d(x[..., None, None], *packed, bias, *where, *settings, pixel, *activation)
    arguments = (x, *packed, bias, *settings, residual, *activation)
    for isa, y in by_isa(lambda: torch.ops.dsconv.linear(*arguments)).items():
        assert same_bits(y, conv[..., 0, 0]), isa


SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e38, -3.4e38, 1e-40, -1e-40, 2.0**-100, 0.0, -0.0)


@given(st.data())
def test_quantizing_gives_the_integers_of_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    groups = data.draw(st.integers(1, 5))
    channels = groups * data.draw(st.integers(1, 40) | st.sampled_from((1, 64, 513, 600)))
    space = data.draw(st.lists(st.integers(1, 5) | st.just(18), max_size=3))
    x = torch.randn(data.draw(st.integers(0, 3)), channels, *space) * 2.0 ** data.draw(st.integers(-110, 110))
    if data.draw(st.booleans()):
        x = x.abs()
    if x.numel():
        places = torch.randint(x.numel(), (data.draw(st.integers(0, 6)),))
        x.view(-1)[places] = torch.tensor([data.draw(st.sampled_from(SPECIAL)) for _ in places])
    if data.draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    settings = {
        "bits": data.draw(st.integers(2, 8)),
        "block_size": data.draw(st.sampled_from((1, 3, 8, 16, 24, 32, 50, 128, 512, 520, 1000))),
        "sign": data.draw(st.sampled_from(("adaptive", "extra", "included"))),
        "groups": groups,
    }
    expected = quantize_activation(x, **settings)
    # A single short block is padded to a multiple of 8, others are not; a single channel has no kernel.
    one, size = channels // groups <= settings["block_size"], settings["block_size"]
    covered = channels // groups > 1 and (channels // groups <= 512 if one else size % 8 == 0 and size <= 512)
    for isa, quantized in by_isa(lambda: torch.ops.dsconv.quantize_activation(x, **settings), covered=covered).items():
        for got, wanted in zip(quantized, expected, strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted), isa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantizing_takes_every_float(dtype: torch.dtype) -> None:
    x = torch.randn(2, 24, 5).to(dtype)
    for got, wanted in zip(
        torch.ops.dsconv.quantize_activation(x, 4, 16), quantize_activation(x.float(), 4, 16), strict=True
    ):
        assert torch.equal(got, wanted)
