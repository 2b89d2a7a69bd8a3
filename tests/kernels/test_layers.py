"""The layers of dsconv.nn, executed by the integer kernels."""

import copy
import gc
import io
import pickle
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dsconv
from dsconv import nn, ops
from dsconv.config import LayerConfig
from dsconv.conversion import quantize
from dsconv.layers import layer as layer_module
from dsconv.numerics import (
    Reference,
    dequantize_weight,
    fake_quantize_activation,
    quantize_activation,
    quantize_winograd_input,
    reference_conv,
    reference_winograd,
    sqnr_db,
    winograd_input,
    winograd_weight,
)
from dsconv.ops import native, packing, patches

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

DIRECT = dsconv.QuantConfig.preset("default", algorithm="direct")

TAP = LayerConfig(block_size=16)
SHIFT = LayerConfig(block_size=16, activation_bits=8, weight_shift=True, kds_dtype="float16")
FLAT = LayerConfig(block_size=16, blocks="flat", weight_bits=8, activation_bits=8)
CONFIGS = [TAP, SHIFT, FLAT]


def conv(config: LayerConfig = TAP, **options: Any) -> nn.DSConv2d:
    torch.manual_seed(0)
    layer = tnn.Conv2d(**{"in_channels": 40, "out_channels": 12, "kernel_size": 3} | options)
    return nn.DSConv2d.from_float(layer.eval(), config)


def linear(config: LayerConfig = TAP) -> nn.DSLinear:
    torch.manual_seed(0)
    return nn.DSLinear.from_float(tnn.Linear(40, 12).eval(), config)


def image(batch: int = 2, channels: int = 40) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, 9, 8)


@torch.inference_mode()
def run(model: tnn.Module, *inputs: Tensor) -> Tensor:
    y = model(*inputs)
    assert isinstance(y, Tensor)
    return y


def run_simulated(model: tnn.Module, *inputs: Tensor) -> Tensor:
    with ops.simulated():
        return run(model, *inputs)


def assert_near(a: Tensor, b: Tensor) -> None:
    """Check that integers and simulation of one layer agree within the tolerance."""
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


class Calls(TorchDispatchMode):
    """Names of the kernels' operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dsconv":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def calls(model: tnn.Module, x: Tensor) -> list[str]:
    with Calls() as made:
        model(x)
    return made.names


def graph_calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("dsconv.")]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("where", [{}, {"stride": 2, "padding": (1, 2), "groups": 4, "bias": False}, {"dilation": 2}])
def test_convolution_returns_what_the_operator_returns(config: LayerConfig, where: dict[str, Any]) -> None:
    layer, x = conv(config, **where), image()
    with torch.inference_mode():
        assert calls(layer, x) == ["conv2d"]
        expected = torch.ops.dsconv.conv2d(
            x,
            *packing.pack(layer.vqk, layer.kds, layer.kds_shift, layer.config, layer.groups),
            layer.bias,
            *(list(value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)),
            layer.groups,
            config.blocks == "flat",
            12,
            config.weight_bits,
            config.activation_bits,
            config.activation_sign,
            packing.kernel_block_size(layer.vqk.shape, config),
        )
        assert torch.equal(layer(x), expected)
    assert_near(expected, run_simulated(layer, x))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 2, 40), (0, 40), (2, 0, 40)])
def test_linear_of_any_leading_shape_returns_what_the_operator_returns(
    config: LayerConfig, shape: tuple[int, ...]
) -> None:
    layer, x = linear(config), torch.randn(shape)
    with torch.inference_mode():
        assert calls(layer, x) == ["linear"]
        packed = packing.pack(layer.vqk, layer.kds, layer.kds_shift, layer.config, 1)
        settings = (12, config.weight_bits, config.activation_bits, config.activation_sign, 16)
        expected = torch.ops.dsconv.linear(x.view(-1, 40), *packed, layer.bias, *settings)
        y = layer(x)
    assert torch.equal(y, expected.view(*shape[:-1], 12))
    if y.numel():
        assert_near(y, run_simulated(layer, x))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("padding", [0, 2, "same"])
def test_one_dimension_is_a_row_of_two(config: LayerConfig, padding: Any) -> None:
    torch.manual_seed(0)
    float_layer = tnn.Conv1d(40, 12, 4, padding=padding, groups=2, dilation=2)
    layer, x = nn.DSConv1d.from_float(float_layer, config), image()[:, :, 0]
    with torch.inference_mode():
        assert calls(layer, x) == ["conv2d"]
    row = nn.DSConv2d(
        40, 12, (1, 4), padding=(0, layer.zero_padding[0]), groups=2, dilation=(1, 2), config=layer.config
    )
    state = {name: value.view(getattr(row, name).shape) for name, value in layer.state_dict().items()}
    row.load_state_dict(state)
    assert torch.equal(run(layer, x), run(row, layer.padded(x)[:, :, None])[:, :, 0])
    assert torch.equal(run(layer, x[0]), run(layer, x)[0])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [3, (4, 3)])
def test_padding_of_every_mode_and_on_one_side(config: LayerConfig, mode: str, kernel: Any) -> None:
    layer, x = conv(config, kernel_size=kernel, padding="same", padding_mode=mode), image()
    with torch.inference_mode():
        assert calls(layer, x) == ["conv2d"]
    assert run(layer, x).shape == (2, 12, 9, 8)
    assert_near(run(layer, x), run_simulated(layer, x))


@pytest.mark.parametrize("size", [(4, 0), (0, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_without_pixels_is_its_border(size: tuple[int, int], layout: torch.memory_format) -> None:
    layer, x = conv(kernel_size=1, padding=1), torch.zeros(2, 40, *size).contiguous(memory_format=layout)
    with torch.inference_mode():
        y = layer(x)
    assert layer.bias is not None and torch.equal(y, layer.bias[:, None, None].expand(2, 12, size[0] + 2, size[1] + 2))


def test_an_image_without_a_batch_and_a_batch_of_none() -> None:
    layer, x = conv(), image()
    assert torch.equal(run(layer, x[0]), run(layer, x)[0])
    assert run(layer, x[:0]).shape == (0, 12, 7, 6)


def test_channels_last_gives_the_same_bits() -> None:
    layer, x = conv(SHIFT, padding=1), image()
    assert torch.equal(run(layer, x.to(memory_format=torch.channels_last)), run(layer, x))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_long_line_gives_what_its_pieces_give(config: LayerConfig, stride: int, layout: torch.memory_format) -> None:
    layer, x = conv(config, kernel_size=1, stride=stride), torch.randn(2, 40, 3, 1201)
    with torch.inference_mode():
        pieces = [layer(piece.contiguous()) for piece in x.split(100, dim=3)]
        assert torch.equal(layer(x.to(memory_format=layout)), torch.cat(pieces, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [conv, linear])
def test_halves_go_through_float32(make: Any, dtype: torch.dtype) -> None:
    layer = make(SHIFT)
    x = (image() if make is conv else torch.randn(3, 40)).to(dtype)
    half = copy.deepcopy(layer).to(dtype)
    with torch.inference_mode():
        assert len(calls(half, x)) == 1
    assert half.bias.dtype == run(half, x).dtype == dtype
    layer.bias.data = half.bias.data.float()
    assert torch.equal(run(half, x), run(layer, x.float()).to(dtype))


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        (conv(LayerConfig(activation_bits=None)), image(), "its input stays float"),
        (conv(LayerConfig(block_size=12)), image(), "its blocks of 12 are not a multiple of 8 of at most 512"),
    ],
)
def test_what_the_kernels_do_not_cover_is_simulated_and_says_why(layer: nn.DSLayer, x: Tensor, reason: str) -> None:
    assert layer.backend == ("float simulation", reason)
    with torch.inference_mode():
        assert calls(layer, x) == []
        assert torch.equal(layer(x), run_simulated(layer, x))


def test_double_precision_and_other_devices_are_simulated() -> None:
    layer, x = conv(SHIFT), image()
    with torch.inference_mode():
        assert calls(layer.double(), x.double()) == []
    meta = conv().to("meta")
    assert meta.backend.reason == "it is on the device meta"
    assert meta._kernel_weights is None
    assert run(meta, x.to("meta")).is_meta


def test_without_the_extension_layers_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    layer, x = conv(), image()
    assert layer.backend == ("float simulation", "the extension dsconv._C is not built")
    assert torch.equal(run(layer, x), run_simulated(layer, x))


def test_every_instruction_set_is_named_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantize(dsconv.demo.load_network(), {"weight_rule": "paper"}), dsconv.demo.load_digits()[0][:8]
    expected, module = run(model, x), native.extension()
    try:
        for name in module.isa_with_kernels():
            monkeypatch.setenv("DSCONV_MAX_ISA", name)
            native.isa.cache_clear()
            assert dsconv.summary(model).backends == (f"integers ({name})",)
            for execute in (lambda: run(model, x), lambda: dsconv.compile(model, x)(x)):
                before = module.runs()
                assert torch.equal(execute(), expected)
                assert {other for other, count in module.runs().items() if count > before[other]} == {name}
    finally:
        native.isa.cache_clear()


def test_a_file_is_said_to_be_executed_as_its_model_is(tmp_path: Path) -> None:
    model = tnn.Sequential(
        tnn.Conv2d(3, 16, 3), tnn.Conv2d(16, 16, 3), tnn.ConvTranspose2d(16, 8, 2), tnn.Flatten(), tnn.Linear(8, 8)
    )
    quantized = quantize(model, dsconv.QuantConfig.preset("paper", linear=None))
    _, described = dsconv.io.describe(dsconv.save(quantized, tmp_path / "net.safetensors"))
    expected = dsconv.summary(quantized).layers
    assert [row.backend for row in expected].count("float simulation") == 1
    assert [(row.backend, row.backend_reason) for row in described.layers] == [
        (row.backend, row.backend_reason) for row in expected
    ]
    loaded = dsconv.load(tmp_path / "net.safetensors", model)
    x = torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        assert calls(loaded[1], torch.randn(1, 16, 5, 5)) == ["conv2d"]
        assert torch.equal(loaded[:3](x), quantized[:3](x))


# Distance of a layer from the reference


def bounds(layer: nn.DSConv2d | nn.DSLinear, x: Tensor) -> tuple[Reference, Tensor]:
    """Return the exact output with the error bound of the kernels, and the bound of the simulation."""
    config, vqk, kds, shift = layer.config, layer.vqk, layer.kds, layer.kds_shift
    where: dict[str, Any] = {}
    if isinstance(layer, nn.DSConv2d):
        where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        if config.blocks == "flat":
            x, where = patches(x, vqk.shape[2:], *where.values()), {}
            vqk, kds = vqk.flatten(1)[..., None, None], kds[..., None, None]
            shift = None if shift is None else shift[..., None, None]
        where["groups"] = layer.groups
    size, groups = config.block_size, where.get("groups", 1)
    if config.algorithm == "winograd":
        assert isinstance(layer.padding, tuple)
        transformed = winograd_weight(dequantize_weight(vqk, kds.float(), size, shift), size)
        tiles = quantize_winograd_input(winograd_input(x, layer.padding), size)
        sides = tuple(n + 2 * p - 2 for n, p in zip(x.shape[2:], layer.padding, strict=True))
        bias = None if layer.bias is None else layer.bias.detach()
        exact = reference_winograd(*tiles, transformed, size, sides, bias=bias)
        return exact, 4 * exact.bound
    quantized = (x, config.activation_bits, size)
    m, e = quantize_activation(*quantized, sign=config.activation_sign, groups=groups)
    bias = None if layer.bias is None else layer.bias.detach()
    exact = reference_conv(m, e, vqk, kds, size, kds_shift=shift, bias=bias, **where)
    # The simulation rounds each weight and adds the products one by one.
    weight = dequantize_weight(vqk.float().abs(), kds.abs(), size, None if shift is None else shift.abs()).double()
    x_q = fake_quantize_activation(*quantized, sign=config.activation_sign, groups=groups).abs().double()
    operator = F.conv2d if where else F.linear
    magnitude = operator(x_q, weight, None if bias is None else bias.abs().double(), **where)
    return exact, (weight[0].numel() + 4) * 2.0**-24 * magnitude


def assert_every_layer_within_its_bound(model: tnn.Module, x: Tensor) -> None:
    inputs: dict[nn.DSLayer, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, nn.DSLayer) and not module.backend.reason]
    hooks = [layer.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]})) for layer in layers]
    run(model, x)
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(layers) > 5
    for layer, value in inputs.items():
        exact, bound_of_simulation = bounds(layer, value)
        assert ((run(layer, value) - exact.output).abs() <= exact.bound).all()
        assert ((run_simulated(layer, value) - exact.output).abs() <= bound_of_simulation).all()


def assert_nearly_the_same_logits(model: tnn.Module, x: Tensor) -> None:
    """Compare logits with a tolerance: a different last bit can change the rounding of a mantissa in the next layer."""
    y, simulated = run(model, x), run_simulated(model, x)
    assert torch.equal(y.argmax(1), simulated.argmax(1))
    # Winograd has more mantissas, each from four pixels.
    least = 35 if any(layer.algorithm == "winograd" for layer in dsconv.summary(model).layers) else 50
    assert sqnr_db(float(simulated.square().sum()), float((simulated - y).square().sum())) > least


@pytest.mark.parametrize("preset", ["default", "paper", "w4a4", "w8a8"])
def test_every_layer_of_a_network_stays_within_the_bound(preset: str) -> None:
    model, x = quantize(dsconv.demo.load_network(), preset), dsconv.demo.load_digits()[0]
    assert_every_layer_within_its_bound(model, x[:4])
    assert_nearly_the_same_logits(model, x)


@pytest.mark.parametrize(("name", "images"), [("cifar_resnet20", 16), ("squeezenet1_1", 4)])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_real_network_returns_in_integers_what_it_returns_simulated(
    name: str, images: int, preset: str, nets: ModuleType
) -> None:
    model = quantize(nets.load(name), preset)
    pictures, _ = nets.images(nets.NETS[name][1])
    x = nets.preprocess(name, pictures[:images])
    assert_nearly_the_same_logits(model, x)
    if name == "cifar_resnet20":
        assert_every_layer_within_its_bound(model, x[:1])


# Gradients


@pytest.fixture
def warn_again() -> None:
    layer_module._warn_of_gradients.cache_clear()


@pytest.mark.usefixtures("warn_again")
def test_a_gradient_that_is_asked_for_is_simulated_with_one_warning() -> None:
    layer, x = conv(SHIFT), image()
    with pytest.warns(UserWarning, match=r"Gradients are enabled.*torch.inference_mode\(\)"):
        assert calls(layer, x) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = conv(TAP)(x)
    assert torch.equal(y, run_simulated(conv(TAP), x))
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.bias)
    assert torch.equal(gradient, torch.full((12,), 2.0 * 7 * 6))


@pytest.mark.usefixtures("warn_again")
def test_training_is_simulated_without_a_warning() -> None:
    layer, x = conv().train(), image().requires_grad_()
    layer.bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.any()


def test_where_nothing_requires_a_gradient_none_is_asked_for() -> None:
    layer, x = conv(), image()
    layer.bias.requires_grad_(False)
    assert calls(layer, x) == calls(conv(bias=False), x) == ["conv2d"]
    with torch.no_grad():
        assert calls(conv(), image().requires_grad_()) == ["conv2d"]


def test_simulated_holds_within_its_block_and_its_thread() -> None:
    layer, x = conv(), image()
    elsewhere: list[list[str]] = []

    @torch.inference_mode()
    def in_thread() -> None:
        elsewhere.append(calls(layer, x))

    with torch.inference_mode():
        with ops.simulated():
            with pytest.raises(KeyError), ops.simulated():
                raise KeyError
            assert calls(layer, x) == []
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join()
        assert calls(layer, x) == ["conv2d"]
    assert elsewhere == [["conv2d"]]


# The packed weights follow the layer


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign: bool) -> None:
    model, other = tnn.Sequential(conv(SHIFT)), tnn.Sequential(nn.DSConv2d(40, 12, 3, config=SHIFT))
    x = image()
    assert not torch.equal(run(model, x), run(other, x))
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(run(model, x), run(other, x))
    assert set(model.state_dict()) == {"0.vqk", "0.kds", "0.kds_shift", "0.bias"}


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_changed_in_place_or_replaced_is_used(inference: bool) -> None:
    layer, x = conv(SHIFT, bias=False), image()
    y = run(layer, x)
    with torch.inference_mode(inference), torch.no_grad():
        layer.kds.mul_(2)
        layer.kds_shift.mul_(2)
    assert torch.equal(run(layer, x), 2 * y)
    with torch.inference_mode(inference), torch.no_grad():
        layer.vqk[3] = 0
        layer.kds_shift[3] = 0
    assert not run(layer, x)[:, 3].any() and run(layer, x)[:, 4].any()
    layer.kds, layer.kds_shift = layer.kds / 2, layer.kds_shift / 2
    assert torch.equal(run(layer, x)[:, 4:], y[:, 4:])
    layer.config = layer.config.model_copy(update={"activation_bits": 2})
    assert not torch.equal(run(layer, x)[:, 4:], y[:, 4:])
    assert_near(run(layer, x), run_simulated(layer, x))
    layer.quantize_(torch.ones_like(layer.weight))
    assert_near(run(layer, x), run_simulated(layer, x))


def test_packed_weights_are_kept_while_nothing_changes() -> None:
    layer, x = conv(SHIFT), image()
    before = layer._kernel_weights
    assert before is not None
    run(layer, x)
    layer.half().float().to("cpu")
    run(layer, x)
    assert layer._kernel_weights is before


def test_a_copy_and_a_pickle_have_packed_weights_of_their_own() -> None:
    layer, x = conv(SHIFT), image()
    y = run(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    assert file.tell() < layer.vqk.nbytes + layer.kds.nbytes + layer.kds_shift.nbytes + 12_000
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for made in copies:
        assert made._kernel_weights is not None
        assert torch.equal(run(made, x), y)
        with torch.no_grad():
            made.vqk.zero_()
    assert torch.equal(run(layer, x), y)


def test_a_layer_that_comes_back_from_another_device_is_packed_again() -> None:
    layer, x = conv(SHIFT), image()
    state, y = copy.deepcopy(layer.state_dict()), run(layer, x)
    layer.to("meta")
    assert layer._kernel_weights is None
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(run(layer, x), y)


def test_a_layer_made_in_inference_mode_is_used_outside_it() -> None:
    with torch.inference_mode():
        layer = conv(SHIFT, bias=False)
    x = image()
    assert calls(layer, x) == ["conv2d"]
    assert torch.equal(layer(x), run(layer, x))
    assert torch.equal(run(layer, x), run(conv(SHIFT, bias=False), x))


def test_a_shared_layer_has_one_copy() -> None:
    shared = tnn.Conv2d(24, 24, 3, padding=1)
    model, x = quantize(tnn.Sequential(shared, tnn.ReLU(), shared).eval(), {"first_layer": None}), image(2, 24)
    assert model[0] is model[2]
    with torch.inference_mode():
        assert calls(model, x) == ["conv2d", "conv2d"]


def test_fake_tensors_pass_through() -> None:
    layer, mode, x = conv(), FakeTensorMode(), image()
    fakes = {name: mode.from_tensor(value) for name, value in layer.state_dict().items()}
    with mode:
        assert torch.func.functional_call(layer, fakes, torch.empty(2, 40, 9, 8)).shape == (2, 12, 7, 6)
    with torch.inference_mode():
        assert calls(layer, x) == ["conv2d"]


# Compilers


def network() -> tnn.Module:
    """Return a new network that has not run yet."""
    torch.manual_seed(0)
    model = tnn.Sequential(
        tnn.Conv2d(3, 20, 3, padding=1),
        tnn.BatchNorm2d(20),
        tnn.ReLU(),
        tnn.Conv2d(20, 8, (3, 2), padding="same"),
        tnn.Flatten(2),
        tnn.Conv1d(8, 6, 3),
        tnn.AdaptiveAvgPool1d(1),
        tnn.Flatten(),
        tnn.Linear(6, 5),
    ).eval()
    return quantize(model)


OPERATORS = ["conv2d", "conv2d", "conv2d", "linear"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_network_holds_the_operators_and_returns_the_same_bits() -> None:
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph_calls(module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    x = torch.randn(3, 3, 9, 9)
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(run(compiled, x), run(network(), x))
    assert graphs == [OPERATORS]
    assert torch.equal(run_simulated(compiled, x), run_simulated(network(), x))
    assert graphs == [OPERATORS, []]
    y = compiled(x.requires_grad_())
    assert torch.autograd.grad(y.sum(), x)[0].any()
    state = copy.deepcopy(model.state_dict())
    state["3.kds"] *= 2
    model.load_state_dict(state)
    other = network()
    other.load_state_dict(state)
    assert torch.equal(run(compiled, x.detach()), run(other, x.detach()))
    with torch.no_grad():
        for each in (model[3], other[3]):
            each.kds.mul_(2)
    model[3].pack_()
    assert torch.equal(run(compiled, x.detach()), run(other, x.detach()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs g++")
@pytest.mark.usefixtures("fresh_compiler")
def test_network_compiled_to_machine_code_is_right_in_integers_and_simulated() -> None:
    # The last layer has blocks of 64 and 32 values.
    model, x = quantize(dsconv.demo.load_network(), DIRECT), dsconv.demo.load_digits()[0][:32]
    compiled = torch.compile(quantize(dsconv.demo.load_network(), DIRECT), fullgraph=True)
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(run_simulated(compiled, x), run_simulated(model, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_network_holds_the_operators_and_takes_any_batch(strict: bool) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(3, 3, 9, 9)
    program = torch.export.export(network(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert graph_calls(program.graph) == OPERATORS
    # PyTorch takes every parameter, including the empty ones that replace float weights.
    held = {name for name, value in program.state_dict.items() if value.numel() or not name.endswith("weight_like")}
    assert held == set(network().state_dict())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for module in (program.module(), torch.export.load(file).module()):
        for n in (1, 3, 7):
            x = torch.randn(n, 3, 9, 9)
            assert torch.equal(run(module, x), run(network(), x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_layer_in_training_or_simulated_holds_no_operators(strict: bool) -> None:
    x = torch.randn(3, 3, 9, 9)
    assert graph_calls(torch.export.export(network().train(), (x,), strict=strict).graph) == []
    with ops.simulated():
        assert graph_calls(torch.export.export(network(), (x,), strict=strict).graph) == []


# Threads and memory


@pytest.mark.parametrize("packed", [False, True])
def test_threads_that_call_one_module_at_once_get_the_same_bits(packed: bool) -> None:
    model, x = quantize(dsconv.demo.load_network()), dsconv.demo.load_digits()[0][:16]
    expected = run(quantize(dsconv.demo.load_network()), x)

    def work(start: threading.Barrier, outputs: list[Tensor]) -> None:
        start.wait()
        outputs.extend(run(model, x) for _ in range(3))

    for _ in range(5):
        if not packed:
            for module in model.modules():
                if isinstance(module, nn.DSLayer):
                    module._kernel_weights = None
        start, outputs = threading.Barrier(8), []
        threads = [threading.Thread(target=work, args=(start, outputs)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outputs) == 24 and all(torch.equal(y, expected) for y in outputs)


def resident_kilobytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("/proc/self/status is Linux's own")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS:"))


def test_ten_thousand_calls_take_no_memory() -> None:
    layer, x = conv(SHIFT), image()
    for _ in range(500):
        run(layer, x)
    gc.collect()
    before = resident_kilobytes()
    for _ in range(10_000):
        run(layer, x)
    gc.collect()
    # The output of one call is 4 kB: a leak of all would be 40 MB.
    assert resident_kilobytes() - before < 4_000
