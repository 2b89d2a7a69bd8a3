"""``dsconv.from_onnx``: imports an ONNX file as a PyTorch network."""

import json
import math
import os
from collections import defaultdict
from typing import Any

import numpy as np
from torch import fx

from dsconv.conversion.preparation import set_preprocess
from dsconv.data.preprocess import Preprocess
from dsconv.errors import DSConvError, ModelError, first_line, one_line
from dsconv.files import as_path
from dsconv.onnx.importing import (
    activations,
    arithmetic,
    layers,
    patterns,
    pooling,
    quantized,
    reductions,
    resizing,
    shapes,
    sizes,
)
from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.network import ImportedNetwork
from dsconv.onnx.importing.reading import Source, broken, read
from dsconv.onnx.importing.table import ON_SIZES, OPERATORS
from dsconv.onnx.importing.values import Sizes, Unsupported, Value

__all__ = ["OPERATORS", "from_onnx"]

# Each registers its operators in the table.
_PARTS = (activations, arithmetic, layers, pooling, quantized, reductions, resizing, shapes, sizes)
_DOMAINS = ("", "ai.onnx")
_SHOWN = 3
_OF_RUN_TIME = {
    "If": "branches",
    "Loop": "loops",
    "Scan": "loops",
    "LSTM": "recurrent layers",
    "GRU": "recurrent layers",
    "RNN": "recurrent layers",
}
# Constants of these are computed by their own functions, or when the network runs.
_FOLDS_ITSELF = {
    *("ConstantOfShape", "QuantizeLinear", "DequantizeLinear"),
    *("Range", "Pad", "Resize", "Upsample", "ConvTranspose"),
}
# Operators whose outputs have the shape of their broadcast inputs.
_BROADCAST = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Erf", "Tanh", "Sigmoid", "Relu", "Clip"),
    *("Softmax", "LayerNormalization", "HardSigmoid", "HardSwish", "Cast", "Where", "Min", "Max", "Gelu", "Softplus"),
    *("BatchNormalization", "LeakyRelu", "Reciprocal"),
}
# Operators whose outputs have the rank of the first input.
_OF_RANK = {
    *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Split"),
    *("Pad", "Resize", "Upsample", "InstanceNormalization", "GroupNormalization", "DepthToSpace", "SpaceToDepth"),
    *("PRelu", "LRN", "Tile"),
}


def from_onnx(path: str | os.PathLike[str]) -> ImportedNetwork:
    """Import the network of an ONNX file, in evaluation mode, for :func:`dsconv.quantize` and all other functions.

    Convolutions and linear layers become ``torch.nn`` layers with the names from the file. BatchNorm is kept. Any batch
    size is accepted, even if the file has a fixed one. Outputs equal those of ONNX Runtime up to float32 rounding.
    docs/onnx.md lists the supported operators and their conversion.

    Args:
        path: path of the file. External weights are read only from its folder and the folders below.

    Returns:
        A graph module. Its inputs have the names and order of the file; it returns one tensor, or a tuple of them in
        the order of the file.

    Raises:
        FileFormatError: it is not an ONNX file, is incomplete, or its weights are missing or outside its folder.
        ModelError: it has operators that are not supported, or an opset below 7.
        MissingExtraError: the extra ``dsconv[onnx]`` is not installed.
        OSError: it cannot be read.

    >>> import dsconv, tempfile, torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = dsconv.export_onnx(dsconv.quantize(net), torch.zeros(1, 3, 8, 8), folder + "/net.onnx", "float")
    ...     again = dsconv.from_onnx(path)
    >>> again(torch.zeros(5, 3, 16, 16)).shape
    torch.Size([5, 64, 12, 12])
    """
    place = as_path(path)
    try:
        source = read(place)
        _check_operators(source)
        network = _built(source)
        patterns.join(network)
        network.eval()  # including the modules made by the patterns
        if (stated := source.metadata.get("dsconv.preprocess")) is not None:
            set_preprocess(network, Preprocess(**json.loads(stated)))
    except (DSConvError, OSError):
        raise
    except MemoryError:
        raise ModelError(f"{place}: it needs more memory than is available") from None
    except Exception as error:  # inconsistent names, attributes and tensors may raise anything
        raise broken(place, f"{type(error).__name__}: {first_line(error)}") from error
    return network


def _check_operators(source: Source) -> None:
    """Raise an error that lists all operators that are not in the table."""
    wrong: dict[str, list[str]] = defaultdict(list)
    for node in source.graph.node:
        if node.domain not in _DOMAINS or node.op_type not in OPERATORS:
            kind = str(node.op_type) if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
            wrong[kind].append(node.name or (node.output[0] if node.output else ""))
    if not wrong:
        return
    found = "; ".join(f"{kind} ({_shown(names)})" for kind, names in sorted(wrong.items()))
    why = sorted({_OF_RUN_TIME[kind] for kind in wrong if kind in _OF_RUN_TIME})
    domains = sorted({kind.rpartition(".")[0] for kind in wrong if "." in kind})
    hint = f"; networks with {' and '.join(why)} are not supported" if why else ""
    hint += f"; export without the operators of {', '.join(domains)}" if domains else ""
    raise ModelError(f"{source.path}: operators that are not supported: {one_line(found, 1200)}{one_line(hint, 300)}")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _built(source: Source) -> ImportedNetwork:
    builder = Builder(source)
    wrong: dict[str, list[str]] = defaultdict(list)
    failed: set[str] = set()
    for node in source.graph.node:
        if failed.intersection(node.input):
            # Its input is not available.
            failed.update(node.output)
            continue
        builder.node = node
        try:
            results = _added(builder)
        except Unsupported as error:
            wrong[f"{node.op_type}: {error}"].append(node.name or node.output[0])
            failed.update(node.output)
            continue
        except (DSConvError, MemoryError):
            raise
        except Exception as error:
            what = f"node {node.name!r} ({node.op_type}): {type(error).__name__}: {first_line(error)}"
            raise broken(source.path, what) from error
        for name, value in zip(node.output, results, strict=False):
            builder.remember(name, value)
    if wrong:
        found = "; ".join(f"{why} ({_shown(names)})" for why, names in wrong.items())
        raise ModelError(f"{source.path}: nodes that are not supported: {one_line(found, 1200)}")
    try:
        return builder.finished([builder.value(output.name) for output in source.graph.output])
    except Unsupported as error:
        raise ModelError(f"{source.path}: its output: {error}") from None


def _broadcast(shapes: list[list[int | None] | None]) -> list[int | None] | None:
    """Return the broadcast shape of ``shapes``, None if one of them is unknown."""
    known = [shape for shape in shapes if shape is not None]
    rank = max(map(len, known), default=0)
    aligned: list[list[int | None]] = [[*[1] * (rank - len(shape)), *shape] for shape in known]
    sizes = [None if None in ns else next((n for n in ns if n != 1), 1) for ns in zip(*aligned, strict=True)]
    return sizes if len(known) == len(shapes) else None


def _added(builder: Builder) -> tuple[Value, ...]:
    """Return the outputs of the builder's node."""
    node, inputs = builder.node, [builder.value(name) for name in builder.node.input]
    given = [value for value in inputs if value is not None]
    constant = bool(given) and all(isinstance(value, np.ndarray) for value in given)
    if constant and node.op_type in ("Expand", "Tile"):
        builder.check_elements(max(1, given[0].size) * math.prod(builder.ints(given[1], "shape")))  # type: ignore[union-attr]
    folded = builder.fold() if constant and node.op_type not in _FOLDS_ITSELF else None
    if folded is not None:
        return tuple(folded)
    attributes = builder.attributes()
    result: Any = NotImplemented
    if any(isinstance(value, Sizes) for value in given) and node.op_type in ON_SIZES:
        result = ON_SIZES[node.op_type](builder, attributes, *inputs)
    if result is NotImplemented:
        led = any(builder.leads(value) for value in given)
        result = OPERATORS[node.op_type](builder, attributes, *inputs)
        for value in result if isinstance(result, tuple) else (result,):
            # Most operators keep the batch dimension; those that do not mark it.
            if isinstance(value, fx.Node) and "onnx_leads" not in value.meta:
                builder.lead(value, led)
            if isinstance(value, fx.Node) and node.op_type in _BROADCAST and builder.rank(value) is None:
                builder.shaped(value, _broadcast([builder.dims(part) for part in given]))
            if isinstance(value, fx.Node) and node.op_type in _OF_RANK and (rank := builder.rank(given[0])) is not None:
                builder.shaped(value, builder.dims(value) or [None] * rank)
    return result if isinstance(result, tuple) else (result,)
