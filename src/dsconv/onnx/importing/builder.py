"""Builder of the network while an ONNX graph is read, with helpers for its operators."""

import keyword
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from dsconv.errors import import_extra
from dsconv.onnx.importing.functions import NAMES, of_batch, size, tensor_of
from dsconv.onnx.importing.network import ImportedNetwork, add
from dsconv.onnx.importing.reading import Source, broken
from dsconv.onnx.importing.values import Attributes, Number, Numbers, Rounded, Sizes, Unsupported, Value, as_tensor

# Suffixes that exporters append to the name of a layer for its weight.
_WEIGHT = re.compile(r"(?P<layer>.+?)(?:[._](?:weights?|kernel|w)(?:_0)?|/kernel(?:/read)?|:0)")
# A gigabyte of float32.
_MOST_ELEMENTS = 1 << 28
_DIMS, _LEADS = "onnx_dims", "onnx_leads"


class Builder:
    """Network so far, and the values of the ONNX graph by name.

    Attributes:
        opset: version of the standard ONNX operators.
        node: the ``NodeProto`` that is being added.
        batch: batch size if the file fixes it, otherwise None.
        values: values of the graph, by name.
    """

    def __init__(self, source: Source):
        self.source = source
        self.opset = source.opset
        self.graph, self.root = fx.Graph(), nn.Module()
        self.node: Any = None
        self.values: dict[str, Value] = {}
        self.batch: int | None = None
        self._names: set[str] = set()
        self._constants: dict[int, tuple[np.ndarray, str]] = {}
        self._layers: dict[tuple[Any, ...], str] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._read = {name for node in source.graph.node for name in node.input}
        self._read.update(output.name for output in source.graph.output)
        first = self.source.shapes.get(source.inputs[0].name)
        if first:
            self.batch = first[0]
        for given in source.inputs:
            made = self.graph.placeholder(self.free_name(given.name))
            dims = source.shapes.get(given.name)
            self.remember(given.name, made)
            made.meta[_LEADS] = bool(dims) and dims[0] == self.batch if dims else False

    # Values.

    def value(self, name: str) -> Value:
        """Return the value of a name, None for an omitted input of a node."""
        if not name:
            return None
        if name not in self.values and name in self.source.tensors:
            self.values[name] = self.source.array(self.source.tensors[name])
        if name not in self.values:
            raise broken(self.source.path, f"node {self.node.name!r} reads {name!r}, which no earlier node computes")
        return self.values[name]

    def remember(self, name: str, value: Value) -> None:
        """Record an output of the graph's node, and its shape as far as known."""
        self.values[name] = value
        if isinstance(value, fx.Node):
            dims = self.source.shapes.get(name)
            if dims is not None and (_DIMS not in value.meta or len(value.meta[_DIMS]) == len(dims)):
                value.meta[_DIMS] = dims

    def tensor(self, value: Value, like: "Value" = None) -> fx.Node:
        """Return the node of a tensor; a constant becomes a buffer of the network."""
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, np.ndarray):
            return self._constant(value)
        if isinstance(value, Sizes):
            whole = all(isinstance(v, int) or v.target is not torch.sym_float for v in value.values)  # type: ignore[union-attr]
            return self.call(tensor_of, list(value.values), value.scalar, torch.int64 if whole else torch.float32)
        if isinstance(value, Rounded):
            raise Unsupported("it computes with quantized values: the model is already quantized; use the float model")
        raise Unsupported("an input is missing")

    def operand(self, value: Value, other: Value) -> "fx.Node | Number":
        """Return a tensor, or a number for a constant with one value that is combined with the tensor ``other``."""
        if isinstance(value, np.ndarray) and value.size == 1 and not isinstance(other, np.ndarray):
            rank = self.rank(other)
            if value.ndim == 0 or (rank is not None and value.ndim <= rank):
                number: Number = value.item()
                return number
        return self.tensor(value)

    def _constant(self, array: np.ndarray) -> fx.Node:
        if id(array) not in self._constants:
            name = self.free_name("constant")
            add(self.root, name, as_tensor(array))
            # Kept alive, so that no other array gets its id.
            self._constants[id(array)] = array, name
        made = self.graph.get_attr(self._constants[id(array)][1])
        made.meta[_DIMS] = list(array.shape)
        return made

    def weight(self, value: Value, what: str = "weight") -> np.ndarray:
        """Return a constant.

        Raises:
            Unsupported: it is computed when the network runs.
        """
        if not isinstance(value, np.ndarray):
            raise Unsupported(f"its {what} is computed at run time")
        return value

    def numbers(self, value: Value) -> list[Number | fx.Node]:
        """Return the values of a constant, or sizes.

        Raises:
            Unsupported: they depend on the values of a tensor.
        """
        if isinstance(value, Sizes):
            return list(value.values)
        if isinstance(value, np.ndarray):
            return list(value.reshape(-1).tolist())
        raise Unsupported("a size or index is computed from the values of a tensor")

    def ints(self, value: Value, what: str) -> list[int]:
        """Return the values of an integer constant."""
        return [int(number) for number in self.weight(value, what).reshape(-1)]

    def sizes(self, values: Numbers, scalar: bool = False, whole: bool = True) -> Value:
        """Return sizes; a constant if all of them are known."""
        if any(isinstance(value, fx.Node) for value in values):
            return Sizes(tuple(values), scalar)
        array = np.array(values, dtype=np.int64 if whole else np.float32)
        return array.reshape(()) if scalar else array.reshape(-1)

    # Known properties of tensors.

    def dims(self, value: Value) -> list[int | None] | None:
        """Return the shape of a tensor from the file; None if it, or one of its sizes, is unknown."""
        if isinstance(value, np.ndarray):
            return list(value.shape)
        if isinstance(value, Sizes):
            return [] if value.scalar else [len(value.values)]
        return value.meta.get(_DIMS) if isinstance(value, fx.Node) else None

    def rank(self, value: Value) -> int | None:
        """Return the number of dimensions, None if unknown."""
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def known_rank(self, value: Value) -> int:
        """Return the number of dimensions.

        Raises:
            Unsupported: it is unknown.
        """
        rank = self.rank(value)
        if rank is None:
            raise Unsupported("the file does not state how many dimensions its input has")
        return rank

    def axis(self, value: Value, dim: int) -> int:
        """Return a dimension counted from the front, if that is known."""
        rank = self.rank(value)
        return dim + rank if dim < 0 and rank is not None else dim

    def leads(self, value: Value) -> bool:
        """Return whether the first dimension of a tensor is the batch."""
        return isinstance(value, fx.Node) and bool(value.meta.get(_LEADS))

    def shaped(self, value: fx.Node, dims: "list[int | None] | None") -> fx.Node:
        """Record the shape of a tensor, which is used if the file does not state it."""
        if dims is not None:
            value.meta[_DIMS] = dims
        return value

    def lead(self, value: fx.Node, leads: bool) -> fx.Node:
        """Record whether the first dimension of ``value`` is the batch."""
        value.meta[_LEADS] = leads
        return value

    def fixes_batch(self, value: Value) -> bool:
        """Return whether the file fixes the batch size of a tensor, which the network does not."""
        return self.batch is not None and self.leads(value)

    def batch_of_file(self, value: Value) -> fx.Node:
        """Return the node of a tensor whose images are indexed: its batch size stays fixed if the file fixes it."""
        node, dims = self.tensor(value), self.dims(value)
        if not self.fixes_batch(value) or not dims or dims[0] is None:
            return node
        return self.shaped(self.lead(self.call(of_batch, node, dims[0]), False), dims)

    def size(self, value: Value, dim: int) -> "int | fx.Node":
        """Return a size of a tensor: a number if the file fixes it and it is not the batch."""
        dims = self.dims(value)
        free = dim == 0 and self.leads(value)
        if dims is not None and dims[dim] is not None and not free:
            return int(dims[dim])  # type: ignore[arg-type]
        node = self.tensor(value)
        if (node, dim) not in self._sizes:
            self._sizes[node, dim] = self.call(size, node, dim)
        return self._sizes[node, dim]

    # Nodes.

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of one of the functions of :mod:`dsconv.onnx.importing.functions`."""
        assert function in NAMES, function
        return self.graph.call_function(function, args, kwargs)

    def layer(self, make: Callable[[], nn.Module], x: Value, *key: Any) -> fx.Node:
        """Add a call of a module, shared by nodes that are equal except for their input and have the same ``key``."""
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in self.node.attribute))
        whole = (self.node.op_type, *self.node.input[1:], attributes, *key)
        if whole not in self._layers:
            self._layers[whole] = name = self.free_name(self._layer_name(), module=True)
            # Its parameters are replaced, and need no values before.
            with torch.device("meta"):
                module = make()
            add(self.root, name, module)
        return self.graph.call_module(self._layers[whole], (self.tensor(x),))

    def _layer_name(self) -> str:
        """Return the name of the layer of a node, as in the network before its export."""
        if len(self.node.input) > 1 and (found := _WEIGHT.fullmatch(self.node.input[1])):
            return found["layer"]
        name: str = self.node.name or self.node.output[0]
        # ``/layer1/layer1.0/conv1/Conv``
        parts = name.strip("/").split("/")
        if len(parts) > 1 and re.fullmatch(rf"{self.node.op_type}(_\d+)?", parts[-1]):
            parts.pop()
        kept: list[str] = []
        for part in parts:
            if kept and part.startswith(f"{kept[-1]}."):
                kept.pop()
            kept.append(part)
        # The names of indexed containers repeat those of their parents.
        return ".".join(kept)

    def free_name(self, hint: str, module: bool = False) -> str:
        """Return an unused name similar to ``hint``; modules may be nested, with dots in their names."""
        parts = [re.sub(r"\W+", "_", part, flags=re.ASCII).strip("_") for part in hint.split(".")]
        parts = [part for part in parts if part] or ["part"]
        if parts[0][0].isdigit() and not module:
            parts[0] = f"_{parts[0]}"
        parts = [f"{part}_" if keyword.iskeyword(part) or hasattr(nn.Module, part) else part for part in parts]
        name, count = ".".join(parts), 0
        while self._is_taken(name):
            count += 1
            name = f"{'.'.join(parts)}_{count}"
        self._names.add(name)
        return name

    def _is_taken(self, name: str) -> bool:
        """Return whether a name is used by another part, or is a prefix of a used name or the other way round."""
        return any(
            name == other or other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in self._names
        ) or hasattr(fx.GraphModule, name.partition(".")[0])

    def finished(self, outputs: Sequence[Value]) -> ImportedNetwork:
        """Return the network with these outputs: one, or a tuple of several."""
        nodes = [self.tensor(value) for value in outputs]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        return ImportedNetwork(self.root, self.graph, "ImportedNetwork").eval()

    def check_elements(self, count: int) -> None:
        """Reject a constant that is larger than any network needs.

        Raises:
            Unsupported: it is too large.
        """
        if count > _MOST_ELEMENTS:
            raise Unsupported(f"a constant of {count:,} elements")

    def more_outputs(self) -> bool:
        """Return whether an output of the node other than the first is used."""
        return any(name in self._read for name in self.node.output[1:])

    def fold(self) -> list[np.ndarray] | None:
        """Return the outputs of the node for its constant inputs, None if the reference implementation fails."""
        onnx = import_extra("onnx", "onnx")
        names = [name for name in self.node.input if name]
        feeds: dict[str, Any] = {name: self.value(name) for name in names}
        untyped = onnx.TensorProto.UNDEFINED
        graph = onnx.helper.make_graph(
            [self.node],
            "constant",
            [onnx.helper.make_tensor_value_info(name, untyped, None) for name in feeds],
            [onnx.helper.make_tensor_value_info(name, untyped, None) for name in self.node.output],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        try:
            results = import_extra("onnx", "onnx.reference").ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # of many kinds: it is incomplete
            return None
        return [np.asarray(result) for result in results]

    def attributes(self) -> Attributes:
        """Return the attributes of the node."""
        return Attributes(self.node)
