"""Export of a quantized layer: a node with its name while the model is captured, then ONNX operators."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsconv.config import LayerConfig
from dsconv.errors import import_extra
from dsconv.layers import DSLayer
from dsconv.onnx.activations import Magnitude, patches, quantize, quantize_of_attributes
from dsconv.onnx.graph import Nodes, Value
from dsconv.ops import transposed_layout

DOMAIN = "dsconv"
_STAND_IN = f"{DOMAIN}::Layer"


class StandIn(nn.Module):
    """Replaces a quantized layer while the model around it is captured: a node with the layer's name."""

    def __init__(self, name: str, layer: DSLayer):
        super().__init__()
        self.name = name
        self.__dict__["layer"] = layer  # not registered as part of the model

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that a model set on the layer, as builders from lists of layers do, or reads from it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["layer"], name)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the output of the layer."""
        layer: Any = self.__dict__["layer"]
        if layer.dims == 0:
            y = self._node(x.reshape(-1, layer.vqk.shape[1]), (len(layer.vqk),))
            return y if x.dim() == 2 else y.reshape(*x.shape[:-1], len(layer.vqk))
        x = layer.padded(x)
        more = {"output_padding": list(layer.output_padding_for(x, output_size))} if layer.transposed else {}
        return self._node(x, (len(layer.vqk), *layer.output_size_for(x.shape[2:], **more)), **more)

    def _node(self, x: Tensor, shape: tuple[int, ...], **attributes: Any) -> Tensor:
        attributes = {"layer": self.name, **attributes}
        return torch.onnx.ops.symbolic(
            _STAND_IN, (x,), attributes, dtype=x.dtype, shape=(x.shape[0], *shape), version=1
        )


class Integers:
    """Quantized layers by name as ONNX operators: weights are dequantized from integers, and inputs rounded.

    Attributes:
        op: the nodes made.
    """

    def __init__(self, layers: dict[str, DSLayer]):
        self.layers = layers
        self.op = Nodes()
        # Several layers may read one tensor, and one layer may be called several times.
        self._made: dict[tuple[Any, ...], Value] = {}

    def layer(self, name: str, x: Value, output_padding: Sequence[int] | None) -> Value:
        """Return the output of a layer for ``x``."""
        layer: Any = self.layers[name]
        op = self.op
        bias = None if layer.bias is None else self._tensor(f"{name}.bias", layer.bias.float())
        channels = layer.vqk.shape[1] * layer.groups
        given, where = {}, {}
        if layer.dims:
            given = {"strides": layer.stride, "pads": layer.zero_padding * 2, "dilations": layer.dilation}
            # Attributes at their defaults would take space in the file.
            where = {n: value for n, value in given.items() if set(value) != {0 if n == "pads" else 1}}
        if self._over_patches(layer):
            kernel = layer.kernel_size
            x = self._once(("patches", x, kernel, *given.values()), lambda: patches(op, x, channels, kernel, **where))
            channels, where = channels * math.prod(kernel), {}
        if layer.groups > 1:
            where["group"] = layer.groups
        x = self._input(x, layer, channels)
        if output_padding is not None:
            where = {"output_padding": output_padding, **where}
        return getattr(self, layer.onnx_operator)(name, x, bias, **where)

    def functions(self) -> list[Any]:
        """Return the model-local functions that the nodes made so far call."""
        return []

    def _over_patches(self, layer: DSLayer) -> bool:
        """Return whether the input of a layer is divided into blocks over the patch of each output."""
        return layer.config.blocks == "flat" and layer.config.activation_bits is not None and layer.vqk.dim() > 2

    def _input(self, x: Value, layer: DSLayer, channels: int) -> Value:
        config = layer.config
        if config.activation_bits is None:
            return x
        key = ("quantize", x, config.activation_bits, config.block_size, config.activation_sign, channels, layer.groups)
        return self._once(key, lambda: self._quantized(x, config, channels, layer.groups))

    def _quantized(self, x: Value, config: LayerConfig, channels: int, groups: int) -> Value:
        return quantize(self.op, x, config, channels, groups)

    # The lowering of a layer, by its ``onnx_operator``.

    def Conv(self, name: str, x: Value, bias: Value, **where: Any) -> Value:
        return self.op.Conv(x, self._weight(name), bias, **where)

    def ConvTranspose(self, name: str, x: Value, bias: Value, **where: Any) -> Value:
        return self.op.ConvTranspose(x, self._weight(name), bias, **where)

    def Gemm(self, name: str, x: Value, bias: Value) -> Value:
        return self.op.Gemm(x, self._weight(name), bias, transB=1)

    def _weight(self, name: str) -> Value:
        """Return the float32 weight of a layer in the layout of ONNX, which is PyTorch's."""
        return self._once(("weight", name), lambda: self._made_weight(name))

    def _made_weight(self, name: str) -> Value:
        op, layer = self.op, self.layers[name]
        weight = self._dequantized(name)
        if layer.config.blocks == "flat" and layer.vqk.dim() > 2 and not self._over_patches(layer):
            weight = op.Reshape(weight, op.shape(*layer.vqk.shape))
        if layer.transposed:  # as dsconv.ops.transposed_layout
            inputs, kernel = layer.vqk.shape[1], layer.vqk.shape[2:]
            grouped = op.Reshape(weight, op.shape(layer.groups, -1, inputs, *kernel))
            swapped = op.Transpose(grouped, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
            weight = op.Reshape(swapped, op.shape(layer.groups * inputs, -1, *kernel))
        return weight

    def _dequantized(self, name: str) -> Value:
        """Return ``KDS * VQK (+ shift)``, in the shape of the integers from :meth:`_parts`."""
        op = self.op
        vqk, kds, shift, size = self._parts(name)
        depth = vqk.shape[1]
        if depth % size == 0:
            integers, scales = [self._integers(f"{name}.vqk", vqk)], [kds]
        else:  # OpenVINO does not support a short block
            whole = depth - depth % size
            integers = [
                self._integers(f"{name}.vqk", vqk[:, :whole]),
                self._integers(f"{name}.vqk_last", vqk[:, whole:]),
            ]
            scales = op.call("", "Split", (kds, op.shape(whole // size, 1)), {"axis": 1}, outputs=2)
        parts = [
            op.DequantizeLinear(q, scale, axis=1, block_size=min(size, q.shape[1]))
            for q, scale in zip(integers, scales, strict=True)
        ]
        weight = parts[0] if len(parts) == 1 else op.Concat(*parts, axis=1)
        if shift is None:
            return weight
        places = self._once(("places", depth, size), lambda: _block_of(op, op.constant(depth, np.int64), size))
        return op.Add(weight, op.Gather(shift, places, axis=1))

    def _parts(self, name: str) -> tuple[Tensor, Value, Value | None, int]:
        """Return integers ``(O, D, ...)``, float32 scale and shift of blocks ``(O, CB, ...)``, and the block size."""
        layer = self.layers[name]
        vqk = layer.vqk.flatten(1) if layer.config.blocks == "flat" else layer.vqk
        ones = (1,) * (layer.vqk.dim() - vqk.dim()) if self._over_patches(layer) else ()

        def scale(part: str, value: Tensor) -> Value:
            made = self._tensor(f"{name}.{part}", value.reshape(*value.shape, *ones))
            return made if value.dtype == torch.float32 else self.op.Cast(made, to=self.op.FLOAT)

        size = min(layer.config.block_size, vqk.shape[1])
        shift = None if layer.kds_shift is None else scale("kds_shift", layer.kds_shift)
        return vqk.reshape(*vqk.shape, *ones), scale("kds", layer.kds), shift, size

    def _integers(self, name: str, vqk: Tensor) -> Value:
        bits = self.layers[name.rpartition(".")[0]].config.weight_bits
        return self._tensor(name, vqk, import_extra("onnx", "ml_dtypes").int4 if bits <= 4 else None)

    def _tensor(self, name: str, value: Tensor, dtype: Any = None) -> Value:
        """Return an initializer with the values of a tensor."""
        ir = self.op.ir
        value = value.detach().cpu().contiguous()
        tensor = ir.tensor(value.numpy().astype(dtype)) if dtype else ir.tensor_adapters.TorchTensor(value)
        return self._once(("tensor", name), lambda: self.op.initializer(name, tensor))

    def _once(self, key: tuple[Any, ...], make: Callable[[], Value]) -> Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _block_of(op: Nodes, depth: Value, size: "int | Value") -> Value:
    """Return the index of the block of each of ``depth`` values."""
    places = op.Range(op.constant(0, np.int64), depth, op.constant(1, np.int64))
    return op.Div(places, op.constant(size, np.int64) if isinstance(size, int) else size)


class Floats(Integers):
    """Layers as operators on float weights and float inputs."""

    def _over_patches(self, layer: DSLayer) -> bool:
        return False

    def _input(self, x: Value, layer: DSLayer, channels: int) -> Value:
        return x

    def _made_weight(self, name: str) -> Value:
        layer = self.layers[name]
        weight = layer.conv_weight()
        return self._tensor(f"{name}.weight", transposed_layout(weight, layer.groups) if layer.transposed else weight)


class Functions(Integers):
    """Layers as calls of model-local functions, which a runtime may recognize by name and replace by its own."""

    def __init__(self, layers: dict[str, DSLayer]):
        super().__init__(layers)
        self._called: dict[str, Any] = {}

    def _quantized(self, x: Value, config: LayerConfig, channels: int, groups: int) -> Value:
        known = {"bits": config.activation_bits, "sign": config.activation_sign}
        magnitude = {name: [int(value)] for name, value in Magnitude.of(config)._asdict().items()}
        sizes = {"block_size": [config.block_size], "group": [groups]}
        return self._call("BFPQuantize", {"x": x}, {**known, **sizes, **magnitude})

    def Conv(self, name: str, x: Value, bias: Value, **where: Any) -> Value:
        layer, dims = self.layers[name], self.layers[name].dims
        if layer.config.blocks == "flat" and not self._over_patches(layer):
            return super().Conv(name, x, bias, **where)
        default = {"strides": [1] * dims, "pads": [0] * 2 * dims, "dilations": [1] * dims, "group": 1}
        return self._fused("DSConv", name, x, bias, default | where)

    def Gemm(self, name: str, x: Value, bias: Value) -> Value:
        return self._fused("DSLinear", name, x, bias, {})

    def _fused(self, function: str, name: str, x: Value, bias: Value, where: dict[str, Any]) -> Value:
        vqk, kds, shift, size = self._parts(name)
        known = {"weight_bits": self.layers[name].config.weight_bits, "block_size": size}
        inputs = {"x": x, "vqk": self._integers(f"{name}.vqk", vqk), "kds": kds}
        if shift is not None:
            function, inputs["kds_shift"] = f"{function}Shifted", shift
        return self._call(function, {**inputs, "bias": bias}, {**known, **where})

    def _call(self, function: str, inputs: dict[str, Value | None], attributes: dict[str, Any]) -> Value:
        if function not in self._called:
            self._called[function] = _function(function, list(inputs), list(attributes))
        return self.op.call(DOMAIN, function, list(inputs.values()), attributes)[0]

    def functions(self) -> list[Any]:
        return list(self._called.values())


def _function(name: str, inputs: list[str], attributes: list[str]) -> Any:
    """Return a function with this name, these inputs and attributes."""
    op = Nodes(in_function=True)
    given = {part: op.ir.Value(name=part) for part in inputs}
    if "vqk" in given:
        weight = op.DequantizeLinear(given["vqk"], given["kds"], axis=1, block_size=op.attribute("block_size", "INT"))
        if "kds_shift" in given:
            size = op.Constant(value_int=op.attribute("block_size", "INT"))
            depth = op.Squeeze(op.Shape(given["vqk"], start=1, end=2))
            weight = op.Add(weight, op.Gather(given["kds_shift"], _block_of(op, depth, size), axis=1))
        if "strides" in attributes:
            where = {n: op.attribute(n, "INTS") for n in ("strides", "pads", "dilations")}
            y = op.Conv(given["x"], weight, given["bias"], group=op.attribute("group", "INT"), **where)
        else:
            y = op.Gemm(given["x"], weight, given["bias"], transB=1)
    else:
        y = quantize_of_attributes(op, given["x"])
    ir = op.ir
    graph = ir.Graph(list(given.values()), [y], nodes=op.made, opset_imports={"": 21})
    return ir.Function(
        DOMAIN, name, graph=graph, attributes=[ir.Attr(n, ir.AttributeType.UNDEFINED, None) for n in attributes]
    )
