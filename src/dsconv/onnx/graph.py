"""Nodes of a graph, or of a model-local function, in order."""

import itertools
from typing import Any

import numpy as np

from dsconv.errors import import_extra

Value = Any
"""An ``onnx_ir.Value``."""


class Nodes:
    """Builder of nodes: ``op.Add(a, b)`` is the output of a new ``Add``.

    Attributes:
        made: the nodes so far.
        constants: tensors by their contents, without duplicates.
        initializers: tensors that the graph will store; a function cannot store any, and uses constant nodes.
    """

    def __init__(self, *, in_function: bool = False):
        self.ir = import_extra("onnx", "onnx_ir")
        self.FLOAT, self.INT32 = self.ir.DataType.FLOAT, self.ir.DataType.INT32
        self.in_function = in_function
        self._numbers = itertools.count()
        self.made: list[Any] = []
        self.constants: dict[tuple[Any, ...], Value] = {}
        self.initializers: list[Value] = []

    def __getattr__(self, operator: str) -> Any:
        if operator.startswith("_"):
            raise AttributeError(operator)
        return lambda *inputs, **attributes: self.call("", operator, inputs, attributes)[0]

    def call(self, domain: str, operator: str, inputs: Any, attributes: dict[str, Any], outputs: int = 1) -> Any:
        """Return the outputs of a new node."""
        referring = [make(own) for own, make in attributes.items() if callable(make)]
        given = {own: value for own, value in attributes.items() if not callable(value) and value is not None}
        all_attributes = [*self.ir.convenience.convert_attributes(given), *referring]
        # Operators require that trailing empty inputs are omitted, functions that they are present.
        while not domain and inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        # Names take half of the file besides the weights: short ones matter.
        values = [self.ir.Value(name=f"q{next(self._numbers):x}") for _ in range(outputs)]
        self.made.append(self.ir.Node(domain, operator, inputs, all_attributes, outputs=values))
        return self.made[-1].outputs

    def constant(self, array: Any, dtype: Any = np.float32) -> Value:
        """Return a constant tensor, float32 or ``dtype``."""
        array = np.asarray(array, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            tensor = self.ir.tensor(array)
            in_function = self.in_function
            self.constants[key] = (
                self.Constant(value=tensor) if in_function else self.initializer(f"c{len(self.constants)}", tensor)
            )
        return self.constants[key]

    def shape(self, *sizes: int) -> Value:
        """Return int64 sizes, or axes."""
        return self.constant(sizes, np.int64)

    def initializer(self, name: str, tensor: Any) -> Value:
        """Return a tensor that the graph stores under a name."""
        made = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers.append(made)
        return made

    def attribute(self, name: str, kind: str) -> Any:
        """Return a reference to an attribute of the function's call, for a node in it."""
        return lambda own: self.ir.RefAttr(own, name, self.ir.AttributeType[kind])
