"""Swaps the layers of a model for quantized ones, without running the model."""

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from dsconv.config import LayerConfig, QuantConfig, as_config
from dsconv.conversion import hooks
from dsconv.conversion.copying import HOOKS, copied, is_of_torch, is_torch_class, replaced
from dsconv.conversion.info import ModelInfo, info_of
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.statistics import input_moments
from dsconv.conversion.wrappers import unwrapped
from dsconv.data.preprocess import Preprocess, laid_over
from dsconv.errors import ConfigError, ModelError
from dsconv.layers import DSLayer
from dsconv.layers.conv import SAME_UPPER, Pads, same_upper
from dsconv.layers.inputs import device_of
from dsconv.layers.kinds import KINDS, kind_of
from dsconv.modes import check_module
from dsconv.numerics import InputMoments

# Layers with at most this part of the weights of a network are small.
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
    """A copy of ``model`` whose convolutions and linear layers are quantized. ``model`` itself is left as it is.

    No data is needed. Under rule ``balanced``, a copy of a model with BatchNorm runs on noise for a moment: BatchNorm
    tells the means and variances of the inputs of the layers behind it. A layer that appears at several places stays
    one layer. Weight and spectral normalization, pruning, parametrizations and subclasses that compute their weight are
    resolved: the weight they make now is quantized. So is what forward pre-hooks write to a weight. A subclass that
    pads its input with zeros, always alike or by its size as TensorFlow's ``SAME``, is quantized with that padding. A
    layer whose call was replaced and does more than the plain layer stays in float; hooks and replaced methods of other
    modules are kept and run the layers of the copy. Layers that are quantized already stay as they are. What is left in
    float is listed, with the reason, by :func:`dsconv.summary`.

    Args:
        model: a trained float model. Wrappers such as ``torch.compile``, ``DataParallel`` or ``AveragedModel``, around
            it or around parts, are taken off.
        config: a :class:`QuantConfig`, a dictionary of its fields, or the name of a preset; None is ``default``.
        preprocess: how the images of the model are prepared; the copy and all that is made from it say so. A
            :class:`dsconv.data.Preprocess`, or a dictionary of the fields that differ from what the model says; None is
            what the model says (:func:`dsconv.zoo.preprocess_of`).

    Returns:
        A model of the same classes otherwise, in the same training mode.

    Raises:
        ConfigError: the config or ``preprocess`` is not valid, or an override matches no layer.
        ModelError: there is nothing to quantize, a weight holds a NaN or an infinity, or a copy of the model would run
            layers of ``model``.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> quantize(net, "paper")[2].vqk.shape
    torch.Size([64, 32, 3, 3])
    """
    check_module("model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("model: TorchScript cannot be converted: pass the Python model it was made from")
    return quantize_for(unwrapped(model), as_config(config), None, preprocess)


def quantize_for(
    model: nn.Module,
    config: QuantConfig,
    inputs: Mapping[nn.Module, InputMoments] | None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
) -> nn.Module:
    """:func:`quantize` with what is known of the inputs of layers; None: what BatchNorms tell."""
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
            "in_float": {},
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
        try:
            swaps[found.layer] = found.kind.from_float(
                found.layer, settings, weight=plain.weight, padding=plain.padding, inputs=known
            )
        except ValueError as error:
            raise ModelError(f"layer {found.name!r}: {error}") from None
    if not swaps and not any(isinstance(module, DSLayer) for module in model.modules()):
        if not layers:
            raise ModelError(
                f"model {type(model).__name__} has no convolution or linear layer to quantize; "
                "convolutions called as functions are not seen"
            )
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(info.in_float.items())[:5])
        raise ModelError(f"model {type(model).__name__}: no layer is left to quantize ({reasons})")
    return swapped(model, swaps, info)


def swapped(model: nn.Module, swaps: Mapping[nn.Module, nn.Module], info: ModelInfo) -> nn.Module:
    """A deep copy of ``model`` with each module of ``swaps`` replaced wherever it is referred to."""
    # Deep copy looks here for what it has copied already: so it puts the new layers in and never copies the old ones.
    memo: dict[int, Any] = {id(layer): quantized for layer, quantized in swaps.items()}
    for layer, quantized in swaps.items():
        _keep_hooks(layer, quantized, memo)
        _keep_attributes(layer, quantized, memo)
    result = copied(model, memo)
    result.dsconv_info = info  # type: ignore[assignment]
    return result


@dataclass
class FoundLayer:
    """A convolution or linear layer of a model: its kind, every name it has, and why it must stay in float, if so."""

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
        """The number of its weights, 0 where that is not known yet."""
        if isinstance(self.layer, DSLayer):
            return self.layer.vqk.numel()
        # A parametrization keeps the numbers of the weight in one parameter of its own.
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
    """Name, module and parent of all that a model is made of, in the order it was registered."""
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
    """Settings of a layer among all ``layers`` of its model, in order; None where it is left in float."""
    layer: Any = found.layer
    convolutions = [other.layer for other in layers if other.kind.kind == "conv"]
    depthwise = found.kind.float_is_depthwise(layer)
    # Of several names that one counts which an override matches.
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


class Plain(NamedTuple):
    """The plain layer that a float layer amounts to.

    Attributes:
        weight: the weight that it convolves with, None where it cannot be told.
        padding: its padding, None where that is the layer's attribute.
        reason: why it cannot be told.
    """

    weight: Tensor | None
    padding: Pads | str | None = None
    reason: str = ""


def plain_layer(layer: Any, kind: type[DSLayer]) -> Plain:
    """Return the plain layer that ``layer`` of a ``kind`` amounts to."""
    with torch.no_grad():
        hooked = hooks.written(layer, partial(_input_of, layer, kind, 4))
        if hooked is not None and hooked.weight is None:
            return Plain(None, reason=hooked.reason)
        weight = _computed(layer) if hooked is None else hooked.weight
        if weight is None:
            return Plain(None, reason="it has no weight before it has run: run the model once before converting it")
        if weight.is_meta:
            return Plain(None, reason="its weight is on the meta device and has no values")
        own = _own_call(layer, kind)
        return _probed(layer, kind, weight.detach(), own) if own else Plain(weight.detach())


def _computed(layer: Any) -> Any:
    """What PyTorch's own hooks make of the weight, or the weight itself."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(layer)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(layer, do_power_iteration=False)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return hook.apply_mask(layer)  # type: ignore[no-untyped-call]
    return getattr(layer, "weight", None)


def _own_call(layer: nn.Module, kind: type[DSLayer]) -> str:
    """Return why a call of ``layer`` does not compute what its ``kind`` does; an empty text if it does."""
    if name := replaced(layer):
        return f"its {name} was replaced by another one"
    own = type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)
    for name, plain in kind.plain_call.items():
        function = getattr(own, name, None)
        patched = function is not None and is_torch_class(kind.float_type) and not is_of_torch(function)
        if function is not plain or patched:
            return f"its class {type(layer).__name__} has a {name} of its own"
    return ""


class _Calls(TorchFunctionMode):
    """Notes the input, weight and padding of every call of a convolution or linear function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.noted: list[tuple[Tensor, Tensor, Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is self.function:
            given = dict(zip(("input", "weight", "bias", "stride", "padding"), args, strict=False)) | kwargs
            self.noted.append((given["input"], given["weight"].detach().clone(), given.get("padding", 0)))
        return func(*args, **kwargs)


class _Run(NamedTuple):
    """One call of a layer: its input and output, the weight that it used, and the padding, None where it is unlike."""

    x: Tensor
    y: Tensor
    weight: Tensor
    pads: Pads | None


def _probed(layer: Any, kind: type[DSLayer], weight: Tensor, own: str) -> Plain:
    """Find the plain layer that one whose call is not the plain one amounts to: with another weight or padding.

    The layer is run on random inputs of several sizes, from the smallest to the largest and back, and compared with the
    layer that would take its place, with the weight that it used before rounding.
    """
    try:
        runs = _runs(layer, kind, weight)
        used = runs[0].weight
        if used.shape == weight.shape and all(torch.equal(run.weight, used) for run in runs):
            for padding in (None, _padding(layer, runs)):
                made = kind.like(layer, LayerConfig(activation_bits=None), padding).float()
                vars(made)["_shadow"] = partial(made.conv_layout, used)
                if all(_alike(run.y, made(run.x)) for run in runs):
                    return Plain(used.detach().to(weight.dtype), padding)
    except Exception:  # whatever a layer has to say to inputs that it was not made for
        pass
    return Plain(None, reason=f"{own}, which is not a plain layer of another weight or padding")


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _runs(layer: Any, kind: type[DSLayer], weight: Tensor) -> list[_Run]:
    """Calls of copies of ``layer``, without its hooks, so that finding out about it leaves no trace."""
    # All remainders that a stride leaves, and a size that is far from them.
    extras = [*range(1, max(getattr(layer, "stride", (2,))) + 4), 20]
    runs: list[_Run] = []
    # A layer that remembers one input for the next gives itself away in another order of inputs.
    for order in (extras, extras[::-1]):
        memo: dict[int, Any] = {id(getattr(layer, name)): OrderedDict() for name in HOOKS}
        probed = copied(layer, memo, isolate=True).float().eval()
        if not parametrize.is_parametrized(layer):
            vars(probed).pop("weight", None)
            probed._parameters["weight"] = nn.Parameter(weight.float().clone(), requires_grad=False)
        for extra in order:
            x = _input_of(layer, kind, extra)
            with _Calls(kind.float_function) as calls:
                y = probed(x)
            ((read, used, padding),) = calls.noted
            pads = _pads(x, read, padding) if kind.dims and not kind.transposed else None
            runs.append(_Run(x, y, used, pads))
    return runs


def _pads(x: Tensor, read: Tensor, padding: Any) -> Pads | None:
    """Return the zeros around ``x (N, C, *S)`` in a convolution that is called with ``read`` and ``padding``.

    None: ``read`` is not ``x`` with zeros around it, or ``padding`` no numbers.
    """
    dims = x.dim() - 2
    pads = []
    for n, m, dim in zip(x.shape[2:], read.shape[2:], range(2, x.dim()), strict=True):
        others = [d for d in range(read.dim()) if d != dim]
        before = int((read != 0).amax(others).int().argmax())
        pads.append((before, m - n - before))
    border = [p for pair in reversed(pads) for p in pair]
    if min(border) < 0 or not torch.equal(F.pad(x, border), read):
        return None
    more = (padding,) * dims if isinstance(padding, int) else tuple(padding)
    if len(more) != dims or isinstance(padding, str):
        return None
    return tuple((before + p, after + p) for (before, after), p in zip(pads, more, strict=True))


def _padding(layer: Any, runs: Sequence[_Run]) -> Pads | str | None:
    """Return the one padding that all ``runs`` of a convolution show; None where there is none."""
    found = {run.pads for run in runs}
    if len(found) == 1:
        return found.pop()
    where = layer.kernel_size, layer.stride, layer.dilation
    return SAME_UPPER if all(run.pads == same_upper(run.x.shape[2:], *where) for run in runs) else None


def _input_of(layer: Any, kind: type[DSLayer], extra: int) -> Tensor:
    """Random float32 input of a layer, ``extra`` longer than what an output reads, and each dimension one more."""
    shape = [size + max(0, dim - 2) for dim, size in enumerate(kind.float_input_shape(layer, extra))]
    generator = torch.Generator().manual_seed(extra)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(device_of(layer))


def _keep_attributes(layer: nn.Module, quantized: nn.Module, memo: dict[int, Any]) -> None:
    """What a model noted on a layer of its own, as builders from lists of layers do, is there to be read."""
    if (kind := kind_of(layer)) is not None:
        for name, value in vars(layer).items():
            known = name.startswith("_") or name in _attributes_of(kind)  # type: ignore[arg-type]
            if not known and not hasattr(quantized, name):
                vars(quantized)[name] = copy.deepcopy(value, memo)


@cache
def _attributes_of(kind: type[DSLayer]) -> frozenset[str]:
    """Return the attributes that PyTorch gives a float layer."""
    if not is_torch_class(kind.float_type):
        return frozenset(vars(nn.Module()))  # how to make one is not known, and its own do no harm
    make: Callable[..., nn.Module] = kind.float_type
    sizes = [1 for parameter in inspect.signature(make).parameters.values() if parameter.default is parameter.empty]
    return frozenset(vars(make(*sizes, device="meta", dtype=torch.float32)))


def _keep_hooks(layer: nn.Module, quantized: nn.Module, memo: dict[int, Any]) -> None:
    """Hooks of the user go on being called; those that compute the weight have done their work."""
    layer_kind = kind_of(layer)
    written = None if layer_kind is None else hooks.written(layer, partial(_input_of, layer, layer_kind, 4))
    done = frozenset() if written is None else written.keys
    for kind in HOOKS:
        kept = getattr(quantized, kind)
        memo[id(getattr(layer, kind))] = kept
        for key, hook in getattr(layer, kind).items():
            if not isinstance(hook, hooks.WEIGHT_HOOKS) and not (key in done and kind == "_forward_pre_hooks"):
                # A hook that is bound to a part of the model goes over to the copy of that part.
                kept[key] = copy.deepcopy(hook, memo)
                for flags in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                    if key in getattr(layer, flags, {}):
                        getattr(quantized, flags)[key] = True
