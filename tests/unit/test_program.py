"""The program of a compiled network: results and memory of its steps, for any batch, order and number of threads."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import by_isa, conv_sizes
from kernel_cases import same_bits as same_bits_of
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.backends import cpu
from dsconv.compilation import CompiledModel
from dsconv.compilation.frontends import pytorch
from dsconv.compilation.memory import ALIGNMENT, Buffer, place
from dsconv.compilation.operators import average
from dsconv.compilation.operators.average import Average
from dsconv.compilation.operators.map import Map
from dsconv.compilation.operators.pool import Pool
from dsconv.compilation.operators.pytorch import Call
from dsconv.ops import OPERATIONS, native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Net(nn.Module):
    """Network of named layers with a given forward function."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
            for part in layer.modules():
                if isinstance(part, nn.BatchNorm2d):
                    nn.init.uniform_(part.weight, 0.5, 1.5)
                    nn.init.normal_(part.bias)
                    nn.init.normal_(part.running_mean, std=0.3)
                    nn.init.uniform_(part.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


# Winograd layers do not read mantissas, and the step before does not quantize their inputs.
W4A4 = dsconv.QuantConfig.preset("w4a4", algorithm="direct")


def compiled(net: nn.Module, config: dsconv.QuantConfig | dict[str, object] = W4A4, size: int = 9) -> CompiledModel:
    return dsconv.compile(dsconv.quantize(net, config), torch.zeros(1, 3, size, size))


def same_bits(fast: CompiledModel, size: int = 9) -> None:
    for images in (1, 3, 2):
        x = torch.randn(images, 3, size, size)
        with torch.inference_mode():
            expected, found = fast.model(x), fast(x)
        assert torch.equal(found, expected), (found - expected).abs().max()


def steps(fast: CompiledModel, kind: type) -> list[tuple[str, ...]]:
    own = fast.program_for(torch.zeros(1, 3, 9, 9))[0].steps
    return [tuple(step.fused) for step in own if isinstance(step, kind)]


W4A4_64 = {"activation_bits": 4, "block_size": 64}


def inception(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    parts = [F.relu(m.a(x)), F.relu(m.c(F.relu(m.b(x)))), F.relu(m.d(F.max_pool2d(x, 3, 1, 1)))]
    x = torch.cat(parts, 1)
    return m.last(x) + F.max_pool2d(m.last(x), 3, 1, 1)


@pytest.mark.parametrize("channels", [64, 32, 17, 16])
def test_branches_are_written_where_they_are_concatenated(channels: int) -> None:
    c = channels
    fast = compiled(
        Net(
            inception,
            stem=conv(3, c),
            a=conv(c, c, 1),
            b=conv(c, 24, 1),
            c=conv(24, c),
            d=conv(c, 2 * c, 1),
            last=conv(4 * c, 8, 1),
        ),
        W4A4_64,
    )
    # The layer that computes whole blocks quantizes them; others are quantized when all are complete.
    assert steps(fast, Map).count(("quantize",)) == (0 if channels == 64 else 1)
    assert not steps(fast, Call)
    same_bits(fast)


def dense(m: Net, x: Tensor) -> Tensor:
    features = [F.max_pool2d(F.relu(m.stem(x)), 2, 2)]
    for layer, norm in ((m.first, m.norm1), (m.second, m.norm2), (m.third, m.norm3)):
        features.append(layer(F.relu(norm(torch.cat(features, 1)))))
    return F.avg_pool2d(F.relu(m.norm4(torch.cat(features, 1))), 2)


def test_growing_concatenations_are_one_piece_of_memory() -> None:
    fast = compiled(
        Net(
            dense,
            stem=conv(3, 40),
            first=conv(40, 24),
            second=conv(64, 24),
            third=conv(88, 24),
            norm1=nn.BatchNorm2d(40),
            norm2=nn.BatchNorm2d(64),
            norm3=nn.BatchNorm2d(88),
            norm4=nn.BatchNorm2d(112),
        )
    )
    assert steps(fast, Map) == [("batch_norm", "relu")] * 4
    assert len(steps(fast, Pool)) == 2 and not steps(fast, Call)
    same_bits(fast)
    folded = dsconv.compile(dsconv.fold_batchnorm(fast.model), torch.zeros(1, 3, 9, 9))
    assert steps(folded, Map) == [("mul", "add", "relu")] * 4
    same_bits(folded)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: torch.cat([m.a(x), m.a(x)], 1),  # the same piece twice
        lambda m, x: m.b(torch.cat([F.silu(m.a(x)), m.a(x)], 1)),  # a piece that PyTorch computes
        lambda m, x: (lambda y: m.b(torch.cat([y, m.c(y)], 1)) + m.b(torch.cat([m.c(y), y], 1)))(
            m.a(x)
        ),  # two destinations
        lambda m, x: (lambda y: torch.cat([torch.cat([y, m.c(y)], 1), m.c(y)], 1))(m.a(x)),  # one in another
        lambda m, x: (lambda y: torch.cat([m.b(torch.cat([y, y], 1)), torch.cat([y, y, y], 1)], 1))(
            m.a(x)
        ),  # three times
        lambda m, x: (lambda y: (m.b(torch.cat([y, y], 1)), torch.cat([y, x], 1)))(m.a(x))[1],  # with the input
        lambda m, x: (
            m.a(x).reshape(x.shape[0], -1) * 2
        ),  # a view of the program's memory, and a result computed from it
        lambda m, x: (lambda y: m.c(F.relu(m.c(y))) + y.flatten(1)[:, :1, None, None])(m.a(x)),  # read much later
        lambda m, x: m.a(x).permute(0, 2, 3, 1),  # a view that is returned
        lambda m, x: m.a(x),
        lambda m, x: m.c(m.a(x)) + m.a(x) + m.a(x),
        lambda m, x: F.relu6(m.a(x)) + F.hardswish(m.a(x)) * 0.5,
        lambda m, x: F.leaky_relu(F.relu(m.a(x)) - 0.1, 0.2),
    ],
)
@pytest.mark.parametrize("channels", [48, 256])  # with 256, pixels have gaps if all steps allow it
def test_whatever_is_done_with_tensors_gives_the_same_bits(run: Callable[[Net, Tensor], Tensor], channels: int) -> None:
    same_bits(compiled(Net(run, a=conv(3, channels), b=conv(2 * channels, 16, 1), c=conv(channels, channels))))


def test_steps_of_all_kinds_read_pixels_with_gaps_between_them() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        y = F.relu(m.depthwise(x) + x)
        y = F.hardswish(m.grouped(y)) * F.hardsigmoid(m.gate(y)) + x
        return m.last(F.relu(m.norm(torch.cat([y, m.plain(x)], 1))))

    net = Net(
        run,
        stem=conv(3, 256),
        depthwise=conv(256, 256, groups=256),
        grouped=conv(256, 256, groups=4),
        gate=conv(256, 256, 1),
        plain=conv(256, 256, 1),
        norm=nn.BatchNorm2d(512),
        last=conv(512, 16, 1, stride=2),
    )
    same_bits(compiled(net))


@pytest.mark.parametrize("config", ["paper", "w4a4", "default", {"activation_bits": 3, "block_size": 32}])
@pytest.mark.parametrize("groups", [1, 3, 48])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_of_all_kinds_read_what_others_write(config: str, groups: int, stride: int) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.hardswish(m.stem(x))
        x = F.relu(m.middle(x)) + F.leaky_relu(m.side(x), 0.3)
        return m.last(F.adaptive_avg_pool2d(m.wide(x), 1).flatten(1))

    net = Net(
        run,
        stem=conv(3, 48, 5),
        middle=conv(48, 48, groups=groups, stride=stride),
        side=conv(48, 48, 1, stride=stride),
        wide=conv(48, 80, 5),
        last=nn.Linear(80, 10),
    )
    same_bits(compiled(net, config))


def test_lines_of_many_pixels_give_the_same_bits() -> None:
    net = Net(
        lambda m, x: m.last(F.max_pool2d(F.relu(m.line(F.relu(m.stem(x)))), 3, 1, 1)),
        stem=conv(3, 16, 1),
        line=conv(16, 16, groups=16),
        last=conv(16, 8, 1),
    )
    x = torch.randn(2, 3, 3, 1000)
    fast = dsconv.compile(dsconv.quantize(net, "w4a4"), x)
    with torch.inference_mode():
        assert torch.equal(fast(x), fast.model(x))


@pytest.mark.parametrize("size", [24, 40, 48, 96])
def test_blocks_that_are_no_whole_panels_of_weights_give_the_same_bits(size: int) -> None:
    net = Net(
        lambda m, x: m.last(F.relu(m.middle(F.relu(m.stem(x))))),
        stem=conv(3, 144, 1),
        middle=conv(144, 200),
        last=conv(200, 8, 1),
    )
    same_bits(compiled(net, {"activation_bits": 3, "block_size": size}))


@pytest.mark.parametrize("activation", [F.relu, lambda y: y])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("sign", ["adaptive", "extra", "included"])
def test_a_block_that_is_quantized_as_it_is_made_is_rounded_by_its_signs(
    sign: str, channels: int, activation: Callable[[Tensor], Tensor]
) -> None:
    net = Net(
        lambda m, x: m.last(activation(m.middle(y := activation(m.stem(x))) + y)),
        stem=conv(3, channels, 1),
        middle=conv(channels, channels, 1),
        last=conv(channels, 8, 1),
    )
    same_bits(compiled(net, {"activation_bits": 3, "activation_sign": sign, "block_size": channels}))


@pytest.mark.parametrize("first", ["small", "large"])
def test_exponents_beyond_those_of_narrow_weights_give_the_same_bits_and_are_forgotten(first: str) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        large, small = m.large(x), m.small(x)  # computed in this order, concatenated in either
        return m.last(torch.cat([small, large] if first == "small" else [large, small], 1))

    net = Net(run, large=conv(3, 64), small=conv(3, 64), last=conv(128, 20))
    for layer in (net.small, net.last):
        layer.weight.data.mul_(1e-3)
    fast = compiled(net)
    for magnitude in (1e33, 1.0, 1e35, 1e30):
        x = torch.randn(2, 3, 9, 9) * magnitude
        with torch.inference_mode():
            expected, found = fast.model(x), fast(x)
        assert expected.isfinite().all() and expected.abs().max() > magnitude * 1e-5
        assert torch.equal(found, expected)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("average", [False, True])
@settings(max_examples=12)  # each example captures a network
@given(data=st.data())
def test_pooling_is_pytorchs(average: bool, ceil_mode: bool, data: st.DataObject) -> None:
    kernel = data.draw(st.tuples(*[st.integers(1, 4)] * 2))
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    more: dict[str, object] = {"count_include_pad": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        more["divisor_override"] = data.draw(st.integers(1, 9))
    if not average:
        more = {"dilation": data.draw(st.integers(1, 2))}
    pool = F.avg_pool2d if average else F.max_pool2d
    channels = data.draw(st.sampled_from((5, 16, 40)))
    net = Net(lambda m, x: pool(m.a(x), kernel, stride, padding, ceil_mode=ceil_mode, **more), a=conv(3, channels, 1))
    fast = compiled(net)
    assert len(steps(fast, Pool)) == 1
    x = torch.randn(2, 3, 9, 9)
    if data.draw(st.booleans()):
        x[0, :, 2, 3] = data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    with torch.inference_mode():
        assert torch.equal(fast(x).nan_to_num(9.0), fast.model(x).nan_to_num(9.0))


def excited(m: Net, x: Tensor) -> Tensor:
    """Apply squeeze and excitation, as in EfficientNet."""
    y = F.silu(m.norm(m.deep(F.silu(m.stem(x)))))
    gate = torch.sigmoid(m.up(F.silu(m.down(F.adaptive_avg_pool2d(y, 1)))))
    return m.last((m.project(gate * y) * m.project(y)).mean((2, 3)))


def excitation() -> Net:
    torch.manual_seed(0)
    return Net(
        excited,
        stem=conv(3, 48),
        deep=conv(48, 48, groups=48),
        norm=nn.BatchNorm2d(48),
        down=conv(48, 8, 1),
        up=conv(8, 48, 1),
        project=conv(48, 40),
        last=nn.Linear(40, 10),
    )


def test_gates_and_exponentials_are_steps_of_the_program() -> None:
    qmodel, x = dsconv.quantize(excitation(), "w8a8"), torch.randn(7, 3, 9, 9)
    fast = dsconv.compile(qmodel, torch.zeros(1, 3, 9, 9))
    assert ("mul",) in steps(fast, Map) and ("mul", "quantize") not in steps(fast, Map)
    assert not fast.plan.in_pytorch and len(steps(fast, Average)) == 2
    y = fast(x)
    with torch.inference_mode():
        assert (y - qmodel(x)).abs().max() < 0.02 * y.abs().max()
    # The bits do not depend on the other images of the batch.
    assert torch.equal(y, torch.cat([fast(one) for one in x.split([1, 4, 2])]))
    assert torch.equal(copy.deepcopy(fast)(x), y)


def test_gates_of_large_images_are_those_of_the_image() -> None:
    def gated(m: Net, x: Tensor) -> Tensor:
        y = F.hardswish(m.stem(x))
        return m.last(y * F.hardsigmoid(m.gate(F.adaptive_avg_pool2d(y, 1))))

    net = Net(gated, stem=conv(3, 48), gate=conv(48, 48, 1), last=conv(48, 8, 1))
    same_bits(compiled(net, size=21), size=21)  # several tasks per image


@pytest.mark.parametrize("known", [True, False], ids=["found", "own"])
@pytest.mark.parametrize("channels", [1, 2, 150])
@pytest.mark.parametrize("size", [(1, 3), (2, 6), (7, 7), (13, 17), (64, 90)])
def test_averages_have_the_bits_of_pytorchs(
    size: tuple[int, int], channels: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:  # an unknown order of sums
        monkeypatch.setattr(average, "lanes_of_pytorch", lambda _: None)
    net = Net(
        lambda m, x: m.last(F.adaptive_avg_pool2d(m.a(x), 1)).flatten(1) + m.head(m.b(x).mean((2, 3))),
        a=conv(3, channels, 1),
        b=conv(3, channels, 1),
        last=conv(channels, 9, 1),
        head=nn.Linear(channels, 9),
    )
    x = torch.randn(3, 3, *size) + 2
    fast = dsconv.compile(dsconv.quantize(net, "w8a8"), x)
    assert len(steps(fast, Average)) == 2 and not fast.plan.in_pytorch
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                for images in (x, x[:1]):
                    found, expected = fast(images), fast.model(images)
                    if known and channels > 1:
                        assert torch.equal(found, expected)
                    torch.testing.assert_close(
                        found, expected, rtol=0.02, atol=0.02
                    )  # a mantissa may be rounded differently
    finally:
        torch.set_num_threads(before)


def test_an_average_may_be_what_a_network_returns() -> None:
    for averaged in (lambda y: F.adaptive_avg_pool2d(y, 1), lambda y: y.mean((2, 3))):
        net = Net(lambda m, x, averaged=averaged: averaged(m.a(x)), a=conv(3, 40, 1))
        fast, x = dsconv.compile(dsconv.quantize(net), torch.randn(1, 3, 9, 7)), torch.randn(3, 3, 9, 7)
        with torch.inference_mode():
            assert torch.equal(fast(x), fast.model(x))
            pixels = x.to(memory_format=torch.channels_last)  # which PyTorch sums in another order
            torch.testing.assert_close(fast(pixels), fast.model(pixels))


@pytest.mark.parametrize("size", [1, 7, 56, 224])
def test_averages_are_near_those_in_float64(size: int) -> None:
    net = Net(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1), a=conv(3, 150, 1))
    x = torch.randn(3, 3, size, size) + 2
    qmodel = dsconv.quantize(net, "w4a4")
    fast = dsconv.compile(qmodel, x)
    with torch.inference_mode():
        pixels = qmodel.a(x).double()
    averages = [step for step in fast.plan.steps if step.operator == "dsconv.average"]
    assert len(averages) == (size > 1)  # of one value, it has no effect
    error = (fast(x) - pixels.mean((2, 3), keepdim=True)).abs()
    assert (error <= 5e-7 * pixels.abs().mean((2, 3), keepdim=True)).all()


def test_an_average_over_channels_is_not_one_over_images() -> None:
    for dims in ((1, 2), (1, 3), (2, 3), (-1, -2)):
        net = Net(lambda m, x, dims=dims: m.a(x).mean(dims), a=conv(3, 9, 1))  # as many channels as lines and columns
        qmodel, x = dsconv.quantize(net, "w4a4"), torch.randn(2, 3, 9, 9)
        with torch.inference_mode():
            torch.testing.assert_close(dsconv.compile(qmodel, x)(x), qmodel(x))


def of_all_kinds(m: Net, x: Tensor) -> Tensor:
    """Run every kind of step that the extension supports, and every kind of layer."""
    x = F.max_pool2d(F.relu(m.norm(m.stem(x))), 3, 1, 1)
    y = F.hardswish(m.line(x)) + F.leaky_relu(m.wide(F.avg_pool2d(x, 3, 1, 1)), 0.2)
    y = torch.cat([F.silu(m.grouped(y)), F.relu6(m.plain(y) + x)], 1)
    y = y * F.hardsigmoid(m.gate(F.adaptive_avg_pool2d(y, 1)))
    return torch.cat([m.last(m.pooled(y).flatten(1)), m.head(y.mean((2, 3)))], 1)


@pytest.mark.parametrize(
    "config",
    [
        {"activation_bits": 4},
        {"weight_bits": 8, "weight_shift": True, "block_size": 16},
        {"blocks": "flat", "block_size": 32},
    ],
    ids=str,
)
def test_every_instruction_set_gives_the_same_bits(config: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = Net(
        of_all_kinds,
        stem=conv(3, 40, 5),
        norm=nn.BatchNorm2d(40),
        line=conv(40, 40, groups=40),
        wide=conv(40, 40, 5, groups=40, stride=1),
        grouped=conv(40, 24, groups=2),
        plain=conv(40, 40),
        gate=conv(64, 64, 1),
        pooled=nn.MaxPool2d(3),
        last=nn.Linear(576, 10),
        head=nn.Linear(64, 7),
    )
    qmodel, x = dsconv.quantize(net, {"weight_rule": "paper", **config}), torch.randn(3, 3, 9, 9)
    x[2] *= 1e30  # beyond the exponents of narrow weights
    found = by_isa(lambda: dsconv.compile(qmodel, x)(x))
    expected = next(iter(found.values()))
    for isa, y in found.items():
        assert same_bits_of(y, expected), isa


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 10)), max_size=30))
def test_no_two_buffers_share_memory_while_both_are_needed(sizes: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(size * ALIGNMENT, first, first + more) for size, first, more in sizes]
    end = place(buffers)
    for i, a in enumerate(buffers):
        assert a.offset % ALIGNMENT == 0 and 0 <= a.offset <= end - a.size
        for b in buffers[:i]:
            assert not a.meets(b) or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
    assert end <= sum(buffer.size for buffer in buffers)
    needed = [sum(b.size for b in buffers if b.first <= step <= b.last) for step in range(41)]
    assert end >= max(needed)


def sums(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    for layer in (m.a, m.b, m.a):
        x = F.relu(layer(F.relu(m.b(x))) + x)
    return x


@pytest.mark.parametrize("channels", [64, 256])
def test_sums_are_in_the_order_of_the_layout_of_the_input(channels: int) -> None:
    fast = compiled(residual_net(channels))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 9).contiguous(memory_format=layout)
        with torch.inference_mode():
            assert torch.equal(fast(x), fast.model(x))


def residual_net(channels: int = 64) -> Net:
    return Net(
        lambda m, x: m.last(sums(m, x).mean((2, 3))),
        stem=conv(3, channels),
        a=conv(channels, channels),
        b=conv(channels, channels),
        last=nn.Linear(channels, 10),
    )


def test_a_sum_takes_the_place_of_its_residual() -> None:
    layers = {"stem": conv(3, 64), "a": conv(64, 64), "b": conv(64, 64)}
    fast = compiled(Net(lambda m, x: m.b(sums(m, x)), **layers), W4A4_64)
    one = fast.program_for(torch.zeros(1, 3, 9, 9))[0]
    # Live at the same time are only the residual in float32 and two inputs of layers with borders.
    assert one.memory_bytes < 4 * 64 * 81 + 2 * (64 + 8 + 8) * 11 * 11 + 1024
    same_bits(fast)


def test_batches_beyond_what_is_cached_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cached_bytes", 100_000)
    fast = compiled(residual_net())
    one = fast.program_for(torch.zeros(1, 3, 9, 9))[0]
    assert one.images_at_once is not None and one.images_at_once < 4
    x = torch.randn(11, 3, 9, 9)
    with torch.inference_mode():
        assert torch.equal(fast(x), fast.model(x))
    for run in (
        lambda m, x: m.a(x) - m.a(x).mean(0, keepdim=True),
        lambda m, x: m.a(x).mean(0),
        lambda m, x: m.a(x).flatten(),
        lambda m, x: m.a(x) * x.shape[0],
        lambda m, x: m.a(x).permute(1, 0, 2, 3),
    ):
        together = compiled(Net(run, a=conv(3, 64)))
        with torch.inference_mode():
            assert together.program_for(x)[0].images_at_once is None
            assert torch.equal(together(x), together.model(x))


def test_a_batch_too_large_for_memory_is_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = torch.randn(11, 3, 9, 9), []
    for fast, alone in (
        (compiled(residual_net()), True),
        (compiled(Net(lambda m, x: m.a(x).mean(0), a=conv(3, 64))), False),
    ):
        program = fast.program_for(x)[0]

        def short(parts: Sequence[Tensor], run: Any = program._run) -> Any:
            sizes.append(len(parts[0]))
            if len(parts[0]) > 3:
                raise torch.OutOfMemoryError
            return run(parts)

        monkeypatch.setattr(program, "_repeated", short)
        with torch.inference_mode():
            if alone:
                assert torch.equal(fast(x), fast.model(x))
                assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
                assert torch.equal(fast(x[:3]), fast.model(x[:3])) and sizes[8:] == [
                    2,
                    1,
                ]  # the capture is not tried again
            else:
                with pytest.raises(torch.OutOfMemoryError):
                    fast(x)


@pytest.mark.slow
def test_two_thousand_calls_from_four_threads_give_the_same_bits_and_take_no_more_memory() -> None:
    fast = compiled(residual_net())
    batches = [torch.randn(n, 3, 9, 9) for n in (1, 2, 3, 5, 8)]
    with torch.inference_mode():
        expected = [fast.model(x) for x in batches]
    wrong: list[int] = []

    def work(first: int) -> None:
        for call in range(first, first + 250):
            which = call % len(batches)
            if not torch.equal(fast(batches[which]), expected[which]):
                wrong.append(call)

    def four_threads() -> None:
        threads = [threading.Thread(target=work, args=(i * 7,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    four_threads()
    before = resident_bytes()
    four_threads()
    assert not wrong
    assert resident_bytes() - before < 4 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_in_place_operators_that_others_see_are_left_to_pytorch() -> None:
    def seen(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        view = y.flatten(1)
        y.relu_()
        return view

    def unseen(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y.add_(m.a(x))
        return F.dropout(y.relu_(), training=False).flatten(1) + y.flatten(1)

    for run in (seen, unseen):
        net = Net(run, a=conv(3, 16))
        same_bits(compiled(net))
    x = torch.zeros(2, 3, 9, 9)
    for run, possible in ((seen, False), (unseen, False)):
        exported = torch.export.export(Net(run, a=conv(3, 16)), (x,)).module(check_guards=False)
        assert pytorch.make_functional(exported.graph) is possible


def test_profile_counts_every_step_and_its_multiply_adds() -> None:
    fast, x = compiled(residual_net()), torch.randn(2, 3, 9, 9)
    found = dsconv.profile(fast, x, runs=3)
    assert [step.name for step in found.steps] == [step.name for step in fast.plan.steps]
    assert [step.macs for step in found.steps if step.name == "a"] == [81 * 64 * 64 * 9] * 2
    assert all(step.median_ms > 0 for step in found.steps)
    assert sum(step.median_ms for step in found.steps) < 2 * found.median_ms
    assert "GMAC/s" in str(found) and found.to_dict()["batch_size"] == 2
    with pytest.raises(ValueError, match="runs: expected at least 2"):
        dsconv.profile(fast, x, runs=1)
    with pytest.raises(ValueError, match="at least one image"):
        dsconv.profile(fast, x[:0])


def test_the_extension_refuses_steps_that_do_not_fit() -> None:
    module = native.extension()
    nothing, size, strides = (-1, -1, [], 0, 0.0, 0.0), (16, 4, 4), (256, 1, 64, 16)

    def fresh() -> tuple[object, int, int]:
        one = module.Program("scalar")
        return one, one.values(0, 0, 0, size, strides), one.quantized(1024, 16, 16, 1, (4, 4, 1, 1), 4, 4, 0, False)

    one, values, quantized = fresh()
    address = torch.zeros(1 << 16).data_ptr()
    uses = (values, -1, [], 0, 0.0, 0.0)

    def convolve(source: int = -1, read: int = 1000, use: object = uses, **changed: int) -> None:
        one.convolve(
            conv_sizes(module, **changed),
            source,
            quantized if read == 1000 else read,
            address,
            address,
            0,
            0,
            0,
            0,
            4,
            4,
            0,
            use,
        )

    convolve()
    for wrong in (
        lambda: convolve(read=7),
        lambda: convolve(source=7),
        lambda: convolve(use=nothing),
        lambda: convolve(use=(values, -1, [(quantized, 8)], 0, 0.0, 0.0)),
        lambda: convolve(use=(values, -1, [(3, 0)], 0, 0.0, 0.0)),
        lambda: convolve(use=(values, -1, [], 99, 0.0, 0.0)),
        lambda: convolve(use=(values, 5, [], 0, 0.0, 0.0)),
        lambda: convolve(channels=32),
        lambda: convolve(outputs=32),
        lambda: convolve(out_height=6, out_width=6, pad_h=2, pad_w=2),
        lambda: convolve(flat=True),
        lambda: one.values(0, 0, 0, (17, 4, 4), strides),
        lambda: one.values(0, 1, 0, size, strides),
        lambda: one.values(-1, 0, 0, size, strides),
        lambda: one.values(0, 0, 0, (16, 0, 4), strides),
        lambda: one.quantized(0, 16, 12, 1, (4, 4, 1, 1), 4, 4, 0, False),
        lambda: one.quantized(0, 16, 16, 1, (4, 4, -1, 1), 4, 4, 0, False),
        lambda: one.quantized(0, 16, 16, 1, (4, 4, 1, 1), 4, 9, 0, False),
        lambda: one.map(values, [(99, 0, 0.0, 0.0, -1, 0, 0)], uses),
        lambda: one.map(values, [(0, 99, 0.0, 0.0, -1, 0, 0)], uses),
        lambda: one.map(values, [(1, 0, 0.0, 0.0, 99, 0, 0)], uses),
        lambda: one.map(values, [], nothing),
        lambda: one.pool(values, (3, 3, 1, 1, 9, 1, 1, 1), False, False, 0, (4, 4), uses),
        lambda: one.pool(values, (3, 3, 0, 1, 1, 1, 1, 1), False, False, 0, (4, 4), uses),
        lambda: one.pool(values, (3, 3, 1, 1, 1, 1, 1, 1), False, False, 0, (2, 2), uses),
        lambda: one.run(1, [], 0, 1, 0),
        lambda: one.run(1, [address], 0, 9, 0),
        lambda: one.run(1, [address], -1, 1, 0),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            wrong()


def of_fitting_steps(module: Any) -> dict[str, Any]:
    """Return a program, and the numbers of its tensors."""
    one = module.Program("scalar")
    grid, dense = (4, 4, 1, 1), (256, 1, 64, 16)
    return {
        "program": one,
        "plain": one.values(0, 0, 0, (16, 4, 4), dense),
        "lines": one.values(0, 0, 0, (16, 4, 4), (256, 16, 4, 1)),
        "wide": one.values(0, 0, 0, (32, 4, 4), (512, 1, 128, 32)),
        "low": one.values(0, 0, 0, (16, 2, 4), (128, 1, 64, 16)),
        "narrow": one.values(0, 0, 0, (16, 4, 2), (128, 1, 32, 16)),
        "pixel": one.values(0, 0, 0, (16, 1, 1), (16, 1, 16, 16)),
        "wide pixel": one.values(0, 0, 0, (32, 1, 1), (32, 1, 32, 32)),
        "flat": one.values(0, 0, 0, (256, 1, 1), (256, 1, 256, 256)),
        "flat, apart": one.values(0, 0, 0, (256, 1, 1), (512, 1, 512, 512)),
        "input": one.quantized(4096, 16, 16, 1, grid, 4, 4, 0, False),
        "two blocks": one.quantized(4096, 32, 16, 1, grid, 4, 4, 0, False),
        "large block": one.quantized(4096, 32, 32, 1, grid, 4, 4, 0, False),
        "groups": one.quantized(4096, 16, 16, 2, grid, 4, 4, 0, False),
        "low input": one.quantized(4096, 16, 16, 1, (3, 4, 1, 1), 4, 4, 0, False),
        "narrow input": one.quantized(4096, 16, 16, 1, (4, 3, 1, 1), 4, 4, 0, False),
        "low border": one.quantized(4096, 16, 16, 1, (4, 4, 0, 1), 4, 4, 0, False),
        "narrow border": one.quantized(4096, 16, 16, 1, (4, 4, 1, 0), 4, 4, 0, False),
        "of wide weights": one.quantized(4096, 16, 16, 1, grid, 8, 4, 0, False),
        "of more bits": one.quantized(4096, 16, 16, 1, grid, 4, 5, 0, False),
        "of another sign": one.quantized(4096, 16, 16, 1, grid, 4, 4, 1, False),
        "of a shift": one.quantized(4096, 16, 16, 1, grid, 4, 4, 0, True),
        "of short blocks": one.quantized(4096, 16, 8, 1, grid, 4, 4, 0, False),
    }


SIZES = {"outputs": 16, "kernel": (3, 3), "padding": (1, 1), "groups": 1, "flat": False}
OUTPUT, RESIDUAL, TARGET, SOURCE = "outputs: ", "residual: ", "targets: ", "quantized as the layer wants it"
POOL, AVERAGE, FLATTEN = "pool: expected a padding", "average: ", "dense tensors of as many values"
OPERAND, POST_OPS = "an operation that has an operand", "in the place of post-ops"
MISFITS: list[tuple[str, dict[str, Any], str]] = [
    *(("convolve", {"values": name}, OUTPUT) for name in ("lines", "wide", "low", "narrow")),
    *(("convolve", {"residual": name}, RESIDUAL) for name in ("lines", "wide", "low", "narrow")),
    *(("convolve", {"target": name}, TARGET) for name in ("low input", "narrow input", "large block", "groups")),
    *(("convolve", {"target": "two blocks", "at": at}, TARGET) for at in (-16, 8, 24, 32)),
    *(("convolve", {"input": name}, SOURCE) for name in ("two blocks", "groups", "of wide weights", "of more bits")),
    *(("convolve", {"input": name}, SOURCE) for name in ("of another sign", "of a shift", "of short blocks")),
    *(
        ("convolve", {"input": name}, "quantized input of the layer's sizes")
        for name in ("low input", "narrow input", "low border", "narrow border")
    ),
    *(("convolve", {"source": name}, "input of the layer's sizes") for name in ("wide", "low", "narrow")),
    ("convolve", {"flat": True}, "flattened blocks and Winograd need a float input"),
    ("convolve", {"groups": 2, "target": "input"}, "grouped convolution"),
    ("convolve", {"kernel": (3, 5)}, "sizes of the convolution"),
    ("convolve", {"values": None}, "without an output"),
    ("map", {"values": None}, "without an output"),
    ("map", {"values": "wide"}, OUTPUT),
    *(("map", {"operation": kind}, "factors and offsets") for kind in ("scale", "normalize")),
    *(("map", {"operation": kind, "operand": "plain"}, OPERAND) for kind in ("activate", "normalize", "softmax")),
    *(
        ("map", {"operation": "add", "operand": name}, "map: expected a dense operand")
        for name in ("lines", "wide", "low", "narrow", "wide pixel")
    ),
    ("map", {"operation": "activate", "values": None}, "without an output"),
    ("map", {"residual": "plain"}, POST_OPS),
    ("map", {"activation": 1}, POST_OPS),
    ("map", {"source": "lines"}, "nothing to do but to quantize"),
    ("map", {"source": "lines", "values": None, "target": "two blocks"}, "nothing to do but to quantize"),
    (
        "map",
        {"source": "lines", "values": None, "target": "input", "operation": "add"},
        "nothing to do but to quantize",
    ),
    ("pool", {"source": "lines"}, "channels lie side by side"),
    *(("pool", {"padding": padding}, POOL) for padding in ((-1, 1), (1, -1), (3, 1), (1, 3))),
    *(("pool", {"stride": stride, "values": "plain"}, POOL) for stride in ((2, 1), (1, 2))),
    ("pool", {"divisor": -1}, POOL),
    ("pool", {"residual": "plain"}, POOL),
    ("pool", {"activation": 1}, POOL),
    ("pool", {"values": "low"}, OUTPUT),
    ("pool", {"values": None}, "without an output"),
    *(("average", {"lanes": lanes}, AVERAGE) for lanes in (-1, 0, 17)),
    ("average", {"source": "lines"}, AVERAGE),
    *(("average", {"values": name}, AVERAGE) for name in ("wide pixel", "low", "narrow")),
    ("flatten", {"source": "lines"}, FLATTEN),
    *(("flatten", {"values": name}, FLATTEN) for name in ("plain", "pixel")),
    ("flatten", {"values": "flat, apart"}, "a tensor of its own"),
]


@pytest.mark.parametrize(("kind", "changed", "message"), MISFITS)
def test_a_step_that_does_not_fit_its_tensors_is_refused(kind: str, changed: dict[str, Any], message: str) -> None:
    own = of_fitting_steps(native.extension())
    one, address = own["program"], torch.zeros(1 << 16).data_ptr()

    def add(changed: dict[str, Any]) -> None:
        values = {"average": "pixel", "flatten": "flat"}.get(kind, "plain")
        given = SIZES | {"source": "plain", "input": "input", "values": values, "stride": (1, 1)} | changed
        number = {name: own.get(given.get(name), -1) for name in ("values", "residual", "operand", "source")}
        targets = [(own[given["target"]], given.get("at", 0))] if given.get("target") else []
        uses = (number["values"], number["residual"], targets, given.get("activation", 0), 0.0, 0.0)
        where = (*given["kernel"], *given["stride"], *given["padding"], 1, 1)
        if kind == "convolve":
            names = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w")
            changes = dict(zip(names, where, strict=False)) | {name: given[name] for name in ("outputs", "groups")}
            sizes = conv_sizes(native.extension(), flat=given["flat"], **changes)
            source = number["source"] if "source" in changed else -1
            one.convolve(sizes, source, own[given["input"]], address, address, 0, 0, 0, 0, 4, 4, 0, uses)
        elif kind == "map":
            kinds = [OPERATIONS.index(given["operation"])] if "operation" in given else []
            one.map(number["source"], [(kind, 0, 0.0, 0.0, number["operand"], 0, 0) for kind in kinds], uses)
        elif kind == "pool":
            one.pool(number["source"], where, False, False, given.get("divisor", 0), (4, 4), uses)
        elif kind == "average":
            one.average(number["source"], given.get("lanes", 8), number["values"])
        else:
            one.flatten(number["source"], number["values"])

    add({})
    with pytest.raises(ValueError, match=message):
        add(changed)


def test_a_run_is_given_all_memory_that_its_steps_use() -> None:
    one = native.extension().Program("scalar")
    dense, memory = (256, 1, 64, 16), torch.zeros(4096)
    first, last = (one.values(base, 0, 0, (16, 4, 4), dense) for base in (0, 3))
    one.map(first, [], (last, -1, [], 0, 0.0, 0.0))
    address = memory.data_ptr() + -memory.data_ptr() % 64
    one.run(1, [address, 0, 0, address + 4096], 0, 1, 0)
    for wrong in (
        lambda: one.run(1, [address, 0, 0], 0, 1, 0),
        lambda: one.run(1, [address] * 4, 0, 2, 0),
        lambda: one.run(1, [address] * 4, -1, 1, 0),
    ):
        with pytest.raises(ValueError, match="no such run"):
            wrong()
    with pytest.raises(ValueError, match="expected the address"):
        one.run(1, [address, 0, 0, 0], 0, 1, 0)
    with pytest.raises(ValueError, match="aligned"):
        one.run(1, [address + 32, 0, 0, address + 4096], 0, 1, 0)
    with pytest.raises(ValueError, match="offset of a multiple of 64"):
        one.quantized(32, 16, 16, 1, (4, 4, 1, 1), 4, 4, 0, False)


def test_a_program_keeps_its_constants_when_the_model_moves_to_shared_memory() -> None:
    torch.manual_seed(0)
    layers = {"a": conv(3, 16), "norm": nn.BatchNorm2d(16), "b": conv(16, 8)}
    net = Net(lambda n, x: n.b(n.norm(F.max_pool2d(n.a(x), 2))), **layers)
    qnet, x = dsconv.fold_batchnorm(dsconv.quantize(net)), torch.randn(2, 3, 8, 8)
    fast = dsconv.compile(qnet, x)
    expected, before = fast(x), {name: value.data_ptr() for name, value in fast.state_dict().items()}
    fast.share_memory()  # as a process does that is spawned with it
    assert {name for name, value in fast.state_dict().items() if value.data_ptr() != before[name]} > {"model.b.bias"}
    reused = [torch.full((count,), 1e9, dtype=torch.float32) for count in (8, 16) for _ in range(100)]
    assert torch.equal(fast(x), expected) and len(reused) == 200
