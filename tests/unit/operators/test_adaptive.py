"""Adaptive average pooling is a step of compiled networks, with PyTorch's bits."""

from typing import Any

import pytest
import torch
from program_cases import CONFIG, Net, conv, steps_of
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.compilation.operators import adaptive
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


@pytest.mark.parametrize("size", [(5, 4), (3, 3), (1, 2), (20, 18), (None, 1)])
@pytest.mark.parametrize("channels", [3, 64])
def test_has_pytorchs_bits(channels: int, size: tuple[int, int]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(m.a(x), size)

    assert steps_of(run, (3, 13, 9), a=conv(3, channels)) == ["conv2d", "adaptive_avg_pool2d"]


def test_it_quantizes_what_a_layer_reads() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(F.adaptive_avg_pool2d(m.a(x)[:, 16:], 6))

    found = steps_of(run, each_isa=True, a=conv(3, 64), b=conv(48, 8))
    assert found == ["conv2d", "adaptive_avg_pool2d+", "conv2d"]


def test_one_window_is_an_average_of_the_image_and_one_for_each_pixel_nothing() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return F.adaptive_avg_pool2d(y, (9, 9)) * F.adaptive_avg_pool2d(y, 1)

    # An average in another layout has another order of sums.
    assert steps_of(run, near=1e-6, a=conv(3, 8))[:2] == ["conv2d", "average"]


def test_the_layout_is_that_of_what_is_read() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.hardswish(m.a(x).permute(0, 2, 3, 1)) + 1
        return F.adaptive_avg_pool2d(y.permute(0, 3, 1, 2), 3)

    assert steps_of(run, (3, 14, 14), a=conv(3, 64)) == ["conv2d", "map", "adaptive_avg_pool2d"]


def test_windows_in_an_order_of_our_own_are_near_those_in_float64() -> None:
    qmodel = dsconv.quantize(Net(lambda m, x: F.adaptive_avg_pool1d(m.a(x), 2), a=nn.Conv1d(3, 20, 1)), CONFIG)
    x = torch.randn(2, 3, 8_192) + 2
    fast = dsconv.compile(qmodel, x[:1])
    assert not fast.plan.in_pytorch
    with torch.inference_mode():
        windows = qmodel.a(x).double().unflatten(2, (2, -1))
    assert ((fast(x) - windows.mean(3)).abs() <= 5e-6 * windows.abs().mean(3)).all()


def test_pytorch_pools_where_no_way_has_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "_divides_at_once", lambda *_: None)
    assert steps_of(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 4), a=conv(3, 8)) == [
        "conv2d", "aten.adaptive_avg_pool2d"
    ]  # fmt: skip


def test_the_extension_refuses_windows_that_are_not_there() -> None:
    module = native.extension()
    one: Any = module.Program("scalar")  # type: ignore[union-attr]

    def tensor(c: int, h: int, w: int) -> int:
        return int(one.values(0, 0, 0, (c, h, w), (c * h * w, 1, w * c, c)))

    source, outputs = tensor(8, 2, 3), (tensor(8, 1, 1), -1, [], 0, 0.0, 0.0)
    one.average_windows(source, [(0, 2)], [(1, 3)], False, outputs)
    for rows, columns in (
        ([], [(1, 3)]),
        ([(0, 3)], [(1, 3)]),
        ([(0, 0)], [(1, 3)]),
        ([(1, 0)], [(1, 3)]),
        ([(-1, 1)], [(1, 3)]),
        ([(0, 2)], [(1, 4)]),
        ([(0, 2)], [(1, 3), (1, 3)]),
    ):
        with pytest.raises(ValueError, match=r"average_windows|outputs"):
            one.average_windows(source, rows, columns, False, outputs)
    assert torch.equal(torch.tensor(adaptive.spans(7, 3)), torch.tensor([(0, 3), (2, 5), (4, 7)]))
