"""Quantized layers of a network: search, checks and addition of a bias."""

from typing import cast

import torch
from torch import Tensor, nn

from dsconv.errors import ModelError
from dsconv.layers import DSLayer
from dsconv.modes import check_evaluation_mode, check_module


def quantized_layers(model: nn.Module, name: str = "qmodel", *, duplicates: bool = False) -> dict[str, DSLayer]:
    """Return the quantized layers of the argument ``name``: under all their names if ``duplicates``, else under one.

    Raises:
        ModelError: it is not a network, or has no quantized layer.
    """
    check_module(name, model)
    modules = model.named_modules(remove_duplicate=not duplicates)
    found = {path: module for path, module in modules if isinstance(module, DSLayer)}
    if not found:
        raise ModelError(
            f"{name}: {type(model).__name__} holds no quantized layer: convert it with dsconv.quantize first"
        )
    return found


def check_inference(qmodel: nn.Module, doing: str) -> None:
    """Raise ModelError unless ``qmodel`` is a quantized model in evaluation mode.

    Raises:
        ModelError: the message says what to do before ``doing``.
    """
    quantized_layers(qmodel)
    # A part that is in training mode on purpose keeps its behaviour.
    check_evaluation_mode(qmodel, doing, parts=False)


def check_original(name: str, layer: DSLayer, there: nn.Module | None, network: str = "reference") -> None:
    """Raise ModelError unless ``there`` can be the layer ``name`` of the float ``network`` behind ``layer``.

    Raises:
        ModelError: there is none, or it has another class or shape.
    """
    shape = tuple(layer.dequantized_weight().shape)
    got = "no such layer" if there is None else f"a {type(there).__name__}"
    if isinstance(there, layer.float_type):
        there_shape = tuple(cast(Tensor, there.weight).shape)
        if there_shape == shape:
            return
        got += f" with {there_shape}"
    raise ModelError(
        f"{network}: expected a {layer.float_type.__name__} {name!r} with a weight {shape}, as in the quantized "
        f"network, got {got}: pass the float network that was quantized"
    )


def add_bias(layer: DSLayer, like: object) -> None:
    """Add a zero bias to a layer without one, with the dtype and ``requires_grad`` of the parameter ``like``."""
    if layer.bias is None:
        dtype = like.dtype if isinstance(like, Tensor) else torch.float32
        zeros = torch.zeros(len(layer.vqk), dtype=dtype, device=layer.vqk.device)
        layer.bias = nn.Parameter(zeros, requires_grad=isinstance(like, Tensor) and like.requires_grad)
