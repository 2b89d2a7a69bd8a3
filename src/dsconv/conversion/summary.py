"""Summary of each layer of a model: sizes, bits, backend, and the reason if it is left in float."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dsconv import backends
from dsconv.conversion.copying import is_torch_class
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import model_info
from dsconv.errors import one_line
from dsconv.layers import DSLayer
from dsconv.layers.kinds import kind_of
from dsconv.modes import check_module
from dsconv.numerics import packed_bytes
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerSummary:
    """Summary of one layer. Fields that only a quantized layer has are None for a layer in float.

    Attributes:
        name: name in the model.
        kind: class of the layer.
        shape: shape of its weight; ``(O, C/groups, *K)`` for a quantized layer.
        weight_bits, activation_bits, activation_sign, block_size, blocks, kds_dtype, weight_shift, algorithm: its
            settings; ``activation_bits`` is also None if the input stays in float. Winograd always rounds the
            transformed input to 8 bits.
        effective_bits: bits per weight, including its share of the KDS and shifts.
        bytes_before: size of the weight in float32.
        bytes_after: current size of the weight: VQK packed at their bit width, KDS and shifts.
        weight_sqnr_db: signal-to-quantization-noise ratio of the weight.
        reason: why it was left in float, else None.
        backend: backend that executes it when no gradient is required.
        backend_reason: why a quantized layer is not executed in integers, else None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    effective_bits: float
    bytes_before: int
    bytes_after: int
    backend: str
    reason: str | None = None
    backend_reason: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    activation_sign: str | None = None
    block_size: int | None = None
    blocks: str | None = None
    kds_dtype: str | None = None
    weight_shift: bool | None = None
    algorithm: str | None = None
    weight_sqnr_db: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether the layer is quantized."""
        return self.reason is None


@dataclass(frozen=True)
class Summary(Printed):
    """Summary of all layers of a model; prints as a table.

    Attributes:
        layers: the layers in the order of the model. A convolution or linear function that stays in float is included,
            under the name of the parameter from which its weight is computed, or else of the module.
        other_bytes: size of everything that is not a weight: biases, BatchNorm, buffers.
        parameters: other parameters with two or more dimensions in modules of the user, such as position embeddings and
            layer scales.
    """

    layers: tuple[LayerSummary, ...]
    other_bytes: int
    parameters: tuple[LayerSummary, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Size of the float model."""
        return sum(row.bytes_before for row in self._rows) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        """Size of the quantized model, which is the size of its file without the header."""
        return sum(row.bytes_after for row in self._rows) + self.other_bytes

    @property
    def effective_bits(self) -> float:
        """Mean bits per weight over all layers, including those left in float, and other parameters."""
        weights = sum(row.bytes_before for row in self._rows) / 4
        return sum(row.bytes_after for row in self._rows) * 8 / max(1.0, weights)

    @property
    def effective_bits_quantized(self) -> float:
        """Mean bits per weight over the quantized layers."""
        layers = [layer for layer in self.layers if layer.quantized]
        weights = sum(layer.bytes_before for layer in layers) / 4
        return sum(layer.bytes_after for layer in layers) * 8 / max(1.0, weights)

    @property
    def _rows(self) -> tuple[LayerSummary, ...]:
        return self.layers + self.parameters

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that execute the quantized layers, without duplicates."""
        return tuple(sorted({layer.backend for layer in self.layers if layer.quantized}))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "parameters": [asdict(row) for row in self.parameters],
            "other_bytes": self.other_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "effective_bits": self.effective_bits,
            "effective_bits_quantized": self.effective_bits_quantized,
        }

    def __rich__(self) -> "Table":
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        quantized = [layer for layer in self.layers if layer.quantized]
        explained: dict[str, list[str]] = {}
        parameters = ", ".join(f"{row.name} {'x'.join(map(str, row.shape))}" for row in self.parameters)
        for layer in self.layers:
            if layer.reason is not None:
                explained.setdefault(f"In float, {layer.reason}", []).append(layer.name)
            elif layer.backend_reason is not None:
                explained.setdefault(f"By {layer.backend}, {layer.backend_reason}", []).append(layer.name)
        notes = [
            f"{len(quantized)} layers quantized, {len(self.layers) - len(quantized)} in float; "
            f"{self.effective_bits:.2f} bits per weight ({self.effective_bits_quantized:.2f} in quantized layers); "
            f"{self.bytes_before / 1e6:.2f} -> {self.bytes_after / 1e6:.2f} MB, "
            f"{self.other_bytes / 1e6:.2f} of these for biases, BatchNorm and buffers.",
            "dB: SQNR (signal-to-quantization-noise ratio) of the weight. "
            f"Executed in inference by: {', '.join(self.backends) or 'none'}.",
            *(one_line(f"{reason}: {', '.join(names)}.", 10_000) for reason, names in explained.items()),
            *([one_line(f"Parameters outside layers, in float: {parameters}.", 10_000)] if self.parameters else []),
        ]
        table = Table(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=escape("\n".join(notes)), caption_justify="left"
        )
        table.add_column("layer", overflow="fold")
        for column in ("weight", "W", "A", "block", "bits", "float kB", "kB", "dB"):
            table.add_column(column, justify="left" if column == "weight" else "right", overflow="fold")
        for layer in self.layers:
            cells = ["float", "float", ""]
            if layer.quantized:
                activation = f"{layer.activation_bits} {layer.activation_sign}" if layer.activation_bits else "float"
                activation = "8 winograd" if layer.algorithm == "winograd" else activation
                block = str(layer.block_size)
                block += " flat" if layer.blocks == "flat" else ""
                block += " +shift" if layer.weight_shift else ""
                cells = [str(layer.weight_bits), activation, block]
            table.add_row(
                escape(one_line(layer.name, 200)),
                "x".join(map(str, layer.shape)),
                *cells,
                f"{layer.effective_bits:.2f}",
                f"{layer.bytes_before / 1e3:.1f}",
                f"{layer.bytes_after / 1e3:.1f}",
                "" if layer.weight_sqnr_db is None else f"{layer.weight_sqnr_db:.1f}",
                style=None if layer.quantized else "yellow",
            )
        return table


def summary(model: nn.Module) -> Summary:
    """Return a table of the layers of a quantized model, or of a float one before its conversion.

    Every convolution and linear layer has a row, including functional ones, as does every other PyTorch module with a
    weight of two or more dimensions, such as an embedding. A layer or weight that appears in several places has one
    row.

    >>> import dsconv
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> [layer.effective_bits for layer in dsconv.summary(dsconv.quantize(net, "paper")).layers]
    [14.666666666666666, 5.0]
    """
    check_module("model", model)
    model, functions = as_layers(model)
    info = model_info(model)
    called = {name: one for one in functions for name in one.parameters}
    rows: list[LayerSummary] = []
    parameters: list[LayerSummary] = []
    counted: set[int] = set()
    total = sum(_bytes(t) for t in _unique([*model.parameters(), *_saved_buffers(model)]))
    for name, module in model.named_modules():
        if isinstance(module, DSLayer):
            size = packed_bytes(module.vqk.numel(), module.config.weight_bits)
            size += sum(_bytes(scale) for scale in (module.kds, module.kds_shift) if scale is not None)
            kind, sqnr, device = type(module).__name__, module.weight_sqnr_db, module.vqk.device
            rows.append(quantized_row(name, kind, module.operation, size, sqnr, device))
            counted.update(id(t) for t in module.buffers(recurse=False))
        elif "parametrizations" not in name.split("."):
            is_layer = kind_of(module) is not None
            for full_name, weights in _weights(name, module, is_layer).items():
                new = [weight for weight in weights if id(weight) not in counted]
                if not new and not is_layer:
                    continue
                counted.update(map(id, new))
                largest = max(weights, key=_bytes)
                shape = () if is_lazy(largest) else tuple(largest.shape)
                size, bits = sum(map(_bytes, new)), 8.0 * largest.dtype.itemsize
                kind, reason = type(module).__name__, _why_float(module, is_layer)
                if full_name in called:
                    kind, reason = called[full_name].kind, called[full_name].reason
                elif info and name in info.in_float:
                    reason = info.in_float[name]
                row = LayerSummary(full_name, kind, shape, bits, size, size, backends.IN_FLOAT, reason)
                (parameters if reason == _NO_LAYER else rows).append(row)
        for one in functions:
            if one.name == name and not one.parameters:
                rows.append(LayerSummary(name, one.kind, (), 32.0, 0, 0, backends.IN_FLOAT, one.reason))
    unpacked = sum(_bytes(t) for m in model.modules() if isinstance(m, DSLayer) for t in m.buffers(recurse=False))
    in_float = sum(row.bytes_after for row in rows + parameters if not row.quantized)
    return Summary(tuple(rows), total - unpacked - in_float, tuple(parameters))


_NO_LAYER = "a parameter outside layers"


def _weights(name: str, module: nn.Module, is_layer: bool) -> dict[str, list[nn.Parameter]]:
    """Return the weights of a module by name; a layer has one, even if it is computed from several parameters."""
    found: dict[str, list[nn.Parameter]] = {}
    for parameter_name, parameter in _own_parameters(module):
        if parameter_name == "weight" if is_lazy(parameter) else parameter.dim() > 1:
            full_name = name if is_layer else ".".join(filter(None, (name, parameter_name)))
            found.setdefault(full_name, []).append(parameter)
    return found


def _why_float(module: nn.Module, is_layer: bool) -> str:
    """Return why the weight of a module is in float, if no conversion has recorded a reason."""
    if is_layer:
        return "not converted"
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention calls linear functions with it, in PyTorch"
    own = is_torch_class(type(module)) and not isinstance(module, nn.ParameterList | nn.ParameterDict)
    return "neither a convolution nor a linear layer" if own else _NO_LAYER


def quantized_row(
    name: str, kind: str, operation: backends.Operation, size: int, sqnr: float | None, device: torch.device
) -> LayerSummary:
    """Return the row of a quantized layer of class ``kind`` and ``size`` in bytes."""
    shape, config, backend = operation.shape, operation.config, backends.execution(operation, device)
    stated = config.model_dump(exclude={"weight_rule", "weight_scale"}) | {"algorithm": config.algorithm}
    if config.activation_bits is None:
        stated["activation_sign"] = None
    weights = math.prod(shape)
    return LayerSummary(
        name=name,
        kind=kind,
        shape=tuple(shape),
        effective_bits=8 * size / max(1, weights),
        bytes_before=4 * weights,
        bytes_after=size,
        backend=backend.name,
        backend_reason=backend.reason,
        weight_sqnr_db=sqnr,
        **stated,
    )


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the module itself, including those from which parametrizations compute."""
    own = list(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        parametrizations = cast(nn.Module, module.parametrizations)
        own += parametrizations.named_parameters(prefix="parametrizations")
    return own


def _bytes(tensor: Tensor) -> int:
    # A lazy parameter has no size before its layer has run.
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    names = set(model.state_dict())
    return [buffer for name, buffer in model.named_buffers() if name in names]
