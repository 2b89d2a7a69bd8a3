"""``dsconv.export_onnx``: a quantized network as an ONNX file, in the style that suits what is to read it."""

import json
import os
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dsconv.compilation.compiled import CompiledModel
from dsconv.conversion import ModelInfo, model_info
from dsconv.conversion.convert import swapped
from dsconv.config import QuantConfig
from dsconv.errors import ConfigError, ModelError, import_extra
from dsconv.files import replacing
from dsconv.nn import DSLayer
from dsconv.onnx.layers import DOMAIN, Floats, Functions, Integers, StandIn

Style = Literal["qdq", "function", "int8", "float"]
STYLES: tuple[str, ...] = get_args(Style)
OPSET = 21
"""The first with integers of 4 bits and scales of blocks."""
_LOWERINGS: dict[str, type[Integers]] = {"qdq": Integers, "function": Functions, "int8": Floats, "float": Floats}


def export_onnx(
    qmodel: nn.Module,
    example_input: Tensor,
    path: str | os.PathLike[str],
    style: Style = "qdq",
    *,
    opset: int = OPSET,
    force: bool = False,
) -> Path:
    path = Path(path)
    layers = {name: module for name, module in qmodel.named_modules() if isinstance(module, DSLayer)}
    model = _captured(qmodel, layers, example_input, opset)
    _lower(model, _LOWERINGS[style](layers))
    _write(model, path, _metadata(qmodel, layers, style))
    return path


def _captured(qmodel: nn.Module, layers: dict[str, DSLayer], x: Tensor, opset: int) -> Any:
    """The network in ONNX, with a node of its name for each layer."""
    stand_ins: dict[nn.Module, nn.Module] = {layer: StandIn(name, layer) for name, layer in layers.items()}
    model = swapped(qmodel, stand_ins, model_info(qmodel) or ModelInfo(QuantConfig()))
    example = x.new_zeros((2, *x.shape[1:]))  # a batch of one would be taken for a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["x"],
            output_names=["y"],
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            verbose=False,
        )
    assert program is not None
    return program.model


def _lower(model: Any, lowering: Integers) -> None:
    """Replace the nodes that stand for layers."""
    ir = lowering.op.ir
    graph = model.graph
    for node in [node for node in graph if node.domain == DOMAIN]:
        lowering.op.made.clear()
        padding = node.attributes.get("output_padding")
        y = lowering.layer(node.attributes["layer"].as_string(), node.inputs[0], padding and padding.as_ints())
        old = node.outputs[0]
        y.type, y.shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], lowering.op.made, [old], [y])
    for value in lowering.op.initializers:
        graph.register_initializer(value)
    for function in lowering.functions():
        model.functions[function.identifier()] = function
    if not model.functions:
        model.opset_imports.pop(DOMAIN)


def _write(model: Any, path: Path, entries: dict[str, str]) -> None:
    ir, onnx = import_extra("onnx", "onnx_ir"), import_extra("onnx", "onnx")
    model.metadata_props.clear()
    model.metadata_props.update(entries)
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "dsconv", metadata.version("dsconv")
    for node in model.graph:
        node.metadata_props.clear()
        node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto, full_check=True)
    with replacing(path) as beside:
        beside.write_bytes(proto.SerializeToString())


def _metadata(qmodel: nn.Module, layers: dict[str, DSLayer], style: str) -> dict[str, str]:
    return {"dsconv.version": metadata.version("dsconv"), "dsconv.style": style}
