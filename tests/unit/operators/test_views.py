"""Slices of channels need no step, and operators without effect need none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from program_cases import Net, conv, steps_of
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

CONV = "conv2d"


@pytest.mark.parametrize(
    "halves",
    [
        lambda x: x.chunk(2, 1),
        lambda x: torch.split(x, 32, 1),
        lambda x: x.split([32, 32], -3),
        lambda x: (x[:, :32], x[:, -32:]),
        lambda x: (x.narrow(1, 0, 32), x[:, 32:1000]),
    ],
)
def test_parts_are_read_where_they_lie(halves: Callable[[Tensor], Any]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = halves(m.a(x))
        return m.b(a) + b

    assert steps_of(run, a=conv(3, 64), b=conv(32, 32)) == [CONV, "map+", CONV]


def test_every_kind_of_step_reads_a_part() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        pooled = F.max_pool2d(y[:, 3:35], 3, 2, 1)
        return (
            m.b(pooled),
            F.hardswish(y[:, 1:5]) * y[:, 60:].sum((2, 3), keepdim=True),
            y[:, 8:24] + y[:, 24:40],
            y[:, 7:10].flatten(1),
            m.b(torch.cat([y[:, 40:], m.c(y[:, :8])], 1)),
            m.wino(y[:, 9:41]),
            m.depthwise(y[:, 32:]),
            F.pixel_shuffle(y[:, 5:13], 2),
        )

    layers = {"a": conv(3, 64), "b": conv(32, 8), "c": conv(8, 8), "depthwise": conv(32, 32, groups=32)}
    found = steps_of(run, each_isa=True, wino=conv(32, 32), **layers)
    assert [name for name in found if name.startswith("aten")] == ["aten.max_pool2d+", "aten.sum"]


def test_parts_of_the_input_in_either_layout() -> None:
    assert steps_of(lambda m, x: m.a(x[:, 2:]), size=(5, 9, 7), a=conv(3, 8)) == [CONV]
    layers = {"a": conv(3, 8), "b": conv(4, 8)}
    assert steps_of(lambda m, x: (m.b(x[:, 1:]), x[:, 1:]), size=(5, 9, 7), **layers) == ["map+", CONV]


def test_parts_of_parts_of_a_concatenation_and_of_what_pytorch_makes() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x), m.a(x) * 2, torch.erf(m.a(x))], 1)
        first, second = y[:, 4:132].chunk(2, 1)
        return m.b(torch.erf(first)[:, 1:33]) + m.b(second[:, 3:35])

    steps_of(run, a=conv(3, 64), b=conv(32, 8))


def test_a_part_is_returned_beside_the_whole() -> None:
    steps_of(lambda m, x: (y := m.a(x), y[:, 1:3], torch.relu(y)[:, 2:]), a=conv(3, 8))


def test_parts_that_are_concatenated_again_lie_there_from_the_start() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = list(m.a(x).chunk(2, 1))
        y.append(m.b(y[-1]))
        y.append(m.b(y[-1]))
        return m.c(torch.cat(y, 1))

    layers = {"a": conv(3, 64), "b": conv(32, 32), "c": conv(128, 8, 1)}
    assert steps_of(run, **layers) == [CONV, "map+", "conv2d+", CONV, "map+", CONV]

    def exchanged(m: Any, x: Tensor) -> Tensor:
        first, second = m.a(x).chunk(2, 1)
        return m.c(torch.cat([second, first, m.b(first), first], 1))

    steps_of(exchanged, **layers)


def test_a_memory_plan_keeps_what_a_part_is_of() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        part = m.a(x)[:, 30:38]
        y = m.b(x)
        for _ in range(3):
            y = m.c(y)
        return y + torch.erf(part).permute(0, 1, 3, 2)[:, :8] + part

    steps_of(run, a=conv(3, 64), b=conv(3, 8), c=conv(8, 8))


def test_what_changes_nothing_is_no_step() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.ops.aten.alias(m.a(x)).detach().clone().contiguous()
        y = F.dropout(y.to(torch.float32), 0.5, m.training)[:, :64].view(y.shape).reshape(y.shape).expand(y.shape)
        y = F.pad(F.interpolate(F.adaptive_avg_pool2d(m.nothing(y), (9, 9)), size=(9, 9)), (0, 0))
        return m.b(F.relu(y))

    assert steps_of(run, a=conv(3, 64), b=conv(64, 8), nothing=nn.Identity()) == ["conv2d+", CONV]


def test_numbers_that_only_steps_of_ours_need_are_not_computed() -> None:
    net = {"a": conv(3, 8), "b": nn.Linear(8, 4)}
    run: Any = lambda m, x: m.b(m.a(x).mean((2, 3)).view(x.size(0), -1))  # noqa: E731
    qmodel = dsconv.quantize(Net(run, **net))
    assert not dsconv.compile(qmodel, torch.zeros(1, 3, 9, 9)).plan.in_pytorch


def test_parts_in_place_are_as_in_the_model() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        first, second = m.a(x).chunk(2, 1)
        return m.b(first.relu_() + F.hardswish(second, inplace=True))

    steps_of(run, a=conv(3, 64), b=conv(32, 8))


def test_the_plan_calls_functions_of_python_by_their_names() -> None:
    qmodel = dsconv.quantize(Net(lambda m, x: torch.topk(m.a(x), 2, 1)[0], a=conv(3, 8)))
    called = [step.operator for step in dsconv.compile(qmodel, torch.zeros(1, 3, 9, 9)).plan.in_pytorch]
    assert called == ["aten.topk", "getitem"]


def test_rows_of_values_and_images_of_one_pixel_are_the_same() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x).mean((2, 3), keepdim=True)).flatten(1)
        z = m.c(F.relu(y)).view(len(x), -1, 1, 1)
        return m.d(z).reshape(len(x), 8), y, z

    layers = {"a": conv(3, 64), "b": conv(64, 32, 1), "c": nn.Linear(32, 64), "d": conv(64, 8, 1)}
    found = steps_of(run, **layers)
    assert found == [CONV, "average", "map+", CONV, "map+", "linear+", CONV]


def test_a_head_reads_what_was_pooled() -> None:
    layers = {"a": conv(3, 64), "b": conv(64, 64), "head": nn.Linear(64, 10)}
    found = steps_of(lambda m, x: m.head(F.adaptive_avg_pool2d(m.b(m.a(x)), 1).flatten(1)), **layers)
    assert found == ["conv2d+", CONV, "average", "map+", "linear"]
    wide = {"a": conv(3, 64), "b": nn.Conv2d(64, 64, 9), "head": nn.Linear(64, 10)}
    found = steps_of(lambda m, x: m.head(torch.flatten(F.relu(m.b(m.a(x))), 1)), **wide)
    assert found == ["conv2d+", "conv2d+", "linear"]


def test_expansions_of_gates() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = F.hardsigmoid(m.b(y.mean((2, 3), keepdim=True)))
        return m.c(y * gate.expand_as(y) + gate.expand(y.shape))

    found = steps_of(run, a=conv(3, 64), b=conv(64, 64, 1), c=conv(64, 8))
    assert "aten.expand" not in found and "aten.expand_as" not in found


def test_sequences_of_one_channel_need_no_detour() -> None:
    layers = {"a": nn.Conv1d(1, 16, 3), "b": nn.Conv1d(16, 1, 3)}
    found = steps_of(
        lambda m, x: m.b(F.relu(m.a(m.c(x).squeeze(2)))).unsqueeze(2), (3, 1, 9), c=conv(3, 1, 1), **layers
    )
    assert [step.rstrip("+") for step in found] == [CONV, CONV, CONV]
    qmodel = dsconv.quantize(Net(lambda m, x: m.b(F.relu(m.a(x))), **layers))
    for x in (torch.randn(2, 1, 40), torch.randn(2, 40, 3).transpose(1, 2)[:, 1:2]):
        fast = dsconv.compile(qmodel, x)
        assert not fast.plan.in_pytorch
        with torch.inference_mode():
            assert torch.equal(fast(x), qmodel(x)) and fast(x).stride() == qmodel(x).stride()


def test_parts_of_a_tensor_have_the_shape_that_they_are_parts_of() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        rows = F.max_pool1d(y, 7).flatten(1)
        return y, y[:, 3:5], y[:, :3].cumsum(2), m.b(y)[:, 1:], rows, rows[:, 2:]

    qmodel = dsconv.quantize(Net(run, a=nn.Conv1d(2, 8, 3), b=nn.Conv1d(8, 16, 3, groups=8)))
    for images in (2, 0):
        x = torch.randn(images, 2, 9)
        fast = dsconv.compile(qmodel, torch.randn(1, 2, 9))
        with torch.inference_mode():
            for found, expected in zip(fast(x), qmodel(x), strict=True):
                assert torch.equal(found, expected) and found.stride() == expected.stride()
