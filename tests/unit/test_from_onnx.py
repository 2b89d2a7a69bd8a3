"""Networks from ONNX files: names, batch, patterns, and their use in all other parts of the package."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402
from onnx_cases import Case, expected, imported, input_of, model_of, same  # noqa: E402

import dsconv  # noqa: E402
from dsconv.conversion import model_info  # noqa: E402
from dsconv.errors import FileFormatError, ModelError  # noqa: E402
from dsconv.onnx.importing import network as networks  # noqa: E402

_random = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return (_random.standard_normal(shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32)


def functions(net: Any) -> set[str]:
    return {networks.NAMES[node.target] for node in net.graph.nodes if node.op == "call_function"}


NET = Case(
    "net",
    [
        ("Conv", "x stem.conv.weight", "a", {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
        ("BatchNormalization", "a s b m v", "b1", {}),
        ("Relu", "b1", "r", {}),
        ("Conv", "r stem.0.weight stem.0.bias", "c", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("Sigmoid", "c", "g", {}),
        ("Mul", "c g", "d", {}),
        ("Add", "d table", "e", {}),
        ("GlobalAveragePool", "e", "p", {}),
        ("Flatten", "p", "f", {}),
        ("MatMul", "f head_w_0", "h", {}),
        ("Add", "h bias", "y", {}),
    ],
    (2, 3, 16, 16),
    {
        "stem.conv.weight": floats(8, 3, 3, 3),
        **{name: abs(floats(8)) + 0.5 for name in "sbmv"},
        "stem.0.weight": floats(16, 8, 3, 3),
        "stem.0.bias": floats(16),
        "table": floats(16, 1, 1),
        "head_w_0": floats(16, 10),
        "bias": floats(10),
    },
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return imported(model_of(NET), tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return input_of(NET)


def test_layers_have_the_names_of_the_file(net: Any, x: torch.Tensor) -> None:
    kinds = {name: type(module).__name__ for name, module in net.named_modules() if name and list(module.parameters())}
    layers = {"stem.conv": "PaddedConv2d", "stem.0": "PaddedConv2d", "head": "Linear"}
    assert layers.items() <= kinds.items()
    assert kinds["BatchNormalization_1"] == "BatchNorm2d"
    assert functions(net) == {"F.relu", "F.silu", "torch.add", "F.adaptive_avg_pool2d", "torch.flatten"}
    with torch.no_grad():
        same(net(x), expected(model_of(NET), x=x))


def test_a_network_is_quantized_saved_loaded_and_compiled(net: Any, x: torch.Tensor, tmp_path: Path) -> None:
    qnet = dsconv.quantize(net)
    assert all(
        layer.quantized for layer in dsconv.summary(qnet).layers if layer.name in ("stem.conv", "stem.0", "head")
    )
    for folded in (
        qnet,
        dsconv.fold_batchnorm(qnet),
        dsconv.calibrate(qnet, net, input_of(NET._replace(shape=(16, 3, 16, 16)))),
    ):
        path = dsconv.save(folded, tmp_path / "net.safetensors")
        again = dsconv.load(path)
        with torch.inference_mode():
            y = folded(x)
            assert torch.equal(again(x), y)
            assert torch.equal(dsconv.load(path, net)(x), y)
            assert torch.equal(dsconv.compile(again, x)(x), y)
        assert networks.describe(again) == networks.describe(folded)
    exported = onnx.load(dsconv.export_onnx(dsconv.load(path), x, tmp_path / "out.onnx"))
    same(y, expected(exported, x=x), tolerance=2e-2)


def test_batchnorms_are_folded_beside_functions_that_decide_by_sizes(tmp_path: Path) -> None:
    case = Case(
        "cut",
        [
            ("Conv", "x w", "a", {}),
            ("BatchNormalization", "a s b m v", "n", {}),
            ("Slice", "n starts ends axes", "c", {}),
            ("DepthToSpace", "c", "y", {"blocksize": 2}),
        ],
        (2, 3, 8, 8),
        {
            "w": floats(8, 3, 3, 3),
            **{name: abs(floats(8)) + 0.5 for name in "sbmv"},
            **{name: np.array([place], np.int64) for name, place in (("starts", 1), ("ends", 5), ("axes", 2))},
        },
    )
    qnet = dsconv.quantize(imported(model_of(case), tmp_path))
    folded = dsconv.fold_batchnorm(qnet)
    assert len(model_info(folded).folded) == 1
    assert functions(qnet) >= {"dsconv.sliced", "dsconv.depth_to_space"}
    with torch.inference_mode():
        torch.testing.assert_close(folded(input_of(case)), qnet(input_of(case)))


def test_a_network_that_was_changed_is_saved_as_it_is(net: Any, x: torch.Tensor, tmp_path: Path) -> None:
    changed = dsconv.quantize(net)
    changed.head = nn.Linear(16, 3)
    with torch.inference_mode():
        assert torch.equal(dsconv.load(dsconv.save(changed, tmp_path / "n.safetensors"))(x), changed(x))
    changed.head = nn.Sequential(nn.Linear(16, 3))  # not a module of imported networks: the file cannot describe it
    with pytest.raises(ModelError, match="pass the float model"):
        dsconv.load(dsconv.save(changed, tmp_path / "n.safetensors"))


def test_copies_keep_attributes_and_hooks(net: Any, x: torch.Tensor) -> None:
    import copy

    net.note, seen = "kept", []
    handle = net.register_forward_hook(lambda *_: seen.append(1))
    try:
        made = copy.deepcopy(net)
    finally:
        handle.remove()
    made(x)
    assert (made.note, seen) == ("kept", [1])


def test_a_file_of_version_before_is_as_it_was(tmp_path: Path) -> None:
    from safetensors import safe_open

    qnet = dsconv.quantize(nn.Sequential(nn.Conv2d(3, 32, 3)))
    with safe_open(dsconv.save(qnet, tmp_path / "n.safetensors"), "numpy") as file:
        assert "network" not in file.metadata()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "nodes",
    [
        [("Reshape", "x whole", "y", {})],
        [
            ("Reshape", "x parts", "p", {}),
            ("Transpose", "p", "t", {"perm": [0, 2, 1, 3, 4]}),
            ("Reshape", "t x4", "y", {}),
        ],
        [
            ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
            ("Reshape", "t tokens", "u", {}),
            ("Concat", "c u", "y", {"axis": 1}),
        ],
        [("Reshape", "x flat", "f", {}), ("Gather", "f places", "y", {})],
        [("Reshape", "x windows", "w", {}), ("Softmax", "w", "s", {}), ("Reshape", "s x4", "y", {})],
    ],
    ids=["flatten", "channel shuffle", "class token", "strides", "windows"],
)
def test_the_batch_is_free_also_where_the_file_fixes_it(nodes: Any, fixed: bool, tmp_path: Path) -> None:
    shapes = {
        "whole": [1, 144],
        "parts": [1, 2, 2, 6, 6],
        "x4": [1, 4, 6, 6],
        "tokens": [1, 36, 4],
        "flat": [-1],
        "windows": [4, 36, 1],
    }
    constants = {name: np.array(shape, np.int64) for name, shape in shapes.items()}
    if not fixed:
        # Shapes without the batch size.
        constants |= {name: np.array([-1, *shape[1:]], np.int64) for name, shape in shapes.items()}
        if any(inputs in ("c u", "f places") for _, inputs, *_ in nodes):
            return  # a free batch size gives other operators
    case = Case(
        "batch", nodes, (1, 4, 6, 6), {**constants, "c": floats(1, 1, 4), "places": np.arange(144).reshape(1, 4, 36)}
    )
    model = model_of(case, fixed=fixed)
    net, x = imported(model, tmp_path), torch.randn(3, 4, 6, 6)
    wanted = np.concatenate([expected(model, x=image[None])[0] for image in x])
    same(net(x), [wanted])
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    same(program.module()(x[:2]), [wanted[: len(wanted) * 2 // 3]])


def test_a_file_that_takes_images_of_its_batch_by_number_runs_with_that_batch(tmp_path: Path) -> None:
    case = Case("first image", [("Gather", "x i", "y", {"axis": 0})], (1, 4, 6, 6), {"i": np.array(0, np.int64)})
    net, x = imported(model_of(case, fixed=True), tmp_path), torch.randn(2, 4, 6, 6)
    assert torch.equal(net(x[:1]), x[0])
    with pytest.raises(ValueError, match="run the network with the batch size of the file"):
        net(x)


def test_several_inputs_and_outputs_have_their_names_and_order(tmp_path: Path) -> None:
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["left:0", "class"], ["sum"]),
            helper.make_node("Sub", ["left:0", "class"], ["difference"]),
        ],
        "two",
        [helper.make_tensor_value_info(name, kind, [None, 3]) for name in ("left:0", "class")],
        [helper.make_tensor_value_info(name, kind, [None, 3]) for name in ("difference", "sum", "class")],
    )
    net = imported(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    found = net(left_0=a, class_=b)
    assert type(found) is tuple
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, (a - b, a + b, b), strict=True))


def test_a_layer_that_reads_a_weight_twice_is_one_layer(tmp_path: Path) -> None:
    nodes = [("Conv", "x w", "a", {}), ("MaxPool", "x", "p", {"kernel_shape": [2, 2]}), ("Conv", "p w", "b", {})]
    model = model_of(Case("shared", nodes, constants={"w": floats(8, 4, 3, 3)}), outputs=("a", "b"))
    net, x = imported(model, tmp_path), torch.randn(2, 4, 8, 8)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 1
    with torch.no_grad():
        same(net(x), expected(model, x=x))


_HALF, _THREE = np.float32(0.5), np.float32(3)
_NUMBERS = {
    "half": _HALF,
    "one": np.float32(1),
    "two": np.float32(2),
    "three": _THREE,
    "cubed": _THREE,
    "zero": np.float32(0),
    "six": np.float32(6),
    "sixth": np.float32(1 / 6),
    "root": np.float32(2**0.5),
    "k": np.float32(0.044715),
    "c": np.float32((2 / np.pi) ** 0.5),
    "eps": np.float32(1e-5),
    "w": floats(6),
    "b": floats(6),
}
_CLIPPED = [("Add", "x three", "a", {}), ("Clip", "a zero six", "q", {})]


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        ("F.silu", [("Sigmoid", "x", "s", {}), ("Mul", "s x", "y", {})]),
        ("F.mish", [("Softplus", "x", "s", {}), ("Tanh", "s", "t", {}), ("Mul", "x t", "y", {})]),
        ("F.hardsigmoid", [*_CLIPPED, ("Div", "q six", "y", {})]),
        ("F.hardswish", [*_CLIPPED, ("Mul", "x q", "m", {}), ("Div", "m six", "y", {})]),
        ("F.hardswish", [*_CLIPPED, ("Div", "q six", "m", {}), ("Mul", "x m", "y", {})]),
        ("F.hardswish", [*_CLIPPED, ("Mul", "x sixth", "m", {}), ("Mul", "m q", "y", {})]),
        ("F.hardswish", [("HardSigmoid", "x", "h", {"alpha": 1 / 6}), ("Mul", "h x", "y", {})]),
        (
            "F.gelu",
            [
                ("Div", "x root", "d", {}),
                ("Erf", "d", "e", {}),
                ("Add", "e one", "f", {}),
                ("Mul", "x f", "g", {}),
                ("Mul", "g half", "y", {}),
            ],
        ),
        (
            "F.gelu",
            [
                ("Div", "x root", "d", {}),
                ("Erf", "d", "e", {}),
                ("Add", "e one", "f", {}),
                ("Mul", "x half", "g", {}),
                ("Mul", "g f", "y", {}),
            ],
        ),
        (
            "F.gelu",
            [
                ("Pow", "x cubed", "p", {}),
                ("Mul", "p k", "q", {}),
                ("Add", "x q", "r", {}),
                ("Mul", "r c", "s", {}),
                ("Tanh", "s", "t", {}),
                ("Add", "t one", "u", {}),
                ("Mul", "u x", "v", {}),
                ("Mul", "v half", "y", {}),
            ],
        ),
        (
            None,
            [
                ("ReduceMean", "x", "m", {"axes": [-1]}),
                ("Sub", "x m", "d", {}),
                ("Pow", "d two", "p", {}),
                ("ReduceMean", "p", "v", {"axes": [-1]}),
                ("Add", "v eps", "e", {}),
                ("Sqrt", "e", "r", {}),
                ("Div", "d r", "n", {}),
                ("Mul", "n w", "s", {}),
                ("Add", "s b", "y", {}),
            ],
        ),
    ],
)
def test_what_exporters_take_apart_is_one_operator_again(wanted: str | None, nodes: Any, tmp_path: Path) -> None:
    case = Case("pattern", nodes, constants=_NUMBERS, opset=17)
    net, x = imported(model_of(case), tmp_path), 2 * input_of(case)
    assert functions(net) == ({wanted} if wanted else set())
    with torch.no_grad():
        same(net(x), expected(model_of(case), x=x))


@pytest.mark.parametrize(
    "nodes",
    [
        [("Sigmoid", "x", "s", {}), ("Add", "x one", "t", {}), ("Mul", "s t", "y", {})],
        [
            ("Add", "x two", "a", {}),
            ("Clip", "a zero six", "q", {}),
            ("Mul", "x q", "m", {}),
            ("Div", "m six", "y", {}),
        ],
        [
            ("Div", "x two", "d", {}),
            ("Erf", "d", "e", {}),
            ("Add", "e one", "f", {}),
            ("Mul", "x f", "g", {}),
            ("Mul", "g half", "y", {}),
        ],
    ],
)
def test_what_only_looks_alike_stays(nodes: Any, tmp_path: Path) -> None:
    case = Case("no pattern", nodes, constants=_NUMBERS)
    net, x = imported(model_of(case), tmp_path), 2 * input_of(case)
    assert not functions(net) & {"F.silu", "F.hardswish", "F.hardsigmoid", "F.gelu"}
    with torch.no_grad():
        same(net(x), expected(model_of(case), x=x))


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "BatchNormalization"])
def test_constants_of_channels_are_folded_into_the_layer_before_them(kind: str, tmp_path: Path) -> None:
    layers: dict[str, dict[str, np.ndarray]] = {
        "Conv": {"w": floats(4, 2, 3, 3)},
        "ConvTranspose": {"w": floats(4, 2, 3, 3)},
        "BatchNormalization": {name: abs(floats(4)) + 0.5 for name in "wbmv"},
    }
    tensors, attributes = layers[kind], {} if kind == "BatchNormalization" else {"group": 2}
    constants = {**tensors, "scale": floats(4, 1, 1), "shift": floats(1, 4, 1, 1), "number": np.float32([1.5])}
    names = " ".join(["x", *tensors])
    nodes = [
        (kind, names, "c", attributes),
        ("Mul", "c scale", "d", {}),
        ("Add", "shift d", "e", {}),
        ("Div", "e number", "y", {}),
    ]
    case = Case("affine", nodes, constants=constants)
    net, x = imported(model_of(case), tmp_path), input_of(case)
    assert functions(net) == set()
    with torch.no_grad():
        same(net(x), expected(model_of(case), x=x))


def test_a_constant_beside_what_others_read_too_is_not_folded(tmp_path: Path) -> None:
    nodes = [("Conv", "x w", "c", {}), ("Mul", "c s", "d", {}), ("Add", "c d", "y", {})]
    case = Case("read twice", nodes, constants={"w": floats(4, 4, 3, 3), "s": floats(4, 1, 1)})
    x = input_of(case)
    with torch.no_grad():
        same(imported(model_of(case), tmp_path)(x), expected(model_of(case), x=x))


# Quantized models.


def test_a_model_with_pairs_of_quantizers_gives_its_float_network(tmp_path: Path) -> None:
    nodes = [
        ("QuantizeLinear", "x xs xz", "q", {}),
        ("DequantizeLinear", "q xs xz", "d", {}),
        ("DequantizeLinear", "wq ws wz", "w", {"axis": 0}),
        ("Conv", "d w", "c", {}),
        ("QuantizeLinear", "c cs cz", "e", {}),
        ("DequantizeLinear", "e cs cz", "y", {}),
    ]
    integers = _random.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8)
    constants = {
        "xs": np.float32(0.05),
        "xz": np.uint8(128),
        "wq": integers,
        "ws": abs(floats(8)) / 127,
        "wz": np.zeros(8, np.int8),
        "cs": np.float32(0.15),
        "cz": np.uint8(0),
    }
    case = Case("qdq", nodes, constants=constants)
    net, x = imported(model_of(case), tmp_path), input_of(case)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert torch.allclose(weights[0], torch.from_numpy(integers * constants["ws"].reshape(-1, 1, 1, 1)))
    # The quantizer after the layer represents a ReLU.
    assert functions(net) == {"F.relu"}
    with torch.no_grad():
        (wanted,) = expected(model_of(case), x=x)
        assert np.linalg.norm(net(x).numpy() - wanted) < 0.05 * np.linalg.norm(wanted)


def test_a_model_of_integer_operators_is_said_to_be_quantized(tmp_path: Path) -> None:
    nodes = [("DynamicQuantizeLinear", "x", "q s z", {}), ("ConvInteger", "q w z", "y", {})]
    case = Case("integers", nodes, constants={"w": np.ones((8, 4, 3, 3), np.uint8)})
    with pytest.raises(ModelError, match=r"the model is already quantized.*use the float model"):
        imported(model_of(case), tmp_path)


# Refusals.


def test_all_operators_that_are_not_supported_are_named_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], name="places"),
        helper.make_node("LSTM", ["x", "w", "r"], ["b"]),
        helper.make_node("Fancy", ["x"], ["c"], name="fancy_1", domain="com.example"),
    ]
    model = model_of(Case("bad", [("Relu", "x", "y", {})]))
    model.graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(ModelError) as caught:
        imported(model, tmp_path)
    said = str(caught.value)
    for part in (
        "NonZero ('places')",
        "LSTM ('b')",
        "com.example.Fancy ('fancy_1')",
        "recurrent layers",
        "com.example",
    ):
        assert part in said


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_branches_and_loops_are_refused(kind: str, tmp_path: Path) -> None:
    model = model_of(Case("bad", [("Relu", "x", "y", {})]))
    model.graph.node.append(helper.make_node(kind, ["x"], ["z"]))
    with pytest.raises(ModelError, match=r"networks with (branches|loops) are not supported"):
        imported(model, tmp_path)


def test_nodes_that_are_not_supported_are_named_with_the_reason(tmp_path: Path) -> None:
    nodes = [
        ("LRN", "x", "a", {"size": 2}),
        ("Resize", "a _ f", "b", {"antialias": 1, "mode": "linear"}),
        ("MaxPool", "x", "p i", {"kernel_shape": [2, 2]}),
    ]
    model = model_of(Case("bad", nodes, constants={"f": np.float32([1, 1, 2, 2])}), outputs=("b", "p", "i"))
    with pytest.raises(ModelError, match=r"LRN: an even number.*'LRN_0'.*MaxPool: indices.*'MaxPool_2'"):
        imported(model, tmp_path)


@pytest.mark.parametrize("opset", [6, 999])
def test_an_opset_that_is_not_known_is_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"opset: expected 7 to [0-9]+, got {opset}"):
        imported(model_of(Case("old", [("Relu", "x", "y", {})], opset=opset)), tmp_path)


def test_a_file_that_is_none_or_incomplete_is_refused(tmp_path: Path) -> None:
    whole = model_of(NET).SerializeToString()
    path = tmp_path / "model.onnx"
    for data in (b"", b"not a model at all", whole[: len(whole) // 2], whole[:-7], b"\x00" * 100):
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match=r"model\.onnx: "):
            dsconv.from_onnx(path)
    with pytest.raises(FileNotFoundError, match=r"there is none"):
        dsconv.from_onnx(tmp_path / "none.onnx")


def test_a_damaged_file_ends_in_an_error_that_can_be_shown(tmp_path: Path) -> None:
    small = Case(
        "small",
        [("Conv", "x w", "c", {"pads": [1, 1, 1, 1]}), ("Reshape", "c s", "y", {})],
        constants={"w": floats(2, 4, 3, 3), "s": np.array([0, -1], np.int64)},
    )
    whole = bytearray(model_of(small).SerializeToString())
    for _ in range(150):
        data = bytearray(whole)
        for place in _random.integers(0, len(data), 3):
            data[place] = _random.integers(0, 256)
        (tmp_path / "model.onnx").write_bytes(data)
        with contextlib.suppress(dsconv.errors.DSConvError):
            dsconv.from_onnx(tmp_path / "model.onnx")


def external(folder: Path, location: str, **more: Any) -> Path:
    """Write a model whose weight is in another file."""
    weight = floats(8, 4, 3, 3)
    model = model_of(Case("external", [("Conv", "x w", "y", {})], constants={"w": weight}))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_other_files_are_read_from_the_folder_of_the_model(tmp_path: Path) -> None:
    weight = floats(8, 4, 3, 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"head" + weight.tobytes() + b"tail")
    net = dsconv.from_onnx(external(tmp_path, "data/w.bin", offset=4, length=weight.nbytes))
    assert any(torch.equal(p, torch.from_numpy(weight)) for p in net.parameters())


def test_weights_outside_of_the_folder_of_the_model_are_not_read(tmp_path: Path) -> None:
    outside, folder = tmp_path / "w.bin", tmp_path / "model"
    outside.write_bytes(floats(8, 4, 3, 3).tobytes())
    folder.mkdir()
    (folder / "link.bin").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    for location in (str(outside), "../w.bin", "a/../../w.bin", "link.bin", "up/w.bin", "", "w\0.bin"):
        with pytest.raises(
            FileFormatError, match=r"in the folder of the model or below|a link to outside the folder of the model"
        ):
            dsconv.from_onnx(external(folder, location))


def test_weights_that_are_missing_or_too_short_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"'w' are in 'none.bin', which does not exist"):
        dsconv.from_onnx(external(tmp_path, "none.bin"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="which does not exist"):
        dsconv.from_onnx(external(tmp_path, "pipe"))
    (tmp_path / "w.bin").write_bytes(b"1234")
    for more in ({}, {"length": 1152}, {"offset": -4}, {"offset": "x"}, {"offset": 8}):
        with pytest.raises(FileFormatError, match="tensor 'w'"):
            dsconv.from_onnx(external(tmp_path, "w.bin", **more))


def test_a_constant_that_does_not_fit_the_memory_is_refused(tmp_path: Path) -> None:
    case = Case(
        "bomb", [("ConstantOfShape", "s", "c", {}), ("Add", "x c", "y", {})], constants={"s": np.array([1 << 40])}
    )
    with pytest.raises(ModelError, match=r"a constant of [0-9,]+ elements"):
        imported(model_of(case), tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(dsconv.errors.MissingExtraError, match=r"dsconv\[onnx\]"):
        dsconv.from_onnx(tmp_path / "model.onnx")


# Descriptions in files.


@pytest.fixture(scope="module")
def described(net: Any) -> dict[str, Any]:
    found = networks.describe(net)
    assert found is not None
    return found


def test_a_description_is_that_of_the_network_it_makes(described: dict[str, Any], net: Any, x: torch.Tensor) -> None:
    made = networks.build(described)
    assert networks.describe(made) == described
    assert made.code == net.code
    made.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(made(x), net(x))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("nodes", [["call_function", "a", "os.system", ["true"], {}], ["output", "output", "output", [None], {}]]),
        ("nodes", [["call_function", "a", "torch.load", ["x"], {}]]),
        ("nodes", [["placeholder", "x", "x=print(1)", [], {}], ["output", "output", "output", [None], {}]]),
        ("nodes", [["placeholder", "x", "x", [], {}], ["call_module", "a", "stem", [], {}]]),
        ("nodes", [["call_method", "x", "x", [], {}]]),
        ("nodes", [["output", "output", "output", [{"node": "later"}], {}]]),
        ("nodes", "x"),
        ("modules", {"a'); print(1": ["Linear", {"in_features": 1, "out_features": 1, "bias": True}]}),
        ("modules", {"a": ["Sequential", {}]}),
        ("modules", {"a": ["Linear", {"in_features": 1, "out_features": 1, "device": "cpu"}]}),
        ("modules", {"forward": ["Linear", {"in_features": 1, "out_features": 1}]}),
        ("modules", {"class": ["Linear", {"in_features": 1, "out_features": 1}]}),
        ("constants", {"a": ["float8", [1]]}),
        ("constants", {"a": ["float32", [-1]]}),
    ],
)
def test_a_description_of_anything_else_is_refused(part: str, value: Any, described: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="describes no network"):
        networks.build({**described, part: value})


def test_a_file_whose_description_is_larger_than_its_tensors_is_refused(net: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    from dsconv.io.checkpoint import checksum, write

    with safe_open(dsconv.save(dsconv.quantize(net), tmp_path / "net.safetensors"), "pt") as file:
        entries, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, change in (
        ("large", {"modules": {"big": ["Linear", {"in_features": 1 << 20, "out_features": 1 << 20}]}}),
        ("other", {"nodes": [["output", "output", "output", [None], {}]], "modules": {}}),
    ):
        entries["network"] = json.dumps({**json.loads(entries["network"]), **change})
        entries["checksum"] = checksum(entries, tensors)
        write(tmp_path / f"{name}.safetensors", tensors, entries)
        with pytest.raises(FileFormatError):
            dsconv.load(tmp_path / f"{name}.safetensors")


# Round trips.


def test_a_float_export_of_a_network_comes_back_with_its_layers(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
            self.body = nn.Conv2d(32, 32, 3, padding=1)
            self.fc = nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.stem(x)
            x = x + F.silu(self.body(x))
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    qnet, x = dsconv.quantize(Residual().eval()), torch.randn(3, 3, 8, 8)
    preprocessed = dsconv.zoo.set_preprocess
    preprocessed(qnet, dsconv.data.Preprocess(resize=8, mean=(0.5,)))
    again = dsconv.from_onnx(dsconv.export_onnx(qnet, x, tmp_path / "float.onnx", "float"))
    assert {"stem.0", "body", "fc"} <= {name for name, _ in again.named_modules()}
    assert dsconv.zoo.preprocess_of(again) == dsconv.zoo.preprocess_of(qnet)
    simulated = dsconv.onnx.OnnxNetwork(tmp_path / "float.onnx")
    with torch.inference_mode():
        assert torch.allclose(again(x), simulated(x), atol=1e-5)


@pytest.mark.parametrize("style", ["qdq", "function"])
def test_a_quantized_export_of_our_own_computes_the_same(style: Any, tmp_path: Path) -> None:
    qnet = dsconv.quantize(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval())
    x = torch.randn(2, 3, 8, 8)
    path = dsconv.export_onnx(qnet, x, tmp_path / "net.onnx", style)
    again, wanted = dsconv.from_onnx(path), dsconv.onnx.OnnxNetwork(path)(x)
    with torch.inference_mode():
        # If sums differ in their last bits, a rounding may change.
        assert (again(x) - wanted).norm() < 0.02 * wanted.norm()
