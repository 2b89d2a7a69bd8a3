"""Names that users choose from, with checks that need no PyTorch, so that the command line can run them at once."""

import os
from pathlib import Path
from typing import Literal, cast, get_args

from dsconv.errors import ConfigError, FileFormatError, ModelError, check_choice, check_extra
from dsconv.files import as_path

ActivationSign = Literal["adaptive", "extra", "included"]
ACTIVATION_SIGNS: tuple[str, ...] = get_args(ActivationSign)
ActivationSignChoice = Literal["adaptive", "extra", "included", "auto"]
WeightRule = Literal["paper", "refined", "balanced"]
WEIGHT_RULES: tuple[str, ...] = get_args(WeightRule)
WeightScale = Literal["l2", "kl"]
WEIGHT_SCALES: tuple[str, ...] = get_args(WeightScale)
Algorithm = Literal["direct", "winograd"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
AlgorithmChoice = Literal["direct", "winograd", "auto"]
KdsDtype = Literal["float32", "float16", "bfloat16"]
Preset = Literal["default", "paper", "w4a4", "w8a8"]
"""Name of a preset, see :meth:`dsconv.QuantConfig.preset`."""
PRESETS: tuple[Preset, ...] = get_args(Preset)
RecipeName = Literal["default", "paper"]
"""Name of an adaptation recipe, see :meth:`dsconv.Recipe.preset`."""
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)

Style = Literal["qdq", "function", "int8", "float"]
"""Representation of a network in an ONNX file, see :func:`dsconv.export_onnx`."""
STYLES: tuple[str, ...] = get_args(Style)
OPSET = 21
"""ONNX opset: the first one with 4-bit integers and with block scales."""

PEERS = ("torch", "onnxruntime", "openvino", "mnn")
"""Runtimes that :func:`dsconv.bench` measures in addition to dsconv."""

Task = Literal["classification", "segmentation", "images", "other"]
"""Kind of a network's outputs, which selects the measures, see :mod:`dsconv.evaluation.measures`."""
TASKS: tuple[str, ...] = get_args(Task)

OnInterrupt = Literal["raise", "partial"]
"""Effect of Ctrl-C on a measurement: raise KeyboardInterrupt, or return the figures so far."""

COMPILED_MAGIC = b"\x89dsconv\n"
"""First bytes of a compiled network, see :meth:`dsconv.compilation.CompiledModel.save`."""

_LIBRARIES = ("torchvision", "timm", "dsconv")


def check_on_interrupt(value: str) -> None:
    """Raise ConfigError unless ``value`` is one of :data:`OnInterrupt`."""
    check_choice("on_interrupt", value, get_args(OnInterrupt))


def check_task(value: str | None) -> Task | None:
    """Return ``value`` if it is one of :data:`TASKS` or None; otherwise raise ConfigError."""
    if value is not None:
        check_choice("task", value, TASKS)
    return cast(Task | None, value)


def is_registered(name: str) -> bool:
    """Return whether model ``name`` is from a library, so that building it runs no user code."""
    return name.partition("/")[0] in _LIBRARIES and ".py:" not in name and not is_onnx(name)


def is_onnx(name: str) -> bool:
    """Return whether model ``name`` is an ONNX file."""
    return name.endswith(".onnx")


def check_model_name(name: str) -> None:
    """Raise the errors of :func:`dsconv.zoo.build` that can be detected from ``name`` without building the model.

    Raises:
        ModelError: ``name`` has an unknown form.
        FileFormatError: it is a compiled network.
        MissingExtraError: the library that has the model is not installed.
        FileNotFoundError: the file does not exist.
    """
    base = name.partition("?")[0]
    if is_registered(name):
        library = name.partition("/")[0]
        if library != "dsconv":
            check_extra("zoo", library)
    elif is_onnx(name):
        if not Path(name).is_file():
            raise FileNotFoundError(f"model {name!r}: there is no file {name}")
        check_extra("onnx", "onnx")
    elif ".py:" not in base:
        check_not_compiled(Path(name))
        hint = ""
        if base.endswith(".py"):
            hint = f": name the function of the file that returns the model, as in {base}:make"
        elif Path(name).is_file():
            hint = ": a file of weights is passed as weights (--weights) with the model that it belongs to"
        raise ModelError(
            f"model {name!r}: expected torchvision/NAME, timm/NAME, dsconv/NAME, path/to/file.py:factory or "
            f"path/to/model.onnx{hint}"
        )
    elif not (path := Path(base.rpartition(":")[0])).is_file():
        raise FileNotFoundError(f"model {name!r}: there is no file {path}")


def check_not_compiled(path: Path) -> None:
    """Raise FileFormatError if a file is a compiled network, which is for programs without PyTorch."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        begin = file.read(len(COMPILED_MAGIC))
    if begin == COMPILED_MAGIC:
        raise FileFormatError(
            f"{path}: is a compiled network of dsconv compile: dsconv_runtime (Python) and libdsconv (C) run it; "
            "here, give the file of dsconv quantize, or the model, that it was compiled from"
        )


def check_metric_name(name: str | None) -> None:
    """Check the form of the name of a metric, ``path/to/file.py:function``.

    Raises:
        ConfigError: the name has another form.
        FileNotFoundError: the file does not exist.
    """
    if name is None:
        return
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function:
        raise ConfigError(f"metric: expected path/to/file.py:function, got {name!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"metric {name!r}: there is no file {path}")


def check_weights(weights: str | os.PathLike[str]) -> Path | None:
    """Return the file of ``weights``, or None for ``default`` and ``random``.

    Raises:
        FileFormatError: it is a compiled network.
        FileNotFoundError: the file does not exist.
    """
    if str(weights) in ("default", "random"):
        return None
    if not (path := as_path(weights, "weights")).is_file():
        raise FileNotFoundError(f"weights: expected 'default', 'random' or a file, there is no {path}")
    check_not_compiled(path)
    return path
