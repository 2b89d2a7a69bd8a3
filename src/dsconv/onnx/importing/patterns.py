"""Patterns of operators that exporters decompose, and folding of constants into layers."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dsconv.onnx.importing.network import ImportedNetwork, add

_CLOSE = 1e-4


def join(network: ImportedNetwork) -> None:
    """Replace parts of a network by equivalent PyTorch operators, and fold constants into layers."""
    for rule in (_layer_norms, _affine, _activations, _activations):
        for node in list(network.graph.nodes):
            rule(network, node)
        network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    for name in _unused_constants(network):
        delattr(network, name)
    network.recompile()


def _unused_constants(network: ImportedNetwork) -> list[str]:
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    return [name for name, _ in network.named_buffers(recurse=False) if name not in used]


def _is(node: Any, *functions: Callable[..., Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def _near(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, number, rel_tol=_CLOSE)


def _orders(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Yield the operands of a sum or product in both orders."""
    a, b = node.args[:2]
    yield a, b
    yield b, a


def _alone(node: fx.Node) -> bool:
    return len(node.users) == 1


def _replace(network: ImportedNetwork, node: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with network.graph.inserting_before(node):
        made = network.graph.call_function(function, args, kwargs)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    network.graph.erase_node(node)


# Activations.


def _activations(network: ImportedNetwork, node: fx.Node) -> None:
    """Replace SiLU, hard sigmoid, hard swish, Mish and GELU."""
    if not _is(node, torch.mul, torch.div):
        return
    if (x := _hard_sigmoid_of(node)) is not None:
        _replace(network, node, F.hardsigmoid, x)
    elif (x := _hard_swish_of(node)) is not None:
        _replace(network, node, F.hardswish, x)
    elif (found := _gelu_of(node)) is not None:
        _replace(network, node, F.gelu, found[0], approximate=found[1])
    elif node.target is torch.mul:
        for x, gate in _orders(node):
            if _is(gate, torch.sigmoid) and gate.args[0] is x:
                return _replace(network, node, F.silu, x)
            if _is(gate, torch.tanh) and _is(gate.args[0], F.softplus) and gate.args[0].args[0] is x:
                return _replace(network, node, F.mish, x)


def _by(node: Any, number: float) -> Any:
    """Return ``x`` of ``x * number`` or ``x / (1 / number)``, else None."""
    if _is(node, torch.mul):
        return next((x for x, n in _orders(node) if _near(n, number)), None)
    return node.args[0] if _is(node, torch.div) and _near(node.args[1], 1 / number) else None


def _clipped_of(node: Any) -> Any:
    """Return ``x`` of ``relu6(x + 3)``, else None."""
    if _is(node, F.relu6) and _is(node.args[0], torch.add):
        return next((x for x, n in _orders(node.args[0]) if _near(n, 3)), None)
    return None


def _hard_sigmoid_of(node: fx.Node) -> Any:
    inner = _by(node, 1 / 6)
    return None if inner is None else _clipped_of(inner)


def _hard_swish_of(node: fx.Node) -> Any:
    """Return ``x`` of ``x * hardsigmoid(x)``, ``x * relu6(x + 3) / 6`` or ``x / 6 * relu6(x + 3)``, else None."""
    if (inner := _by(node, 1 / 6)) is not None and _is(inner, torch.mul):
        return next((x for x, gate in _orders(inner) if _clipped_of(gate) is x), None)
    if node.target is torch.mul:
        for x, gate in _orders(node):
            if _is(gate, F.hardsigmoid) and gate.args[0] is x:
                return x
            if (whole := _by(x, 1 / 6)) is not None and _clipped_of(gate) is whole:
                return whole
    return None


def _factors(node: Any) -> tuple[float, list[fx.Node]]:
    """Return a product of numbers and tensors as its number and its tensors."""
    if _is(node, torch.mul):
        parts = [_factors(part) if isinstance(part, fx.Node) else (float(part), []) for part in node.args]
        return parts[0][0] * parts[1][0], parts[0][1] + parts[1][1]
    if _is(node, torch.div) and isinstance(node.args[1], int | float) and node.args[1]:
        number, tensors = _factors(node.args[0])
        return number / node.args[1], tensors
    return 1.0, [node]


def _gelu_of(node: fx.Node) -> "tuple[fx.Node, str] | None":
    """Return ``x`` and kind of ``x * (1 + erf(x / sqrt(2))) / 2``, or of its tanh approximation."""
    number, tensors = _factors(node)
    if not math.isclose(number, 0.5, rel_tol=_CLOSE) or len(tensors) != 2:
        return None
    for x, gate in (tensors, tensors[::-1]):
        if not _is(gate, torch.add):
            continue
        inner: Any = next((part for part, one in _orders(gate) if _near(one, 1)), None)
        if _is(inner, torch.erf):
            scale, of = _factors(inner.args[0])
            if of == [x] and math.isclose(scale, math.sqrt(0.5), rel_tol=_CLOSE):
                return x, "none"
        if _is(inner, torch.tanh) and _is_tanh_argument(inner.args[0], x):
            return x, "tanh"
    return None


def _is_tanh_argument(node: Any, x: fx.Node) -> bool:
    """Return whether a node is ``sqrt(2 / pi) * (x + 0.044715 x^3)``."""
    scale, tensors = _factors(node)
    if not math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=_CLOSE) or len(tensors) != 1:
        return False
    if not _is(tensors[0], torch.add):
        return False
    for first, cube in _orders(tensors[0]):
        number, of = _factors(cube) if isinstance(cube, fx.Node) else (0.0, [])
        cubed = of == [x] * 3 or (len(of) == 1 and _is(of[0], torch.pow) and of[0].args == (x, 3))
        if first is x and cubed and math.isclose(number, 0.044715, rel_tol=_CLOSE):
            return True
    return False


# Constants after layers.


def _constant(network: ImportedNetwork, value: Any) -> Tensor | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float32, device="cpu")
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return network.get_buffer(str(value.target))
    return None


def _of_channels(layer: nn.Module, value: Tensor, rank: int | None) -> Tensor | None:
    """Return a constant combined with the output of a layer as one number per channel, else None."""
    channels = _channels(layer)
    if value.numel() == 1:
        return value.reshape(1).expand(channels) if rank is None or value.dim() <= rank else None
    if isinstance(layer, nn.Linear):
        return value.reshape(-1) if value.numel() == channels == value.shape[-1] else None
    if rank is None:
        return None
    whole = (1,) * (rank - value.dim()) + tuple(value.shape)
    return value.reshape(-1) if len(whole) == rank and whole[1] == value.numel() == channels else None


def _channels(layer: nn.Module) -> int:
    return int(
        getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0) or getattr(layer, "num_features", 0)
    )


def _affine(network: ImportedNetwork, node: fx.Node) -> None:
    """Fold ``layer(x) * scale`` and ``layer(x) + shift`` into the layer."""
    if not _is(node, torch.add, torch.mul, torch.sub, torch.div) or node.kwargs:
        return
    orders = list(_orders(node))[: 2 if node.target in (torch.add, torch.mul) else 1]
    for source, other in orders:
        value = _constant(network, other)
        if value is None or not isinstance(source, fx.Node) or source.op != "call_module" or not _alone(source):
            continue
        layer = network.get_submodule(str(source.target))
        if not isinstance(layer, _ConvNd | nn.Linear | _BatchNorm) or _uses(network, source) != 1:
            continue
        dims = source.meta.get("onnx_dims")
        row = _of_channels(layer, value, len(dims) if dims is not None else _rank(layer))
        if row is None or not row.is_floating_point():
            continue
        _take_up(layer, node.target, row)
        node.replace_all_uses_with(source)
        source.meta.update({key: kept for key, kept in node.meta.items() if key not in source.meta})
        network.graph.erase_node(node)
        return


def _rank(layer: nn.Module) -> int | None:
    return layer.weight.dim() if isinstance(layer, _ConvNd) else None


def _uses(network: ImportedNetwork, call: fx.Node) -> int:
    return sum(node.op == "call_module" and node.target == call.target for node in network.graph.nodes)


@torch.no_grad()
def _take_up(layer: Any, target: Any, row: Tensor) -> None:
    """Multiply the outputs of a layer by a number per channel, or add it to them, in place."""
    row = row.to(layer.weight.dtype)
    if target in (torch.add, torch.sub):
        signed = row if target is torch.add else -row
        layer.bias = nn.Parameter(signed.clone() if layer.bias is None else layer.bias + signed)
        return
    scale = row if target is torch.mul else 1 / row
    if isinstance(layer, _ConvTransposeNd):
        # (I, O / groups, *K)
        by_group = scale.reshape(layer.groups, 1, -1).expand(-1, len(layer.weight) // layer.groups, -1)
        layer.weight.mul_(by_group.reshape(len(layer.weight), -1, *[1] * (layer.weight.dim() - 2)))
    else:
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(scale)


# Normalization over the last dimensions.


def _layer_norms(network: ImportedNetwork, node: fx.Node) -> None:
    """Replace ``(x - mean) / sqrt(var + eps) * scale + shift`` over the last dimension."""
    if not _is(node, torch.add):
        return
    for product, shift in _orders(node):
        if not _is(product, torch.mul) or not _alone(product):
            continue
        for normal, scale in _orders(product):
            weight, bias = _row(network, scale), _row(network, shift)
            found = _normalized(normal)
            if weight is None or bias is None or found is None or weight.shape != bias.shape:
                continue
            x, eps = found
            layer = nn.LayerNorm(weight.shape, eps)
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            name = f"{node.name}_norm"
            add(network, name, layer)
            with network.graph.inserting_before(node):
                made = network.graph.call_module(name, (x,))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            network.graph.erase_node(node)
            return


def _row(network: ImportedNetwork, value: Any) -> Tensor | None:
    constant = _constant(network, value) if isinstance(value, fx.Node) else None
    return constant if constant is not None and constant.dim() == 1 else None


def _normalized(node: Any) -> "tuple[fx.Node, float] | None":
    """Return ``x`` and ``eps`` of ``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)`` over the last dimension."""
    if not _is(node, torch.div):
        return None
    centred: Any = node.args[0]
    root: Any = node.args[1]
    if not _is(centred, torch.sub) or not _is(root, torch.sqrt) or not _is(root.args[0], torch.add):
        return None
    x, mean = centred.args
    found: Any = ((v, e) for v, e in _orders(root.args[0]) if isinstance(e, float))
    variance, eps = next(found, (None, 0.0))
    if not _is_last_mean(mean, x) or not _is(variance, torch.mean):
        return None
    square: Any = variance.args[0] if variance is not None else None
    is_square = (_is(square, torch.pow) and square.args == (centred, 2)) or (
        _is(square, torch.mul) and square.args == (centred, centred)
    )
    return (x, eps) if is_square and _is_last_mean(variance, square) else None


def _is_last_mean(node: Any, x: Any) -> bool:
    if not _is(node, torch.mean) or node.args[0] is not x or node.args[2] is not True:
        return False
    dims = x.meta.get("onnx_dims") if isinstance(x, fx.Node) else None
    return list(node.args[1]) == [-1] or (dims is not None and list(node.args[1]) == [len(dims) - 1])
