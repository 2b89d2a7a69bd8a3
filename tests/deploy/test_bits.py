"""Networks without PyTorch have the bits of ``dsconv.compile``: steps of all kinds, tensors of all shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsconv
from dsconv.compilation.program import Port, Program
from dsconv.ops import native
from dsconv.structures import tensors_in

runtime = pytest.importorskip("dsconv_runtime")
pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Of(nn.Module):
    """Layers by name, and what is done with them."""

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


conv = nn.Conv2d
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "views": (lambda: Of(views, a=conv(3, 16, 3, padding=1), b=conv(16, 16, 3, padding=1)), ((3, 9, 7),)),
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
    fast.save(tmp_path / "net.dsconv", fast_start=fast_start)
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
    fast.save(tmp_path / "net.dsconv")
    made = runtime.Network(tmp_path / "net.dsconv")(x.numpy())
    for output, expected in zip(made.values(), tensors_in(fast(x)), strict=True):
        assert np.array_equal(output, expected.numpy(), equal_nan=True)


def test_any_strides_of_an_input_are_read(tmp_path: Path) -> None:
    fast, (x,) = compiled("views")
    fast.save(tmp_path / "net.dsconv")
    net, array = runtime.Network(tmp_path / "net.dsconv"), x.numpy()
    expected = net(array)
    pixels = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    wide = np.zeros((10, 3, 9, 14), np.float32)
    wide[::2, :, :, ::2] = array
    for other in (pixels, wide[::2, :, :, ::2], np.flip(np.flip(array, 2).copy(), 2)):
        assert all(np.array_equal(net(other)[name], output) for name, output in expected.items())


@pytest.mark.parametrize("port", [(0, 0, 0, 2**62, (10000,)), (0, 0, 2**61, 2**62, (1,)), (0, 2**62, 0, 64, (1,))])
def test_places_outside_of_the_memory_are_refused(
    port: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, _ = compiled("rows")
    *where, strides = port
    right = Program.ports

    def wrong(program: Program) -> Any:
        return right(program)[0], [Port(*where, (3,), strides)]

    monkeypatch.setattr(Program, "ports", wrong)
    fast.save(tmp_path / "net.dsconv")
    with pytest.raises(runtime.FileFormatError, match=r"too large|outside of its memory"):
        runtime.Network(tmp_path / "net.dsconv")


def test_a_large_batch_is_computed_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 64, 3, padding=1), nn.ReLU(), conv(64, 64, 3, padding=1)).eval()
    x = torch.randn(9, 3, 160, 160, dtype=torch.float32)
    fast = dsconv.compile(dsconv.quantize(model), x[:1])
    fast.save(tmp_path / "net.dsconv")
    net = runtime.Network(tmp_path / "net.dsconv")
    assert net.run_bytes(9) < 9 * net.run_bytes(1)
    assert np.array_equal(net(x.numpy()), fast(x).numpy())
