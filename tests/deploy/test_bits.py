"""The runtime without PyTorch has the bits of ``dsconv.compile``: steps of all kinds, tensors of all shapes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsconv
from dsconv.ops import native
from dsconv.structures import tensors_in

runtime = pytest.importorskip("dsconv_runtime")
pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Of(nn.Module):
    """Network of named layers with a given forward function."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module):
        super().__init__()
        self.layers, self._forward = nn.ModuleDict(layers), forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self.layers, *inputs)


def views(m: Any, x: Tensor) -> Any:
    y = torch.relu(m["a"](x))
    return {
        "all": y,
        "some": y[:, 4:12],
        "flat": torch.cat([y, m["b"](y)], 1).flatten(1),
        "last": y.permute(0, 2, 3, 1),
    }


def plain(m: Any, x: Tensor) -> Any:
    y = torch.relu(m["a"](x))
    return y.permute(0, 2, 3, 1), y[:, 4:12], torch.cat([y, m["b"](y)], 1), y.mean((2, 3))


def compact(m: Any, x: Tensor) -> Tensor:
    x = F.hardswish(m["deep"](F.silu(m["grow"](x))))
    return F.gelu(m["project"](x * torch.sigmoid(m["squeeze"](F.adaptive_avg_pool2d(x, 1)))))  # type: ignore[no-any-return]


def spatial(m: Any, x: Tensor, other: Tensor) -> Any:
    small = m["down"](x)
    up = torch.cat([F.interpolate(small, scale_factor=2.0, mode="bilinear"), m["other"](other)], 1)
    whole = F.channel_shuffle(m["norm"](up), 4)
    made = m["last"](F.pad(whole, (1, 1, 1, 1), mode="reflect"))
    near = F.interpolate(made, scale_factor=2.0, mode="nearest")
    return near, F.pixel_shuffle(m["up"](small), 2), F.adaptive_avg_pool2d(whole, (3, 5)), torch.softmax(made, 1)


def rooms(m: Any, x: Tensor) -> Any:
    """Operators that change sizes: windows beyond the end, strides, pads, crops, scales, transposed layers."""
    y = F.max_pool2d(torch.relu(m["first"](x)), 3, 2, ceil_mode=True)
    pads = F.pad(y, (2, 1, 0, 3), mode="replicate") + F.pad(y, (1, 2, 2, 1), value=0.5)
    parts = pads[:, :, ::2, 1::2]
    return {
        "up": m["up"](y),
        "near": F.interpolate(parts, scale_factor=3.0, mode="nearest"),
        "between": F.interpolate(m["last"](y[:, :, 1:-1, 2:]), scale_factor=2.0, mode="bilinear"),
        "corners": F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=True),
        "squeezed": F.avg_pool2d(m["deep"](y), 2, count_include_pad=False),
        "windows": F.adaptive_avg_pool2d(pads, (3, 2)),
    }


def scaled(m: Any, x: Tensor) -> Any:
    """Scales that are no whole numbers; PyTorch has one kernel for small results, and another for large ones."""
    y = m["a"](x)
    return [F.interpolate(y, scale_factor=by, mode="bilinear") for by in (1.7, 0.5)]


conv = nn.Conv2d
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "views": (lambda: Of(views, a=conv(3, 16, 3, padding=1), b=conv(16, 16, 3, padding=1)), ((3, 9, 7),)),
    "plain": (lambda: Of(plain, a=conv(3, 16, 3, padding=1), b=conv(16, 16, 3, padding=1)), ((3, 9, 7),)),
    "compact": (
        lambda: Of(
            compact,
            grow=conv(4, 32, 1),
            deep=conv(32, 32, 3, padding=1, groups=32),
            squeeze=conv(32, 32, 1),
            project=conv(32, 8, 1),
        ),
        ((4, 10, 6),),
    ),
    "spatial": (
        lambda: Of(
            spatial,
            down=conv(8, 8, 3, padding=1, stride=2),
            other=conv(8, 8, 1),
            norm=nn.GroupNorm(2, 16),
            last=conv(16, 8, 3),
            up=nn.ConvTranspose2d(8, 4, 2, stride=2),
        ),
        ((8, 8, 12), (8, 8, 12)),
    ),
    "rooms": (
        lambda: Of(
            rooms,
            first=conv(3, 8, 5, padding=2, stride=2),
            up=nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1),
            last=conv(8, 8, 1),
            deep=conv(8, 8, 3, padding=2, dilation=2),
        ),
        ((3, 20, 20),),
    ),
    "scaled": (lambda: Of(scaled, a=conv(3, 24, 3, padding=1)), ((3, 20, 20),)),
    "sound": (
        lambda: nn.Sequential(nn.Conv1d(2, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 4, 3, stride=2)),
        ((2, 31),),
    ),
    "volume": (
        lambda: nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 3, padding=1)),
        ((2, 5, 6, 7),),
    ),
    "rows": (lambda: nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3)), ((24,),)),
}


def compiled(name: str, config: Any = None) -> tuple[Any, list[Tensor]]:
    make, shapes = CASES[name]
    torch.manual_seed(1)
    model = make().eval()
    inputs = [torch.randn(5, *shape, dtype=torch.float32) for shape in shapes]
    return dsconv.compile(dsconv.quantize(model, config), tuple(x[:1] for x in inputs)), inputs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", ["default", "w4a4", "w8a8", "fast start"])
def test_the_bits_are_those_of_the_compiled_network(name: str, config: str, tmp_path: Path) -> None:
    fast_start = config == "fast start"
    fast, inputs = compiled(name, None if fast_start else config)
    fast.save(tmp_path / "net.dsconv", fast_start=fast_start, other_sizes=False)
    net = runtime.Network(tmp_path / "net.dsconv")
    for samples in (1, 2, 5, 0):
        given = [x[:samples] for x in inputs]
        made = net(*(x.numpy() for x in given))
        outputs = [*made.values()] if isinstance(made, dict) else [made]
        if not samples:
            assert [len(output) for output in outputs] == [0] * len(outputs)
            continue
        for output, expected in zip(outputs, tensors_in(fast(*given)), strict=True):
            assert output.shape == expected.shape and np.array_equal(output, expected.numpy(), equal_nan=True)


def test_values_that_are_not_finite_go_through_alike(tmp_path: Path) -> None:
    fast, (x,) = compiled("views")
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[2, 2, 4, 4] = float("nan"), float("inf"), -float("inf")
    fast.save(tmp_path / "net.dsconv", other_sizes=False)
    made = runtime.Network(tmp_path / "net.dsconv")(x.numpy())
    for output, expected in zip(made.values(), tensors_in(fast(x)), strict=True):
        assert np.array_equal(output, expected.numpy(), equal_nan=True)


def test_any_strides_of_an_input_are_read(tmp_path: Path) -> None:
    fast, (x,) = compiled("views")
    fast.save(tmp_path / "net.dsconv", other_sizes=False)
    net, array = runtime.Network(tmp_path / "net.dsconv"), x.numpy()
    expected = net(array)
    pixels = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    wide = np.zeros((10, 3, 9, 14), np.float32)
    wide[::2, :, :, ::2] = array
    for other in (pixels, wide[::2, :, :, ::2], np.flip(np.flip(array, 2).copy(), 2)):
        assert all(np.array_equal(net(other)[name], output) for name, output in expected.items())


def check_sizes(fast: Any, net: Any, shapes: Sequence[Sequence[tuple[int, ...]]]) -> None:
    """Compare the bits for inputs of several sizes, of one sample and of three."""
    for size in shapes:
        for samples in (1, 3):
            given = [torch.randn(samples, *shape, dtype=torch.float32) for shape in size]
            made = net(*(x.numpy() for x in given))
            outputs = [*made.values()] if isinstance(made, dict) else [made]
            for output, expected in zip(outputs, tensors_in(fast(*given)), strict=True):
                assert output.shape == expected.shape, size
                assert np.array_equal(output, expected.numpy(), equal_nan=True), size


SIZES: dict[str, list[tuple[int, ...]]] = {
    "plain": [(3, 9, 7), (3, 10, 8), (3, 41, 5), (3, 1, 1)],
    "compact": [(4, 11, 6), (4, 3, 30), (4, 64, 65)],
    "spatial": [(8, 40, 76), (8, 8, 44), (8, 72, 12)],
    "sound": [(2, 32), (2, 100), (2, 7)],
    "rooms": [(3, 20, 20), (3, 33, 18), (3, 21, 47)],
    "scaled": [(3, 52, 20), (3, 21, 51), (3, 116, 148), (3, 2, 3)],
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("config", ["default", "w4a4"])
def test_sizes_that_were_not_compiled_have_the_bits_too(name: str, config: str, tmp_path: Path) -> None:
    fast, inputs = compiled(name, config)
    saved = fast.save(tmp_path / "net.dsconv")
    assert saved.size_step == (32 if name == "spatial" else 1), saved.why_fixed
    net = runtime.Network(tmp_path / "net.dsconv")
    assert net.size_step == saved.size_step
    with torch.no_grad():
        check_sizes(fast, net, [[shape] * len(inputs) for shape in SIZES[name]])


def test_more_sizes_than_are_remembered(tmp_path: Path) -> None:
    fast, _ = compiled("plain")
    fast.save(tmp_path / "net.dsconv")
    net = runtime.Network(tmp_path / "net.dsconv")
    sizes = [[(3, 5, width)] for width in range(4, 24)]
    check_sizes(fast, net, sizes + sizes[:2])


def test_sizes_that_the_steps_cannot_take_are_refused(tmp_path: Path) -> None:
    fast, _ = compiled("rooms")
    fast.save(tmp_path / "net.dsconv")
    net = runtime.Network(tmp_path / "net.dsconv")
    with pytest.raises(
        runtime.DataError, match=r"expected \(N, 3, 20, 20\), or other .* got \(1, 3, 2, 20\): .* smaller"
    ):
        net(np.zeros((1, 3, 2, 20), np.float32))
    with pytest.raises(runtime.DataError, match=r"got \(1, 4, 20, 20\): the number of channels"):
        net(np.zeros((1, 4, 20, 20), np.float32))
    with pytest.raises(runtime.DataError, match="other heights and widths, got"):
        net(np.zeros((1, 3, 20), np.float32))
    fast, _ = compiled("spatial")
    fast.save(tmp_path / "net.dsconv")
    net = runtime.Network(tmp_path / "net.dsconv")
    given = np.zeros((1, 8, 9, 12), np.float32)
    with pytest.raises(runtime.DataError, match="heights and widths that differ from the first by multiples of 32"):
        net(given, given)
    with pytest.raises(runtime.DataError, match="do not agree"):
        net(np.zeros((1, 8, 40, 12), np.float32), np.zeros((1, 8, 8, 12), np.float32))


def test_a_reflection_beyond_the_image_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Of(lambda m, x: m["a"](F.pad(x, (0, 2, 0, 0), mode="reflect")), a=conv(3, 8, 1)).eval()
    fast = dsconv.compile(dsconv.quantize(model), torch.zeros(1, 3, 8, 8, dtype=torch.float32))
    fast.save(tmp_path / "net.dsconv")
    net = runtime.Network(tmp_path / "net.dsconv")
    check_sizes(fast, net, [[(3, 2, 3)]])
    with pytest.raises(runtime.DataError, match=r"got \(1, 3, 8, 2\): an image is smaller than what a step reads"):
        net(np.zeros((1, 3, 8, 2), np.float32))


def test_a_large_batch_is_computed_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 64, 3, padding=1), nn.ReLU(), conv(64, 64, 3, padding=1)).eval()
    x = torch.randn(9, 3, 160, 160, dtype=torch.float32)
    fast = dsconv.compile(dsconv.quantize(model), x[:1])
    fast.save(tmp_path / "net.dsconv", other_sizes=False)
    net = runtime.Network(tmp_path / "net.dsconv")
    assert net.run_bytes((9, 3, 160, 160)) < 9 * net.run_bytes((1, 3, 160, 160))
    assert np.array_equal(net(x.numpy()), fast(x).numpy())
