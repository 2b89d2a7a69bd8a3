"""Transposed and 3-D convolutions in integers: results of ``torch.ops.dsconv.convolution``."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Case, assert_same_everywhere, general_cases, laid_out, near, same_bits
from torch import Tensor
from torch.nn import functional as F

from dsconv.config import LayerConfig
from dsconv.numerics import dequantize_weight
from dsconv.ops import native, transposed_layout

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

any_layout = st.sampled_from(LAYOUTS)


def pixels(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


@given(general_cases(), any_layout)
def test_output_is_within_the_bound_of_the_reference_and_nan_where_it_is(case: Case, layout: str) -> None:
    assert near(case.run(x=laid_out(case.x, layout)), case.reference())


@given(general_cases())
def test_every_instruction_set_thread_count_batch_split_and_layout_gives_the_same_bits(case: Case) -> None:
    assert_same_everywhere(case, case.run())


@given(general_cases(), any_layout)
def test_output_has_the_memory_layout_of_the_input_and_that_of_its_fake(case: Case, layout: str) -> None:
    x = laid_out(case.x, layout)
    y = case.run(x=x)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=pixels(x))
    assert y.is_contiguous(memory_format=pixels(x) if last else torch.contiguous_format)
    fake = case.run(**{name: value.to("meta") for name, value in case.arguments().items() if isinstance(value, Tensor)})
    assert fake.shape == y.shape
    assert fake.stride() == case.run().stride()


@given(general_cases(), any_layout, any_layout, st.booleans())
def test_what_follows_is_computed_last_and_written_where_it_is_wanted(
    case: Case, layout: str, other: str, in_place: bool
) -> None:
    y = case.run(bias=None)
    bias, gain, offset = torch.randn(3, case.outputs)
    residual = torch.randn(y.shape) * (2 if y.numel() == 0 else y.nan_to_num(0, 0, 0).abs().max())
    ones = (1,) * len(case.kernel)
    exact = (y.double() + bias.view(-1, *ones)).float().double() * gain.view(-1, *ones) + offset.view(-1, *ones)
    expected = F.leaky_relu(exact.float() + residual, 0.25)
    wanted = {"x": laid_out(case.x, layout), "bias": bias, "gain": gain, "offset": offset, "residual": residual}
    wanted |= {"activation": "leaky_relu", "alpha": 0.25}
    assert same_bits(case.run(**wanted), expected)
    out = laid_out(residual.clone(), other if other in ("contiguous", "channels last") else "contiguous")
    if in_place:
        wanted["residual"] = out
    returned = case.operator.out(**case.arguments() | wanted, out=out)
    assert returned is out
    assert same_bits(out, expected)


# Kernel, stride, padding, output padding and dilation in each dimension.
GEOMETRIES: dict[str, tuple[int, int, int, int, int]] = {
    "a pixel for each of 2x2": (2, 2, 0, 0, 1),
    "of U-Nets": (3, 2, 1, 1, 1),
    "of GANs": (4, 2, 1, 0, 1),
    "of super-resolution": (9, 3, 4, 2, 1),
    "stride 1": (3, 1, 1, 0, 1),
    "phases without taps": (2, 5, 0, 3, 1),
    "taps of some phases alone": (3, 4, 1, 0, 2),
    "more padding than taps": (2, 3, 2, 0, 1),
    "more output padding than stride": (2, 1, 0, 2, 3),
    "the kernel beyond the image": (8, 2, 3, 1, 2),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_equal_those_of_pytorch(name: str, groups: int) -> None:
    torch.manual_seed(0)
    kernel, stride, padding, extra, dilation = ((n, n) for n in GEOMETRIES[name])
    bias = torch.randn(34)
    config = LayerConfig(weight_bits=8, activation_bits=8, block_size=16)
    x = torch.randint(-64, 65, (2, 24 * groups, 5, 7)).float()
    case = Case(x, 34, kernel, config, groups, stride, padding, dilation, bias, output_padding=extra)
    y = case.run()
    assert near(y, case.reference())
    sides = zip((5, 7), kernel, stride, padding, extra, dilation, strict=True)
    assert y.shape == (2, 34, *((n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, s, p, e, d in sides))
    # 8 bits are enough for these integers.
    weight = transposed_layout(dequantize_weight(case.vqk, case.kds, 16).double(), groups)
    expected = F.conv_transpose2d(x.double(), weight, bias.double(), stride, padding, extra, groups, dilation)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_frames_are_lines_of_another_dimension(transposed: bool) -> None:
    """Compare a 3-D convolution whose kernel has one frame with the 2-D convolution of each frame."""
    torch.manual_seed(0)
    x, config = torch.randn(2, 40, 3, 5, 6), LayerConfig(block_size=16)
    deep = Case(
        x, 12, (1, 3, 2), config, 1, (1, 2, 1), (0, 1, 0), (1, 1, 2), output_padding=(0, 1, 0) if transposed else None
    )
    torch.manual_seed(0)
    flat = Case(
        *(torch.randn(2, 40, 3, 5, 6)[:, :, 0], 12, (3, 2), config, 1, (2, 1), (1, 0), (1, 2)),
        output_padding=(1, 0) if transposed else None,
    )
    y = deep.run()
    for frame in range(3):
        assert same_bits(y[:, :, frame], flat.run(x=x[:, :, frame]))


@pytest.mark.parametrize("stride", [1, 3])
def test_large_images_are_what_their_parts_are(stride: int) -> None:
    torch.manual_seed(0)
    x, config = torch.randn(1, 16, 70, 90), LayerConfig(block_size=16)
    case = Case(x, 40, (3, 3), config, 1, (stride, stride), output_padding=(0, 0))
    y = case.run()
    for top in (0, 35):
        part = case.run(x=x[:, :, top : top + 35])
        # Lines that no other part contributes to.
        inner = slice(2, part.shape[2] - 2)
        assert same_bits(part[:, :, inner], y[:, :, top * stride : top * stride + part.shape[2]][:, :, inner])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stride": [2]}, "stride: expected two whole numbers of at least 1"),
        ({"output_padding": [2, 0]}, r"output_padding: expected less than stride \(2, 1\) or dilation \(1, 1\)"),
        ({"output_padding": [0, -1]}, "output_padding: expected two whole numbers of at least 0"),
        ({"x": torch.zeros(1, 16, 0, 3, dtype=torch.float32)}, "expected an image whose output has pixels"),
        ({"padding": [9, 0]}, "expected an image whose output has pixels"),
        ({"x": torch.zeros(1, 16, 3, dtype=torch.float32)}, "expected float32 x of 4 dimensions"),
        ({"x": torch.zeros(1, 16, 3, 3, dtype=torch.float64)}, "expected float32 x of 4 dimensions"),
        ({"weight": torch.zeros(3, dtype=torch.uint8)}, "weight: expected contiguous"),
        ({"flat": True}, "the sizes of the convolution do not agree"),
    ],
)
def test_calls_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    case = Case(torch.randn(1, 16, 3, 3), 4, (3, 3), LayerConfig(), 1, (2, 1), output_padding=(1, 0))
    with pytest.raises((ValueError, RuntimeError), match=message):
        case.run(**changed)
