"""Models with state, or whose code depends on constants, are captured unchanged."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv.errors import ModelError
from dsconv.ops import native

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


@functools.lru_cache
def ramp(height: int, width: int) -> Tensor:
    return torch.arange(height * width, dtype=torch.float32).view(height, width)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.eval()


class Caches(Net):
    """Model that caches anchors for the last shape, grids by size, and flags."""

    shape: Any = None
    first = True

    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[tuple[int, ...], Tensor] = {}

    @functools.lru_cache  # noqa: B019
    def steps(self, width: int) -> Tensor:
        return torch.arange(width, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.ones_like(y).cumsum(3)
        size = tuple(y.shape[2:])
        if size not in self.grids:
            self.grids[size] = torch.zeros(size) + size[0]
        if not hasattr(self, "mesh") or self.mesh.shape != size:
            self.register_buffer("mesh", torch.ones(size) * size[1])
        self.first, self.images, self.features = False, x.shape[0], y
        return y + self.anchors + self.grids[size] + self.mesh + self.steps(size[1]) + ramp(*size)


class Constants(Net):
    """Model with branches and sizes that depend on values of buffers and parameters, as converters from ONNX write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.tensor([-1, 8, 4 * 64]))
        self.register_buffer("count", torch.tensor(2))
        self.register_buffer("keep", torch.arange(32) % 2 == 0)
        self.gain = nn.Parameter(torch.tensor([1.5, 2.5]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if torch.any(self.size == 0) or self.gain.sum() < 0:
            return x
        y = y * float(self.gain.max()) + torch.arange(self.count).sum()
        z = y[:, self.keep.nonzero()[:, 0]][:, : self.count]
        total = torch.zeros_like(self.gain)
        total += x.mean()  # not constant any more
        same = torch.reshape(y, torch.Size(self.size)) + torch.reshape(y, [int(n) for n in self.size])
        return same.flatten(1) + (z.sum((1, 2, 3)) + total[0] + self.count.item())[:, None] + self.size.tolist()[1]


class ByBatch(Net):
    """Model that uses the batch size as a number and treats one size differently."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if x.shape not in self.seen:
            self.seen[x.shape] = torch.arange(len(x), dtype=torch.float32)[:, None, None, None]
        return y + self.seen[x.shape] if x.shape[0] == 3 else y


def state_of(model: nn.Module) -> dict[str, Any]:
    found = {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    return found | {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after.keys() == before.keys()
    for key, value in after.items():
        if isinstance(value, dict):
            assert list(value) == list(before[key]) and all(value[k] is before[key][k] for k in value), key
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            assert value[0] is before[key][0] and torch.equal(value[1], before[key][1]), key
        else:
            assert value is before[key], key


@needs_extension
@pytest.mark.parametrize(("net", "sizes"), [(Caches, (8, 6)), (Constants, (8,)), (ByBatch, (8, 6))])
@pytest.mark.parametrize("images_before", [0, 5])
def test_compiled_for_one_shape_it_is_right_for_others(net: Any, sizes: tuple[int, ...], images_before: int) -> None:
    qmodel = dsconv.quantize(net())
    with torch.inference_mode():
        if images_before:
            with torch.inference_mode(False):  # the cached tensor has a gradient history
                qmodel(torch.randn(images_before, 3, 8, 8))
        before = state_of(qmodel)
        fast = dsconv.compile(qmodel, torch.zeros(1, 3, 8, 8))
        assert_same_state(qmodel, before)
        for size in sizes:
            for images in (1, 5, 3):
                x = torch.randn(images, 3, size, 8)
                assert torch.equal(fast(x), qmodel(x))


@pytest.mark.parametrize("net", [Caches, Constants])
def test_exported_it_is_right_for_every_batch(net: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    qmodel = dsconv.quantize(net())
    with torch.inference_mode():
        qmodel(torch.randn(5, 3, 8, 8))
        before = state_of(qmodel)
        session = runtime.InferenceSession(
            str(dsconv.export_onnx(qmodel, torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx"))
        )
        assert_same_state(qmodel, before)
        for images in (1, 5, 3):
            x = torch.randn(images, 3, 8, 8)
            (y,) = session.run(None, {"x": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), qmodel(x), rtol=1e-4, atol=1e-3)


def test_a_graph_for_all_batches_is_not_made_of_a_branch_on_one(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(ModelError, match=r"batch size became a constant.*branches on it"):
        dsconv.export_onnx(dsconv.quantize(ByBatch()), torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@needs_extension
def test_a_batch_that_was_cached_before_is_no_constant() -> None:
    """Check any cached size: a capture compares two batch sizes to find values that depend on the size."""
    for count in (2, 3, 4):
        model = dsconv.quantize(Caches().eval(), "w4a4")
        with torch.inference_mode():
            model(torch.randn(count, 3, 9, 7))
            fast = dsconv.compile(model, torch.zeros(1, 3, 9, 7))
            assert torch.equal(fast(x := torch.randn(5, 3, 9, 7)), model(x))
        assert fast.program_for(x).any_batch


class Head(Net):
    """Detector head that computes boxes from a grid, in two parts of the batch."""

    shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).view(x.shape[0], 8, -1)
        if self.shape != x.shape:
            rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in x.shape[2:]), indexing="ij")
            self.shape, self.grid = x.shape, torch.stack((columns, rows)).view(2, -1).repeat(1, 4)
        half = x.size(0) // 2
        return torch.cat([y[:half], y[half:] * 2])[:, :2] + self.grid


@needs_extension
@torch.inference_mode()
def test_what_follows_from_the_size_alone_is_computed_once() -> None:
    qmodel = dsconv.quantize(Head())
    fast = dsconv.compile(qmodel, torch.zeros(1, 3, 8, 8))
    for shape in ((1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 6, 8)):
        x = torch.randn(shape)
        assert torch.equal(fast(x), qmodel(x))
    left = {str(step.operator) for step in fast.plan.in_pytorch}
    assert not left & {f"aten.{name}" for name in ("arange", "meshgrid", "stack", "repeat")}


@needs_extension
@torch.inference_mode()
def test_constants_are_neither_chance_nor_what_a_caller_may_write() -> None:
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + torch.rand(8)

    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.conv(x)
            return torch.arange(6.0).view(2, 3).t()

    x = torch.randn(1, 3, 8, 8)
    random, fixed = (dsconv.compile(dsconv.quantize(net), x) for net in (Random(), Fixed()))
    assert not torch.equal(random(x), random(x))
    expected = fixed(x).clone()
    fixed(x).zero_()
    assert torch.equal(fixed(x), expected)
