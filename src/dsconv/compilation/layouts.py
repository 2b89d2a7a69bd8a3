"""Memory layouts of a model's tensors, which can affect the last bits of PyTorch's results.

A captured graph is run once, operator by operator as in the model, for each layout of its input; every node then
records the strides of its tensor in the model. A program passes tensors with these strides to PyTorch's operators if
the bits may depend on them, and uses its own layout elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dsconv.data.inputs import Inputs

Strides = tuple[int, ...]
LAYOUT = ("strides", "sizes")
"""Keys of ``node.meta``: strides and sizes of its tensor when the model ran."""


def are_lines(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether strides are those of a contiguous tensor, except for dimensions of size 1."""
    expected = 1
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def are_pixels(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether strides are those of channels-last images or volumes, except for dimensions of size 1."""
    order = (0, *range(2, len(sizes)), 1)
    return len(sizes) in (4, 5) and are_lines([sizes[d] for d in order], [strides[d] for d in order])


def lies_in_lines(node: Any) -> bool:
    """Return whether the tensor of ``node`` is contiguous in the model; True if that is not recorded."""
    return "strides" not in node.meta or are_lines(node.meta["sizes"], node.meta["strides"])


def lies_in_pixels(node: Any) -> bool:
    """Return whether the tensor of ``node`` is channels-last in the model, and not contiguous at the same time."""
    return not lies_in_lines(node) and are_pixels(node.meta["sizes"], node.meta["strides"])


def in_one_format(node: Any) -> bool:
    """Return whether the tensor of ``node`` has one of PyTorch's formats in the model; True if that is not recorded.

    PyTorch has a separate BatchNorm, with different rounding, for other tensors.
    """
    return lies_in_lines(node) or lies_in_pixels(node)


def restrided(x: Tensor, strides: Strides) -> Tensor:
    """Return ``x`` in memory with these strides; a copy if it has other strides.

    >>> x = torch.zeros(2, 3, 4, 4, dtype=torch.float32)
    >>> restrided(x, (48, 1, 12, 3)).is_contiguous(memory_format=torch.channels_last)
    True
    """
    have = x.stride()
    if have == strides:
        return x
    if all(size == 1 or a == b for size, a, b in zip(x.shape, have, strides, strict=True)):
        return x.as_strided(x.shape, strides)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def order_in_memory(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of ``x`` by decreasing stride; the batch dimension counts as the slowest for one image.

    >>> order_in_memory(torch.zeros(1, 3, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    """
    strides = x.stride()
    order = sorted(range(len(x) == 1, len(strides)), key=lambda dim: -strides[dim])
    return (0, *order) if len(x) == 1 else tuple(order)


def in_layout_of(x: Tensor, images: int) -> Tensor:
    """Return zeros for ``images`` images, with the same order of dimensions in memory as ``x``."""
    order, sizes = order_in_memory(x), [images, *x.shape[1:]]
    zeros = torch.zeros([sizes[dim] for dim in order], dtype=x.dtype, device=x.device)
    return zeros.permute([order.index(dim) for dim in range(x.dim())])


def zeros_like(inputs: Inputs, count: int) -> Inputs:
    """Return arguments of zeros with the sizes and layouts of ``inputs`` for ``count`` samples."""
    both = zip(inputs.tensors, inputs.batched, strict=True)
    return inputs.filled(in_layout_of(x, count) if batched else x for x, batched in both)


def record(module: fx.GraphModule, inputs: Inputs) -> None:
    """Run the graph of ``module`` for ``inputs``, and record strides and sizes of every tensor in ``node.meta``."""
    _Recorder(module).run(*inputs.tensors)


def hold_for_batches(module: fx.GraphModule, images: int) -> bool:
    """Return whether strides recorded for a batch hold for others: images are consecutive in memory, or shared."""
    for node in module.graph.nodes:
        strides, sizes = node.meta.get("strides"), node.meta.get("sizes")
        if node.op == "call_function" and strides and len(sizes) in (2, 4, 5) and sizes[0] == images and strides[0]:
            ends = [size * stride for size, stride in zip(sizes[1:], strides[1:], strict=True) if size > 1]
            if strides[0] < max(ends, default=0):
                return False
    return True


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            n.meta["strides"], n.meta["sizes"] = made.stride(), tuple(made.shape)
        return made
