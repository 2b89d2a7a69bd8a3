"""ONNX files: the nodes of a layer, value for value, and whole networks in three runtimes."""

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv import nn as dsnn
from dsconv.conversion import model_info
from dsconv.demo import load_digits
from dsconv.errors import ConfigError, DataError, MissingExtraError, ModelError
from dsconv.numerics import fake_quantize_activation
from dsconv.onnx import STYLES, OnnxNetwork, int8
from dsconv.onnx.activations import quantize
from dsconv.onnx.graph import Nodes
from dsconv.onnx.layers import DOMAIN, Floats, Functions, Integers

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
ir = pytest.importorskip("onnx_ir", reason="needs the extra 'onnx'")

Run = Callable[[Any, Tensor], Tensor]


def by_reference(model: Any, x: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return torch.from_numpy(ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0])


def by_onnxruntime(model: Any, x: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def by_openvino(model: Any, x: Tensor) -> Tensor:
    openvino = pytest.importorskip("openvino", reason="needs the extra 'bench'")
    core = openvino.Core()
    # Its default is bfloat16 on processors that support it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    return torch.from_numpy(compiled(x.numpy())[0].copy())


RUNTIMES = [pytest.param(run, id=run.__name__[3:]) for run in (by_reference, by_onnxruntime, by_openvino)]


def model_of(x: Tensor, lowering: Integers | Nodes, make: Callable[[Any], Any], y_shape: torch.Size) -> Any:
    """Return a model that applies ``make`` to an input ``x`` of any batch size."""
    op = lowering if isinstance(lowering, Nodes) else lowering.op
    given = ir.val("x", ir.DataType.FLOAT, ["batch", *x.shape[1:]])
    y = make(given)
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["batch", *y_shape[1:]])
    functions = lowering.functions() if isinstance(lowering, Integers) else []
    opsets = {"": 21} | ({DOMAIN: 1} if functions else {})
    graph = ir.Graph([given], [y], nodes=op.made, initializers=op.initializers, opset_imports=opsets, name="g")
    made = ir.to_proto(ir.Model(graph, ir_version=10, functions=functions))
    onnx.checker.check_model(made, full_check=True)
    return made


def every_kind_of_value(channels: int, block: int) -> Tensor:
    """Return blocks whose largest magnitudes are all powers of two, their neighbours, subnormal, zero and huge."""
    exact = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
    beside = [np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf)), exact * np.float32(1.5)]
    edges = np.array([0, 1e-45, 1e-40, np.finfo(np.float32).max, np.nextafter(np.float32(2**-100), 0)], np.float32)
    sizes = torch.from_numpy(np.concatenate([exact, *beside, edges]))
    x = (torch.rand(2, channels, 1, len(sizes), generator=torch.Generator().manual_seed(0)) * 2 - 1) * sizes
    x[0, ::block], x[1, ::block] = sizes, -sizes
    x[0] = x[0].abs()
    return x


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("in_function", [False, True], ids=["operators", "function"])
@pytest.mark.parametrize("sign", ["adaptive", "extra", "included"])
def test_activations_have_the_values_of_the_definition(sign: Any, in_function: bool, run: Run) -> None:
    if in_function and run is by_openvino:
        pytest.skip("OpenVINO knows no model-local functions")
    for bits, (channels, groups, size) in ((2, (8, 1, 8)), (4, (20, 2, 8)), (7, (24, 3, 64)), (8, (8, 1, 8))):
        config = dsconv.LayerConfig(activation_bits=bits, activation_sign=sign, block_size=size)
        x = every_kind_of_value(channels, min(size, channels // groups))
        expected = fake_quantize_activation(x, bits, size, sign=sign, groups=groups)
        lowering: Any = Functions({}) if in_function else Nodes()

        def make(given: Any, lowering: Any = lowering, settings: Any = (config, channels, groups)) -> Any:
            return lowering._quantized(given, *settings) if in_function else quantize(lowering, given, *settings)

        y = run(model_of(x, lowering, make, x.shape), x)
        assert torch.equal(y, expected), (bits, x[y != expected][:4], y[y != expected][:4])


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("sign", ["adaptive", "extra", "included"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_read_what_is_not_finite_are_nan(value: float, sign: Any, run: Run) -> None:
    torch.manual_seed(0)
    layer = dsnn.DSConv2d.from_float(tnn.Conv2d(20, 4, 3), dsconv.LayerConfig(block_size=8, activation_sign=sign))
    x = torch.randn(2, 20, 5, 6)
    x[1, 11, 4, 5] = value
    with torch.inference_mode():
        expected = layer(x)
    lowering = Integers({"layer": layer})
    y = run(model_of(x, lowering, lambda given: lowering.layer("layer", given, None), expected.shape), x)
    assert torch.equal(y.isnan(), expected.isnan()) and 0 < expected.isnan().sum() < expected.numel()


def config(bits: int = 4, **changes: Any) -> dsconv.LayerConfig:
    return dsconv.LayerConfig(**{"weight_bits": bits, "activation_bits": 8, "block_size": 16, **changes})


LAYERS: dict[str, tuple[Any, tuple[int, ...], dsconv.LayerConfig]] = {
    "whole blocks": (tnn.Conv2d(32, 6, 3, padding=1), (32, 5, 6), config()),
    "short last block, shift": (tnn.Conv2d(40, 6, 3, 2), (40, 7, 6), config(weight_shift=True, kds_dtype="float16")),
    "groups, short blocks": (tnn.Conv2d(66, 6, (1, 3), groups=3), (66, 3, 5), config(3, activation_sign="included")),
    "flattened": (tnn.Conv2d(3, 8, 5, 2, 2), (3, 9, 9), config(8, blocks="flat", block_size=32)),
    "flattened, shift": (tnn.Conv2d(6, 8, 3, groups=2), (6, 5, 5), config(blocks="flat", weight_shift=True)),
    "depthwise": (tnn.Conv2d(9, 18, 3, padding=2, dilation=2, groups=9), (9, 6, 6), config(8, blocks="flat")),
    "flattened weights alone": (tnn.Conv2d(3, 8, 3), (3, 6, 6), config(blocks="flat", activation_bits=None)),
    "weights alone": (tnn.Conv2d(24, 8, 3), (24, 6, 6), config(2, activation_bits=None, kds_dtype="bfloat16")),
    "1-D": (tnn.Conv1d(20, 4, 3, padding=1), (20, 9), config(5, activation_sign="extra", activation_bits=4)),
    "3-D": (tnn.Conv3d(4, 4, 2), (4, 3, 4, 3), config(blocks="flat")),
    "transposed": (tnn.ConvTranspose2d(24, 6, 3, 2, 1, 1), (24, 4, 5), config(weight_shift=True)),
    "transposed, groups": (tnn.ConvTranspose1d(48, 6, 3, 2, groups=2), (48, 5), config(weight_shift=True)),
    "linear": (tnn.Linear(40, 10), (40,), config(6, weight_shift=True)),
    "linear, one block": (tnn.Linear(10, 3, bias=False), (10,), config(activation_sign="included")),
}


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("style", ["qdq", "function", "float"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_returns_what_it_did(name: str, style: str, run: Run) -> None:
    if style == "function" and run is by_openvino:
        pytest.skip("OpenVINO knows no model-local functions")
    if name == "transposed, groups" and run is by_reference:
        pytest.skip("ONNX's own evaluator cannot run a ConvTranspose of groups")
    float_layer, shape, settings = LAYERS[name]
    torch.manual_seed(0)
    float_layer.reset_parameters()
    kind = getattr(dsnn, f"DS{type(float_layer).__name__}")
    layer = kind.from_float(float_layer, settings)
    x = torch.randn(3, *shape)
    if style == "float":
        float_layer.weight.data = layer.dequantized_weight()
    with torch.no_grad(), dsconv.ops.simulated():
        expected = (float_layer if style == "float" else layer)(x)
    lowering = {"qdq": Integers, "function": Functions, "float": Floats}[style]({"layer": layer})
    padding = getattr(layer, "output_padding", None)
    y = run(model_of(x, lowering, lambda given: lowering.layer("layer", given, padding), expected.shape), x)
    # Operands are the same; runtimes add float32 products in different orders.
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max() * math.sqrt(x[0].numel())


READERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "bits": ({}, {"activation_bits": 4}),
    "sign": ({}, {"activation_sign": "included", "activation_bits": 4}),
    "block size": ({}, {"block_size": 8}),
    "groups": ({"groups": 2}, {}),
    "weights alone": ({}, {"activation_bits": None}),
    "flat": ({}, {"blocks": "flat"}),
    "flat, stride": ({"stride": 2}, {"blocks": "flat"}),
    "flat, padding": ({"padding": 1}, {"blocks": "flat"}),
    "flat, dilation": ({"dilation": 2}, {"blocks": "flat"}),
    "flat, other kernel": ({"kernel_size": (3, 1)}, {"blocks": "flat"}),
    "plain again": ({}, {}),
}


@pytest.mark.parametrize("style", [Integers, Functions], ids=["qdq", "function"])
def test_layers_that_read_one_tensor_round_it_each_by_its_own_settings(style: type[Integers]) -> None:
    torch.manual_seed(0)
    layers = {
        name.replace(" ", "_"): dsnn.DSConv2d.from_float(
            tnn.Conv2d(**{"in_channels": 24, "out_channels": 4, "kernel_size": 3, **given}),
            dsconv.LayerConfig(**{"activation_bits": 6, "block_size": 16, **settings}),
        )
        for name, (given, settings) in READERS.items()
    }
    # The first value of every block is negative at some positions, no value at others, and some are large.
    x = torch.randn(2, 24, 7, 6).abs() * torch.logspace(-2, 2, 24).view(24, 1, 1)
    x[1] *= torch.randn(24, 7, 6).sign()
    with torch.no_grad(), dsconv.ops.simulated():
        expected = {name: layer(x).flatten(1) for name, layer in layers.items()}
    lowering = style(layers)
    op = lowering.op

    def make(given: Any) -> Any:
        return op.Concat(*(op.Reshape(lowering.layer(name, given, None), op.shape(0, -1)) for name in layers), axis=1)

    y = by_onnxruntime(model_of(x, lowering, make, torch.cat([*expected.values()], 1).shape), x)
    found = dict(zip(layers, y.split([e.shape[1] for e in expected.values()], 1), strict=True))
    wrong = [name for name in layers if (found[name] - expected[name]).abs().max() > 1e-5 * expected[name].abs().max()]
    assert wrong == []


def tensors(model: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.fixture(scope="module")
def qnet() -> tnn.Module:
    return dsconv.quantize(dsconv.zoo.build("dsconv/digits_resnet"))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_digits("test")[0]


@pytest.fixture(scope="module")
def files(qnet: tnn.Module, digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    folder = tmp_path_factory.mktemp("onnx")
    return {s: onnx.load(dsconv.export_onnx(qnet, digits[:1], folder / f"{s}.onnx", s)) for s in STYLES}


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("style", STYLES)
def test_a_network_returns_what_it_did(
    style: str, run: Run, files: dict[str, Any], qnet: tnn.Module, digits: Tensor
) -> None:
    if style == "function" and run is by_openvino:
        pytest.skip("OpenVINO knows no model-local functions")
    for x in (digits[:1], digits[1:40]):  # any batch
        with torch.inference_mode():
            expected = qnet(x)
        y = run(files[style], x)
        # The last bit of a sum may change a rounding; float and int8 round at other points.
        within = {"qdq": 0.01, "function": 0.01, "float": 0.05, "int8": 0.1}[style]
        assert y.shape == expected.shape
        assert (y - expected).norm() <= within * expected.norm()


def test_a_file_holds_vqk_and_kds_as_they_are(files: dict[str, Any], qnet: tnn.Module) -> None:
    for style in ("qdq", "function"):
        held = tensors(files[style])
        for name, layer in qnet.named_modules():
            if isinstance(layer, dsnn.DSLayer):
                vqk, kds = held[f"{name}.vqk"], held[f"{name}.kds"]
                four = layer.config.weight_bits <= 4
                assert vqk.data_type == (onnx.TensorProto.INT4 if four else onnx.TensorProto.INT8)
                parts = [held[key] for key in (f"{name}.vqk", f"{name}.vqk_last") if key in held]
                assert sum(len(part.raw_data) for part in parts) == math.ceil(layer.vqk.numel() / (1 + four))
                integers = np.concatenate([onnx.numpy_helper.to_array(part) for part in parts], axis=1)
                assert np.array_equal(integers.ravel().astype(np.int8), layer.vqk.numpy().ravel())
                half = layer.kds.dtype == torch.float16
                assert kds.data_type == (onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT)
                assert np.array_equal(onnx.numpy_helper.to_array(kds).ravel(), layer.kds.numpy().ravel())


def test_the_scales_of_blocks_are_kds_through_a_cast_at_most(files: dict[str, Any]) -> None:
    made_by = {output: node for node in files["qdq"].graph.node for output in node.output}
    blocked = [node for node in files["qdq"].graph.node if node.op_type == "DequantizeLinear"]
    for node in blocked:
        scale = node.input[1]
        while scale in made_by:  # in float32, and without the blocks of another part of the integers
            assert made_by[scale].op_type in ("Cast", "Split")
            scale = made_by[scale].input[0]
        assert scale == node.input[0].partition(".vqk")[0] + ".kds"
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["axis"] == 1 and attributes["block_size"] > 1
    assert len(blocked) == sum(".vqk" in name for name in tensors(files["qdq"]))


def test_functions_are_called_by_their_names(files: dict[str, Any]) -> None:
    model = files["function"]
    assert {f.name for f in model.functions} == {"BFPQuantize", "DSConv", "DSConvShifted", "DSLinearShifted"}
    assert {f.domain for f in model.functions} == {DOMAIN}
    called = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    assert called.count("DSConvShifted") + called.count("DSConv") == 9 and called.count("DSLinearShifted") == 1
    assert not [node for node in model.graph.node if node.op_type == "DequantizeLinear"]


def test_the_metadata_say_how_a_network_was_quantized(files: dict[str, Any], qnet: tnn.Module) -> None:
    for style, model in files.items():
        found = {entry.key.removeprefix("dsconv."): entry.value for entry in model.metadata_props}
        assert found["style"] == style and found["version"] == dsconv.__version__
        assert found["weight_bits"] == "4" and found["activation_bits"] == "8" and found["block_size"] == "64"
        assert found["activation_sign"] == "adaptive"
        info = model_info(qnet)
        assert info is not None
        assert json.loads(found["config"])["weight_shift"] and info.config.weight_shift
        assert json.loads(found["other_layers"])["conv1"]["weight_bits"] == 8


def test_ranges_of_images_are_closer_than_those_of_noise(
    qnet: tnn.Module, digits: Tensor, files: dict[str, Any], tmp_path: Path
) -> None:
    images = dsconv.export_onnx(qnet, digits[:1], tmp_path / "a.onnx", "int8", images=digits[:32])
    with torch.inference_mode():
        expected = qnet(digits[32:])
        errors = [
            float((by_onnxruntime(model, digits[32:]) - expected).norm() / expected.norm())
            for model in (onnx.load(images), files["int8"])
        ]
    assert errors[0] < 0.05 and errors[1] < 0.1
    layers = [node.op_type for node in onnx.load(images).graph.node if node.op_type in ("Conv", "Gemm")]
    weights = [
        t for t in onnx.load(images).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    ]
    assert len(layers) == len(weights) == 10


def int8_filters(model: Any) -> dict[str, np.ndarray]:
    """Return the int8 weights of layers, a row for each scale."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    filters = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            dequantize = made_by[node.input[1]]
            weight = onnx.numpy_helper.to_array(tensors(model)[dequantize.input[0]])
            assert dequantize.op_type == "DequantizeLinear" and weight.dtype == np.int8
            scales = tensors(model)[dequantize.input[1]].dims
            axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 0)
            filters[node.input[1]] = (
                np.moveaxis(weight, axis, 0).reshape(*scales, -1) if scales else weight.reshape(1, -1)
            )
    return filters


def pair_sums(filters: dict[str, np.ndarray]) -> tuple[int, int]:
    """Return the largest and the smallest sum of two products of a filter with activations of 0 to 255."""
    highest, lowest = 0, 0
    for rows in filters.values():
        for row in np.sort(rows.astype(np.int64), axis=1):
            highest = max(highest, 255 * int(np.maximum(row[-2:], 0).sum()))
            lowest = min(lowest, 255 * int(np.minimum(row[:2], 0).sum()))
    return highest, lowest


def test_no_pair_of_products_of_an_int8_file_saturates_in_16_bits(
    files: dict[str, Any], qnet: tnn.Module, digits: Tensor, tmp_path: Path
) -> None:
    images = onnx.load(dsconv.export_onnx(qnet, digits[:1], tmp_path / "a.onnx", "int8", images=digits[:32]))
    for model in (files["int8"], images):
        filters = int8_filters(model)
        highest, lowest = pair_sums(filters)
        assert len(filters) == 10 and lowest >= -(1 << 15) and highest < 1 << 15
        # The range is fully used: a filter's largest weight or pair is the largest that is allowed.
        for rows in filters.values():
            top, bottom = (np.sort(np.maximum(r.astype(int), 0))[:, -2:].sum(1) for r in (rows, -rows.astype(int)))
            largest = np.abs(rows.astype(int)).max(1)
            assert ((np.maximum(top, bottom) >= 126) | (largest == 127)).all()
        assert {e.key: e.value for e in model.metadata_props}["dsconv.full_range"] == "false"


def saturating(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return products ``(N, O)`` of uint8 ``(N, K)`` and int8 ``(O, K)`` as processors without VNNI add them."""
    products = x[:, None, :].astype(np.int64) * w[None].astype(np.int64)
    return np.clip(products[..., ::2] + products[..., 1::2], -(1 << 15), (1 << 15) - 1).sum(-1)


@pytest.mark.parametrize("order", ["as they are", "largest first"])
def test_integers_of_layers_come_out_right_where_pairs_are_added_in_16_bits(
    order: str, qnet: tnn.Module, digits: Tensor, files: dict[str, Any], tmp_path: Path
) -> None:
    full = onnx.load(dsconv.export_onnx(qnet, digits[:1], tmp_path / "a.onnx", "int8", full_range=True))
    assert {e.key: e.value for e in full.metadata_props}["dsconv.full_range"] == "true"
    right = []
    for model in (files["int8"], full):
        wrong = 0
        for rows in int8_filters(model).values():
            rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
            if order == "largest first":
                rows = np.sort(rows, axis=1)
            x = np.full((1, rows.shape[1]), 255, np.uint8)
            wrong += int((saturating(x, rows) != x.astype(np.int64) @ rows.T.astype(np.int64)).sum())
        right.append(wrong == 0)
    assert right == [True, False]  # otherwise this test could not fail


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9),
    st.sampled_from([1.0, 1e-30, 1e-42, 1e30]),
)
def test_scales_are_the_smallest_that_keep_pairs_within_16_bits(values: list[float], unit: float) -> None:
    row = np.array([values], np.float32) * np.float32(unit)
    (scale,) = int8.scales_without_saturation(row.astype(np.float64))
    q = np.round(row.astype(np.float64) / scale)[0]
    high, low = np.sort(np.maximum(q, 0))[-2:].sum(), np.sort(np.minimum(q, 0))[:2].sum()
    assert np.isfinite(scale) and scale > 0 and np.abs(q).max() <= 127
    assert 255 * high < 1 << 15 and 255 * low >= -(1 << 15)
    if np.abs(row).max() > 1e-30:
        assert max(high, -low) >= 126 or np.abs(q).max() == 127


def test_full_range_takes_all_of_int8(qnet: tnn.Module, digits: Tensor, files: dict[str, Any], tmp_path: Path) -> None:
    full = onnx.load(dsconv.export_onnx(qnet, digits[:1], tmp_path / "a.onnx", "int8", full_range=True))
    assert all(np.abs(rows.astype(int)).max(1).min() == 127 for rows in int8_filters(full).values())
    steps = [
        sum(float(onnx.numpy_helper.to_array(t).sum()) for name, t in tensors(model).items() if "weight_scale" in name)
        for model in (files["int8"], full)
    ]
    assert 1.1 < steps[0] / steps[1] <= 2.01


class OtherKinds(tnn.Module):
    """Layers of other kinds: transposed, depthwise, with constants that are not 2-D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = tnn.Conv2d(8, 16, 3, padding=1), tnn.Conv2d(16, 16, 3, groups=16)
        self.up = tnn.ConvTranspose2d(16, 8, 2, 2)
        self.matrices = tnn.Parameter(torch.randn(8, 12, 4))

    def forward(self, x: Tensor) -> Any:
        return self.up(self.depthwise(self.conv(x).relu()).relu()) @ self.matrices


def test_layers_of_other_kinds_are_right_in_int8_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = dsconv.quantize(OtherKinds().eval(), dsconv.QuantConfig.preset("default", weight_bits=8))
    x = torch.randn(8, 8, 8, 8)
    model = onnx.load(dsconv.export_onnx(net, x[:1], tmp_path / "a.onnx", "int8", images=x))
    with torch.inference_mode():
        expected = net(x)
    assert float((by_onnxruntime(model, x) - expected).norm() / expected.norm()) < 0.03
    filters = int8_filters(model)
    highest, lowest = pair_sums(filters)
    assert len(filters) == 4 and lowest >= -(1 << 15) and highest < 1 << 15


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"style": "int4"}, "style: expected one of qdq, function, int8, float, got 'int4'"),
        ({"opset": 20}, "opset: expected 21 to"),
        ({"opset": 99}, "opset: expected 21 to"),
        ({"style": "float", "opset": 17}, "opset: expected 18 to"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.float32)}, "only style 'int8' takes the ranges"),
        ({"full_range": True}, "full_range: only style 'int8' rounds weights to int8, got style 'qdq'"),
        ({"style": "int8", "full_range": 1}, "full_range: expected True or False, got 1"),
        (
            {"style": "int8", "images": torch.zeros(2, 3, 8, 8, dtype=torch.float32)},
            r"images: expected .*, got Inputs\(float32 \(2, 3, 8, 8\)",
        ),
        ({"style": "int8", "images": torch.zeros(0, 1, 8, 8)}, "images: expected at least one of the shape"),
        ({"example_input": [torch.zeros(3, 8, 8)]}, r"example_input: expected tensors .* got a list of images"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], expected: str, qnet: tnn.Module, tmp_path: Path) -> None:
    given = {"example_input": torch.zeros(1, 1, 8, 8), "path": tmp_path / "a.onnx", **changes}
    with pytest.raises(ConfigError, match=expected):
        dsconv.export_onnx(qnet, **given)
    with pytest.raises(DataError, match=r"inputs: expected a tensor \(N, ...\) among the arguments"):
        dsconv.export_onnx(qnet, [1, 1, 8, 8], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class CountsImages(tnn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(len(x), -1)


def quantized(model: tnn.Module) -> tnn.Module:
    return dsconv.quantize(model, "paper").eval()


@pytest.mark.parametrize(
    ("make", "x", "style", "expected"),
    [
        (lambda: tnn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), "qdq", "no quantized layer"),
        (
            lambda: quantized(tnn.Sequential(tnn.Conv2d(3, 8, 3))).train(),
            torch.zeros(1, 3, 8, 8),
            "qdq",
            "training mode",
        ),
        (lambda: quantized(tnn.Sequential(tnn.Conv2d(3, 8, 3))).half(), torch.zeros(1, 3, 8, 8), "qdq", "not float32"),
        (lambda: quantized(tnn.Sequential(tnn.Conv2d(3, 8, 3))), torch.zeros(1, 3, 8, 8).half(), "qdq", "not float32"),
        (
            lambda: quantized(CountsImages(tnn.Conv2d(3, 8, 3))),
            torch.zeros(1, 3, 8, 8),
            "qdq",
            "batch size became a con",
        ),
        (lambda: quantized(tnn.Sequential(tnn.Conv2d(3, 8, 3))), torch.zeros(1, 4, 8, 8), "qdq", "cannot be exported"),
        (
            lambda: quantized(tnn.Sequential(tnn.Conv2d(3, 8, 3), tnn.AvgPool2d(2, divisor_override=3))),
            torch.zeros(1, 3, 8, 8),
            "qdq",
            "no average pooling with a divisor_override, here 3",
        ),
        (
            lambda: quantized(tnn.Sequential(tnn.Conv3d(3, 8, 3), tnn.AdaptiveAvgPool3d((1, 2, 2)))),
            torch.zeros(1, 3, 5, 6, 6),
            "qdq",
            r"an input of \(1, 3, 5, 6, 6\): No ONNX function found for .*_adaptive_avg_pool3d",
        ),
        (
            lambda: quantized(tnn.Sequential(tnn.Conv2d(3, 8, 3))),
            torch.zeros(1, 3, 8, 8),
            "int8",
            "images: expected some",
        ),
    ],
)
def test_models_that_cannot_be_exported(make: Any, x: Tensor, style: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=expected):
        dsconv.export_onnx(make(), x, tmp_path / "a.onnx", style)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(qnet: tnn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnxscript is not installed: pip install 'dsconv\[onnx\]'"):
        dsconv.export_onnx(qnet, torch.zeros(1, 1, 8, 8), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_is_exported_as_what_it_was_made_of(digits: Tensor, tmp_path: Path) -> None:
    net = tnn.Sequential(tnn.Conv2d(1, 32, 3), tnn.ReLU(), tnn.Conv2d(32, 8, 3)).eval()
    qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("default", algorithm="direct"))
    compiled = dsconv.compile(qnet, digits[:1])
    again = OnnxNetwork(dsconv.export_onnx(compiled, digits[:1], tmp_path / "a.onnx"))
    with torch.inference_mode():
        assert torch.allclose(again(digits[:4]), compiled(digits[:4]), atol=1e-4)


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("style", ["qdq", "int8", "float"])
def test_a_maximum_over_padding_by_zeros_is_zero_at_least(style: Any, run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = tnn.Conv2d(8, 32, 3), tnn.ZeroPad2d((0, 1, 0, 1)), tnn.MaxPool2d(2, 1), tnn.Conv2d(32, 4, 1)
    tnn.init.constant_(layers[0].bias, -10.0)
    qnet, x = dsconv.quantize(tnn.Sequential(*layers).eval()), torch.randn(4, 8, 6, 6)
    images = {"images": x} if style == "int8" else {}
    model = onnx.load(dsconv.export_onnx(qnet, x[:1], tmp_path / "net.onnx", style, **images))
    with torch.inference_mode():
        expected = qnet(x)
    assert float((run(model, x) - expected).norm() / expected.norm()) < 0.03


class Noted(tnn.Module):
    """A list of layers, each with the index of the output that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = tnn.ModuleList(
            [tnn.Conv2d(3, 8, 3, padding=1), tnn.Conv2d(8, 8, 3, padding=1), tnn.Conv2d(8, 4, 1)]
        )
        for layer, source in zip(self.layers, (-1, 0, 0), strict=True):
            layer.source = source

    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = []
        for layer in self.layers:
            made.append(layer(x if layer.source < 0 else made[layer.source]) / layer.in_channels)
        return made[-1]


def test_what_a_model_noted_on_its_layers_is_read_during_the_export(tmp_path: Path) -> None:
    qmodel, x = dsconv.quantize(Noted().eval()), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        again = OnnxNetwork(dsconv.export_onnx(qmodel, x, tmp_path / "net.onnx"))
        assert torch.allclose(again(x), qmodel(x), atol=1e-5)
