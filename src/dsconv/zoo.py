"""Float models by name: from torchvision, timm, Python files and ONNX files, and the small one included in dsconv.

A name is ``torchvision/resnet50``, ``timm/resnet50``, ``dsconv/digits_resnet``, ``path/to/model.onnx`` or
``path/to/file.py:factory``; arguments of the factory may follow, as in ``torchvision/resnet18?num_classes=200``.

A Python file defines the preprocessing of its models in an attribute ``preprocess`` of the model or of the file itself:
a :class:`dsconv.data.Preprocess` or a dictionary of its fields.
"""

import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from dsconv import strict_json
from dsconv.conversion.preparation import offered, preprocess_of, set_preprocess
from dsconv.data import Preprocess
from dsconv.errors import ConfigError, DSConvError, ModelError, import_extra, one_line
from dsconv.names import check_model_name, check_weights, is_onnx, is_registered

__all__ = ["build", "is_registered", "preprocess_of", "set_preprocess"]

_SHOWN = 5
# Built by default with auxiliary classifiers, without which the published weights are loaded.
_AUXILIARY = ("googlenet", "inception_v3")


def build(name: str, *, weights: str | os.PathLike[str] = "default") -> nn.Module:
    """Build the float model called ``name``, in evaluation mode.

    Args:
        name: see above.
        weights: ``default``: the trained weights that belong to the name, downloaded if necessary (a factory in a file
            loads its own); ``random``: random weights, except for ONNX files, which always use their own; otherwise the
            path of a state dictionary, ``.safetensors`` or written by ``torch.save``.

    Raises:
        ModelError: the model does not exist, or its weights are unavailable or do not fit.
        FileFormatError: an ONNX file is damaged.
        MissingExtraError: torchvision, timm or onnx is not installed.
        FileNotFoundError: the file does not exist.

    >>> sum(p.numel() for p in build("dsconv/digits_resnet").parameters())
    222570
    """
    if not isinstance(name, str):
        raise ModelError(f"model: expected a name such as torchvision/resnet50, got {type(name).__name__}")
    library, _, rest = name.partition("/")
    check_model_name(name)
    path = check_weights(weights)
    trained = str(weights) == "default"
    base, _, query = (rest if is_registered(name) else name).partition("?")
    arguments = {} if is_onnx(name) else _arguments(name, query)
    builders: dict[str, Callable[..., tuple[nn.Module, Preprocess | None]]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "dsconv": _own,
    }
    try:
        if is_registered(name):
            model, preprocess = builders[library](base, trained, arguments)
        elif is_onnx(name):
            model, preprocess = _from_onnx(name), None
        else:
            model, preprocess = _from_file(base, arguments)
    except (DSConvError, FileNotFoundError):
        raise
    except Exception as error:
        if trained and isinstance(error, OSError | RuntimeError):
            raise ModelError(
                f"model {name!r}: its trained weights are not available ({error}): pass a file of weights, or 'random'"
            ) from None
        raise ModelError(f"model {name!r}: its arguments do not fit: {error}") from error
    if path is not None:
        _load_weights(model, path)
    model.dsconv_architecture = name  # type: ignore[assignment]
    if preprocess is not None:
        set_preprocess(model, preprocess)
    return model.eval()


def _arguments(name: str, query: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in arguments:
            raise ModelError(f"model {name!r}: its argument {key!r} is given twice: give it once")
        try:
            arguments[key] = strict_json.loads(value)
        except ValueError as error:
            if value[:1] in ("{", "["):
                raise ModelError(f"model {name!r}: expected JSON as its argument {key!r}: {error}") from None
            arguments[key] = value
    if query and not arguments:
        raise ModelError(f"model {name!r}: expected arguments as NAME?key=value&key=value, got {query!r}")
    return arguments


def _unknown(library: str, what: str, name: str, known: Iterable[str]) -> ModelError:
    close = difflib.get_close_matches(name, list(known), n=_SHOWN)
    hint = f": did you mean {', '.join(close)}?" if close else ""
    return ModelError(f"{library} has no {what} {name!r}{hint}")


def _torchvision(name: str, trained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocess | None]:
    models = import_extra("zoo", "torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", "model", name, models.list_models())
    if name in _AUXILIARY:
        arguments = {"aux_logits": False, **({} if trained else {"init_weights": False}), **arguments}
    if not trained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # By default, these load and download pretrained weights for a part of the model.
        arguments = {"weights_backbone": None, **arguments}
    default = models.get_model_weights(name).DEFAULT
    model = models.get_model(name, weights=default if trained else None, **arguments)
    return model, _stated(Preprocess.from_torchvision, default)


def _timm(name: str, trained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocess | None]:
    timm = import_extra("zoo", "timm")
    if not timm.is_model(name):
        raise _unknown("timm", "model", name, timm.list_models())
    if "checkpoint_path" in arguments:
        # timm may unpickle the checkpoint, and a name can come from an untrusted file.
        raise ModelError(f"model {name!r}: checkpoint_path cannot be part of a name: pass the file as weights")
    model = timm.create_model(name, pretrained=trained, **arguments)
    return model, _stated(Preprocess.from_timm, model)


def _stated(read: Callable[[Any], Preprocess], source: Any) -> Preprocess | None:
    """Return the preprocessing stated by ``source``, or None if a Preprocess cannot express it, as for segmentation."""
    try:
        return read(source)
    except ConfigError:
        return None


def _own(name: str, trained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocess | None]:
    from dsconv import demo

    if name != "digits_resnet":
        raise _unknown("dsconv", "model", name, ["digits_resnet"])
    return demo.digits_resnet(pretrained=trained, **arguments), demo.PREPROCESS


def function_of(what: str, name: str) -> tuple[Any, Callable[..., Any]]:
    """Import ``path/to/file.py:function``; return the module and the function. Errors call the function ``what``.

    Raises:
        ModelError: the file cannot be imported, or does not define the function.
    """
    file, _, factory_name = name.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Classes of the file are looked up here when a model is copied.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{what} {name!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise _unknown(str(path), what, factory_name, known)
    return module, factory


def _from_file(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, Preprocess | None]:
    module, factory = function_of("model", name)
    factory_name = name.rpartition(":")[2]
    try:
        model = factory(**arguments)
    except Exception as error:
        raise ModelError(f"model {name!r}: {factory_name}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {name!r}: expected a torch.nn.Module, {factory_name}() returned a {type(model).__name__}"
        )
    try:
        return model, preprocess_of(model) or offered(getattr(module, "preprocess", None))
    except ConfigError as error:
        raise ModelError(f"model {name!r}: {error}") from None


def _from_onnx(name: str) -> nn.Module:
    from dsconv.onnx import from_onnx

    return from_onnx(name)


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dictionary into ``model``; half-precision values are widened to the dtype of the model."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            # Otherwise, a pickle may run arbitrary code.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"weights {path}: expected safetensors, or a state dictionary that torch.save wrote: "
            f"{one_line(' '.join(str(error).split()), 400)}"
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ModelError(f"weights {path}: expected a dictionary of names to tensors, got {type(state).__name__}")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        differences = [line.strip() for line in str(error).splitlines()[1:]]
        raise ModelError(f"weights {path} do not fit {type(model).__name__}: {' '.join(differences)[:600]}") from None
