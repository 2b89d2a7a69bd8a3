"""``dsconv.export_onnx``: writes a quantized network as an ONNX file, in a style for the intended runtime."""

import json
import os
import re
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsconv.compilation.compiled import CompiledModel
from dsconv.compilation.frontends.graph import RETURNED
from dsconv.compilation.frontends.pytorch import exported, needs_one_batch, reason
from dsconv.conversion.convert import swapped
from dsconv.conversion.info import info_of
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.quantized import quantized_layers
from dsconv.conversion.statistics import noise, normalized, with_statistics
from dsconv.conversion.wrappers import unwrapped
from dsconv.data.inputs import Batch, Inputs, as_inputs, input_names, output_name
from dsconv.errors import ConfigError, MissingExtraError, ModelError, check_choice, import_extra
from dsconv.files import as_path, replacing
from dsconv.modes import check_evaluation_mode
from dsconv.names import OPSET, STYLES, Style
from dsconv.onnx import int8
from dsconv.onnx.graph import Nodes
from dsconv.onnx.layers import DOMAIN, Floats, Functions, Integers, StandIn
from dsconv.ops import arguments_of
from dsconv.structures import Way, paths_in

_OLDEST = {"qdq": OPSET, "function": OPSET, "int8": 18, "float": 18}
_LOWERINGS: dict[str, type[Integers]] = {"qdq": Integers, "function": Functions, "int8": Floats, "float": Floats}
# A protobuf message cannot be larger.
_ONE_BATCH = (
    "model {}: the batch size became a constant: its code turns it into a number, as len(x) does, or branches on it: "
    "use x.shape[0] or flatten(1)"
)
_LARGEST_BYTES = (1 << 31) - 1


def export_onnx(
    qmodel: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    style: Style = "qdq",
    *,
    images: Batch | None = None,
    full_range: bool = False,
    opset: int = OPSET,
    progress: bool = False,
) -> Path:
    """Write a quantized network to an ONNX file; an existing file is replaced when the new one is complete.

    =============  =============================================  ==================================================
    ``style``      weights                                        activations
    =============  =============================================  ==================================================
    ``qdq``        VQK as INT4 (INT8 above 4 bits) and KDS, made  block floating point in ONNX's own operators,
                   float by ``DequantizeLinear`` of blocks        value for value that of :mod:`dsconv.numerics`
    ``function``   the same                                       the same, layers and roundings being calls of the
                                                                  model-local functions ``dsconv::DSConv`` etc.
    ``int8``       rounded once more, to INT8 with one scale for  UINT8 with one scale for each tensor
                   each output channel, right on every processor
    ``float``      float32                                        float32
    =============  =============================================  ==================================================

    docs/onnx.md describes how runtimes execute them. Input ``x`` and output ``y`` have any batch size and the image
    size of the example. Several inputs have the names of the parameters of the model's ``forward``, with the path to a
    tensor within them, as ``image`` or ``extra_mask``; several outputs are named by the keys of a dictionary or the
    fields of a dataclass, and those of a tuple ``y_0``, ``y_1``. The file's metadata state style, bits, block sizes and
    conventions.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, in eval mode, float32. For a compiled model, its
            ``model`` is written.
        example_input: ``(N, ...)``, or other arguments, as for :func:`dsconv.compile`; only shapes and dtypes of
            tensors are used.
        path: path of the file, usually ``*.onnx``, in an existing folder.
        style: see above.
        images: for ``int8``, float32 inputs ``(N, ...)`` for determining the ranges of activations; labels are not
            needed. None uses noise, and BatchNorms whose output on that noise has the mean and the standard deviation
            of the training images. The noise is prepared with the preprocessing of the network
            (:func:`dsconv.zoo.preprocess_of`); a warning is given if that is unknown.
        full_range: for ``int8``, let weights use all of int8, which is more accurate by up to a bit. Such a file is
            correct where products of bytes are accumulated in 32 bits (x86 with VNNI, Arm); on other x86 processors,
            ONNX Runtime and OpenVINO add pairs of them in 16 bits, which may saturate. Without ``full_range``, no pair
            can.
        opset: ONNX opset, from 21 on, for ``int8`` and ``float`` from 18 on.
        progress: show the progress of the range measurement for ``int8`` on stderr, as :func:`dsconv.evaluate` does.

    Returns:
        The path.

    Raises:
        ConfigError: an argument has an invalid value.
        ModelError: the model has no quantized layer, is not for inference in float32, or cannot be exported; or
            ``int8`` needs ``images``, since the model has no BatchNorm.
        MissingExtraError: the extra ``dsconv[onnx]`` is not installed.
        OSError: the file cannot be written.

    >>> import dsconv, onnx, tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = onnx.load(export_onnx(dsconv.quantize(net), torch.zeros(1, 3, 8, 8), folder + "/net.onnx"))
    >>> [(t.name, list(t.dims)) for t in model.graph.initializer if "vqk" in t.name]
    [('0.vqk', [32, 27, 1, 1]), ('2.vqk', [64, 32, 3, 3])]
    """
    qmodel = unwrapped(qmodel)
    if isinstance(qmodel, CompiledModel):
        qmodel = qmodel.model
    path = as_path(path)
    inputs = as_inputs(example_input)
    _check(qmodel, inputs, style, images, full_range, opset)
    facts = _facts(qmodel, style)
    with replacing(path) as beside:
        if style == "int8":
            facts["dsconv.ranges"] = "noise and BatchNorm" if images is None else f"{len(images)} images"
            facts["dsconv.full_range"] = str(full_range).lower()
            _write_int8(qmodel, inputs, beside, images, full_range, opset, progress)
            model = import_extra("onnx", "onnx").load(beside)
        else:
            model = _exported(qmodel, inputs, style, opset)
        _write(model, beside, facts)
    return path


def _check(qmodel: nn.Module, inputs: Inputs, style: str, images: Batch | None, full_range: bool, opset: int) -> None:
    check_choice("style", style, STYLES)
    for module in ("onnx", "onnxscript", *["onnxruntime"] * (style == "int8")):
        import_extra("onnx", module)
    if not hasattr(torch.onnx, "ops"):
        raise MissingExtraError("onnx", "PyTorch 2.8 or newer")
    oldest, newest = _OLDEST[style], import_extra("onnx", "onnx").defs.onnx_opset_version()
    if not oldest <= opset <= newest:
        raise ConfigError(f"opset: expected {oldest} to {newest} for style {style!r}, got {opset}")
    if inputs.of_images:
        raise ConfigError(
            f"example_input: expected tensors (N, ...), got a list of images, {inputs}, and an ONNX file has a fixed "
            "number of inputs: export the part of the model that takes a batch"
        )
    kind = type(qmodel).__name__
    quantized_layers(qmodel)
    check_evaluation_mode(qmodel, "the export")
    half = [name for name, value in qmodel.named_parameters() if value.dtype != torch.float32 and value.numel()]
    if half or any(x.is_floating_point() and x.dtype != torch.float32 for x in inputs.tensors):
        what = f"parameter {half[0]!r}" if half else "the example_input"
        raise ModelError(f"model {kind}: {what} is not float32: call float() on model and input before the export")
    if images is not None and style != "int8":
        raise ConfigError(f"images: only style 'int8' takes the ranges of activations from them, got {style!r}")
    if images is not None and not isinstance(images, Tensor | Inputs):
        raise ConfigError(f"images: expected a tensor, dsconv.Inputs or None, got {type(images).__name__}")
    if not isinstance(full_range, bool):
        raise ConfigError(f"full_range: expected True or False, got {full_range!r}")
    if full_range and style != "int8":
        raise ConfigError(f"full_range: only style 'int8' rounds weights to int8, got style {style!r}")
    if images is not None and (not len(images) or _kinds(as_inputs(images)) != _kinds(inputs)):
        raise ConfigError(
            f"images: expected at least one of the shape of the example_input, {inputs}, got {as_inputs(images)}"
        )


def _kinds(inputs: Inputs) -> list[Any]:
    return [(x.shape[batched:], x.dtype) for x, batched in zip(inputs.tensors, inputs.batched, strict=True)]


def _facts(qmodel: nn.Module, style: str) -> dict[str, str]:
    """Return the metadata of the file."""
    settings: dict[str, list[str]] = {}
    for name, layer in quantized_layers(qmodel).items():
        settings.setdefault(layer.config.model_dump_json(), []).append(name)
    # The most common settings, and the layers with other ones.
    common, *others = sorted(settings, key=lambda text: -len(settings[text]))
    config = json.loads(common)
    facts = {"version": metadata.version("dsconv"), "style": style, "config": common}
    facts |= {name: str(config[name]) for name in ("weight_bits", "activation_bits", "activation_sign", "block_size")}
    if (preprocess := preprocess_of(qmodel)) is not None:
        facts["preprocess"] = preprocess.model_dump_json()
    facts["other_layers"] = json.dumps({name: json.loads(text) for text in others for name in settings[text]})
    return {f"dsconv.{name}": text for name, text in facts.items()}


def _write_int8(
    qmodel: nn.Module, inputs: Inputs, path: Path, images: Batch | None, full_range: bool, opset: int, progress: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def in_float(name: str, model: nn.Module) -> Path:
            file = Path(folder, f"{name}.onnx")
            _write(_exported(model, inputs, "float", opset), file, {})
            return file

        like = None
        if images is None:
            if not with_statistics(qmodel):
                raise ModelError(
                    f"images: expected some for style 'int8', since {type(qmodel).__name__} has no BatchNorm (or one "
                    "that was folded) to take the ranges of activations from: pass images, which need no labels"
                )
            preprocess = preprocess_of(qmodel)
            if preprocess is None:
                warnings.warn(
                    f"images: got none for style 'int8', and {type(qmodel).__name__} does not state its preprocessing: "
                    "its input is assumed to have mean 0 and variance 1. Pass images, which need no labels, or set "
                    "the preprocessing (dsconv.zoo.set_preprocess)",
                    stacklevel=3,
                )
            if len(inputs.tensors) > 1:
                raise ModelError(f"images: expected some for style 'int8' and a model of several inputs, {inputs}")
            images = noise(preprocess, inputs.tensors[0].shape[1:])
            like = in_float("like", normalized(qmodel, images))
        options: dict[str, Any] = {"full_range": full_range, "progress": progress}
        int8.quantize(in_float("network", qmodel), path, images, like=like, **options)


def _exported(qmodel: nn.Module, inputs: Inputs, style: str, opset: int) -> Any:
    """Return the network as an ``onnx.ModelProto``."""
    model, outputs = _captured(qmodel, inputs, opset)
    lowering = _LOWERINGS[style](quantized_layers(qmodel))
    _keep_pads(model.graph, lowering.op)
    _lower(model, lowering)
    _simplify_pools(model.graph)
    model.metadata_props.clear()
    model.metadata_props["dsconv.outputs"] = json.dumps(outputs)
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
    proto = import_extra("onnx", "onnx_ir").to_proto(model)
    del proto.graph.value_info[:]
    return proto


def _captured(qmodel: nn.Module, inputs: Inputs, opset: int) -> tuple[Any, list[Way]]:
    """Return the network as an ``onnx_ir.Model`` with a named node for each layer, and the path to each output."""
    stand_ins: dict[nn.Module, nn.Module] = {
        layer: StandIn(name, layer) for name, layer in quantized_layers(qmodel).items()
    }
    model = swapped(qmodel, stand_ins, info_of(qmodel))
    kind = type(qmodel).__name__
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # PyTorch's exporter would drop the operators that a branch on the batch size requires.
            captured = exported(model, inputs)
            _check_divisors(captured.program.graph)
            outputs = [way for way, _ in paths_in(captured.output, RETURNED)]
            names = input_names(inputs, qmodel)
            program = torch.onnx.export(
                captured.program,
                dynamo=True,
                input_names=names,
                output_names=[output_name(way, names) for way in outputs],
                opset_version=opset,
                verbose=False,
            )
    except ModelError:
        raise
    except Exception as error:
        if needs_one_batch(error):
            raise ModelError(_ONE_BATCH.format(kind)) from error
        shapes = " and ".join(str(tuple(x.shape)) for x in inputs.tensors)
        raise ModelError(f"the model cannot be exported for an input of {shapes}{reason(_cause(error))}") from error
    assert program is not None
    graph = program.model.graph
    ends = [graph.inputs[inputs.batched.index(True)], *graph.outputs]
    # Some of several outputs may have no batch dimension.
    of_one = [not value.shape or isinstance(value.shape[0], int) for value in ends]
    if of_one[0] or all(of_one[1:]):
        raise ModelError(_ONE_BATCH.format(kind))
    _name_batch(graph, inputs.batched.index(True))
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    return program.model, outputs


def _cause(error: BaseException) -> BaseException:
    """Return the original error without the advice on the exporter in which PyTorch wraps it."""
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    return error


def _check_divisors(graph: torch.fx.Graph) -> None:
    """Raise an error for averages with a divisor, which ONNX lacks and PyTorch's exporter drops silently."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.avg_pool2d.default, torch.ops.aten.avg_pool3d.default):
            divisor = arguments_of(node.target, node.args, node.kwargs)["divisor_override"]
            if divisor is not None:
                raise ModelError(
                    f"ONNX has no average pooling with a divisor_override, here {divisor}: leave it out, and multiply "
                    "the averages by a number"
                )


def _name_batch(graph: Any, batched: int) -> None:
    """Name the batch size ``batch`` in all shapes: an exported program uses PyTorch's symbol for it."""
    ir = import_extra("onnx", "onnx_ir")
    symbol = re.compile(rf"\b{re.escape(graph.inputs[batched].shape[0].value)}\b")
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else symbol.sub("batch", str(size.value)) for size in value.shape]
            value.shape = ir.Shape(sizes)


def _lower(model: Any, lowering: Integers) -> None:
    """Replace the nodes that represent layers by the operators of these layers."""
    graph, ir = model.graph, lowering.op.ir
    for node in [node for node in graph if node.domain == DOMAIN]:
        lowering.op.made.clear()
        padding = node.attributes.get("output_padding")
        y = lowering.layer(node.attributes["layer"].as_string(), node.inputs[0], padding and padding.as_ints())
        (old,) = node.outputs
        y.type, y.shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], lowering.op.made, [old], [y])
    for value in lowering.op.initializers:
        graph.register_initializer(value)
    for function in lowering.functions():
        function.graph.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    if not model.functions:
        model.opset_imports.pop(DOMAIN, None)


def _keep_pads(graph: Any, op: Nodes) -> None:
    """Add the axes to the padding before a maximum pool: without them, ONNX Runtime merges it into the pool.

    It does this also for zero padding, although a pool's own padding is below all values, and zeros are not.
    """
    for pool in graph:
        pad = pool.inputs[0].producer() if pool.op_type == "MaxPool" else None
        if pad is not None and pad.op_type == "Pad" and (len(pad.inputs) < 4 or pad.inputs[3] is None):
            pad.resize_inputs(4)
            pad.replace_input_with(3, op.shape(*range(len(pool.inputs[0].shape))))


def _simplify_pools(graph: Any) -> None:
    """Round the sizes of pools down where this makes no difference: ONNX's own evaluator fails for rounding up."""
    for node in graph:
        given = {
            name: node.attributes[name].value for name in ("kernel_shape", "strides", "pads") if name in node.attributes
        }
        if "ceil_mode" not in node.attributes or len(given) < 3 or node.attributes.get_int("ceil_mode", 0) == 0:
            continue
        sizes = zip(node.inputs[0].shape[2:], given["kernel_shape"], given["strides"], strict=True)
        dims, pads = len(given["strides"]), given["pads"]
        if all((n + pads[i] + pads[i + dims] - k) % s == 0 for i, (n, k, s) in enumerate(sizes)):
            del node.attributes["ceil_mode"]


def _write(model: Any, path: Path, facts: dict[str, str]) -> None:
    onnx = import_extra("onnx", "onnx")
    model.producer_name, model.producer_version = "dsconv", metadata.version("dsconv")
    said = {entry.key: entry.value for entry in model.metadata_props if entry.key.startswith("dsconv.")}
    onnx.helper.set_model_props(model, said | facts)
    if model.ByteSize() > _LARGEST_BYTES:
        raise ModelError(f"{path}: an ONNX file holds 2 GB at most, this has {model.ByteSize():,} bytes")
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
