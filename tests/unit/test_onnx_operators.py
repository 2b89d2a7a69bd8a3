"""Each operator that ``from_onnx`` supports has the results of ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx_cases import Case, expected, imported, input_of, model_of, same

from dsconv.onnx.importing import OPERATORS

_random = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return _random.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def one(
    kind: str,
    shape: tuple[int, ...] = (2, 4, 6, 6),
    *,
    opset: int = 18,
    label: str = "",
    dtype: Any = np.float32,
    constants: dict[str, np.ndarray] | None = None,
    inputs: str = "",
    **attributes: Any,
) -> Case:
    """Return a case of one node, whose inputs are ``x`` and the constants."""
    constants = constants or {}
    names = inputs or " ".join(["x", *constants])
    return Case(f"{kind}{label}", [(kind, names, "y", attributes)], shape, constants, opset, dtype)


_W = floats(8, 4, 3, 3)
_UNARY = (
    "Relu Sigmoid Tanh Softplus Softsign Mish HardSwish Erf LeakyRelu Elu Celu Selu ThresholdedRelu HardSigmoid Abs "
    "Neg Exp Floor Ceil Round Sign Sin Cos Identity Dropout IsNaN GlobalAveragePool GlobalMaxPool Softmax LogSoftmax"
)
_REDUCTIONS = "ReduceMean ReduceSum ReduceMax ReduceMin ReduceLogSumExp ReduceL2 ReduceL1 ReduceSumSquare ReduceProd"

CASES: list[Case] = [
    *(one(kind) for kind in _UNARY.split()),
    *(one(kind, label="(3)", opset=11, axis=2) for kind in ("Softmax", "LogSoftmax")),
    *(one(kind, label=", default of opset 11", opset=11) for kind in ("Softmax", "LogSoftmax")),
    one("Gelu", opset=20),
    one("Gelu", opset=20, label="(tanh)", approximate="tanh"),
    one("HardSigmoid", label="(1/6)", alpha=1 / 6),
    one("Selu", label="(other)", alpha=1.5, gamma=2.0),
    *(
        Case(
            f"{kind} of positives",
            [("Abs", "x", "a", {}), ("Add", "a one", "b", {}), (kind, "b", "y", {})],
            constants={"one": np.float32([1.0])},
        )
        for kind in ("Log", "Sqrt", "Reciprocal")
    ),
    one("Clip", constants={"low": np.float32(-0.5), "high": np.float32(0.25)}),
    one("Clip", label="(0, 6)", constants={"low": np.float32(0), "high": np.float32(6)}),
    one("Clip", label="(low)", constants={"low": np.float32(0.1)}),
    one("Clip", label="(opset 6)", opset=9, min=0.0, max=6.0),
    one("Clip", label="(no bounds)", opset=9),
    # Layers.
    one("Conv", constants={"w": _W}),
    one(
        "Conv",
        label="(all)",
        constants={"w": floats(8, 2, 3, 3), "b": floats(8)},
        group=2,
        strides=[2, 1],
        dilations=[1, 2],
        pads=[1, 2, 1, 2],
    ),
    one("Conv", label="(uneven)", constants={"w": _W, "b": floats(8)}, pads=[0, 1, 2, 0]),
    *(
        one(
            "Conv",
            (2, 4, n, n + 1),
            label=f"({auto}, {stride}, {n})",
            constants={"w": floats(8, 4, k, k)},
            auto_pad=auto,
            strides=[stride, stride],
        )
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for stride in (1, 2)
        for n, k in ((6, 3), (7, 2))
    ),
    one("Conv", (2, 4, 9), label="(1d)", constants={"w": floats(8, 4, 3)}, pads=[1, 0]),
    one(
        "Conv",
        (2, 4, 5, 5, 5),
        label="(3d)",
        constants={"w": floats(8, 4, 3, 3, 3)},
        auto_pad="SAME_UPPER",
        strides=[2] * 3,
    ),
    Case(
        "Conv of a computed weight",
        [("Mul", "x two", "t", {}), ("Slice", "t z four a", "s", {}), ("Conv", "x s", "y", {"kernel_shape": [3, 3]})],
        shape=(2, 4, 6, 6),
        constants={"two": np.float32(2), "z": ints(0, 0), "four": ints(3, 3), "a": ints(2, 3)},
    ),
    Case(
        "Pad and Conv",
        [("Pad", "x p", "t", {}), ("Conv", "t w", "y", {"pads": [1, 0, 1, 0]})],
        constants={"w": _W, "p": ints(0, 0, 1, 0, 0, 0, 0, 2)},
    ),
    one("ConvTranspose", constants={"w": floats(4, 8, 3, 3)}),
    one(
        "ConvTranspose",
        label="(all)",
        constants={"w": floats(4, 2, 3, 3), "b": floats(4)},
        group=2,
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        output_padding=[1, 0],
    ),
    one("ConvTranspose", label="(uneven)", constants={"w": floats(4, 2, 3, 3)}, strides=[2, 2], pads=[0, 1, 1, 0]),
    one("ConvTranspose", label="(uneven, small)", constants={"w": floats(4, 2, 3, 3)}, pads=[0, 0, 2, 1]),
    one("ConvTranspose", label="(SAME)", constants={"w": floats(4, 2, 3, 3)}, strides=[2, 2], auto_pad="SAME_UPPER"),
    one(
        "ConvTranspose",
        label="(SAME_LOWER)",
        constants={"w": floats(4, 2, 4, 3)},
        strides=[2, 2],
        auto_pad="SAME_LOWER",
    ),
    one("Gemm", (3, 5), constants={"w": floats(5, 7)}),
    one("Gemm", (3, 5), label="(all)", constants={"w": floats(7, 5), "c": floats(7)}, transB=1, alpha=0.5, beta=2.0),
    one("Gemm", (3, 5), label="(scalar)", constants={"w": floats(5, 7), "c": floats(1)}),
    one("Gemm", (5, 3), label="(transA)", constants={"w": floats(5, 7), "c": floats(3, 7)}, transA=1, beta=0.5),
    one("MatMul", (2, 3, 5), constants={"w": floats(5, 7)}),
    one("MatMul", (5, 3), label="(left)", constants={"w": floats(7, 5)}, inputs="w x"),
    one("BatchNormalization", constants={"s": floats(4), "b": floats(4), "m": floats(4), "v": abs(floats(4))}),
    one(
        "BatchNormalization",
        (3, 4),
        label="(2d)",
        constants={"s": floats(4), "b": floats(4), "m": floats(4), "v": abs(floats(4))},
        epsilon=0.1,
    ),
    one("InstanceNormalization", constants={"s": floats(4), "b": floats(4)}),
    one("GroupNormalization", constants={"s": floats(2), "b": floats(2)}, num_groups=2),
    one("GroupNormalization", label="(21)", opset=21, constants={"s": floats(4), "b": floats(4)}, num_groups=2),
    one("LayerNormalization", constants={"s": floats(6), "b": floats(6)}),
    one("LayerNormalization", label="(2 axes)", constants={"s": floats(6, 6)}, axis=-2),
    one("LRN", size=3),
    one("PRelu", constants={"s": floats(4, 1, 1)}),
    one("PRelu", label="(last axis)", constants={"s": floats(6)}),
    one("PRelu", label="(one)", constants={"s": floats(1)}),
    one("LpNormalization", axis=1),
    # Arithmetic.
    *(
        one(kind, constants={"c": floats(4, 1, 1)})
        for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
    ),
    *(one(kind, label="(number)", constants={"c": np.float32(1.5)}) for kind in ("Add", "Sub", "Mul", "Div")),
    *(
        one(kind, label="(number first)", constants={"c": np.float32(1.5)}, inputs="c x")
        for kind in ("Add", "Sub", "Mul", "Div")
    ),
    one("Pow", constants={"c": np.float32(2)}),
    one("Mod", dtype=np.int64, constants={"c": ints(3)}),
    one("Div", label="(whole)", dtype=np.int64, constants={"c": ints(2)}),
    *(one(kind, constants={"c": np.float32(0)}) for kind in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual")),
    one("Equal", dtype=np.int64, constants={"c": ints(1)}),
    Case(
        "Where, And, Or, Xor, Not",
        [
            ("Greater", "x c", "a", {}),
            ("Less", "x d", "b", {}),
            ("And", "a b", "e", {}),
            ("Or", "a b", "f", {}),
            ("Xor", "e f", "g", {}),
            ("Not", "g", "h", {}),
            ("Where", "h x c", "y", {}),
        ],
        constants={"c": np.float32(0), "d": np.float32(0.5)},
    ),
    one("Cast", to=7),
    one("Cast", label="(double)", to=11),
    one("CumSum", constants={"a": np.int64(1)}),
    one("Einsum", (2, 4, 6), inputs="x w", constants={"w": floats(6, 3)}, equation="nct,td->ncd"),
    one("Trilu", (2, 5, 5), upper=0),
    # Shapes.
    one("Reshape", constants={"s": ints(0, -1)}),
    one("Reshape", label="(more)", constants={"s": ints(0, 2, 2, 6, 6)}),
    one("Flatten"),
    one("Flatten", label="(2)", axis=2),
    one("Transpose", perm=[0, 2, 3, 1]),
    one("Transpose", label="(all)"),
    one("Unsqueeze", constants={"a": ints(-1, 1)}),
    one("Squeeze", (2, 1, 6, 6), constants={"a": ints(1)}),
    one("Concat", constants={"c": floats(2, 3, 6, 6)}, axis=1),
    Case(
        "Split",
        [("Split", "x s", "a b", {"axis": 1}), ("Concat", "b a", "y", {"axis": 1})],
        constants={"s": ints(1, 3)},
    ),
    Case("Split(equal)", [("Split", "x", "a b", {"axis": 1, "num_outputs": 2}), ("Sub", "a b", "y", {})]),
    one("Slice", constants={"s": ints(1, -5), "e": ints(1 << 62, -1), "a": ints(1, -2)}),
    one(
        "Slice",
        label="(steps)",
        constants={"s": ints(0, 5), "e": ints(6, -(1 << 62)), "a": ints(2, 3), "t": ints(2, -2)},
    ),
    one("Slice", label="(opset 9)", opset=9, starts=[1], ends=[3], axes=[1]),
    one("Gather", constants={"i": ints(2, 0, 1)}, axis=1),
    one("Gather", label="(one)", constants={"i": np.int64(-1)}, axis=2),
    one("Gather", label="(negative, 2d)", constants={"i": np.int64([[0, -1], [1, 2]])}, axis=1),
    one("GatherElements", constants={"i": _random.integers(-4, 4, (2, 4, 6, 6))}, axis=1),
    one("Expand", (2, 1, 1, 6), constants={"s": ints(4, 3, 1)}),
    one("Tile", constants={"r": ints(1, 2, 1, 3)}),
    one("Pad", constants={"p": ints(0, 0, 1, 2, 0, 0, 3, 0), "v": np.float32(0.5)}),
    one("Pad", label="(axes)", constants={"p": ints(1, 2), "v": np.float32(0), "a": ints(-1)}),
    one("Pad", label="(cut)", constants={"p": ints(0, 0, -1, 0, 0, 0, 0, -2)}),
    *(
        one("Pad", label=f"({mode})", constants={"p": ints(0, 0, 0, 2, 0, 0, 0, 1)}, mode=mode)
        for mode in ("reflect", "edge")
    ),
    one("Pad", label="(opset 9)", opset=9, pads=[0, 0, 1, 1, 0, 0, 1, 1]),
    *(one("DepthToSpace", label=f"({mode})", blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    one("SpaceToDepth", blocksize=2),
    # Pools.
    one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    one("MaxPool", label="(ceil)", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    one("MaxPool", label="(dilated)", kernel_shape=[2, 2], dilations=[2, 2]),
    *(
        one(kind, (2, 4, 7, 6), label=f"({how})", kernel_shape=[3, 3], strides=[2, 2], **attributes)
        for kind in ("MaxPool", "AveragePool")
        for how, attributes in (
            ("after", {"pads": [0, 0, 1, 1]}),
            ("before", {"pads": [1, 1, 0, 0]}),
            ("upper", {"auto_pad": "SAME_UPPER"}),
            ("lower", {"auto_pad": "SAME_LOWER"}),
        )
    ),
    one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    one("AveragePool", label="(counts)", kernel_shape=[3, 3], pads=[1, 0, 0, 1], count_include_pad=1),
    # Resizing.
    *(
        one(
            "Resize",
            (2, 3, 5, 6),
            label=f"({mode}, {coordinates}, {how})",
            inputs=inputs,
            constants=constants,
            mode=mode,
            coordinate_transformation_mode=coordinates,
        )
        for mode in ("nearest", "linear")
        for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for how, inputs, constants in (
            ("twice", "x _ f", {"f": np.float32([1, 1, 2, 2])}),
            ("half as large again", "x _ f", {"f": np.float32([1, 1, 1.5, 1.5])}),
            ("sizes", "x _ _ s", {"s": ints(2, 3, 3, 7)}),
        )
    ),
    *(
        one(
            "Resize",
            (2, 3, 5, 6),
            label=f"({rounding})",
            inputs="x _ f",
            constants={"f": np.float32([1, 1, 0.6, 2.5])},
            coordinate_transformation_mode="asymmetric",
            nearest_mode=rounding,
        )
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    one(
        "Resize", (2, 3, 5, 6), label="(cubic)", inputs="x _ f", constants={"f": np.float32([1, 1, 2, 2])}, mode="cubic"
    ),
    one("Resize", (2, 3, 5, 6), label="(axes)", inputs="x _ f", constants={"f": np.float32([2, 3])}, axes=[2, 3]),
    one("Upsample", opset=9, constants={"f": np.float32([1, 1, 2, 2])}),
    one("GridSample", (1, 3, 5, 6), opset=20, constants={"g": np.clip(floats(1, 4, 4, 2), -1, 1)}),
    Case(
        "Resize to the size of another",
        [
            ("MaxPool", "x", "p", {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Shape", "x", "s", {}),
            ("Slice", "s a b", "hw", {}),
            ("Shape", "p", "t", {}),
            ("Slice", "t z a", "nc", {}),
            ("Concat", "nc hw", "all", {"axis": 0}),
            ("Resize", "p _ _ all", "r", {"mode": "nearest"}),
            ("Add", "r x", "y", {}),
        ],
        constants={"z": ints(0), "a": ints(2), "b": ints(4)},
    ),
    Case(
        "Resize by a ratio of sizes",
        [
            ("MaxPool", "x", "p", {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Shape", "x", "s", {}),
            ("Shape", "p", "t", {}),
            ("Cast", "s", "sf", {"to": 1}),
            ("Cast", "t", "tf", {"to": 1}),
            ("Div", "sf tf", "q", {}),
            ("Slice", "q a b", "hw", {}),
            ("Concat", "ones hw", "all", {"axis": 0}),
            ("Resize", "p _ all", "r", {"mode": "linear"}),
            ("Add", "r x", "y", {}),
        ],
        constants={"ones": np.float32([1, 1]), "a": ints(2), "b": ints(4)},
    ),
    # Reductions.
    *(
        one(kind, opset=13, axes=[2, 3], keepdims=keep, label=f"({keep})")
        for kind in _REDUCTIONS.split()
        for keep in (0, 1)
        if kind != "ReduceSum"
    ),
    one("ReduceSum", constants={"a": ints(-1)}, keepdims=0),
    one("ReduceMean", label="(all)"),
    Case("ReduceLogSum", [("Abs", "x", "a", {}), ("ReduceLogSum", "a", "y", {"axes": [1]})], opset=13),
    one("ArgMax", axis=1, keepdims=0),
    one("ArgMin", axis=-1),
    Case(
        "TopK",
        [("TopK", "x k", "v i", {"axis": 1}), ("Cast", "i", "f", {"to": 1}), ("Add", "v f", "y", {})],
        constants={"k": ints(2)},
    ),
    # Sizes and constants.
    Case(
        "Shape and Reshape",
        [
            ("Shape", "x", "s", {}),
            ("Gather", "s z", "n", {}),
            ("Unsqueeze", "n z0", "u", {}),
            ("Concat", "u m", "t", {"axis": 0}),
            ("Reshape", "x t", "y", {}),
        ],
        constants={"z": np.int64(0), "z0": ints(0), "m": ints(-1)},
    ),
    Case(
        "arithmetic of sizes",
        [
            ("Shape", "x", "s", {}),
            ("Gather", "s i", "h", {}),
            ("Div", "h two", "half", {}),
            ("Mul", "half two", "even", {}),
            ("Sub", "even one", "e", {}),
            ("Slice", "x one e i", "y", {}),
        ],
        shape=(2, 4, 7, 6),
        constants={"i": ints(2), "two": ints(2), "one": ints(1)},
    ),
    Case(
        "Size, Range and ConstantOfShape",
        [
            ("Shape", "x", "s", {}),
            ("ConstantOfShape", "s", "c", {}),
            ("Size", "x", "n", {}),
            ("Cast", "n", "f", {"to": 1}),
            ("Gather", "s i", "w", {}),
            ("Range", "z w one", "r", {}),
            ("Cast", "r", "rf", {"to": 1}),
            ("Add", "c rf", "d", {}),
            ("Add", "d f", "e", {}),
            ("Add", "e x", "y", {}),
        ],
        constants={"i": np.int64(3), "z": np.int64(0), "one": np.int64(1)},
    ),
    Case(
        "Expand to a size",
        [
            ("Shape", "x", "s", {}),
            ("Equal", "s minus", "e", {}),
            ("Where", "e s s", "t", {}),
            ("Expand", "c t", "d", {}),
            ("Add", "d x", "y", {}),
        ],
        constants={"c": floats(1, 4, 1, 1), "minus": ints(-1, -1, -1, -1)},
    ),
    Case(
        "constants of nodes",
        [
            ("Constant", "", "a", {"value_float": 2.0}),
            ("Constant", "", "b", {"value_floats": [1.0] * 6}),
            ("Mul", "a b", "c", {}),
            ("Add", "x c", "y", {}),
        ],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_computes_what_it_does_in_onnx_runtime(case: Case, tmp_path: Path) -> None:
    model, x = model_of(case), input_of(case)
    with torch.no_grad():
        same(imported(model, tmp_path)(x), expected(model, x=x))


def test_every_operator_of_the_table_has_a_case() -> None:
    tested = {kind for case in CASES for kind, *_ in case.nodes}
    refused = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
    elsewhere = {"QuantizeLinear", "DequantizeLinear", "Swish"}
    assert set(OPERATORS) - tested == refused | elsewhere
