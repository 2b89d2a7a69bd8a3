"""Front ends, which convert a model to the compiler's graph.

A front end is a module of this folder with two functions:

- ``takes(model) -> bool``: whether it supports a model.
- ``graph(model, inputs, any_batch) -> Graph``: the graph of a model for arguments of the sizes and memory layouts of
  ``inputs``, for any batch size or theirs alone; or a :class:`dsconv.errors.ModelError` with the reason why there is
  none.

The graph has a placeholder for each tensor of the arguments and returns a list. Its nodes call functional ATen
operators, and those of ``torch.ops.dsconv`` for quantized layers; ``node.meta["val"]`` has the shape and dtype of each
result. Tensors of the model are ``get_attr`` nodes.
"""

from typing import Protocol

from torch import nn

from dsconv.compilation.frontends import pytorch
from dsconv.compilation.frontends.graph import Graph
from dsconv.data.inputs import Inputs

__all__ = ["Graph", "graph_of"]


class _FrontEnd(Protocol):
    def takes(self, model: nn.Module) -> bool: ...
    def graph(self, model: nn.Module, inputs: Inputs, any_batch: bool) -> Graph: ...


_FRONT_ENDS: tuple[_FrontEnd, ...] = (pytorch,)


def graph_of(model: nn.Module, inputs: Inputs, any_batch: bool = True) -> Graph:
    """Return the graph of ``model`` from the first front end that supports it.

    Raises:
        ModelError: it cannot be captured for ``inputs``.
    """
    front_end = next(front_end for front_end in _FRONT_ENDS if front_end.takes(model))
    return front_end.graph(model, inputs, any_batch)
