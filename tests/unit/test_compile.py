"""dsconv.compile: the bits of the folded model, in fewer steps."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.compilation import CompiledModel
from dsconv.errors import DataError, ModelError
from dsconv.names import PRESETS
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


# Winograd layers do not read mantissas, and the step before does not quantize their inputs.
W4A4 = dsconv.QuantConfig.preset("w4a4", algorithm="direct")


def compiled(model: nn.Module, x: Tensor, config: str | dsconv.QuantConfig = W4A4) -> CompiledModel:
    return dsconv.compile(dsconv.quantize(randomized(model), config), x)


def assert_same_bits(fast: CompiledModel, x: Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(fast(x), fast.model(x))


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class Block(nn.Module):
    """A residual block that ends with ``after``, with one of the two orders of the addition."""

    def __init__(self, after: Callable[[Tensor], Tensor], swapped: bool = False, downsample: bool = False):
        super().__init__()
        self.first, self.conv, self.norm = conv(3, 32), conv(32, 32), nn.BatchNorm2d(32)
        self.downsample = conv(32, 32) if downsample else nn.Identity()
        self.after, self.swapped = after, swapped

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y, x = self.norm(self.conv(x)), self.downsample(x)
        return self.after(x + y if self.swapped else y + x)


@pytest.mark.parametrize("algorithm", ["direct", "auto"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize(
    ("after", "fused"),
    [
        (F.relu, ("bias", "add", "relu")),
        (F.relu6, ("bias", "add", "clamp")),
        (nn.ReLU6(inplace=True), ("bias", "add", "clamp")),
        (nn.LeakyReLU(0.2), ("bias", "add", "leaky_relu")),
        (nn.LeakyReLU(inplace=True), ("bias", "add", "leaky_relu")),
        (F.silu, ("bias", "add", "silu")),
        (nn.Hardtanh(-1, 1), ("bias", "add", "clamp")),
    ],
)
def test_addition_and_activation_go_into_the_convolution(
    after: Callable[[Tensor], Tensor], fused: tuple[str, ...], downsample: bool, swapped: bool, algorithm: str
) -> None:
    x = torch.randn(2, 3, 9, 7)
    fast = compiled(Block(after, swapped, downsample), x, dsconv.QuantConfig.preset("w4a4", algorithm=algorithm))
    steps = {step.name: step.fused for step in fast.plan.steps if step.backend.startswith("integers")}
    taken = [set(fused) <= set(step) or set(fused) - {"bias"} <= set(step) for step in steps.values()]
    assert any(taken), steps
    assert steps["first"] == ("relu", "quantize") if algorithm == "direct" else ("relu",)
    if after is F.silu:  # which rounds differently than PyTorch's
        torch.testing.assert_close(fast(x), fast.model(x))
    else:
        assert_same_bits(fast, x)


def normed(*layers: nn.Module) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("layers", "shape", "fused"),
    [
        ((nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40, eps=0.1), nn.ReLU()), (3, 9, 7), ("bias", "batch_norm", "relu")),
        ((conv(3, 40), nn.BatchNorm2d(40, affine=False), nn.Hardtanh()), (3, 8, 8), ("batch_norm", "clamp")),
        ((nn.Conv1d(16, 40, 3), nn.BatchNorm1d(40), nn.ReLU()), (16, 9), ("bias", "batch_norm", "relu")),
        ((nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU6()), (20,), ("bias", "batch_norm", "clamp")),
        ((nn.Conv2d(40, 40, 3, groups=40), nn.BatchNorm2d(40)), (40, 9, 7), ("bias", "batch_norm")),
        ((nn.Conv2d(24, 48, 3, groups=24), nn.BatchNorm2d(48)), (24, 9, 7), ("batch_norm",)),  # as its operator
    ],
)
def test_batchnorm_goes_into_the_layer_in_front(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...], fused: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    fast = dsconv.compile(dsconv.quantize(normed(*layers).eval(), "w4a4"), torch.zeros(1, *shape))
    (layer,) = [step for step in fast.plan.steps if step.backend.startswith("integers")]
    assert layer.fused[: len(fused)] == fused
    assert not any("batch_norm" in step.operator for step in fast.plan.steps)
    for images in (1, 5):
        assert_same_bits(fast, torch.randn(images, *shape))


def test_a_batchnorm_that_learns_is_left_to_pytorch() -> None:
    model = normed(conv(3, 40), nn.BatchNorm2d(40), nn.ReLU()).eval()
    qmodel = dsconv.quantize(model, "w4a4")
    qmodel[1].train()
    x = torch.randn(4, 3, 9, 7)
    fast = dsconv.compile(qmodel, x)
    assert [step.fused for step in fast.plan.steps if step.backend.startswith("integers")] == [()]
    with torch.inference_mode():
        # Its sums over the batch have another order.
        torch.testing.assert_close(fast(x), qmodel(x))


def test_the_first_layer_may_read_many_channels() -> None:
    for groups in (1, 2):
        fast = compiled(nn.Sequential(nn.Conv2d(64, 32, 3, groups=groups), nn.ReLU()), torch.randn(1, 64, 9, 7))
        for x in (torch.randn(3, 64, 9, 7), torch.randn(2, 64, 9, 7).to(memory_format=torch.channels_last)):
            assert_same_bits(fast, x)


def test_what_others_read_as_well_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(y) * y + (y + y)

    x = torch.randn(1, 3, 5, 5)
    fast = compiled(Twice(), x)
    assert [step.fused for step in fast.plan.steps if step.name == "conv"] == [("bias",)]
    assert_same_bits(fast, x)


def test_a_sum_that_broadcasts_or_scales_is_not_fused() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.conv(x), x.mean(1, keepdim=True)) + torch.add(self.other(x), x[:, :1], alpha=2)

    x = torch.randn(2, 3, 5, 5)
    assert_same_bits(compiled(Sums(), x), x)


class Joined(nn.Module):
    """Apply each of ``JOINED`` to the output of its own convolution, to its input and to the constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = conv(3, 16), nn.ModuleList(conv(16, 16) for _ in JOINED)
        self.scale, self.offset = (nn.Parameter(torch.randn(16, 1, 1)) for _ in range(2))
        self.line = nn.Parameter(torch.randn(16))  # images are as wide as they have channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.first(x))
        named = zip(JOINED.items(), self.layers, strict=True)
        return {name: F.relu(join(self, layer, x)) for (name, join), layer in named}


# ``f(x)`` is the convolution; operands to the left of it are computed before it.
JOINED: dict[str, Callable[[Joined, Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "the second twice": lambda m, f, x: torch.add(f(x), x, alpha=2),
    "the convolution twice": lambda m, f, x: torch.add(x, f(x), alpha=2),
    "minus the second": lambda m, f, x: torch.add(f(x), x, alpha=-1),
    "in place": lambda m, f, x: f(x).add_(x, alpha=0.5),
    "difference": lambda m, f, x: f(x) - x,
    "difference from the second": lambda m, f, x: x - f(x),
    "difference from twice": lambda m, f, x: torch.sub(x, f(x), alpha=2),
    "a number": lambda m, f, x: f(x) + 0.25,
    "twice a number": lambda m, f, x: torch.add(f(x), 0.25, alpha=2),
    "itself": lambda m, f, x: (lambda y: y + y)(f(x)),
    "itself twice": lambda m, f, x: (lambda y: torch.add(y, y, alpha=2))(f(x)),
    "a value for each image": lambda m, f, x: x.mean((1, 2, 3), keepdim=True) + f(x),
    "a value for each channel": lambda m, f, x: x.amax((2, 3), keepdim=True) + f(x),
    "a value for each pixel": lambda m, f, x: x[:, :1] + f(x),
    "a value for each line": lambda m, f, x: x[..., :1] + f(x),
    "the first of the images": lambda m, f, x: x[:1] + f(x),
    "a value for each pixel, later": lambda m, f, x: f(x) + x[:, :1],
    "what is made later": lambda m, f, x: f(x) + F.hardswish(x),
    "without a convolution, twice": lambda m, f, x: torch.add(F.hardswish(f(x)), F.max_pool2d(x, 3, 1, 1), alpha=2),
    "without one, broadcast": lambda m, f, x: F.hardswish(f(x)) + F.max_pool2d(x, 3, 1, 1)[:, :1],
    "scaled, twice the offset": lambda m, f, x: torch.add(F.max_pool2d(f(x), 3, 1, 1) * m.scale, m.offset, alpha=2),
    "scaled, an offset of lines": lambda m, f, x: F.max_pool2d(f(x), 3, 1, 1) * m.scale + m.line,
    "scaled by lines": lambda m, f, x: F.max_pool2d(f(x), 3, 1, 1) * m.line + m.offset,
    "product with lines": lambda m, f, x: F.hardswish(f(x)) * F.max_pool2d(x, (1, 16)),
    "product with a channel": lambda m, f, x: F.hardswish(f(x)) * F.max_pool2d(x, 3, 1, 1)[:, :1],
}


def test_sums_and_products_of_all_kinds_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    # How weights are rounded makes no difference here, but for the time that it takes.
    fast = compiled(Joined(), torch.zeros(1, 3, 5, 16), dsconv.QuantConfig.preset("w4a4", weight_rule="paper"))
    x = torch.randn(2, 3, 5, 16)
    with torch.inference_mode():
        found, expected = fast(x), fast.model(x)
    assert [name for name in JOINED if not torch.equal(found[name], expected[name])] == []


READERS: dict[str, tuple[nn.Module, dict[str, object]]] = {
    "plain": (nn.Conv2d(48, 16, 1), {}),
    "bits": (nn.Conv2d(48, 16, 1), {"activation_bits": 4}),
    "sign included": (nn.Conv2d(48, 16, 1), {"activation_sign": "included"}),
    "sign extra": (nn.Conv2d(48, 16, 1), {"activation_sign": "extra"}),
    "block_size": (nn.Conv2d(48, 16, 1), {"block_size": 32}),
    "groups": (nn.Conv2d(48, 16, 1, groups=2), {"block_size": 24}),
    "shift": (nn.Conv2d(48, 16, 1), {"weight_shift": True}),
    "wide": (nn.Conv2d(48, 16, 1), {"weight_bits": 8}),
    "large border": (nn.Conv2d(48, 16, 5, padding=2), {}),
    "border": (nn.Conv2d(48, 16, 3, padding=(1, 0)), {}),
    "depthwise": (nn.Conv2d(48, 48, 3, groups=48), {}),
    "plain again": (nn.Conv2d(48, 16, 1), {}),
}


def test_layers_that_read_one_tensor_round_it_each_by_its_own_settings() -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 48, 3)
            self.readers = nn.ModuleDict({name: layer for name, (layer, _) in READERS.items()})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = F.leaky_relu(self.stem(x), 0.5)
            return {name: layer(x) for name, layer in self.readers.items()}

    common = {"weight_bits": 4, "weight_rule": "paper", "activation_bits": 6, "block_size": 16, "weight_shift": False}
    overrides = {f"readers.{name}": common | settings for name, (_, settings) in READERS.items()}
    fast = compiled(Readers(), torch.zeros(1, 3, 8, 9), dsconv.QuantConfig(overrides=overrides))
    x = torch.randn(2, 3, 8, 9)
    with torch.inference_mode():
        found, expected = fast(x), fast.model(x)
    assert [name for name in READERS if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_a_window_of_padding_alone_has_the_maximum_of_pytorch(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float32)
    fast = compiled(nn.Sequential(nn.Conv2d(3, 16, 1), nn.MaxPool2d(2, 1, 1, dilation=2)), x)
    assert_same_bits(fast, x)
    assert fast(x).isneginf().all()


def test_batch_and_image_size_may_vary() -> None:
    fast = compiled(Block(F.relu), torch.randn(1, 3, 9, 7))
    for shape in ((1, 3, 9, 7), (5, 3, 9, 7), (2, 3, 16, 16), (0, 3, 9, 7), (1, 3, 16, 16)):
        assert_same_bits(fast, torch.randn(shape))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.Conv1d(3, 16, 3), nn.MaxPool1d(2)), (3, 9)),
        (nn.Sequential(nn.Conv3d(3, 16, 3), nn.ReLU()), (3, 4, 5, 6)),
        (nn.Sequential(conv(3, 16), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 5)), (3, 9, 8)),
        (nn.Sequential(nn.Linear(16, 5), nn.ReLU()), (9, 16)),
    ],
    ids=["sequences", "volumes", "images to rows", "tokens"],
)
def test_a_batch_may_be_empty(network: nn.Module, shape: tuple[int, ...]) -> None:
    fast = compiled(network, torch.randn(1, *shape))
    for images in (0, 2):
        assert_same_bits(fast, torch.randn(images, *shape))


def test_of_many_image_sizes_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconv.compilation.compiled._SIZES_KEPT", 2)
    fast = compiled(nn.Sequential(conv(3, 16)), torch.randn(1, 3, 4, 4))
    for size in (5, 6, 7, 4):
        assert_same_bits(fast, torch.randn(1, 3, size, 4))
    assert [size for _, (size, *_) in fast._captured] == [(3, 7, 4), (3, 4, 4)]


def test_a_new_size_may_come_from_several_threads_at_once() -> None:
    fast, x = compiled(Block(F.relu), torch.randn(1, 3, 9, 7)), torch.randn(3, 3, 12, 12)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(fast(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, results[0]) for result in results)


def test_copies_work_and_the_model_given_stays_as_it_is() -> None:
    qmodel, x = dsconv.quantize(randomized(Block(F.relu)), "w4a4"), torch.randn(2, 3, 9, 7)
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    fast = dsconv.compile(qmodel, x)
    assert isinstance(qmodel.norm, nn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))


def test_file_of_a_compiled_model_is_loaded_and_compiled_again(tmp_path: Path) -> None:
    images, _ = dsconv.demo.load_digits()
    fast = dsconv.compile(dsconv.quantize(dsconv.zoo.build("dsconv/digits_resnet")), images[:1])
    again = dsconv.load(dsconv.save(fast, tmp_path / "net.safetensors"))
    assert torch.equal(dsconv.compile(again, images[:1])(images), fast(images))


def test_no_gradient_is_computed_and_none_is_needed() -> None:
    x = torch.randn(1, 3, 9, 7, requires_grad=True)
    assert not compiled(Block(F.relu), x.detach())(x).requires_grad


def test_plan_prints_what_runs_and_by_what() -> None:
    layers = (conv(3, 16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(1))
    fast = compiled(nn.Sequential(*layers), torch.zeros(1, 3, 4, 4))
    text = str(fast.plan)
    assert [step.operator for step in fast.plan.in_pytorch] == ["aten.log_softmax"]
    assert (
        "dsconv.conv2d" in text
        and "dsconv.flatten" in text
        and "1 by PyTorch" in text
        and f"integers ({native.isa()})" in text
    )
    assert "MB between steps per image" in text and fast.plan.memory_bytes > 0
    assert fast.plan.weight_bytes > 0


def test_plan_counts_the_weights_of_layers_that_pytorch_calls() -> None:
    x = torch.randn(3, 16, 9)  # lines
    fast = compiled(nn.Sequential(nn.Conv1d(16, 32, 3), nn.ReLU(), nn.Conv1d(32, 8, 3)), x[:1])
    layers = [step for step in fast.plan.steps if step.backend == f"integers ({native.isa()})"]
    assert len(layers) == 2 and all(layer.weight_bytes > 16 * 32 * 3 // 4 for layer in layers)
    assert_same_bits(fast, x)


@pytest.mark.parametrize("config", PRESETS)
def test_digits_network_gives_the_same_bits_under_every_preset(config: str) -> None:
    images, _ = dsconv.demo.load_digits()
    fast = dsconv.compile(dsconv.quantize(dsconv.demo.load_network(), config), images[:1])
    assert_same_bits(fast, images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet34",
        "resnet50",
        "vgg16",
        "vgg16_bn",
        "alexnet",
        "googlenet",
        "densenet121",
        "squeezenet1_1",
        "mobilenet_v2",
        "efficientnet_b0",
    ],
)
def test_networks_of_torchvision_have_all_layers_in_kernels(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    settings = {"init_weights": False} if name == "googlenet" else {}
    x = torch.randn(2, 3, 64, 64)
    # How weights are rounded makes no difference here, but for the time that it takes.
    fast = compiled(getattr(models, name)(**settings), x, dsconv.QuantConfig.preset("w4a4", weight_rule="paper"))
    layers = [module for module in fast.model.modules() if isinstance(module, dsconv.nn.DSLayer)]
    skipped = 6 if name == "googlenet" else 0  # the auxiliary heads, which run only in training
    depthwise = [layer for layer in layers if layer.config.activation_bits is None]
    assert all(layer.groups == layer.in_channels > 1 for layer in depthwise)
    ours = [step for step in fast.plan.steps if step.operator.startswith(("dsconv.conv2d", "dsconv.linear"))]
    assert len(ours) == len(layers) - skipped
    assert sum(step.backend.startswith("integers") for step in ours) == len(ours) - len(depthwise)
    assert all(step.backend.startswith(("integers", "float32")) for step in ours)
    assert_same_bits(fast, x)


@pytest.mark.slow
def test_resnet50_takes_thirty_megabytes() -> None:
    models = pytest.importorskip("torchvision.models")
    qmodel = dsconv.quantize(models.resnet50().eval(), {"activation_bits": 4, "block_size": 64})
    plan = dsconv.compile(qmodel, torch.zeros(1, 3, 224, 224)).plan
    assert plan.weight_bytes + plan.memory_bytes <= 30e6


def test_a_region_without_autocast_is_run_by_pytorch() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            with torch.autocast("cpu", enabled=False):
                z = torch.matmul(y.flatten(2), y.flatten(2).transpose(1, 2)).mean((1, 2))
            return self.last(y) * z[:, None, None, None]

    x = torch.randn(2, 3, 6, 6)
    fast = compiled(Region(), x, "w4a4")
    assert_same_bits(fast, x)


def test_errors_say_what_is_wrong() -> None:
    x = torch.zeros(1, 3, 8, 8)
    qmodel = dsconv.quantize(Block(F.relu).eval(), "w4a4")
    with pytest.raises(ValueError, match="example_input: expected float32 on the CPU"):
        dsconv.compile(qmodel, x.double())
    with pytest.raises(ValueError, match=r"example_input: expected a batch of at least one, got .*0, 3, 8, 8"):
        dsconv.compile(qmodel, x[:0])
    for wrong in (None, torch.tensor(1.0), {"a": [1, None]}):
        with pytest.raises(DataError, match=r"inputs: expected a tensor \(N, ...\) among the arguments"):
            dsconv.compile(qmodel, wrong)
    with pytest.raises(ValueError, match=r"expected float32 on the CPU, got torch\.float64"):
        dsconv.compile(qmodel, x)(x.double())
    with pytest.raises(ModelError, match="training mode"):
        dsconv.compile(qmodel.train(), x)

    class ByValue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.sum()) > 0 else x

    with pytest.raises(ModelError, match=r"float\(x\.sum\(\)\)"):
        dsconv.compile(dsconv.quantize(ByValue().eval(), "w4a4"), x)
