"""Kernels for GPUs: on a GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv import LayerConfig, QuantConfig, backends
from dsconv.backends import cpu, cuda, simulate
from dsconv.errors import ModelError
from dsconv.numerics import quantize_activation, reference_conv
from dsconv.ops import ACTIVATIONS
from dsconv.ops.arguments import Sizes

triton = pytest.importorskip("triton", reason="needs Triton: pip install 'dsconv[gpu]'")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
GPU = torch.cuda.is_available()
_FLOAT = {"weight_bits": 8, "blocks": "flat", "activation_bits": None}
_EXTRA = {"activation_sign": "extra", "activation_bits": 3, "weight_bits": 2, "weight_shift": True}
_INCLUDED = {"activation_sign": "included", "activation_bits": 5, "weight_bits": 3}
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    CASES: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
        (nn.Conv2d(64, 40, 3, padding=1), (2, 64, 6, 5), {"weight_shift": True, "kds_dtype": "float16"}),
        (nn.Conv2d(128, 64, 3, 2, dilation=2, padding=2), (1, 128, 7, 6), {"block_size": 32, "activation_bits": 4}),
        (nn.Conv2d(96, 24, 1), (1, 96, 4, 5), {"weight_shift": True}),  # incomplete blocks
        (nn.Conv2d(64, 40, (1, 3), groups=2), (2, 64, 3, 5), {"block_size": 16, **_EXTRA}),
        (nn.Conv2d(64, 130, 1, 2), (1, 64, 5, 5), {"block_size": 48, "weight_bits": 5, "weight_shift": True}),
        (nn.Conv2d(24, 16, 2, padding=1), (1, 24, 4, 4), {"block_size": 8, **_INCLUDED}),
        (nn.Conv2d(300, 8, 1, bias=False), (1, 300, 2, 3), {"block_size": 256}),
        (nn.Conv2d(3, 20, 7, 2, padding=3), (1, 3, 12, 10), {"weight_bits": 8, "blocks": "flat"}),
        (nn.Conv2d(64, 64, 3, padding=1, groups=64), (2, 64, 5, 5), _FLOAT),
        (nn.Conv2d(8, 16, 5, padding=2, groups=8), (1, 8, 6, 6), _FLOAT),
        (nn.Conv2d(6, 12, 3, 2, padding=1, groups=6), (2, 6, 5, 6), {"weight_shift": True}),  # depthwise, in integers
        (nn.Conv2d(40, 1, 1), (2, 40, 3, 4), {}),
        (nn.Linear(100, 30), (3, 100), {"weight_shift": True}),
        (nn.Conv1d(40, 30, 3, padding=1), (2, 40, 9), {"weight_shift": True, "kds_dtype": "float16"}),
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the device of the kernels. In the interpreter it is the CPU, whose own kernels are disabled."""
    if GPU:
        yield "cuda"
        return
    monkeypatch.setattr(backends, "BACKENDS", [cuda, simulate])
    monkeypatch.setattr(cuda, "device", "cpu")
    library = cuda.register("CPU")
    yield "cpu"
    library._destroy()


def config(settings: dict[str, Any]) -> LayerConfig:
    return LayerConfig(**{"block_size": 64, "activation_bits": 8, **settings})


def quantized(layer: Any, settings: dict[str, Any]) -> Any:
    return getattr(dsconv.nn, f"DS{type(layer).__name__}").from_float(layer, config(settings)).eval()


def moved(model: Any, device: str) -> Any:
    """Return the model with its weights packed again for the device."""
    model = model.to(device)
    for module in model.modules():
        if hasattr(module, "pack_"):
            module.pack_()
    return model


def name(case: Any) -> str:
    layer, _, settings = case
    return f"{type(layer).__name__}-{'x'.join(map(str, layer.weight.shape))}-{'-'.join(map(str, settings.values()))}"


def same(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def values(shape: tuple[int, ...]) -> Tensor:
    """Return values of several magnitudes, a NaN, an infinity, and a block of zeros."""
    x = torch.randn(shape) * torch.randint(-3, 4, shape).float().exp2()
    x.flatten(1)[:, 0] = torch.nan
    x.flatten(1)[-1, -1] = torch.inf
    if len(shape) > 2:
        x[..., shape[-1] // 2] = 0
    return x


def layouts_of(x: Tensor) -> list[Tensor]:
    """Return the same values in other layouts, and an empty batch."""
    pixels = {4: torch.channels_last}.get(x.dim(), torch.contiguous_format)
    return [x, x.contiguous(memory_format=pixels), torch.cat([x, x], 1)[:, : x.shape[1]], x[:0]]


@pytest.fixture(scope="module", autouse=True)
def of_the_cpu() -> dict[str, Any]:
    """Return the outputs of the cases by the CPU kernels; by the simulation without the extension."""
    torch.manual_seed(0)
    outputs = {}
    with torch.inference_mode():
        for case in CASES:
            layer, shape, settings = case
            x, made = values(shape), quantized(layer, settings)
            outputs[name(case)] = (x, *map(made, layouts_of(x)))
    return outputs


@pytest.mark.parametrize("case", CASES, ids=name)
def test_layers_have_the_bits_of_the_kernels_for_cpus(case: Any, gpu: str, of_the_cpu: Any) -> None:
    layer, _, settings = case
    x, *expected = of_the_cpu[name(case)]
    with torch.inference_mode():
        made = moved(quantized(layer, settings), gpu)
        assert made.backend.name.endswith("(cuda)"), made.backend
        for x_as, y_as in zip(layouts_of(x.to(gpu)), expected, strict=True):
            y = made(x_as)
            assert y.device.type == gpu and y.shape == y_as.shape
            if cpu.native.extension() is not None:
                assert y.stride() == y_as.stride() and same(y, y_as)
        assert same(made(x.to(gpu).half()), made(x.to(gpu).half().float()).half())


@pytest.mark.parametrize("seed", range(12))
def test_random_convolutions_are_within_the_bound(seed: int, gpu: str) -> None:
    generator = torch.Generator().manual_seed(seed)

    def one_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    torch.manual_seed(seed)
    groups, size = one_of(1, 1, 2), one_of(8, 16, 32, 64, 96)
    channels, outputs = groups * one_of(8, 24, 40, 72, 130), groups * one_of(1, 5, 33, 65)
    kernel, stride, dilation = one_of((1, 1), (3, 3), (2, 1), (3, 5)), one_of(1, 2, 3), one_of(1, 2)
    settings = {"weight_bits": one_of(2, 3, 4, 5, 8), "activation_bits": one_of(2, 4, 7, 8), "block_size": size,
                "weight_shift": one_of(True, False), "kds_dtype": one_of("float16", "float32"),
                "activation_sign": one_of("adaptive", "extra", "included")}  # fmt: skip
    layer = nn.Conv2d(channels, outputs, kernel, stride, one_of(0, 1, 2), dilation, groups)
    made, x = quantized(layer, settings), torch.randn(one_of(1, 2), channels, 6, 7)
    if min(made.output_size_for(x.shape[2:])) < 1:
        x = torch.randn(1, channels, 11, 11)
    c = made.config
    mantissa, exponent = quantize_activation(x, c.activation_bits, size, sign=c.activation_sign, groups=groups)
    where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": groups}
    shift = None if made.kds_shift is None else made.kds_shift.float()
    expected = reference_conv(
        mantissa, exponent, made.vqk, made.kds.float(), size, kds_shift=shift, bias=layer.bias.detach(), **where
    )
    with torch.inference_mode():
        y = moved(made, gpu)(x.to(gpu)).cpu()
    assert bool(((y.double() - expected.output).abs() <= expected.bound).all())


class Net(nn.Module):
    """Layers and steps of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, 1)
        self.wide, self.deep = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, padding=1)
        self.depthwise, self.narrow = nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 20, 1)
        self.slope, self.last = nn.PReLU(64), nn.Linear(212, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.wide(self.pool(self.first(x))))
        y = F.relu(self.deep(x) + x)
        z = self.narrow(F.hardswish(self.depthwise(self.mean(y)[:, :, :4, :4])))
        joined = torch.cat([y, z * 2 + 1, self.slope(self.deep(y)), y - x], 1)
        return self.last(torch.flatten(F.adaptive_avg_pool2d(joined, 1), 1)), F.pixel_shuffle(joined[:, :64], 2)


def close(a: Any, b: Any) -> bool:
    return all(torch.allclose(p.cpu(), q.cpu(), rtol=1e-4, atol=1e-5) for p, q in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def network() -> tuple[Any, Tensor, Any]:
    """Return a network, an input, and the output of the CPU program."""
    torch.manual_seed(1)
    net = Net().eval()
    net.first[1].running_mean.normal_()
    qnet = dsconv.fold_batchnorm(dsconv.quantize(net, QuantConfig.preset("default", algorithm="direct")))
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        return qnet, x, (dsconv.compile(qnet, x) if cpu.lower() is not None else qnet)(x)


def test_a_compiled_network_is_that_of_the_cpu(network: Any, gpu: str) -> None:
    qnet, x, expected = network
    with torch.inference_mode():
        qnet, x = moved(copy.deepcopy(qnet), gpu), x.to(gpu)
        fast = dsconv.compile(qnet, x)
        logits, shuffled = fast(x)
        assert same(shuffled, expected[1]) or cpu.lower() is None
        assert close((logits, shuffled), expected)  # averages are summed in another order
        assert close(fast(x[:1]), qnet(x[:1]))
        assert close(fast(x.contiguous(memory_format=torch.channels_last)), expected)
        assert same(fast(x)[0], logits)
    assert {step.backend for step in fast.plan.steps} == {"integers (cuda)", "float32 (cuda)"}
    assert not fast.plan.in_pytorch


class Sum(nn.Module):
    """Operations on an input in NCHW, which only a layer reads, and a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(16, 8, 1), nn.Linear(8 * 5 * 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.flatten(self.layer(F.relu(x) * 2 + x), 1))


def test_maps_take_an_input_in_lines_and_programs_no_images_at_all(gpu: str) -> None:
    torch.manual_seed(3)
    net = dsconv.quantize(Sum().eval(), QuantConfig.preset("w8a8", algorithm="direct"))
    x = torch.randn(2, 16, 5, 6)
    with torch.inference_mode():
        net, x = moved(net, gpu), x.to(gpu)
        fast = dsconv.compile(net, x)
        assert not fast.plan.in_pytorch
        for some in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
            assert torch.allclose(fast(some), net(some), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_have_the_bits_of_the_kernels_for_cpus(kind: str, gpu: str) -> None:
    from dsconv.backends.cuda import launch

    x = torch.cat([torch.linspace(-120, 120, 800), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    x = torch.cat([x, torch.randn(219)]).view(16, 64)
    alpha, beta = {"clamp": (-1.0, 2.5), "leaky_relu": (0.1, 0.0), "elu": (1.0, 0.0)}.get(kind, (0.0, 0.0))
    made = torch.empty_like(x, device=gpu)
    pixels = launch.Pixels(x.to(gpu), 64)
    launch.change(pixels, launch.Pixels(made, 64), 16, 16, 64, "activate", activation=kind, alpha=alpha, beta=beta)
    program = cpu.lower()
    if program is None:
        pytest.skip("needs the extension, to compare with")
    expected, ids = torch.empty_like(x), []
    for base in (1, 2):
        ids.append(program.values(base, 0, 0, (64, 4, 4), (1024, 1, 256, 64)))
    program.map(ids[0], [(0, ACTIVATIONS.index(kind), alpha, beta, -1, 0, 0)], (ids[1], -1, [], 0, 0.0, 0.0))
    program.run(1, [0, x.data_ptr(), expected.data_ptr()], 0, 1, 0)
    assert same(made, expected)


@pytest.mark.parametrize(
    ("layer", "settings", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 2), {}, "not transposed"),
        (nn.Conv3d(8, 8, 1), {}, "one and two dimensions"),
        (nn.Conv2d(8, 8, 3), {"activation_bits": None}, "stays float"),
        (nn.Conv2d(8, 8, 3), {"algorithm": "winograd"}, "algorithm='direct'"),
        (nn.Conv2d(8, 8, 6), {}, "36 taps"),
        (nn.Conv2d(8, 8, 1, groups=2), {"blocks": "flat"}, "one group"),
        (nn.Conv2d(90, 8, 1), {"block_size": 30}, "multiple of 8"),
    ],
)
def test_the_summary_says_why_a_layer_is_simulated(layer: Any, settings: Any, reason: str, gpu: str) -> None:
    made = moved(quantized(layer, settings), gpu)
    assert made.backend.name == "float simulation" and reason in (made.backend.reason or "")
    with torch.inference_mode():
        assert bool(made(torch.randn(1, layer.in_channels, *[7] * made.dims, device=gpu)).isfinite().all())


def test_no_algorithm_without_kernels_is_chosen(gpu: str) -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1)
    of_the_device = dsconv.nn.DSConv2d.from_float(layer.to(gpu), config({"algorithm": "auto"}))
    assert of_the_device.config.algorithm == "direct" and of_the_device.backend.name == "integers (cuda)"


def test_without_triton_layers_are_simulated_and_the_reason_names_the_extra(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    cuda._unusable.cache_clear()
    try:
        made = moved(quantized(nn.Conv2d(64, 8, 1), {}), gpu)
        assert "pip install 'dsconv[gpu]'" in (made.backend.reason or "")
        x = torch.randn(1, 64, 2, 2, device=gpu)
        assert made(x).shape == (1, 8, 2, 2)
        with pytest.raises(ModelError, match="dsconv"):
            dsconv.compile(nn.Sequential(made), x)
    finally:
        cuda._unusable.cache_clear()


def test_weights_that_were_packed_otherwise_are_refused(gpu: str) -> None:
    made = moved(quantized(nn.Conv2d(64, 8, 1), {}), gpu)
    weights, settings = made._kernel_weights.packed
    x, where = torch.randn(1, 64, 2, 2, device=gpu), ([1, 1], [1, 1], [0, 0], [1, 1], 1, False)
    call = torch.ops.dsconv.conv2d
    assert call(x, *weights, None, *where, *settings).shape == (1, 8, 2, 2)
    with pytest.raises(ValueError, match="weight: expected a contiguous tensor"):
        call(x, weights.weight[:, :, :32], weights.kds, None, None, *where, *settings)
    settled = (*weights, None, *where, *settings)
    for given, message in (
        ({"gain": torch.ones(8, dtype=torch.float32, device=gpu)}, "offset: expected a tensor with a gain"),
        (
            {
                "gain": torch.ones(7, dtype=torch.float32, device=gpu),
                "offset": torch.ones(8, dtype=torch.float32, device=gpu),
            },
            "gain: expected a contiguous",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, *settled, **given)
    for bias, message in (
        (torch.ones(3), r"bias: expected a contiguous tensor \(8,\)"),
        (torch.ones(8).double(), "flo"),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, *weights, bias.to(gpu), *where, *settings)
    shifted = moved(quantized(nn.Conv2d(64, 8, 1), {"weight_shift": True}), gpu)._kernel_weights.packed[0]
    with pytest.raises(ValueError, match="kds_shift: expected a contiguous tensor"):
        call(x, weights.weight, weights.kds, shifted.kds[:, :8].float(), None, *where, *settings)
    with pytest.raises(ValueError, match="kds: expected float32, or int32"):
        call(x, weights.weight, weights.kds, weights.kds.new_empty(0), None, *where, *settings)
    with pytest.raises(ValueError, match="residual: expected float32"):
        call(x, *weights, None, *where, *settings, torch.zeros(1, 8, 1, 1, device=gpu))
    with pytest.raises(ValueError, match="algorithm: expected direct"):
        call(x, *weights, None, [3, 3], [1, 1], [1, 1], [1, 1], 1, False, *settings, algorithm="winograd")


def test_tiles_fit_what_is_computed() -> None:
    from dsconv.backends.cuda.tuning import Problem

    for pixels, outputs, block, quantized_block in ((49, 64, 64, 64), (800_000, 64, 64, 128), (10_000, 128, 512, 0)):
        tiles = Problem(pixels, outputs, 1, 8, block, quantized_block).tiles()
        assert tiles and all(t.outputs >= quantized_block and max(outputs, t.outputs) % t.outputs == 0 for t in tiles)


def test_tiles_are_kept_in_a_file_and_tried_again_where_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsconv.backends.cuda import tuning

    found = {("a GPU", tuning.Problem(1, 64, 1, 1, 64, 0)): tuning.Tile(16, 64, 2, 4)}
    monkeypatch.setenv("DSCONV_CACHE", str(tmp_path / "folder"))
    monkeypatch.setattr(tuning, "_found", dict(found))
    tuning._save()
    for text, expected in ((None, found), ("[[1, 2]]", {}), ("no JSON", {})):
        if text is not None:
            (tmp_path / "folder" / "tiles.json").write_text(text)
        monkeypatch.setattr(tuning, "_found", {})
        tuning._load.cache_clear()
        tuning._load()
        assert tuning._found == expected
    (tmp_path / "folder" / "tiles.json").write_text(json.dumps([["other GPU", [1, 64, 1, 1, 64, 0], [16, 64, 4, 3]]]))
    monkeypatch.setattr(tuning, "_found", dict(found))
    tuning._save()
    assert len(json.loads((tmp_path / "folder" / "tiles.json").read_text())) == 2  # including that of another process
    monkeypatch.setenv("DSCONV_CACHE", "/proc/no/place")
    tuning._save()  # the same as a missing file
    tuning._load.cache_clear()


def test_only_the_first_run_makes_constants(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconv.backends.cuda import launch

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.first(x), (1, 0, 2, 1), value=1.5)

    torch.manual_seed(4)
    net = dsconv.quantize(Padded().eval(), QuantConfig.preset("default", algorithm="direct"))
    x, program = torch.randn(1, 3, 6, 6), cuda.lower()
    assert program is not None
    resized = torch.empty(1, 2, 2, 3, device=gpu)
    whole, result = (program.values(base, 0, 0, (3, n, n), (3 * n * n, 1, 3 * n, 3)) for base, n in ((1, 6), (2, 2)))
    places = [(0, 1, 0.25, 0.75), (4, 5, 1.0, 0.0)]
    program.interpolate(whole, places, places, 0, 0, 0, (result, -1, [], 0, 0.0, 0.0))
    with torch.inference_mode():
        net, x = moved(net, gpu), x.to(gpu)
        bases = [None, x.permute(0, 2, 3, 1).contiguous(), resized]
        fast = dsconv.compile(net, x)
        assert not fast.plan.in_pytorch
        expected = net(x)
        assert same(fast(x), expected)
        program.run(1, bases, 0, 1, None)
        corner = x[..., :2, :2] * torch.tensor([0.25, 0.75], device=gpu) * torch.tensor([[0.25], [0.75]], device=gpu)
        assert close([resized[0, 0, 0]], [corner.sum((2, 3))[0]])
        launch._windows.cache_clear()
        # Copies to the GPU are not possible while a graph is captured.
        given, make = list[Any](), torch.tensor
        monkeypatch.setattr(torch, "tensor", lambda data, **named: given.append(data) or make(data, **named))
        assert same(fast(x), expected)
        program.run(1, bases, 0, 1, None)
    assert given == []


def test_places_beyond_32_bits_are_counted_in_64(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconv.backends.cuda import launch, tuning
    from dsconv.backends.cuda.layouts import Form, Rows

    wide = []
    monkeypatch.setattr(tuning, "start", lambda *arguments, WIDE, **constants: wide.append(WIDE))
    monkeypatch.setattr(
        tuning, "run", lambda kernel, problem, arguments, constants, live: wide.append(constants["WIDE"])
    )
    x, many = torch.empty(64, device=gpu), (1 << 31) // 64
    rows = {n: Rows(Form(64, 64, 1, 8, "adaptive", False), n, x, x, x) for n in (4, many - 1, many)}
    for image in (1 << 28, 1 << 30):  # four images, far apart
        launch.quantize(x, (image, 1, 64, 64), (64, 1, 1), launch.Target(rows[4]))
    pixels, post, weights = launch.Pixels(x, 64), launch.PostOps(), launch.Weights(x, x, None, 4)
    for n in (many - 1, many):  # the output is larger than the input
        sizes = Sizes(1, 64, 1, n, 64, 1, n, *[1] * 4, 0, 0, 1, 1, 64, 1, True)
        launch.depthwise(pixels, weights, sizes, n, post, None, launch.Target(rows[n]))
        launch.pool(pixels, (64, 1, n), (1, n), (1, 1, 1, 1, 0, 0, 1, 1), None, n, post, None, launch.Target(rows[n]))
        launch.convolve(rows[4], weights, sizes, n, post, None, launch.Target(rows[n]))
    assert wide == [False, True] + [False] * 3 + [True] * 3


class OfGpu(Tensor):
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def test_sizes_used_last_are_kept_as_graphs_and_what_cannot_be_captured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconv.backends.cuda.graphs import Graphs

    cuda_of_torch, runs = MagicMock(), []
    cuda_of_torch.is_current_stream_capturing.return_value = False
    monkeypatch.setattr(torch, "cuda", cuda_of_torch)

    def run(xs: Sequence[Tensor]) -> list[Any]:
        (x,) = xs
        runs.append(len(x))
        return [x + 1, 7]

    graphs = Graphs(run, alone=True)
    sizes = [torch.zeros(n, 2).as_subclass(OfGpu) for n in range(12)]
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 1):
        assert graphs([sizes[n]])[1] == 7
    assert runs == [n for n in range(1, 10) for _ in range(4)]  # each is captured once
    graphs([sizes[2]])
    assert runs[36:] == [2] * 4  # it was the least recently used of 9
    assert same(graphs([sizes[0]])[0], torch.zeros(0, 2, dtype=torch.float32))  # an empty batch has no graph
    runs.clear()
    cuda_of_torch.graph.side_effect = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.warns(UserWarning, match=r"cannot be captured as a CUDA graph for \(11, 2\).*stream is capturing$"):
        assert same(graphs([sizes[11]])[0], torch.ones(11, 2, dtype=torch.float32))
    assert same(graphs([sizes[11]])[0], torch.ones(11, 2, dtype=torch.float32))
    assert runs == [11] * 5  # the capture is not tried again


def test_programs_leave_memory_to_pytorch(network: Any, gpu: str) -> None:
    qnet, x, _ = network
    with torch.inference_mode():
        fast = dsconv.compile(moved(copy.deepcopy(qnet), gpu), x.to(gpu))
        fast(x.to(gpu))
        # A graph has fixed addresses: no other run may use its memory, and a larger batch must not free it.
        assert not fast.program_for(x.to(gpu)).program._spare


def test_other_threads_compute_while_one_compiles_and_tries() -> None:
    from dsconv.backends.cuda import tuning

    launched = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **constants: launched.append(grid)

        def warmup(self, *arguments: Any, **constants: Any) -> None:
            pass

    with tuning.compiling(), tuning.trying():
        tuning.start(Kernel(), (1,))
        other = threading.Thread(target=tuning.start, args=(Kernel(), (2,)))
        other.start()
        other.join()
    assert launched == [(2,)]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_to_integer_tensor_instructions_and_spill_nothing() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    made = subprocess.run(
        [sys.executable, SUPPORT / "cuda_compiles.py"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert made.returncode == 0, made.stderr[-2000:]
    rows = [json.loads(line) for line in made.stdout.splitlines()]
    assert len(rows) == 10
    large = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for row in rows:
        instruction = large.get(row["capability"], "mma.sync") if row["size"] == "large" else "mma.sync"
        if row["capability"] == 100 and triton.__version__.startswith("3.6."):
            instruction = "mma.sync"  # that version has no other integer instruction there
        assert row["instructions"] == [instruction], row
        assert (row["integers"], row["stack"]) == (True, 0), row


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_networks_are_replayed_compiled_by_pytorch_and_exported() -> None:
    torch.manual_seed(2)
    qnet = dsconv.quantize(nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 1)).eval(), "w8a8").cuda()
    x = torch.randn(4, 64, 9, 9, device="cuda")
    with torch.inference_mode():
        expected = qnet(x)
        fast = dsconv.compile(qnet, x)
        larger = torch.randn(40, 64, 9, 9, device="cuda")
        for some in (x, x, x[:3], larger, x, x.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(fast(some), qnet(some))
        first, second = fast(x), fast(x + 1)
        assert torch.equal(first, expected) and not torch.equal(first, second)  # the caller owns the outputs
        assert torch.equal(torch.compile(qnet)(x), expected)
        assert torch.equal(torch.export.export(qnet, (x,)).module()(x), expected)
    with pytest.raises(ValueError, match="expected float32 on cuda"):
        fast(x.cpu())
