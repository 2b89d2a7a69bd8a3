"""Equivalence of a float layer to a plain one, however its weight is computed and its input padded."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from dsconv.config import LayerConfig
from dsconv.conversion import hooks
from dsconv.conversion.copying import HOOKS, copied, is_of_torch, is_torch_class, replaced
from dsconv.layers import DSLayer
from dsconv.layers.conv import SAME_UPPER, Pads, same_upper
from dsconv.layers.inputs import device_of


class Plain(NamedTuple):
    """Plain layer that is equivalent to a float layer.

    Attributes:
        weight: the weight that it convolves with, None if unknown.
        padding: its padding, None if it is the layer's attribute.
        reason: why it is unknown.
    """

    weight: Tensor | None
    padding: Pads | str | None = None
    reason: str = ""


def plain_layer(layer: Any, kind: type[DSLayer]) -> Plain:
    """Return the plain layer of a ``kind`` that is equivalent to ``layer``."""
    with torch.no_grad():
        hooked = hooks.written(layer, partial(input_of, layer, kind, 4))
        if hooked is not None and hooked.weight is None:
            return Plain(None, reason=hooked.reason)
        weight = computed_weight(layer) if hooked is None else hooked.weight
        if weight is None:
            return Plain(None, reason="it has no weight before it has run: run the model once before converting it")
        if weight.is_meta:
            return Plain(None, reason="its weight is on the meta device and has no values")
        own = _own_call(layer, kind)
        return _probed(layer, kind, weight.detach(), own) if own else Plain(weight.detach())


def computed_weight(layer: Any) -> Any:
    """Return the weight that PyTorch's own hooks compute, or the weight itself."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(layer)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(layer, do_power_iteration=False)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return hook.apply_mask(layer)  # type: ignore[no-untyped-call]
    return getattr(layer, "weight", None)


def _own_call(layer: nn.Module, kind: type[DSLayer]) -> str:
    """Return why a call of ``layer`` differs from that of its ``kind``; an empty string if it does not."""
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
    """Records the input, weight and padding of every call of a convolution or linear function."""

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
    """One call of a layer: its input, output and the weight used, and the padding, None if not constant."""

    x: Tensor
    y: Tensor
    weight: Tensor
    pads: Pads | None


def _probed(layer: Any, kind: type[DSLayer], weight: Tensor, own: str) -> Plain:
    """Find a plain layer, with another weight or padding, that is equivalent to one with a modified call.

    The layer is run on random inputs of several sizes, from the smallest to the largest and back, and compared with the
    layer that would replace it, with the same weight before rounding.
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
    except Exception:  # a layer may raise anything for unexpected inputs
        pass
    return Plain(None, reason=f"{own}, which is not a plain layer of another weight or padding")


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _runs(layer: Any, kind: type[DSLayer], weight: Tensor) -> list[_Run]:
    """Return calls of copies of ``layer``, without its hooks, so that the analysis has no side effects."""
    # All remainders of division by the stride, and one size far from these.
    extras = [*range(1, max(getattr(layer, "stride", (2,))) + 4), 20]
    runs: list[_Run] = []
    # The other order of inputs reveals a layer that remembers earlier inputs.
    for order in (extras, extras[::-1]):
        memo: dict[int, Any] = {id(getattr(layer, name)): OrderedDict() for name in HOOKS}
        probed = copied(layer, memo, isolate=True).float().eval()
        if not parametrize.is_parametrized(layer):
            vars(probed).pop("weight", None)
            probed._parameters["weight"] = nn.Parameter(weight.float().clone(), requires_grad=False)
        for extra in order:
            x = input_of(layer, kind, extra)
            with _Calls(kind.float_function) as calls:
                y = probed(x)
            ((read, used, padding),) = calls.noted
            pads = _pads(x, read, padding) if kind.dims and not kind.transposed else None
            runs.append(_Run(x, y, used, pads))
    return runs


def _pads(x: Tensor, read: Tensor, padding: Any) -> Pads | None:
    """Return the zero padding around ``x (N, C, *S)`` in a convolution called with ``read`` and ``padding``.

    Return None if ``read`` is not ``x`` padded with zeros, or ``padding`` is not numeric.
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
    """Return the padding common to all ``runs`` of a convolution, None if there is none."""
    found = {run.pads for run in runs}
    if len(found) == 1:
        return found.pop()
    where = layer.kernel_size, layer.stride, layer.dilation
    return SAME_UPPER if all(run.pads == same_upper(run.x.shape[2:], *where) for run in runs) else None


def input_of(layer: Any, kind: type[DSLayer], extra: int) -> Tensor:
    """Return a random float32 input; each dimension is ``extra`` longer than the receptive field, plus its index."""
    shape = [size + max(0, dim - 2) for dim, size in enumerate(kind.float_input_shape(layer, extra))]
    generator = torch.Generator().manual_seed(extra)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(device_of(layer))
