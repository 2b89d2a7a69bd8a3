"""Small ONNX graphs: a case is nodes, constants and an input; ONNX Runtime computes the expected output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor

import dsconv


class Case(NamedTuple):
    """``nodes`` from the input ``x`` to the output ``y``, in the form ``(type, inputs, outputs, attributes)``."""

    name: str
    nodes: Sequence[tuple[str, str, str, dict[str, Any]]]
    shape: tuple[int, ...] = (2, 4, 6, 6)
    constants: dict[str, np.ndarray] = {}  # noqa: RUF012
    opset: int = 18
    dtype: Any = np.float32


def model_of(case: Case, *, fixed: bool = False, outputs: Sequence[str] = ("y",)) -> onnx.ModelProto:
    """Return the model of a case, with free batch and image sizes, or with those of ``shape``."""
    nodes = [
        helper.make_node(kind, inputs.split(), made.split(), name=f"{kind}_{place}", **attributes)
        for place, (kind, inputs, made, attributes) in enumerate(case.nodes)
    ]
    # An empty name stands for an omitted input.
    for node in nodes:
        node.input[:] = ["" if name == "_" else name for name in node.input]
    free = [size if fixed or dim == 1 else f"n{dim}" for dim, size in enumerate(case.shape)]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    graph = helper.make_graph(
        nodes,
        case.name,
        [helper.make_tensor_value_info("x", kind, free)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in case.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=9)


def input_of(case: Case, seed: int = 0) -> Tensor:
    """Return a random input."""
    generator = np.random.default_rng(seed)
    if np.dtype(case.dtype).kind in "iu":
        return torch.from_numpy(generator.integers(0, 4, case.shape).astype(case.dtype))
    return torch.from_numpy(generator.standard_normal(case.shape).astype(case.dtype))


def expected(model: onnx.ModelProto, **inputs: Tensor) -> list[np.ndarray]:
    """Return the outputs of ONNX Runtime for a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return found


def imported(model: onnx.ModelProto, folder: Path) -> Any:
    """Return the network of :func:`dsconv.from_onnx` for a model."""
    onnx.save(model, folder / "model.onnx")
    return dsconv.from_onnx(folder / "model.onnx")


def same(found: Any, wanted: Sequence[np.ndarray], tolerance: float = 2e-5) -> None:
    """Check that outputs match ONNX Runtime up to rounding."""
    outputs = found if isinstance(found, tuple) else (found,)
    assert len(outputs) == len(wanted)
    for got, right in zip(outputs, wanted, strict=True):
        assert tuple(got.shape) == right.shape
        assert got.numpy().dtype == right.dtype
        np.testing.assert_allclose(got.numpy(), right, rtol=tolerance, atol=tolerance)
