"""The integer kernels, called as PyTorch operators."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.numerics import quantize_activation, quantize_weight, quantize_weight_shifted, reference_conv
from dsconv.ops import cpu
from dsconv.ops.simulate import _patches

pytestmark = pytest.mark.skipif(cpu.extension() is None, reason="the extension dsconv._C is not built")


class Case:
    """A random layer and input, the operator's arguments and what it has to return."""

    def __init__(self, draw: st.DrawFn):
        pick = lambda low, high: draw(st.integers(low, high))  # noqa: E731
        torch.manual_seed(pick(0, 10**6))
        self.groups = pick(1, 3)
        self.config = LayerConfig(
            weight_bits=pick(2, 8),
            activation_bits=pick(2, 8),
            block_size=16 * pick(1, 8),
            activation_sign=draw(st.sampled_from(("adaptive", "extra", "included"))),
            weight_shift=draw(st.booleans()),
            blocks=draw(st.sampled_from(("tap", "flat"))),
        )
        kernel = (pick(1, 3), pick(1, 3))
        self.where = {
            "stride": (pick(1, 3), pick(1, 2)),
            "padding": (pick(0, 2), pick(0, 2)),
            "dilation": (pick(1, 2), pick(1, 2)),
        }
        channels, outputs = pick(1, 80), self.groups * pick(1, 40)
        self.x = torch.randn(pick(0, 3), self.groups * channels, pick(5, 9), pick(5, 20)) * 2.0 ** pick(-90, 90)
        if draw(st.booleans()):
            self.x = self.x.relu()
        if draw(st.booleans()) and self.x.numel():
            self.x.view(-1)[pick(0, self.x.numel() - 1)] = draw(st.sampled_from((torch.nan, torch.inf)))
        w = torch.randn(outputs, channels, *kernel)
        rows = w.flatten(1) if self.config.blocks == "flat" else w
        bits, size = self.config.weight_bits, self.config.block_size
        shift: Tensor | None = None
        if self.config.weight_shift:
            vqk, kds, shift = quantize_weight_shifted(rows, bits, size)
        else:
            vqk, kds = quantize_weight(rows, bits, size)
        self.bias = torch.randn(outputs) if draw(st.booleans()) else None
        self.vqk, self.kds, self.shift = vqk.view(w.shape), kds, shift
        self.packed = cpu.pack(self.vqk, kds, shift, self.config, self.groups)

    def arguments(self, x: Tensor) -> tuple[object, ...]:
        config = self.config
        return (
            x,
            *self.packed,
            self.bias,
            list(self.vqk.shape[2:]),
            *(list(value) for value in self.where.values()),
            self.groups,
            config.blocks == "flat",
            len(self.vqk),
            config.weight_bits,
            config.activation_bits,
            config.activation_sign,
            cpu.kernel_block_size(self.vqk.shape, config),
        )

    def run(self, x: Tensor | None = None) -> Tensor:
        return torch.ops.dsconv.conv2d(*self.arguments(self.x if x is None else x))

    def reference(self):
        config = self.config
        x, where, kds, shift, vqk = self.x, dict(self.where), self.kds, self.shift, self.vqk
        if config.blocks == "flat":
            x, where = _patches(x, vqk.shape[2:], *where.values()), {}
            vqk = vqk.flatten(1)[..., None, None]
            kds, shift = kds[..., None, None], None if shift is None else shift[..., None, None]
        size = config.block_size
        m, e = quantize_activation(x, config.activation_bits, size, sign=config.activation_sign, groups=self.groups)
        return reference_conv(m, e, vqk, kds, size, kds_shift=shift, bias=self.bias, groups=self.groups, **where)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) and a.shape == b.shape


@given(st.data())
def test_output_is_within_the_bound_of_the_reference_and_nan_where_it_is(data: st.DataObject) -> None:
    case = Case(data.draw)
    y, reference = case.run(), case.reference()
    assert torch.equal(y.isnan(), reference.output.isnan())
    assert (((y - reference.output).abs() <= reference.bound) | y.isnan()).all()


@given(st.data())
def test_every_instruction_set_thread_count_batch_split_and_layout_gives_the_same_bits(data: st.DataObject) -> None:
    case = Case(data.draw)
    expected = case.run()
    with pytest.MonkeyPatch.context() as patch:
        for name in cpu.extension().isa_with_kernels():
            patch.setattr(cpu, "isa", lambda name=name: name)
            assert same_bits(case.run(), expected), name
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert same_bits(case.run(), expected), count
    finally:
        torch.set_num_threads(threads)
    if len(case.x):
        assert same_bits(torch.cat([case.run(image) for image in case.x.split(1)]), expected)
    last = case.run(case.x.to(memory_format=torch.channels_last))
    assert same_bits(last, expected)


@given(st.data())
def test_linear_equals_a_convolution_of_one_pixel(data: st.DataObject) -> None:
    rows, features, outputs = (data.draw(st.integers(low, 100)) for low in (0, 1, 1))
    config = LayerConfig(weight_bits=data.draw(st.integers(2, 8)), activation_bits=8, block_size=32)
    x = torch.randn(rows, features)
    vqk, kds = quantize_weight(torch.randn(outputs, features), config.weight_bits, 32)
    size = cpu.kernel_block_size(vqk.shape, config)
    settings = (outputs, config.weight_bits, 8, "adaptive", size)
    packed = cpu.pack(vqk, kds, None, config, groups=1)
    y = torch.ops.dsconv.linear(x, *packed, None, *settings)
    one = [1, 1]
    conv = torch.ops.dsconv.conv2d(x[..., None, None], *packed, None, one, one, [0, 0], one, 1, False, *settings)
    assert same_bits(y, conv[..., 0, 0])


def example() -> tuple[object, ...]:
    config = LayerConfig(block_size=32)
    vqk, kds = quantize_weight(torch.randn(40, 64, 3, 3), 4, 32)
    packed = cpu.pack(vqk, kds, None, config, groups=1)
    return (
        torch.randn(2, 64, 9, 9),
        *packed,
        torch.randn(40),
        [3, 3],
        [1, 1],
        [1, 1],
        [1, 1],
        1,
        False,
        40,
        4,
        4,
        "extra",
        32,
    )


def test_operator_passes_opcheck() -> None:
    arguments = example()
    torch.library.opcheck(torch.ops.dsconv.conv2d.default, arguments)
    last = arguments[0].to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.dsconv.conv2d.default, (last, *arguments[1:]))


def test_operator_survives_compile_and_export() -> None:
    x, *rest = example()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.dsconv.conv2d(x, *rest).relu()

    model = Model()
    expected = model(x)
    assert same_bits(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    assert same_bits(program.module()(x[:1].contiguous()), expected[:1])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.zeros(2, 64, 9)),
        (0, torch.zeros(2, 64, 9, 9, dtype=torch.float64)),
        (0, torch.zeros(2, 65, 9, 9)),
        (0, torch.zeros(2, 64, 1, 9)[..., :0]),
        (1, torch.zeros(5, dtype=torch.uint8)),
        (2, torch.zeros(7)),
        (4, torch.zeros(41)),
        (5, [3, -3]),
        (6, [0, 1]),
        (7, [-1, 0]),
        (9, 0),
        (9, 3),
        (11, 41),
        (12, 9),
        (13, 1),
        (14, "none"),
        (15, 7),
        (15, 1024),
    ],
)
def test_arguments_that_do_not_agree_raise(place: int, value: object) -> None:
    arguments = list(example())
    arguments[place] = value
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
        torch.ops.dsconv.conv2d(*arguments)


def test_cap_of_the_instruction_set_is_obeyed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSCONV_MAX_ISA", "scalar")
    assert cpu.isa.__wrapped__() == "scalar"
    monkeypatch.setenv("DSCONV_MAX_ISA", "mmx")
    with pytest.raises(ValueError, match="DSCONV_MAX_ISA"):
        cpu.isa.__wrapped__()
