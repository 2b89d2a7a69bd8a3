"""Safetensors file of a quantized model; docs/format.md specifies its layout."""

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from dsconv import backends, strict_json
from dsconv.compilation import CompiledModel
from dsconv.config import LayerConfig, QuantConfig
from dsconv.conversion.convert import swapped
from dsconv.conversion.fold import after_normalizing
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import ModelInfo, info_of, model_info
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.quantized import add_bias, quantized_layers
from dsconv.conversion.summary import LayerSummary, Summary, quantized_row
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Preprocess
from dsconv.errors import ConfigError, FileFormatError, ModelError, one_line
from dsconv.files import as_path, check_place, replacing
from dsconv.io import architecture as architecture_of
from dsconv.layers import Affine, DSLayer
from dsconv.layers.conv import Pads
from dsconv.layers.kinds import KINDS, kind_of
from dsconv.modes import check_module
from dsconv.names import check_not_compiled
from dsconv.numerics import pack, unpack
from dsconv.numerics.packing import packed_bytes

FORMAT_VERSION = 6
FILE_NAME = "model.safetensors"
_MAGIC = "dsconv"
# State of a quantized layer, and its name in a file, which follows other quantized checkpoints.
_FILE_NAMES = {"vqk": "weight_packed", "kds": "weight_scale", "kds_shift": "weight_shift"}
_SHAPE = "weight_shape"
_SHOWN = 5
_OLDER = "the file is of an older version, which did not record the groups of layers: load and save it to know"
_MOST_DIMENSIONS = 5
# The first bytes of a file of torch.save.
_ZIP_MAGIC = b"PK\x03\x04"
# The largest header that safetensors reads.
_LONGEST_HEADER = 100_000_000


Images = Annotated[int, Field(ge=0, lt=2**63)]
# Zero padding before and after a dimension.
_Pad = Annotated[list[Annotated[int, Field(ge=0, lt=2**16)]], Field(min_length=2, max_length=2)]


class LayerRecord(BaseModel):
    """Description of a quantized layer in the header: class, index of its settings, SQNR, and the shape of VQK.

    The padding is stated if it differs from the float layer's attribute, and the groups if the backend depends on them
    (:func:`_depends_on_groups`). The shape is a tensor of the file; in files of version 1 it is in the header.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    type: str
    # A convolution over three dimensions has five.
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=2, max_length=5, exclude=True)]
    settings: int
    sqnr_db: float | None = None
    padding: Literal["same_upper"] | Annotated[list[_Pad], Field(min_length=1, max_length=3)] | None = None
    groups: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: Any) -> dict[str, Any]:
        """Omit fields that older versions do not know, where these behave the same without them."""
        data: dict[str, Any] = serialize(self)
        return {name: value for name, value in data.items() if value is not None or name not in ("padding", "groups")}


class Header(BaseModel):
    """Metadata of a file."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dsconv_version: str
    model_class: str
    architecture: str | None
    config: dict[str, Any]
    settings: list[dict[str, Any]]
    layers: dict[str, LayerRecord]
    in_float: dict[str, str]
    folded: dict[str, str] = {}
    affine: list[str] = []
    calibrated_on: Images = 0
    biases: list[str] = []
    adapted_on: Images = 0
    aliases: dict[str, str]
    preprocess: dict[str, Any] | None
    network: dict[str, Any] | None = None


def save(qmodel: nn.Module, path: str | os.PathLike[str], *, architecture: str | None = None) -> Path:
    """Write a quantized model to one safetensors file; an existing file is replaced when the new one is complete.

    Integers are packed at their bit width; KDS and all other tensors keep their dtype. Nothing is pickled.

    Args:
        qmodel: from :func:`dsconv.quantize`, or any model with quantized layers. For a compiled model, its ``model`` is
            written: compile the result of :func:`load`.
        path: path of the file, usually ``*.safetensors``, in an existing folder.
        architecture: name from which :func:`dsconv.zoo.build` builds the float model, so that the file can be loaded
            without one; known automatically for models from there.

    Returns:
        The path.

    Raises:
        ModelError: the model has no quantized layer, or state that is not a tensor.
        OSError: the file cannot be written.

    >>> import dsconv, tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> qnet = dsconv.quantize(net)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = dsconv.load(dsconv.save(qnet, folder + "/net.safetensors"), net)
    >>> x = torch.randn(1, 3, 8, 8)
    >>> with torch.inference_mode():
    ...     torch.equal(again(x), qnet(x))
    True
    """
    qmodel = unwrapped(qmodel)
    if isinstance(qmodel, CompiledModel):
        qmodel = qmodel.model
    check_module("qmodel", qmodel)
    path = as_path(path)
    check_place(path)
    tensors, aliases = _stored_tensors(qmodel)
    header = _header(qmodel, aliases, architecture)
    entries = {"format": _MAGIC, "format_version": str(_version(header))}
    # Files of other networks are identical to those of versions without this entry.
    entries |= {name: json.dumps(value) for name, value in header.model_dump(exclude=_left_out(header)).items()}
    entries["checksum"] = checksum(entries, tensors)
    write(path, tensors, entries)
    return path


def _left_out(header: Header) -> set[str]:
    return {"network"} if header.network is None else set()


def _version(header: Header) -> int:
    """Return the format version of a file.

    It is 6 if the config, or its settings of some layers, leave the sign of activations to be chosen; else 5 if layers
    state their groups; else 4 if layers state their padding, or the config has settings for small layers; else 3 if
    settings, or those of some layers in the config, name an algorithm.
    """
    config = header.config
    parts = [value for name, value in config.items() if name != "overrides"]
    stated = [
        settings
        for settings in (config, *parts, *config.get("overrides", {}).values(), *header.settings)
        if isinstance(settings, dict)
    ]
    if any(settings.get("activation_sign") == "auto" for settings in stated):
        return 6
    if any(record.groups is not None for record in header.layers.values()):
        return 5
    if "small_layers" in config or any(record.padding is not None for record in header.layers.values()):
        return 4
    return 3 if any("algorithm" in settings for settings in stated) else 2


def write(path: Path, tensors: dict[str, Tensor], entries: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    _check_name(path)
    with replacing(path) as beside:
        try:
            save_file(tensors, beside, entries)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a quantized model, in evaluation mode; its outputs are bitwise equal to those of the saved model.

    Args:
        path: path of a file written by :func:`save`, or of a folder that contains it as ``model.safetensors``.
        model: the float model of the same architecture, whose weights do not matter and which is unchanged. None builds
            it from the name in the file, or from the description in files of networks from :func:`dsconv.from_onnx`;
            only models of torchvision, timm and dsconv are built by name, and code named by a file is never run.

    Raises:
        FileFormatError: the file is truncated, was modified, is from a newer version, or has another architecture.
        ModelError: the file does not state how to build its model.
        OSError: the file cannot be read.
    """
    path = as_path(path)
    if model is not None:
        check_module("model", model)
    if path.is_dir():
        path /= FILE_NAME
    home = torch.get_default_device()
    # A default device must not apply to tensors filled from the file, and even less to those without values.
    with torch.device("cpu"):
        header, tensors = _read(path)
        into = partial(_loaded, path, header, tensors, home=torch.device("cpu") if home.type == "meta" else home)
        return into(model) if model is not None else _built(path, header, tensors, into)


def _loaded(
    path: Path, header: Header, tensors: dict[str, Tensor], model: nn.Module, *, home: torch.device
) -> nn.Module:
    """Return a copy of ``model`` with the contents of the file; tensors without memory are allocated on ``home``."""
    # Entries of the file keep their place: in older files some parameters are stored that now belong to layers.
    known = header.layers.keys() | tensors.keys() | header.aliases.keys()
    model, _ = as_layers(model, known.__contains__)
    settings = [_layer_settings(path, data) for data in header.settings]
    biases = set(header.biases)
    swaps: dict[nn.Module, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    wrong: list[str] = []
    for name, record in header.layers.items():
        layer = modules.get(name)
        kind = kind_of(layer)
        if layer is None or kind is None:
            got = "none" if layer is None else f"a {type(layer).__name__}"
            wrong.append(f"layer {name!r}: the file has a {record.type}, the model has {got} there")
            continue
        if kind is not KINDS.get(record.type):
            wrong.append(f"layer {name!r}: the file has a {record.type}, the model a {type(layer).__name__}")
            continue
        try:
            quantized = kind.like(layer, settings[record.settings], _from_json(record.padding))
        except (ConfigError, ValueError) as error:
            wrong.append(f"layer {name!r}: the model has another layer than the file: {error}")
            continue
        if list(quantized.vqk.shape) != record.shape:
            shapes = f"{record.shape}, the model {list(quantized.vqk.shape)}"
            wrong.append(f"layer {name!r}: the file has weights of shape {shapes}")
            continue
        groups = quantized.operation.groups
        if record.groups not in (None, groups):
            wrong.append(f"layer {name!r}: groups: {record.groups} in the file, {groups} in the model")
            continue
        quantized.weight_sqnr_db = record.sqnr_db
        if name in biases:
            add_bias(quantized, layer.weight)
        swaps[layer] = quantized
    unknown = [name for name in header.biases if name not in header.layers]
    wrong += [f"layer {name!r}: the file has a bias for it, but no such layer" for name in unknown]
    for name, layer_name in header.folded.items():
        batchnorm, layer = modules.get(name), modules.get(layer_name)
        quantized_layer = swaps.get(layer) if layer is not None else None
        if not isinstance(batchnorm, _BatchNorm) or not isinstance(quantized_layer, DSLayer):
            wrong.append(
                f"module {name!r}: the file has it as a BatchNorm folded into {layer_name!r}, the model has not"
            )
            continue
        add_bias(quantized_layer, batchnorm.bias)
        swaps[batchnorm] = after_normalizing(batchnorm)
    for name in header.affine:
        batchnorm = modules.get(name)
        if isinstance(batchnorm, _BatchNorm):
            swaps[batchnorm] = Affine(batchnorm.num_features)
        else:
            wrong.append(f"module {name!r}: the file has it as a BatchNorm in its inference form, the model has not")
    _refuse(path, header, model, wrong)
    config = _config(path, header.config)
    info = ModelInfo.from_stored({**dict(header), "config": config})
    result = swapped(model, swaps, info)
    _give_memory(result, home)
    _fill(path, header, result, tensors)
    _check_values(path, result)
    return result.eval()


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the metadata of a file, after verifying its checksum.

    Raises:
        FileFormatError, OSError: as :func:`load`.
    """
    return _read(as_path(path))[0]


def describe(path: str | os.PathLike[str]) -> tuple[Header, Summary]:
    """Return the metadata of a file and the summary of its layers, from the file alone, without the model.

    Layers in float come last, since only the model knows their position. The backend of a layer is unknown if it
    depends on its groups, and the file does not state them: in version 4 or earlier.

    Raises:
        FileFormatError, OSError: as :func:`load`.
    """
    path = as_path(path)
    with torch.device("cpu"):
        header, tensors = _read(path)
    rows: list[LayerSummary] = []
    parameters: list[LayerSummary] = []
    for name, record in header.layers.items():
        settings = _layer_settings(path, header.settings[record.settings])
        parts = [f"{name}.{part}".lstrip(".") for part in ("vqk", "kds", "kds_shift")]
        size = sum(tensors.pop(part).nbytes for part in parts if part in tensors)
        operation = backends.Operation(tuple(record.shape), settings, KINDS.get(record.type, DSLayer).transposed)
        known = record.groups is not None or not _depends_on_groups(operation)
        counts = [record.groups or 1] if known else [1, operation.shape[0]]
        row, *others = (
            quantized_row(name, record.type, operation._replace(groups=n), size, record.sqnr_db, torch.device("cpu"))
            for n in counts
        )
        if any(row != other for other in others):
            row = replace(row, backend="unknown backend", backend_reason=_OLDER)
        rows.append(row)
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and tensor.is_floating_point():
            layer = name.removesuffix(".weight")
            # A functional convolution has the name of its parameter.
            layer = name if name in header.in_float else layer
            reason = header.in_float.get(layer, "neither a convolution nor a linear layer")
            size, bits = tensor.nbytes, 8.0 * tensor.element_size()
            row = LayerSummary(layer, "", tuple(tensor.shape), bits, size, size, backends.IN_FLOAT, reason)
            of_layer = layer in header.in_float or name.endswith("weight")
            (rows if of_layer else parameters).append(row)
    in_float = sum(row.bytes_after for row in rows + parameters if not row.quantized)
    other = sum(tensor.nbytes for tensor in tensors.values()) - in_float
    return header, Summary(tuple(rows), other, tuple(parameters))


def _depends_on_groups(operation: backends.Operation) -> bool:
    """Return whether support by backends depends on the number of groups, which the shape does not determine."""
    return operation.config.activation_bits is None and len(operation.shape) > 2 and operation.shape[1] == 1


def _as_json(padding: Pads | str | None) -> Any:
    return [list(pair) for pair in padding] if isinstance(padding, tuple) else padding


def _from_json(padding: Any) -> Pads | str | None:
    return tuple((before, after) for before, after in padding) if isinstance(padding, list) else padding


def _stored_tensors(qmodel: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the file by name, and the names of those already stored under another name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    layers = quantized_layers(qmodel, duplicates=True)
    bits = {f"{name}.vqk".lstrip("."): layer.config.weight_bits for name, layer in layers.items()}
    file_names = _file_names(layers)
    for own_name, value in qmodel.state_dict().items():
        name = file_names.get(own_name, own_name)
        if not isinstance(value, Tensor):
            raise ModelError(f"state {name!r} is a {type(value).__name__}: only tensors can be saved")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ModelError(
                f"state {name!r}: its name contains half a character (a lone surrogate): rename the module"
            ) from None
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        value = value.detach().cpu()
        packed = pack(value, bits[own_name]) if own_name in bits else value
        tensors[name] = packed.clone(memory_format=torch.contiguous_format)
    for name, layer in quantized_layers(qmodel).items():
        shape = torch.tensor(layer.vqk.shape, dtype=torch.int64, device="cpu")
        tensors[f"{name}.{_SHAPE}".lstrip(".")] = shape
    return tensors, aliases


def _file_names(layers: Iterable[str]) -> dict[str, str]:
    """Return the names in a file of the state of ``layers``, by the name in the model."""
    parts = [(layer, *names) for layer in layers for names in _FILE_NAMES.items()]
    return {f"{layer}.{own}".lstrip("."): f"{layer}.{name}".lstrip(".") for layer, own, name in parts}


def _with_own_names(path: Path, header: Header, tensors: dict[str, Tensor]) -> tuple[Header, dict[str, Tensor]]:
    """Return header and tensors with the state of layers named as in the model."""
    # Layers that appear twice are in the header once.
    twice = {
        alias.rpartition(".")[0] for alias, name in header.aliases.items() if name.rpartition(".")[0] in header.layers
    }
    own_names = {name: own for own, name in _file_names({*header.layers, *twice}).items()}
    renamed = {own_names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise FileFormatError(
            f"{path}: it has one tensor under the names of two format versions: get or write it again"
        )
    aliases = {own_names.get(alias, alias): own_names.get(name, name) for alias, name in header.aliases.items()}
    return header.model_copy(update={"aliases": aliases}), renamed


def _header(qmodel: nn.Module, aliases: dict[str, str], architecture: str | None) -> Header:
    settings: list[LayerConfig] = []
    layers: dict[str, LayerRecord] = {}
    for name, layer in quantized_layers(qmodel).items():
        if layer.config not in settings:
            settings.append(layer.config)
        sqnr = layer.weight_sqnr_db
        layers[name] = LayerRecord(
            type=type(layer).__name__,
            shape=list(layer.vqk.shape),
            settings=settings.index(layer.config),
            # JSON has no infinity; a report shows three digits.
            sqnr_db=round(sqnr, 3) if sqnr is not None and abs(sqnr) < 1e3 else None,
            padding=_as_json(layer.given_padding),
            groups=layer.operation.groups if _depends_on_groups(layer.operation) else None,
        )
    info, preprocess = info_of(qmodel), preprocess_of(qmodel)
    found = {
        "architecture": architecture or info.architecture,
        "folded": _folded(qmodel),
        "affine": [name for name, module in qmodel.named_modules() if isinstance(module, Affine)],
        "preprocess": None if preprocess is None else preprocess.model_dump(mode="json"),
        "network": architecture_of.describe(qmodel),
    }
    return Header(
        dsconv_version=metadata.version("dsconv"),
        model_class=_class_name(qmodel),
        settings=[config.model_dump(mode="json") for config in settings],
        layers=layers,
        aliases=aliases,
        **{**info.stored(), **found},
    )


def _folded(qmodel: nn.Module) -> dict[str, str]:
    """Return the name of the layer for each folded BatchNorm, also if only a part of the model was folded."""
    folded: dict[str, str] = {}
    for prefix, module in qmodel.named_modules():
        info = model_info(module)
        pairs = info.folded.items() if info else ()
        folded |= {f"{prefix}.{name}".lstrip("."): f"{prefix}.{layer}".lstrip(".") for name, layer in pairs}
    return folded


def _class_name(model: nn.Module) -> str:
    # Each graph module has its own class without a meaningful name.
    kind = next(kind for kind in type(model).__mro__ if not kind.__qualname__.endswith(".GraphModuleImpl"))
    return f"{kind.__module__}.{kind.__qualname__}"


def checksum(entries: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over all entries but the checksum, and name, dtype, shape and bytes of all tensors, in order."""
    digest = hashlib.sha256()
    described: list[Any] = [[name, entries[name]] for name in sorted(entries) if name != "checksum"]
    described += [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    digest.update(json.dumps(described).encode())
    for name in sorted(tensors):
        if tensors[name].numel():
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OSError(f"{str(path)!r}: expected a path in UTF-8, which safetensors requires: choose another") from None


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Return the header and the tensors of a file, checked as far as possible without a model."""
    entries, tensors = read_tensors(path, _MAGIC, "safetensors file", "get or write it again")
    version = entries["format_version"]
    try:
        fields = {name: strict_json.loads(text) for name, text in entries.items() if name in Header.model_fields}
        if int(version) > 1:
            for name, record in fields["layers"].items():
                shape = tensors.pop(f"{name}.{_SHAPE}".lstrip("."))
                if shape.numel() > _MOST_DIMENSIONS:
                    raise ValueError(f"layer {name!r} has {shape.numel():,} dimensions")
                record["shape"] = shape.tolist()
        header = Header.model_validate(fields)
        if header.preprocess is not None:
            Preprocess(**header.preprocess)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise FileFormatError(f"{path}: its header is not valid ({one_line(reason, 400)}): write it again") from None
    except (ConfigError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{path}: its header is not valid ({one_line(reason, 400)}): write it again") from None
    if int(version) > 1:
        header, tensors = _with_own_names(path, header, tensors)
    _check_layers(path, header, tensors)
    return header, tensors


def read_tensors(path: Path, magic: str, kind: str, mend: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the entries and tensors of a safetensors file whose entry ``format`` is ``magic``; verify its checksum.

    Args:
        kind: description of the file, for errors.
        mend: advice for a damaged file, for errors.

    Raises:
        FileFormatError: it is another kind of file, damaged, or of a newer version.
        OSError: it cannot be read.
    """
    _check_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a {kind} written by dsconv, there is none")
    check_not_compiled(path)
    # Reading first distinguishes an unreadable file from a damaged one.
    with path.open("rb") as file:
        begin = file.read(8)
        size = int.from_bytes(begin, "little")
        described = file.read(min(size, _LONGEST_HEADER))
    if begin.startswith(_ZIP_MAGIC):
        what = "got a file of torch.save: pass weights with their float network (--weights, load_state_dict)"
        raise FileFormatError(f"{path}: expected a {kind} written by dsconv, {what}")
    try:
        # safetensors accepts duplicate names and uses one of them.
        strict_json.loads(described)
        with safe_open(path, framework="pt") as opened:
            entries: dict[str, str] = opened.metadata() or {}
            if entries.get("format") != magic:
                what = "got a safetensors file of another kind"
                raise FileFormatError(f"{path}: expected a {kind} of format {magic!r}, {what}")
            version = entries.get("format_version", "")
            if not (version.isascii() and version.isdecimal()) or len(version) > 9 or int(version) > FORMAT_VERSION:
                newest = f"this dsconv reads up to {FORMAT_VERSION}: update dsconv"
                raise FileFormatError(f"{path}: has format version {version[:20]!r}, {newest}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        whole = checksum(entries, tensors) == entries.get("checksum")
    except (FileFormatError, OSError):
        raise
    except Exception as error:  # safetensors documents none, and supports some dtypes that PyTorch lacks
        reason = one_line(str(error), 400)
        raise FileFormatError(f"{path}: not a complete {kind} ({reason}): {mend}") from None
    if not whole:
        raise FileFormatError(f"{path}: its contents were changed and do not match its checksum: {mend}")
    return entries, tensors


def _check_layers(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Raise FileFormatError for layers without settings, and those whose integers do not have the stated shape."""
    settings = [_layer_settings(path, data) for data in header.settings]
    for name, record in header.layers.items():
        if not 0 <= record.settings < len(settings):
            raise FileFormatError(f"{path}: layer {name!r} refers to settings {record.settings} of {len(settings)}")
        count, bits = math.prod(record.shape), settings[record.settings].weight_bits
        packed = tensors.get(f"{name}.vqk".lstrip("."))
        if packed is None or packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
            got = "none" if packed is None else f"{packed.dtype} of shape {tuple(packed.shape)}"
            raise FileFormatError(
                f"{path}: layer {name!r}: expected {packed_bytes(count, bits)} bytes of integers for a weight of shape "
                f"{record.shape} at {bits} bits, got {got}: write it again"
            )


def _layer_settings(path: Path, data: dict[str, Any]) -> LayerConfig:
    try:
        settings = LayerConfig(**data)
    except (ConfigError, TypeError) as error:
        raise FileFormatError(f"{path}: the settings of its layers are not valid: {error}") from None
    for name in ("algorithm", "activation_sign"):
        if getattr(settings, name) == "auto":
            raise FileFormatError(
                f"{path}: the settings of its layers are not valid: {name} is 'auto', which a file cannot hold"
            )
    return settings


def _config(path: Path, data: dict[str, Any]) -> QuantConfig:
    try:
        return QuantConfig(**data)
    except (ConfigError, TypeError) as error:
        raise FileFormatError(f"{path}: its config is not valid: {error}") from None


def _built(
    path: Path, header: Header, tensors: Mapping[str, Tensor], into: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Return the result of ``into`` for the model that the file names."""
    from dsconv import zoo

    name = header.architecture
    layers = {f"{layer}.vqk".lstrip("."): tuple(record.shape) for layer, record in header.layers.items()}
    shapes = [layers.get(stored, tuple(value.shape)) for stored, value in tensors.items()]
    if header.network is not None:
        try:
            return into(architecture_of.rebuild(header.network, shapes))
        except ModelError as error:
            raise FileFormatError(f"{path}: {error}") from None
    if name is None or not zoo.is_registered(name):
        made = f", which {name!r} made" if name else ""
        raise ModelError(
            f"{path}: pass the float model ({one_line(header.model_class + made, 400)}) to load it into: "
            "only models of torchvision, timm and dsconv, and those of ONNX files, are built from the file"
        )
    try:
        # Without memory, until it is known that the file has values for all of it.
        return into(architecture_of.build(name, shapes, "meta"))
    except _NoValuesError:
        pass
    except ModelError as error:
        # Some models compute with tensor values in their constructors, which tensors on meta do not have.
        if not isinstance(error.__cause__, RuntimeError | NotImplementedError):
            raise
    return into(architecture_of.build(name, shapes, "cpu"))


def _refuse(path: Path, header: Header, model: nn.Module, wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        shown = "; ".join(one_line(difference, 240) for difference in wrong[:_SHOWN])
        raise FileFormatError(
            f"{path}: holds a {one_line(header.model_class, 100)}, which does not fit the model {_class_name(model)}: "
            f"{shown}{more}"
        )


class _NoValuesError(ModelError):
    """A model on ``meta`` has tensors that no file contains."""


def _give_memory(model: nn.Module, home: torch.device) -> None:
    """Allocate parameters and buffers that are on ``meta`` on ``home``; shared ones are allocated once."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        kept = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for own, tensors in ((module._parameters, module._parameters), (module._buffers, kept)):
            for name, value in tensors.items():
                if value is None or not value.is_meta or is_lazy(value):
                    continue
                if id(value) not in made:
                    empty = torch.empty_like(value, device=home)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
                own[name] = made[id(value)]  # type: ignore[assignment]


def _check_values(path: Path, model: nn.Module) -> None:
    """Raise an error if a model still has tensors on ``meta``."""
    found = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if name not in ("_parameters", "_buffers", "_modules")
        and any(t.is_meta for t in tree_leaves(value) if isinstance(t, Tensor))
    ]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise _NoValuesError(
            f"{path}: the model is on the meta device, and the file does not hold {', '.join(found[:_SHOWN])}{more}, "
            "which are not part of a state dictionary: build the model on the CPU"
        )


def _fill(path: Path, header: Header, model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Copy the tensors of a file into a model of the matching structure, in the dtypes of the file."""
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, DSLayer)}
    quantized = {f"{name}.vqk".lstrip("."): layer for name, layer in layers.items()}
    scales = {f"{name}.{part}".lstrip(".") for name in layers for part in ("kds", "kds_shift")}
    expected = model.state_dict(keep_vars=True)
    tensors = dict(stored)
    wrong: list[str] = []
    for alias, name in header.aliases.items():
        if name not in stored or alias in stored:
            wrong.append(f"tensor {alias!r}: stands for {name!r}, which the file does not have alone")
        else:
            tensors[alias] = stored[name]
    for name in sorted(set(expected) ^ set(tensors)):
        wrong.append(f"tensor {name!r}: only in the {'model' if name in expected else 'file'}")
    state = OrderedDict[str, Tensor]()
    state._metadata = expected._metadata  # type: ignore[attr-defined]  # some modules ask for their version
    for name, layer in quantized.items():
        if name in tensors:
            try:
                state[name] = unpack(tensors[name], layer.config.weight_bits, layer.vqk.shape)
            except ValueError as error:
                wrong.append(f"tensor {name!r}: {error}")
    names: dict[int, str] = {}
    for name in sorted(expected.keys() & tensors.keys()):
        first = names.setdefault(id(expected[name]), name)
        if header.aliases.get(name, name) != header.aliases.get(first, first):
            wrong.append(f"tensor {name!r}: one with {first!r} in the model, apart from it in the file")
        if name in quantized:
            continue
        value = state[name] = tensors[name]
        if value.shape != expected[name].shape:
            shapes = f"{list(value.shape)} in the file, {list(expected[name].shape)} in the model"
            wrong.append(f"tensor {name!r}: shape {shapes}")
        elif not _may_stand_for(value, expected[name]) or (name in scales and value.dtype != expected[name].dtype):
            wrong.append(f"tensor {name!r}: {value.dtype} in the file, {expected[name].dtype} in the model")
        elif name in scales and not torch.isfinite(value).all():
            wrong.append(f"tensor {name!r}: holds a NaN or an infinity")
    wrong += _mixed_dtypes(model, {name: value for name, value in state.items() if name not in {*quantized, *scales}})
    _refuse(path, header, model, wrong)
    for name, value in state.items():
        if expected[name].dtype != value.dtype:
            expected[name].data = expected[name].data.to(value.dtype)
    model.load_state_dict(state)
    common = next((p for p in model.parameters() if p.numel() and p.is_floating_point()), None)
    for layer in layers.values():
        like = layer.bias if layer.bias is not None else common
        if like is not None:
            layer.weight_like.data = layer.weight_like.data.to(like.dtype)


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _may_stand_for(value: Tensor, expected: Tensor) -> bool:
    """Return whether the model may have the dtype of ``value`` instead of its own."""
    both_float = value.dtype in _FLOATS and expected.dtype in _FLOATS
    return both_float or value.dtype == expected.dtype


def _mixed_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the modules whose floats have one dtype in the model and several in the file, which PyTorch cannot run."""
    wrong = []
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        pairs = [(value, state[full]) for name, value in own if (full := f"{prefix}.{name}".lstrip(".")) in state]
        pairs = [(value, stored) for value, stored in pairs if value.dtype in _FLOATS]
        kinds = {stored.dtype for _, stored in pairs}
        if len({value.dtype for value, _ in pairs}) == 1 and len(kinds) > 1:
            dtypes = " and ".join(sorted(map(str, kinds)))
            wrong.append(f"module {prefix!r}: {dtypes} side by side in the file, one dtype in the model")
    return wrong
