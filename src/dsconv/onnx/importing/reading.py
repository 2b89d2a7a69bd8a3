"""Reading of ONNX files; damaged ones, and those that refer to files outside their folder, are rejected."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsconv.errors import FileFormatError, ModelError, import_extra, one_line

OLDEST_OPSET = 7
_DOMAINS = ("", "ai.onnx")
# Tensors whose values shape inference may need are smaller.
_SMALL_BYTES = 4096
_EXTERNAL = 1  # TensorProto.EXTERNAL
_GET_AGAIN = "export or download it again"


@dataclass
class Source:
    """ONNX file without the bytes of its large tensors.

    Attributes:
        path: path of the file.
        graph: its graph, with functions of the file inlined.
        tensors: the stored tensors (``TensorProto``), by name.
        inputs: inputs of the graph that are not among ``tensors``.
        opset: version of the standard ONNX operators.
        shapes: shapes of values, by name, as far as known; an unknown size is None.
        metadata: metadata of the file.
    """

    path: Path
    graph: Any
    tensors: dict[str, Any]
    inputs: list[Any]
    opset: int
    shapes: dict[str, list[int | None]]
    metadata: dict[str, str]

    def array(self, tensor: Any) -> np.ndarray:
        """Return the values of a ``TensorProto``, from an external file if they are stored there.

        Raises:
            FileFormatError: they are missing, incomplete, or outside the folder of the file.
        """
        onnx = import_extra("onnx", "onnx")
        if tensor.data_location == _EXTERNAL:
            whole = type(tensor)()
            whole.CopyFrom(tensor)
            del whole.external_data[:]
            whole.data_location, whole.raw_data = 0, self._external(tensor)
            tensor = whole
        try:
            array: np.ndarray = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # of many kinds
            raise broken(self.path, f"tensor {tensor.name!r}: {error}") from None
        return array

    def _external(self, tensor: Any) -> bytes:
        """Return the bytes of a tensor in another file, which must be in the folder of this one or below."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        what = f"{self.path}: the weights {tensor.name!r} are in {name!r}"
        folder = self.path.resolve().parent
        place = folder / name
        if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise FileFormatError(f"{what}: expected a file in the folder of the model or below")
        if not place.resolve().is_relative_to(folder):
            raise FileFormatError(f"{what}, a link to outside the folder of the model: copy that file there")
        if not place.is_file():
            raise FileFormatError(f"{what}, which does not exist: put it beside the model")
        size = place.stat().st_size
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size - offset))
        except ValueError:
            raise broken(
                self.path, f"tensor {tensor.name!r}: its offset or length in {name!r} is not a number"
            ) from None
        if offset < 0 or length < 0 or offset + length > size:
            there = f"bytes {offset} to {offset + length} of {name!r}, which has {size}"
            raise broken(self.path, f"tensor {tensor.name!r}: its values are {there}")
        with place.open("rb") as file:
            file.seek(offset)
            data: bytes = file.read(length)
        return data


def broken(path: Path, reason: str) -> FileFormatError:
    """Return the error for a file with inconsistent contents."""
    return FileFormatError(f"{path}: {one_line(reason, 400)}: {_GET_AGAIN}")


def read(path: Path) -> Source:
    """Return the contents of an ONNX file.

    Raises:
        FileFormatError: it is not an ONNX file, or damaged.
        ModelError: its version, or one of its operators, is not supported.
        OSError: it cannot be read.
    """
    onnx = import_extra("onnx", "onnx")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an ONNX file, there is none")
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # of protobuf
        raise FileFormatError(f"{path}: not a complete ONNX file ({one_line(str(error), 200)}): {_GET_AGAIN}") from None
    if not model.graph.node or not model.graph.output:
        raise FileFormatError(f"{path}: not a complete ONNX file: it has no nodes, or no outputs: {_GET_AGAIN}")
    opset = _opset(path, model, onnx.defs.onnx_opset_version())
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: it has sparse weights, which are not supported: export it with dense ones")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    light = _without_large_tensors(onnx, model)
    if model.functions:
        try:
            light = import_extra("onnx", "onnx.inliner").inline_local_functions(light)
        except Exception as error:  # of several kinds
            raise ModelError(f"{path}: its functions cannot be inlined: {one_line(str(error), 400)}") from None
    inputs = [given for given in model.graph.input if given.name not in tensors]
    for value in [*inputs, *model.graph.output]:
        if value.type.WhichOneof("value") not in ("tensor_type", None):
            kind = value.type.WhichOneof("value").removesuffix("_type")
            raise ModelError(f"{path}: {value.name!r} is a {kind}: expected tensors as inputs and outputs")
    if not inputs:
        raise ModelError(f"{path}: it has no input: expected a network")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return Source(path, light.graph, tensors, inputs, opset, _shapes(onnx, light), metadata)


def input_types(path: Path) -> dict[str, tuple[np.dtype[Any], list[int | str]]]:
    """Return dtype and shape of each input of an ONNX file, by name; a free size is its name, or empty.

    Raises:
        FileFormatError, ModelError, OSError: as :func:`read`, or a shape is missing.
    """
    onnx, source = import_extra("onnx", "onnx"), read(path)
    types: dict[str, tuple[np.dtype[Any], list[int | str]]] = {}
    for given in source.inputs:
        kind = given.type.tensor_type
        if not kind.HasField("shape"):
            raise ModelError(f"{path}: it does not state the shape of its input {given.name!r}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        types[given.name] = dtype, [d.dim_value if d.dim_value > 0 else d.dim_param for d in kind.shape.dim]
    return types


def _opset(path: Path, model: Any, newest: int) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in _DOMAINS]
    if not versions:
        raise FileFormatError(f"{path}: it does not state its version of ONNX's operators: {_GET_AGAIN}")
    if not OLDEST_OPSET <= versions[0] <= newest:
        todo = "export it again with a newer one" if versions[0] < OLDEST_OPSET else "install a newer onnx"
        raise ModelError(f"{path}: opset: expected {OLDEST_OPSET} to {newest}, got {versions[0]}: {todo}")
    return int(versions[0])


def _without_large_tensors(onnx: Any, model: Any) -> Any:
    """Return a copy whose large tensors are inputs, since ONNX cannot process models above 2 GB."""
    light = onnx.ModelProto()
    light.ir_version = max(model.ir_version, 4)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "network"
    for field in ("node", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    known = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(given for given in model.graph.input if given.name not in known)
    for tensor in model.graph.initializer:
        if tensor.data_location != _EXTERNAL and tensor.ByteSize() <= _SMALL_BYTES:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _shapes(onnx: Any, model: Any) -> dict[str, list[int | None]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # shapes that it cannot infer are found without it, or cause an error of their own when needed
        graph = model.graph
    return dict(_known([*graph.value_info, *graph.input, *graph.output]))


def _known(values: list[Any]) -> Iterator[tuple[str, list[int | None]]]:
    for value in values:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            yield value.name, [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims]
