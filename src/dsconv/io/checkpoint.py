"""One safetensors file per quantized model; its layout is specified in docs/format.md."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv import ops
from dsconv.compilation import CompiledModel
from dsconv.config import LayerConfig, QuantConfig
from dsconv.conversion.convert import FLOAT_TYPES, ModelInfo, model_info, quantized_type, swapped
from dsconv.conversion.fold import add_bias
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.summary import LayerSummary, Summary, quantized_row
from dsconv.conversion.wrappers import unwrapped
from dsconv.errors import ConfigError, FileFormatError, ModelError
from dsconv.files import check_place, replacing
from dsconv.nn import Affine, DSLayer
from dsconv.numerics import pack, unpack

FORMAT_VERSION = 2
FILE_NAME = "model.safetensors"
_MAGIC = "dsconv"
# The state of a quantized layer, and what it is called in a file: as in the field's other quantized checkpoints.
_FILE_NAMES = {"vqk": "weight_packed", "kds": "weight_scale", "kds_shift": "weight_shift"}
_SHAPE = "weight_shape"
_SHOWN = 5


class LayerRecord(BaseModel):
    """A quantized layer as the header describes it: class, which of the settings, and its SQNR; and the shape of VQK.

    The shape is a tensor of the file; in files of version 1 it is in the header.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, exclude=True)]
    settings: int
    sqnr_db: float | None = None


class Header(BaseModel):
    """All that a file says about itself beside its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dsconv_version: str
    model_class: str
    architecture: str | None
    config: dict[str, Any]
    settings: list[dict[str, Any]]
    layers: dict[str, LayerRecord]
    in_float: dict[str, str]
    folded: dict[str, str] = {}
    affine: list[str] = []
    calibrated_on: Annotated[int, Field(ge=0)] = 0
    biases: list[str] = []
    adapted_on: int = 0
    aliases: dict[str, str]
    preprocess: dict[str, Any] | None


def save(qmodel: nn.Module, path: str | os.PathLike[str], *, architecture: str | None = None) -> Path:
    """Write a quantized model to one safetensors file; an existing file is replaced when the new one is complete.

    Integers are packed at their width, KDS and all other tensors keep their dtype. Nothing is pickled.

    Args:
        qmodel: from :func:`dsconv.quantize`, or any model that holds quantized layers. Of a compiled model its
            ``model`` is written: compile what :func:`load` returns.
        path: of the file, usually ``*.safetensors``, in an existing folder.
        architecture: name by which :func:`dsconv.zoo.build` makes the float model, so that the file can be loaded
            without one; known by itself for models that came from there.

    Returns:
        The path.

    Raises:
        ModelError: the model holds no quantized layer, or state that is not a tensor.
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
    path = Path(path)
    check_place(path)
    tensors, aliases = _stored_tensors(qmodel)
    header = _header(qmodel, aliases, architecture)
    entries = {"format": _MAGIC, "format_version": str(FORMAT_VERSION)}
    entries |= {name: json.dumps(value) for name, value in header.model_dump().items()}
    entries["checksum"] = checksum(entries, tensors)
    write(path, tensors, entries)
    return path


def write(path: Path, tensors: dict[str, Tensor], entries: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    _check_name(path)
    with replacing(path) as beside:
        try:
            save_file(tensors, beside, entries)
        except SafetensorError as error:
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise OSError(f"{path}: cannot be written: {error}") from None


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a quantized model, in evaluation mode; it computes bitwise what the saved one does there.

    Args:
        path: of a file that :func:`save` wrote, or of a folder that holds it as ``model.safetensors``.
        model: the float model of the same architecture, whose weights do not matter and which is left as it is. None
            builds it by the name in the file; only models of torchvision, timm and dsconv are built that way, no code
            that a file names is ever run.

    Raises:
        FileFormatError: the file is truncated, was changed, is from a newer version, or is of another architecture.
        ModelError: the file does not say how to build its model.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    header, tensors = _read(path)
    if model is None:
        model = _build(path, header)
    model = unwrapped(model)
    settings = [_layer_settings(path, data) for data in header.settings]
    swaps: dict[nn.Module, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    wrong: list[str] = []
    for name, record in header.layers.items():
        layer = modules.get(name)
        if not 0 <= record.settings < len(settings):
            raise FileFormatError(f"{path}: layer {name!r} refers to settings {record.settings} of {len(settings)}")
        if layer is None or not isinstance(layer, FLOAT_TYPES):
            got = "none" if layer is None else f"a {type(layer).__name__}"
            wrong.append(f"layer {name!r}: the file has a {record.type}, the model has {got} there")
            continue
        if quantized_type(layer).__name__ != record.type:
            wrong.append(f"layer {name!r}: the file has a {record.type}, the model a {type(layer).__name__}")
            continue
        quantized = quantized_type(layer).like(layer, settings[record.settings])
        if list(quantized.vqk.shape) != record.shape:
            shapes = f"{record.shape}, the model {list(quantized.vqk.shape)}"
            wrong.append(f"layer {name!r}: the file has weights of shape {shapes}")
            continue
        quantized.weight_sqnr_db = record.sqnr_db
        if name in header.biases:
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
        swaps[batchnorm] = nn.Identity()
    for name in header.affine:
        batchnorm = modules.get(name)
        if isinstance(batchnorm, _BatchNorm):
            swaps[batchnorm] = Affine(batchnorm.num_features)
        else:
            wrong.append(f"module {name!r}: the file has it as a BatchNorm in its inference form, the model has not")
    _refuse(path, header, model, wrong)
    config = _config(path, header.config)
    info = ModelInfo(
        config,
        header.architecture,
        header.in_float,
        header.preprocess,
        header.folded,
        tuple(header.affine),
        header.calibrated_on,
        tuple(header.biases),
        header.adapted_on,
    )
    result = swapped(model, swaps, info)
    _fill(path, header, result, tensors)
    return result.eval()


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file says about itself, after its checksum was verified.

    Raises:
        FileFormatError, OSError: as :func:`load`.
    """
    return _read(Path(path))[0]


def describe(path: str | os.PathLike[str]) -> tuple[Header, Summary]:
    """What a file says about itself, and the summary of its layers: from the file alone, without the model.

    Layers in float come last, since only the model knows their place.

    Raises:
        FileFormatError, OSError: as :func:`load`.
    """
    path = Path(path)
    header, tensors = _read(path)
    rows: list[LayerSummary] = []
    for name, record in header.layers.items():
        if not 0 <= record.settings < len(header.settings):
            raise FileFormatError(f"{path}: layer {name!r} refers to settings that the file does not have")
        settings = _layer_settings(path, header.settings[record.settings])
        parts = [f"{name}.{part}".lstrip(".") for part in ("vqk", "kds", "kds_shift")]
        size = sum(tensors.pop(part).nbytes for part in parts if part in tensors)
        backend = ops.backend(record.shape, settings, transposed="Transpose" in record.type)
        shape = tuple(record.shape)
        rows.append(quantized_row(name, record.type, shape, settings, size, record.sqnr_db, backend))
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and tensor.is_floating_point():
            layer = name.removesuffix(".weight")
            reason = header.in_float.get(layer, "neither a convolution nor a linear layer")
            size, bits = tensor.nbytes, 8.0 * tensor.element_size()
            rows.append(LayerSummary(layer, "", tuple(tensor.shape), bits, size, size, ops.IN_FLOAT, reason))
    in_float = sum(row.bytes_after for row in rows if not row.quantized)
    return header, Summary(tuple(rows), sum(tensor.nbytes for tensor in tensors.values()) - in_float)


def _stored_tensors(qmodel: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of the file by name, and the names of those that stand under another name already."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    layers = _quantized_layers(qmodel, duplicates=True)
    bits = {f"{name}.vqk".lstrip("."): layer.config.weight_bits for name, layer in layers}
    file_names = _file_names(name for name, _ in layers)
    for own_name, value in qmodel.state_dict().items():
        name = file_names.get(own_name, own_name)
        if not isinstance(value, Tensor):
            raise ModelError(f"state {name!r} is a {type(value).__name__}: only tensors can be saved")
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        value = value.detach().cpu()
        packed = pack(value, bits[own_name]) if own_name in bits else value
        tensors[name] = packed.clone(memory_format=torch.contiguous_format)
    for name, layer in _quantized_layers(qmodel):
        tensors[f"{name}.{_SHAPE}".lstrip(".")] = torch.tensor(layer.vqk.shape)
    return tensors, aliases


def _file_names(layers: Iterable[str]) -> dict[str, str]:
    """What the state of ``layers`` is called in a file, by its name in the model."""
    parts = [(layer, *names) for layer in layers for names in _FILE_NAMES.items()]
    return {f"{layer}.{own}".lstrip("."): f"{layer}.{name}".lstrip(".") for layer, own, name in parts}


def _with_own_names(path: Path, header: Header, tensors: dict[str, Tensor]) -> tuple[Header, dict[str, Tensor]]:
    """What was read, with the state of layers named as in the model."""
    # Layers that appear twice are in the header once.
    twice = {
        alias.rpartition(".")[0] for alias, name in header.aliases.items() if name.rpartition(".")[0] in header.layers
    }
    own_names = {name: own for own, name in _file_names({*header.layers, *twice}).items()}
    renamed = {own_names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise FileFormatError(f"{path}: it has a tensor under the names of two versions: get or write it again")
    aliases = {own_names.get(alias, alias): own_names.get(name, name) for alias, name in header.aliases.items()}
    return header.model_copy(update={"aliases": aliases}), renamed


def _quantized_layers(model: nn.Module, *, duplicates: bool = False) -> list[tuple[str, DSLayer]]:
    modules = model.named_modules(remove_duplicate=not duplicates)
    return [(name, module) for name, module in modules if isinstance(module, DSLayer)]


def _header(qmodel: nn.Module, aliases: dict[str, str], architecture: str | None) -> Header:
    settings: list[LayerConfig] = []
    layers: dict[str, LayerRecord] = {}
    for name, layer in _quantized_layers(qmodel):
        if layer.config not in settings:
            settings.append(layer.config)
        sqnr = layer.weight_sqnr_db
        layers[name] = LayerRecord(
            type=type(layer).__name__,
            shape=list(layer.vqk.shape),
            settings=settings.index(layer.config),
            # JSON has no infinity; three digits are all that a report shows.
            sqnr_db=round(sqnr, 3) if sqnr is not None and abs(sqnr) < 1e3 else None,
        )
    if not layers:
        raise ModelError(
            f"model {type(qmodel).__name__} holds no quantized layer: convert it with dsconv.quantize first"
        )
    info, preprocess = model_info(qmodel) or ModelInfo(QuantConfig()), preprocess_of(qmodel)
    return Header(
        dsconv_version=metadata.version("dsconv"),
        model_class=_class_name(qmodel),
        architecture=architecture or info.architecture,
        config=info.config.to_dict(),
        settings=[config.model_dump(mode="json") for config in settings],
        layers=layers,
        in_float=info.in_float,
        folded=_folded(qmodel),
        affine=[name for name, module in qmodel.named_modules() if isinstance(module, Affine)],
        calibrated_on=info.calibrated_on,
        biases=list(info.biases),
        adapted_on=info.adapted_on,
        aliases=aliases,
        preprocess=None if preprocess is None else preprocess.model_dump(mode="json"),
    )


def _folded(qmodel: nn.Module) -> dict[str, str]:
    """Name of each BatchNorm that was folded to that of its layer, also where it was done to a part of the model."""
    folded: dict[str, str] = {}
    for prefix, module in qmodel.named_modules():
        info = model_info(module)
        pairs = info.folded.items() if info else ()
        folded |= {f"{prefix}.{name}".lstrip("."): f"{prefix}.{layer}".lstrip(".") for name, layer in pairs}
    return folded


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def checksum(entries: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all entries but the checksum, and over name, dtype, shape and bytes of all tensors, in order."""
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
        raise OSError(f"{str(path)!r}: expected a path in UTF-8, safetensors takes no other: choose another") from None


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    _check_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file written by dsconv, there is none")
    # Reading one byte first tells a file that cannot be read from one that is broken.
    with path.open("rb") as file:
        file.read(1)
    try:
        with safe_open(path, framework="pt") as file:
            entries: dict[str, str] = file.metadata() or {}
            if entries.get("format") != _MAGIC:
                raise FileFormatError(f"{path}: a safetensors file, but not one written by dsconv")
            version = entries.get("format_version", "")
            if not version.isdecimal() or int(version) > FORMAT_VERSION:
                raise FileFormatError(
                    f"{path}: has format version {version!r}, this dsconv reads up to {FORMAT_VERSION}: update dsconv"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileFormatError:
        raise
    except (SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise FileFormatError(f"{path}: not a complete safetensors file ({error}): get or write it again") from None
    if checksum(entries, tensors) != entries.get("checksum"):
        raise FileFormatError(f"{path}: its contents do not match its checksum, it was changed: get or write it again")
    try:
        fields = {name: json.loads(text) for name, text in entries.items() if name in Header.model_fields}
        if int(version) > 1:
            for name, record in fields["layers"].items():
                record["shape"] = tensors.pop(f"{name}.{_SHAPE}".lstrip(".")).tolist()
        header = Header.model_validate(fields)
    except (ValidationError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise FileFormatError(f"{path}: its header is not valid ({reason}): write it again") from None
    return _with_own_names(path, header, tensors) if int(version) > 1 else (header, tensors)


def _layer_settings(path: Path, data: dict[str, Any]) -> LayerConfig:
    try:
        return LayerConfig(**data)
    except (ConfigError, TypeError) as error:
        raise FileFormatError(f"{path}: the settings of its layers are not valid: {error}") from None


def _config(path: Path, data: dict[str, Any]) -> QuantConfig:
    try:
        return QuantConfig(**data)
    except (ConfigError, TypeError) as error:
        raise FileFormatError(f"{path}: its config is not valid: {error}") from None


def _build(path: Path, header: Header) -> nn.Module:
    from dsconv import zoo

    if header.architecture is None or not zoo.is_registered(header.architecture):
        name = f", which {header.architecture!r} made" if header.architecture else ""
        raise ModelError(
            f"{path}: pass the float model ({header.model_class}{name}) to load it into: "
            "only models of torchvision, timm and dsconv are built from the file"
        )
    return zoo.build(header.architecture, weights="random")


def _refuse(path: Path, header: Header, model: nn.Module, wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise FileFormatError(
            f"{path}: holds a {header.model_class}, which does not fit the model {_class_name(model)}: "
            f"{'; '.join(wrong[:_SHOWN])}{more}"
        )


def _fill(path: Path, header: Header, model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Put the tensors of a file into the model of the right structure, in the dtypes of the file."""
    layers = _quantized_layers(model, duplicates=True)
    quantized = {f"{name}.vqk".lstrip("."): layer for name, layer in layers}
    scales = {f"{name}.{part}".lstrip(".") for name, _ in layers for part in ("kds", "kds_shift")}
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
    state: dict[str, Tensor] = {}
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
        elif _kind(value) != _kind(expected[name]) or (name in scales and value.dtype != expected[name].dtype):
            wrong.append(f"tensor {name!r}: {value.dtype} in the file, {expected[name].dtype} in the model")
        elif name in scales and not torch.isfinite(value).all():
            wrong.append(f"tensor {name!r}: holds a NaN or an infinity")
    _refuse(path, header, model, wrong)
    for name, value in state.items():
        if expected[name].dtype != value.dtype:
            expected[name].data = expected[name].data.to(value.dtype)
    model.load_state_dict(state)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
