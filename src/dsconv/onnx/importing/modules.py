"""Modules of imported networks, and their description in files."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv.layers import Affine, DSLayer
from dsconv.layers.conv import SAME_UPPER, Pads, same_upper


class _Padded:
    """Convolution with zero padding that PyTorch's own does not support.

    Attributes:
        pads: padding before and after each dimension, or ``same_upper`` (:func:`dsconv.layers.conv.same_upper`).
    """

    def __init__(self, *args: Any, pads: Pads | str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pads = pads if isinstance(pads, str) else tuple((int(a), int(b)) for a, b in pads)
        if isinstance(self.pads, str) and self.pads != SAME_UPPER:
            raise ValueError(f"pads: expected {SAME_UPPER!r} or numbers, got {self.pads!r}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x (N, C, *S)``."""
        layer: Any = super()
        pads: Any = self.pads
        if pads == SAME_UPPER:
            own: Any = self
            pads = same_upper(x.shape[2:], own.kernel_size, own.stride, own.dilation)
        y: Tensor = layer.forward(F.pad(x, [p for pair in reversed(pads) for p in pair]))
        return y


class PaddedConv1d(_Padded, nn.Conv1d):
    """``nn.Conv1d`` with ``pads``."""


class PaddedConv2d(_Padded, nn.Conv2d):
    """``nn.Conv2d`` with ``pads``."""


class PaddedConv3d(_Padded, nn.Conv3d):
    """``nn.Conv3d`` with ``pads``."""


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONV, "output_padding")
_PADDED = (*_CONV, "pads")

MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    kind.__name__: (kind, arguments)
    for arguments, kinds in (
        (_CONV, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        (_PADDED, (PaddedConv1d, PaddedConv2d, PaddedConv3d)),
        (_TRANSPOSED, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
        (("in_features", "out_features"), (nn.Linear,)),
        (("num_features", "eps", "affine"), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
        (("num_features", "eps", "affine"), (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
        (("normalized_shape", "eps"), (nn.LayerNorm,)),
        (("num_groups", "num_channels", "eps"), (nn.GroupNorm,)),
        (("num_parameters",), (nn.PReLU,)),
    )
    for kind in kinds
}
"""Classes of modules by their names in files, and their arguments, which are also attributes."""

_WITH_BIAS = (nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm)


def describe_module(module: nn.Module) -> list[Any] | None:
    """Return class and arguments of the float module that ``module`` is, or was made from by quantizing or folding.

    Return None if it is none of :data:`MODULES`.
    """
    if isinstance(module, Affine):
        return ["BatchNorm2d", {"num_features": len(module.scale)}]
    if type(module) is nn.Identity:  # a folded BatchNorm, whose size does not matter any more
        return ["BatchNorm2d", {"num_features": 1}]
    if isinstance(module, DSLayer):
        return _described_layer(module)
    name = type(module).__name__
    kind, arguments = MODULES.get(name, (None, ()))
    if kind is not type(module):
        return None
    if isinstance(module, _BatchNorm) and not module.track_running_stats:
        return None
    values = {argument: getattr(module, argument) for argument in arguments}
    if isinstance(module, _WITH_BIAS):
        values["bias"] = module.bias is not None
    return [name, values]


def _described_layer(layer: DSLayer) -> list[Any] | None:
    name = layer.float_type.__name__
    values = {argument: getattr(layer, argument) for argument in layer.float_attributes}
    values["bias"] = layer.bias is not None
    if values.pop("padding_mode", "zeros") != "zeros":
        return None
    if (pads := layer.given_padding) is not None:
        name, values["padding"], values["pads"] = f"Padded{name}", 0, pads
    return [name, values] if name in MODULES else None


def made(name: str, values: dict[str, Any]) -> nn.Module:
    """Return the module of a description, without weights.

    Raises:
        ValueError: the description is not valid.
    """
    if name not in MODULES:
        raise ValueError(f"there is no module {name!r} in imported networks")
    kind, arguments = MODULES[name]
    if unknown := values.keys() - {*arguments, "bias"}:
        raise ValueError(f"{name} has no argument {min(unknown)!r}")
    return kind(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
