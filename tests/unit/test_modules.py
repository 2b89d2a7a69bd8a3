"""Quantized layers against the float layer with the dequantized weights, in every geometry of PyTorch.

If the integer kernels cover a layer, they and the float simulation are both checked.
"""

import copy
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv import nn, ops
from dsconv.config import LayerConfig, QuantConfig
from dsconv.numerics import fake_quantize_activation, quantize_weight, weights

FLOAT = {
    nn.DSConv1d: tnn.Conv1d,
    nn.DSConv2d: tnn.Conv2d,
    nn.DSConv3d: tnn.Conv3d,
    nn.DSConvTranspose1d: tnn.ConvTranspose1d,
    nn.DSConvTranspose2d: tnn.ConvTranspose2d,
    nn.DSConvTranspose3d: tnn.ConvTranspose3d,
    nn.DSLinear: tnn.Linear,
}
CONV, TRANSPOSED = list(FLOAT)[:3], list(FLOAT)[3:6]
W4 = LayerConfig(block_size=8)
W4_ONLY = LayerConfig(block_size=8, activation_bits=None)
SHIFT = LayerConfig(block_size=8, weight_shift=True, weight_rule="balanced", kds_dtype="float16")
FLAT = LayerConfig(block_size=8, blocks="flat", weight_bits=8, activation_bits=8)


def make(quantized: type[nn.DSLayer], config: LayerConfig | None = W4, **options: Any) -> tuple[tnn.Module, nn.DSLayer]:
    torch.manual_seed(0)
    if quantized is nn.DSLinear:
        layer = tnn.Linear(20, 6, **options)
    else:
        layer = FLOAT[quantized](**{"in_channels": 20, "out_channels": 6, "kernel_size": 3} | options)
    return layer, quantized.from_float(layer, config)


def input_for(layer: nn.DSLayer, batch: int = 2, size: int = 9) -> Tensor:
    torch.manual_seed(1)
    if isinstance(layer, nn.DSLinear):
        return torch.randn(batch, layer.in_features)
    return torch.randn(batch, layer.in_channels, *range(size, size - layer.dims, -1))


def in_float(layer: tnn.Module, quantized: nn.DSLayer) -> tnn.Module:
    """Return the float layer with the dequantized weights of the quantized one."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        assert quantized.dequantized_weight().shape == twin.weight.shape
        twin.weight.copy_(quantized.dequantized_weight())
    return twin


@torch.no_grad()
def assert_same_function(layer: tnn.Module, quantized: nn.DSLayer, x: Tensor, *args: Any) -> None:
    twin, config = in_float(layer, quantized), quantized.config
    if config.activation_bits is not None and config.blocks == "tap":
        rows = x if x.dim() > 1 else x[None]
        batched = rows if isinstance(quantized, nn.DSLinear) or x.dim() == quantized.dims + 2 else x[None]
        groups = getattr(layer, "groups", 1)
        x_q = fake_quantize_activation(
            batched, config.activation_bits, config.block_size, sign=config.activation_sign, groups=groups
        ).view(x.shape)
    else:
        x_q = x
    assert quantized(x, *args).shape == twin(x, *args).shape
    assert_both_close(quantized, x, twin(x_q, *args), *args)


@torch.no_grad()
def assert_both_close(quantized: nn.DSLayer, x: Tensor, expected: Tensor, *args: Any) -> None:
    torch.testing.assert_close(quantized(x, *args), expected, rtol=1e-4, atol=1e-5)
    with ops.simulated():
        torch.testing.assert_close(quantized(x, *args), expected, rtol=1e-4, atol=1e-5)


options = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "in_channels": st.sampled_from([4, 12]),
        "out_channels": st.sampled_from([4, 8]),
    }
)
paddings = st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"]))
modes = st.sampled_from(["zeros", "reflect", "replicate", "circular"])


@settings(max_examples=80)
@given(st.sampled_from(CONV), options, paddings, modes, st.sampled_from([W4, W4_ONLY, SHIFT]), st.booleans())
def test_convolution_of_any_geometry(
    quantized: type[nn.DSLayer], option: dict, padding: Any, mode: str, config: LayerConfig, batched: bool
) -> None:
    option = option | {"padding": padding, "padding_mode": mode}
    if padding == "same":
        option["stride"] = 1
    layer, made = make(quantized, config, **option)
    x = input_for(made, size=8)
    assert_same_function(layer, made, x if batched else x[0])


@settings(max_examples=80)
@given(
    st.sampled_from(TRANSPOSED), options, st.integers(0, 2), st.integers(0, 2), st.sampled_from([W4, W4_ONLY, SHIFT])
)
def test_transposed_convolution_of_any_geometry(
    quantized: type[nn.DSLayer], option: dict, padding: int, output_padding: int, config: LayerConfig
) -> None:
    # An empty output is already an error in PyTorch.
    assume(option["kernel_size"] > 1 or option["stride"] > 1 or padding < 2)
    output_padding = min(output_padding, max(option["stride"], option["dilation"]) - 1)
    layer, made = make(quantized, config, **option, padding=padding, output_padding=output_padding)
    x = input_for(made, size=6)
    assert_same_function(layer, made, x)
    assert_same_function(layer, made, x[0])


@pytest.mark.parametrize("quantized", TRANSPOSED)
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_output_size_of_transposed_convolutions(quantized: type[nn.DSLayer], extra: int) -> None:
    layer, made = make(quantized, W4, stride=3, padding=1)
    x = input_for(made, size=5)
    size = [n + extra for n in layer(x).shape[2:]]
    assert_same_function(layer, made, x, size)
    assert_same_function(layer, made, x, [2, 6, *size])
    with pytest.raises(ValueError, match="output_size: expected"):
        made(x, [n + 3 for n in layer(x).shape[2:]])


@pytest.mark.parametrize(
    ("quantized", "geometry"),
    [
        (nn.DSConv2d, {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        (nn.DSConv2d, {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1), "padding_mode": "reflect"}),
        (nn.DSConv3d, {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "padding": (0, 1, 2)}),
        (nn.DSConv1d, {"kernel_size": (4,), "padding": "same"}),
        (nn.DSConvTranspose2d, {"kernel_size": (1, 3), "stride": (2, 3), "padding": (0, 2), "output_padding": (1, 2)}),
    ],
)
@pytest.mark.parametrize("config", [W4, W4_ONLY])
def test_geometry_that_differs_by_dimension(quantized: Any, geometry: dict, config: LayerConfig) -> None:
    layer, made = make(quantized, config, **geometry)
    assert_same_function(layer, made, input_for(made))


@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (2, 1, 2, 20), (0, 20)])
@pytest.mark.parametrize("config", [W4, W4_ONLY, SHIFT, FLAT])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_leading_shape(shape: tuple[int, ...], config: LayerConfig, bias: bool) -> None:
    layer, made = make(nn.DSLinear, config, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        x_q = x
        if config.activation_bits is not None:
            x_q = fake_quantize_activation(x.view(-1, 20), config.activation_bits, 8).view(shape)
        assert_both_close(made, x, in_float(layer, made)(x_q))


@settings(max_examples=50)
@given(st.sampled_from(CONV), options, paddings, modes)
def test_flat_blocks_quantize_the_values_that_one_output_reads(
    quantized: type[nn.DSLayer], option: dict, padding: Any, mode: str
) -> None:
    option = option | {"padding": padding, "padding_mode": mode}
    if padding == "same":
        option["stride"] = 1
    layer, made = make(quantized, FLAT, **option)
    rows = layer.weight.detach().flatten(1)
    vqk, kds = quantize_weight(rows, 8, 8)
    assert torch.equal(made.vqk.flatten(1), vqk) and torch.equal(made.kds, kds)
    x = input_for(made, size=8)
    with torch.no_grad():
        twin = in_float(layer, made)
        exact, y = twin(x), made(x)
        # Inputs of every output: the columns of a convolution whose filters select one value each.
        each = rows.shape[1]
        picker = FLOAT[quantized](**option | {"out_channels": layer.groups * each, "bias": False})
        picker.weight.copy_(torch.eye(each).repeat(layer.groups, 1).view_as(picker.weight))
        columns = fake_quantize_activation(picker(x), 8, 8, groups=layer.groups)
        grouped = columns.unflatten(1, (layer.groups, each))
        weight = made.dequantized_weight().flatten(1).unflatten(0, (layer.groups, -1))
        expected = torch.einsum("ngc...,goc->ngo...", grouped, weight).flatten(1, 2)
        if layer.bias is not None:
            expected = expected + layer.bias.view(-1, *(1,) * made.dims)
    assert y.shape == exact.shape
    assert_both_close(made, x, expected)


@pytest.mark.parametrize("quantized", FLOAT)
@pytest.mark.parametrize("config", [W4, SHIFT, W4_ONLY])
def test_state_dict_and_deep_copy_keep_every_bit(quantized: type[nn.DSLayer], config: LayerConfig) -> None:
    layer, made = make(quantized, config)
    other = quantized.like(layer, made.config)
    assert not torch.equal(other.vqk, made.vqk)
    assert set(made.state_dict()) == {"vqk", "kds", "bias"} | ({"kds_shift"} if config.weight_shift else set())
    other.load_state_dict(made.state_dict())
    x = input_for(made)
    clone = copy.deepcopy(made)
    assert torch.equal(made(x), other(x)) and torch.equal(made(x), clone(x))
    assert (clone.config, clone.weight_sqnr_db) == (made.config, made.weight_sqnr_db)
    with torch.no_grad():
        clone.vqk.zero_()
        clone.bias.zero_()
    assert torch.equal(made(x), other(x)) and made.vqk.any()


@pytest.mark.parametrize("quantized", FLOAT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [W4, SHIFT])
def test_casting_a_layer_keeps_its_weights(quantized: Any, dtype: torch.dtype, config: LayerConfig) -> None:
    _, made = make(quantized, config)
    x, before = input_for(made).to(dtype), made.dequantized_weight()
    cast = copy.deepcopy(made).to(dtype)
    assert cast.kds.dtype == config.torch_kds_dtype and cast.vqk.dtype == torch.int8
    assert cast.kds_shift is None or cast.kds_shift.dtype == config.torch_kds_dtype
    assert cast.bias.dtype == dtype
    assert torch.equal(cast.dequantized_weight(), before)
    y = cast(x)
    assert y.dtype == dtype
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(y.float(), made(x.float()), rtol=tolerance, atol=tolerance)


def test_half_float_and_double_are_the_same_as_to() -> None:
    _, made = make(nn.DSConv2d, SHIFT)
    for cast in (made.half(), made.double(), made.bfloat16(), made.float()):
        assert cast.kds.dtype == cast.kds_shift.dtype == torch.float16


def test_a_layer_keeps_its_kds_dtype_inside_a_model_that_is_cast() -> None:
    model = tnn.Sequential(make(nn.DSConv2d, W4)[1]).half()
    assert model[0].kds.dtype == torch.float32
    assert model.to("meta")[0].kds.device.type == "meta"


@pytest.mark.parametrize("quantized", FLOAT)
@pytest.mark.parametrize("config", [W4, W4_ONLY])
def test_gradient_reaches_the_input(quantized: type[nn.DSLayer], config: LayerConfig) -> None:
    layer, made = make(quantized, config)
    x = input_for(made).requires_grad_()
    twin = in_float(layer, made)
    y = made(x)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)
    (expected,) = torch.autograd.grad(twin(x), x, seed)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_input_of_flat_blocks() -> None:
    layer, made = make(nn.DSConv2d, FLAT, padding=1, stride=2, groups=2)
    x = input_for(made).requires_grad_()
    y = made(x)
    seed = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, seed)
    (expected,) = torch.autograd.grad(in_float(layer, made)(x), x, seed)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [W4, SHIFT, FLAT])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_every_output_that_reads_it_nan(config: LayerConfig, bad: float) -> None:
    _, made = make(nn.DSConv2d, config, groups=2, padding=1, padding_mode="zeros")
    with torch.no_grad():
        made.kds[4] = 0
    x = input_for(made)
    x[1, 13, 4, 4] = bad
    expected = torch.zeros(2, 6, 9, 8, dtype=torch.bool)
    expected[1, 3:, 3:6, 3:6] = True
    linear = make(nn.DSLinear, W4)[1]
    rows = torch.ones(3, 20)
    rows[1, 19] = bad
    with torch.no_grad():
        for backend in (nullcontext(), ops.simulated()):
            with backend:
                assert torch.equal(made(x).isnan(), expected)
                y = linear(rows)
                assert y.isnan().any(1).tolist() == [False, True, False] and y[1].isnan().all()


@pytest.mark.parametrize("quantized", [*CONV, *TRANSPOSED])
def test_wrong_input_is_named(quantized: type[nn.DSLayer]) -> None:
    _, made = make(quantized)
    good = input_for(made)
    for x in (good[:, :5], good[None], good[0, 0]):
        with pytest.raises(ValueError, match=rf"{quantized.__name__}: expected input \(N, 20, ...\)"):
            made(x)


def test_wrong_features_are_named() -> None:
    with pytest.raises(ValueError, match=r"DSLinear: expected input \(..., 20\), got \(2, 19\)"):
        make(nn.DSLinear)[1](torch.zeros(2, 19))


@pytest.mark.parametrize("quantized", FLOAT)
def test_from_float_leaves_the_layer_alone_and_keeps_its_flags(quantized: type[nn.DSLayer]) -> None:
    layer, _ = make(quantized)
    layer.eval()
    layer.bias.requires_grad_(False)
    before = copy.deepcopy(layer.state_dict())
    made = quantized.from_float(layer, W4)
    assert not made.training and not made.bias.requires_grad
    with torch.no_grad():
        made.bias.zero_()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(TypeError, match=f"{quantized.__name__}: expected a {FLOAT[quantized].__name__}, got ReLU"):
        quantized.from_float(tnn.ReLU())


@pytest.mark.parametrize("rule", ["refined", "balanced"])
def test_rounding_runs_on_one_thread_and_leaves_pytorch_its_threads(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(*args: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return solve(*args, **named)

    name = "round_balanced" if rule == "balanced" else "round_rows"
    solve = getattr(weights, name)
    monkeypatch.setattr(weights, name, noting)
    layer, config = tnn.Linear(20, 6), LayerConfig(block_size=8, weight_rule=rule)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        nn.DSLinear.from_float(layer, config)
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="finite"):
            nn.DSLinear.from_float(layer, config, weight=torch.full((6, 20), torch.nan))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_from_float_takes_what_quantize_takes() -> None:
    layer = tnn.Conv2d(64, 4, 3)
    default = nn.DSConv2d.from_float(layer)
    assert default.config == QuantConfig.preset("default", algorithm="winograd").layer()
    paper = nn.DSConv2d.from_float(layer, QuantConfig.preset("paper"))
    assert paper.config == QuantConfig.preset("paper").layer()
    with pytest.raises(ValueError, match="leaves layers of kind 'linear' in float"):
        nn.DSLinear.from_float(tnn.Linear(4, 4), QuantConfig.preset("paper"))


def test_blocks_of_transposed_convolutions_run_over_input_channels() -> None:
    layer, made = make(nn.DSConvTranspose2d, W4, groups=2)
    assert made.vqk.shape == (6, 10, 3, 3) and made.kds.shape == (6, 2, 3, 3)
    weight = layer.weight.detach()
    for o in range(6):
        g = o // 3
        column = weight[10 * g : 10 * g + 10, o % 3].unsqueeze(0)
        vqk, kds = quantize_weight(column, 4, 8)
        assert torch.equal(made.vqk[o], vqk[0]) and torch.equal(made.kds[o], kds[0])


@pytest.mark.parametrize("scale", [1e-9, 1e8])
@pytest.mark.parametrize("shift", [False, True])
def test_kds_that_float16_cannot_hold_stay_in_float32(scale: float, shift: bool) -> None:
    layer = tnn.Conv2d(32, 4, 3)
    with torch.no_grad():
        layer.weight.mul_(scale)
    config = LayerConfig(kds_dtype="float16", weight_shift=shift)
    made = nn.DSConv2d.from_float(layer, config)
    assert made.kds.dtype == torch.float32 and made.config.kds_dtype == "float32"
    usual = nn.DSConv2d.from_float(tnn.Conv2d(32, 4, 3), config)
    assert usual.kds.dtype == torch.float16
    assert made.weight_sqnr_db > 15


def test_weight_sqnr_is_that_of_the_weight_in_use() -> None:
    layer, made = make(nn.DSConv2d, SHIFT)
    signal = layer.weight.detach().double()
    noise = signal - made.dequantized_weight().double()
    expected = 10 * torch.log10(signal.square().sum() / noise.square().sum())
    assert made.weight_sqnr_db == pytest.approx(float(expected), abs=1e-3)


def test_arguments_of_a_layer_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="groups: expected a divisor of in_channels 20, got 3"):
        nn.DSConv2d(20, 6, 3, groups=3)
    with pytest.raises(ValueError, match="groups: expected a divisor of out_channels 7, got 2"):
        nn.DSConv2d(20, 7, 3, groups=2)
    message = "padding: expected 'same', 'same_upper', 'valid' or whole numbers, got 'some'"
    with pytest.raises(ValueError, match=message):
        nn.DSConv2d(20, 6, 3, padding="some")
    with pytest.raises(ValueError, match="padding_mode"):
        nn.DSConvTranspose2d(20, 6, 3, padding_mode="reflect")


@pytest.mark.parametrize("quantized", FLOAT)
def test_settings_are_printed(quantized: type[nn.DSLayer]) -> None:
    text = repr(make(quantized, SHIFT)[1])
    assert text.startswith(quantized.__name__) and "weight_bits=4" in text and "float16+shift" in text


def network(config: LayerConfig = SHIFT) -> tnn.Module:
    torch.manual_seed(0)
    return tnn.Sequential(
        nn.DSConv2d.from_float(tnn.Conv2d(3, 20, 3, padding=1), FLAT),
        tnn.ReLU(),
        nn.DSConv2d.from_float(tnn.Conv2d(20, 8, 3, stride=2, padding="valid", groups=2), config),
        nn.DSConvTranspose2d.from_float(tnn.ConvTranspose2d(8, 6, 2, stride=2), config),
        nn.DSConv2d.from_float(tnn.Conv2d(6, 6, 3, padding="same", padding_mode="reflect"), config),
        tnn.AdaptiveAvgPool2d(1),
        tnn.Flatten(),
        nn.DSLinear.from_float(tnn.Linear(6, 5), config),
    ).eval()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_computes_the_same(backend: str) -> None:
    torch.compiler.reset()
    model, x = network(), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs g++")
def test_model_compiled_to_machine_code_computes_the_same() -> None:
    torch.compiler.reset()
    model, x = network()[2:4], torch.randn(2, 20, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [W4, SHIFT])
def test_exported_model_computes_the_same_for_any_batch(config: LayerConfig) -> None:
    model = network(config)
    x = torch.randn(3, 3, 9, 9)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    module = program.module()
    for n in (1, 3, 7):
        x = torch.randn(n, 3, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-6)
    assert {name for name in program.state_dict if name.endswith("vqk")} == {f"{i}.vqk" for i in (0, 2, 3, 4, 7)}


class AsksDtype(tnn.Module):
    """Module that reads dtype and device of its parameters and of a layer, like models that cast their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tnn.Conv2d(3, 8, 3, bias=False)
        self.norm = tnn.BatchNorm2d(8, affine=False)
        self.last = tnn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        like, weight = next(self.parameters()), self.last.weight
        x = self.norm(self.first(x.to(like.device, like.dtype)))
        return self.last(x.to(weight.device, weight.dtype)) * weight.shape[1]


def asking() -> tnn.Module:
    torch.manual_seed(0)
    return AsksDtype().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_model_without_other_parameters_has_dtype_and_device(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8)
    quantized = dsconv.quantize(asking().to(dtype), "w8a8")
    cast = dsconv.quantize(asking(), "w8a8").to(dtype)
    for model in (quantized, cast):
        assert {p.dtype for p in model.parameters()} == {model.last.weight.dtype} == {dtype}
        with torch.inference_mode():
            y = model(x)
        assert y.dtype == dtype
        assert (y.float() - asking()(x)).norm() < 0.05 * asking()(x).norm()
    assert next(quantized.to("meta").parameters()).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_and_states_are_as_without_that_parameter(dtype: torch.dtype, tmp_path: Path) -> None:
    quantized = dsconv.quantize(asking().to(dtype), "w8a8")
    assert not any("weight_like" in name for name in quantized.state_dict())
    quantized.load_state_dict(quantized.state_dict())
    path = dsconv.save(quantized, tmp_path / "net.safetensors")
    loaded = dsconv.load(path, asking().to(dtype))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(x), quantized(x))
        if dtype == torch.float32:
            folded = dsconv.fold_batchnorm(quantized)
            assert torch.equal(dsconv.load(dsconv.save(folded, path), asking())(x), folded(x))
            assert torch.equal(dsconv.compile(folded, x)(x), folded(x))


def test_a_file_in_half_precision_gives_layers_that_say_so(tmp_path: Path) -> None:
    model = tnn.Sequential(tnn.Conv2d(3, 8, 3, bias=False), tnn.BatchNorm2d(8), tnn.Conv2d(8, 4, 1)).eval()
    path = dsconv.save(dsconv.quantize(model.half(), "w8a8"), tmp_path / "net.safetensors")
    assert {p.dtype for p in dsconv.load(path, model.float()).parameters()} == {torch.float16}


def test_a_weight_cannot_be_replaced_unseen() -> None:
    _, made = make(nn.DSConv2d, W4)
    for value in (torch.zeros(3), tnn.Parameter(torch.zeros(3)), None):
        with pytest.raises(AttributeError, match=r"DSConv2d: its weight is computed from vqk.*quantize_\(weight\)"):
            made.weight = value
