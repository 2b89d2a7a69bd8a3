"""Front ends: what turns a model into the compiler's graph.

A front end is a module of this folder with two functions:

- ``takes(model) -> bool``: whether it is for a model.
- ``graph(model, x, any_batch) -> fx.GraphModule``: the graph of a model for images of the size and memory layout of
  ``x``, for any batch or that of ``x`` alone; or a :class:`dsconv.errors.ModelError`, which says why there is none.

The graph has one placeholder ``(N, ...)``. Its nodes call functional ATen operators, and those of ``torch.ops.dsconv``
for quantized layers; ``node.meta["val"]`` has shape and dtype of each result. Tensors of the model are ``get_attr``
nodes.
"""

from typing import Protocol

from torch import Tensor, fx, nn

from dsconv.compilation.frontends import pytorch


class _FrontEnd(Protocol):
    def takes(self, model: nn.Module) -> bool: ...
    def graph(self, model: nn.Module, x: Tensor, any_batch: bool) -> fx.GraphModule: ...


_FRONT_ENDS: tuple[_FrontEnd, ...] = (pytorch,)


def graph_of(model: nn.Module, x: Tensor, any_batch: bool = True) -> fx.GraphModule:
    """Return the graph of ``model`` by the first front end that takes it.

    Raises:
        ModelError: it cannot be captured for ``x``.
    """
    front_end = next(front_end for front_end in _FRONT_ENDS if front_end.takes(model))
    return front_end.graph(model, x, any_batch)
