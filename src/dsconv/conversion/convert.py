"""Replacement of a model's layers by quantized ones, without running the model."""

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dsconv.config import LayerConfig, QuantConfig, as_config
from dsconv.conversion import hooks
from dsconv.conversion.copying import HOOKS, copied, is_torch_class
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import ModelInfo, info_of
from dsconv.conversion.plain import Plain, input_of, plain_layer
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.statistics import input_moments, signed_inputs
from dsconv.data.preprocess import Preprocess, laid_over
from dsconv.errors import ConfigError, ModelError
from dsconv.layers import DSLayer
from dsconv.layers.kinds import KINDS, kind_of
from dsconv.modes import check_module
from dsconv.numerics import InputMoments

# A layer is small if it has at most this fraction of a network's weights.
_SMALL = 1 / 512
# Classes of PyTorch and torchvision that read the weights of their layers and never call them.
_READ_WEIGHTS = {
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "ShiftedWindowAttention",
    "ShiftedWindowAttentionV2",
}


def quantize(
    model: nn.Module,
    config: QuantConfig | Mapping[str, Any] | str | None = None,
    *,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a copy of ``model`` with quantized convolutions and linear layers. ``model`` itself is unchanged.

    No data is needed. Under rule ``balanced``, a copy of a model with BatchNorm runs briefly on noise, because
    BatchNorm determines the means and variances of the inputs of the layers after it. A layer that appears in several
    places stays one layer. Weight and spectral normalization, pruning, parametrizations and subclasses that compute
    their weight are resolved: the weight that they currently compute is quantized. The same holds for weights written
    by forward pre-hooks. A convolution or linear function called by a module becomes a layer of that module,
    ``conv2d_weight`` for ``F.conv2d(x, self.weight)``, if its weight and bias are computed from parameters and
    constants alone. A subclass that pads its input with zeros, by a constant amount or depending on the size like
    TensorFlow's ``SAME``, is quantized with that padding. A layer whose call was replaced and does more than the plain
    layer stays in float; hooks and replaced methods of other modules are kept and run the layers of the copy. Layers
    that are already quantized are unchanged. :func:`dsconv.summary` lists what is left in float, with the reason.

    Args:
        model: a trained float model. Wrappers such as ``torch.compile``, ``DataParallel`` or ``AveragedModel``, around
            the model or its parts, are removed.
        config: a :class:`QuantConfig`, a dictionary of its fields, or the name of a preset; None is ``default``.
        preprocess: preprocessing of the model's images, which is stored with the copy and everything made from it. A
            :class:`dsconv.data.Preprocess`, or a dictionary of the fields that differ from the one stored with the
            model; None uses the latter (:func:`dsconv.zoo.preprocess_of`).

    Returns:
        A model whose other modules have the same classes, in the same training mode.

    Raises:
        ConfigError: the config or ``preprocess`` is not valid, or an override matches no layer.
        ModelError: there is nothing to quantize, a weight contains a NaN or an infinity, or a copy of the model would
            run layers of ``model``.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> quantize(net, "paper")[2].vqk.shape
    torch.Size([64, 32, 3, 3])
    """
    check_module("model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("model: TorchScript cannot be converted: pass the Python model it was made from")
    return quantize_for(model, as_config(config), None, preprocess)


def quantize_for(
    model: nn.Module,
    config: QuantConfig,
    inputs: Mapping[nn.Module, InputMoments] | None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    signed: Collection[nn.Module] | None = None,
) -> nn.Module:
    """Run :func:`quantize` with known properties of the layers' inputs.

    Args:
        inputs: their moments; None derives them from BatchNorms.
        signed: layers whose input can be negative; None determines them with noise.
    """
    model, functions = as_layers(model)
    layers = _find_layers(model)
    _check_overrides(config, layers)
    prepared = preprocess_of(model)
    if preprocess is not None:
        prepared = laid_over(prepared, preprocess)
    info = ModelInfo.from_stored(
        {
            **info_of(model).stored(),
            "config": config,
            "architecture": getattr(model, "dsconv_architecture", None),
            "in_float": {name: one.reason for one in functions for name in one.parameters or [one.name]},
            "preprocess": prepared.model_dump(mode="json") if prepared is not None else None,
        }
    )
    swaps: dict[nn.Module, DSLayer] = {}
    for found in layers:
        if isinstance(found.layer, DSLayer):
            continue
        reason = found.reason
        settings = None if reason else layer_config(config, found, layers)
        plain = Plain(None, reason=reason or "the config leaves it in float")
        if settings is not None:
            plain = plain_layer(found.layer, found.kind)
        if plain.weight is None or settings is None:
            info.in_float[found.name] = plain.reason
            continue
        if inputs is None and settings.weight_rule == "balanced" and config.batchnorm_statistics:
            inputs = input_moments(model, prepared)
        known = None if inputs is None else inputs.get(found.layer)
        if signed is None and settings.activation_sign == "auto" and settings.rounds_signs:
            signed = signed_inputs(model, prepared)
        settings = settings.with_sign(signed is None or found.layer in signed)
        try:
            swaps[found.layer] = found.kind.from_float(
                found.layer, settings, weight=plain.weight, padding=plain.padding, inputs=known
            )
        except ValueError as error:
            raise ModelError(f"layer {found.name!r}: {error}") from None
    if not swaps and not any(isinstance(module, DSLayer) for module in model.modules()):
        if not layers and not functions:
            raise ModelError(f"model {type(model).__name__} has no convolution or linear layer to quantize")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(info.in_float.items())[:5])
        raise ModelError(f"model {type(model).__name__}: no layer can be quantized ({reasons})")
    return swapped(model, swaps, info)


def swapped(model: nn.Module, swaps: Mapping[nn.Module, nn.Module], info: ModelInfo) -> nn.Module:
    """Return a deep copy of ``model`` with each module of ``swaps`` replaced wherever it is referenced."""
    # Deep copy looks up finished copies here: it inserts the new layers and never copies the old ones.
    memo: dict[int, Any] = {id(layer): quantized for layer, quantized in swaps.items()}
    for layer, quantized in swaps.items():
        _keep_hooks(layer, quantized, memo)
        _keep_attributes(layer, quantized, memo)
    result = copied(model, memo)
    result.dsconv_info = info  # type: ignore[assignment]
    return result


@dataclass
class FoundLayer:
    """Convolution or linear layer of a model: its kind, all its names, and the reason if it must stay in float."""

    layer: nn.Module
    kind: type[DSLayer]
    names: list[str]
    reason: str = ""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def weights(self) -> int:
        """Number of its weights, 0 if not known yet."""
        if isinstance(self.layer, DSLayer):
            return self.layer.vqk.numel()
        # A parametrization stores the values of the weight in one parameter of its own.
        return max((p.numel() for p in self.layer.parameters() if not is_lazy(p)), default=0)


def _find_layers(model: nn.Module) -> list[FoundLayer]:
    found: dict[int, FoundLayer] = {}
    written = hooks.written_by_others(model, tuple(kind.float_type for kind in KINDS.values()))
    for name, module, parent in _walk(model):
        kind = type(module) if isinstance(module, DSLayer) else kind_of(module)
        if id(module) in found:
            found[id(module)].names.append(name)
        elif kind is not None:
            found[id(module)] = FoundLayer(module, kind, [name], _why_float(module, parent) or written.get(module, ""))
    return list(found.values())


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Yield name, module and parent of all modules of a model, in registration order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if "parametrizations" not in name.split("."):
            yield name, module, modules.get(name.rpartition(".")[0]) if name else None


def _why_float(layer: nn.Module, parent: nn.Module | None) -> str:
    if any(base.__name__ in _READ_WEIGHTS for base in type(parent).__mro__):
        return f"its weight is read by {type(parent).__name__} directly, the layer is not called"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        return "its size is not known yet: run the model once before converting it"
    return ""


def layer_config(config: QuantConfig, found: FoundLayer, layers: list[FoundLayer]) -> LayerConfig | None:
    """Return the settings of a layer among all ``layers`` of its model, in order; None to leave it in float."""
    layer: Any = found.layer
    convolutions = [other.layer for other in layers if other.kind.kind == "conv"]
    depthwise = found.kind.float_is_depthwise(layer)
    # If a layer has several names, the one that an override matches is used.
    overridden = [name for name in found.names if any(fnmatchcase(name, pattern) for pattern in config.overrides)]
    settings = config.layer(
        (overridden or found.names)[0],
        kind=found.kind.kind,
        first=layer in convolutions[:1],
        last=layer is layers[-1].layer,
        depthwise=depthwise,
        small=found.weights <= _SMALL * sum(other.weights for other in layers),
        volume=found.kind.dims == 3,
    )
    if settings is not None and depthwise and settings.blocks == "flat":
        # One block per filter.
        settings = settings.model_copy(update={"block_size": math.prod(layer.kernel_size)})
    return settings


def _check_overrides(config: QuantConfig, layers: list[FoundLayer]) -> None:
    names = [name for found in layers for name in found.names]
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"overrides: {pattern!r} matches no convolution or linear layer; the model has {', '.join(names[:8])}"
                + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            )


def _keep_attributes(layer: nn.Module, quantized: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the attributes that a model set on a layer, as builders from lists of layers do."""
    if (kind := kind_of(layer)) is not None:
        for name, value in vars(layer).items():
            known = name.startswith("_") or name in _attributes_of(kind)  # type: ignore[arg-type]
            if not known and not hasattr(quantized, name):
                vars(quantized)[name] = copy.deepcopy(value, memo)


@cache
def _attributes_of(kind: type[DSLayer]) -> frozenset[str]:
    """Return the names of the attributes that PyTorch gives a float layer."""
    if not is_torch_class(kind.float_type):
        return frozenset(vars(nn.Module()))  # its constructor is unknown, and its own attributes are harmless
    make: Callable[..., nn.Module] = kind.float_type
    sizes = [1 for parameter in inspect.signature(make).parameters.values() if parameter.default is parameter.empty]
    return frozenset(vars(make(*sizes, device="meta", dtype=torch.float32)))


def _keep_hooks(layer: nn.Module, quantized: nn.Module, memo: dict[int, Any]) -> None:
    """Keep the user's hooks, except for those that compute the weight, which are no longer needed."""
    layer_kind = kind_of(layer)
    written = None if layer_kind is None else hooks.written(layer, partial(input_of, layer, layer_kind, 4))
    done = frozenset() if written is None else written.keys
    for kind in HOOKS:
        kept = getattr(quantized, kind)
        memo[id(getattr(layer, kind))] = kept
        for key, hook in getattr(layer, kind).items():
            if not isinstance(hook, hooks.WEIGHT_HOOKS) and not (key in done and kind == "_forward_pre_hooks"):
                # A hook bound to a part of the model is rebound to the copy of that part.
                kept[key] = copy.deepcopy(hook, memo)
                for flags in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                    if key in getattr(layer, flags, {}):
                        getattr(quantized, flags)[key] = True
