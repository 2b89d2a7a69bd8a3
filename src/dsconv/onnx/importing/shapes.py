"""Shapes of tensors, and indexing."""

import math
import operator as python
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.functions import (
    depth_to_space,
    expanded,
    flattened,
    for_batch,
    gathered,
    gathered_elements,
    sliced,
    space_to_depth,
)
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Unsupported, Value, as_tensor

_END = 1 << 31


@operator("Constant")
def constant(op: Builder, a: Attributes) -> Any:
    """Return the values of the node."""
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in a:
            return np.array(a.get(name), dtype=dtype)
    if "value" not in a:
        raise Unsupported("a constant that is not a tensor of numbers")
    return op.source.array(a.get("value"))


@operator("ConstantOfShape")
def filled(op: Builder, a: Attributes, shape: Value) -> Any:
    """Return a tensor filled with one value."""
    value = op.source.array(a.get("value")) if "value" in a else np.zeros(1, np.float32)
    sizes = op.numbers(shape)
    if any(isinstance(size, fx.Node) for size in sizes):
        return op.call(torch.full, sizes, value.item(), dtype=as_tensor(value).dtype, device="cpu")
    known = [int(size) for size in sizes if isinstance(size, int | float)]
    if min(known, default=1) < 0:
        raise Unsupported(f"a constant of shape {known}")
    op.check_elements(math.prod(known))
    return np.full(known, value.item(), value.dtype)


@operator("Shape")
def shape(op: Builder, a: Attributes, x: Value) -> Any:
    """Return the sizes of a tensor."""
    rank = op.known_rank(x)
    start, end, _ = slice(a.get("start", 0), a.get("end")).indices(rank)
    return op.sizes([op.size(x, dim) for dim in range(start, end)])


@operator("Size")
def elements(op: Builder, a: Attributes, x: Value) -> Any:
    """Return the number of elements."""
    total: Any = 1
    for dim in range(op.known_rank(x)):
        size = op.size(x, dim)
        total = total * size if isinstance(total, int) and isinstance(size, int) else op.call(python.mul, total, size)
    return op.sizes([total], scalar=True)


@operator("Reshape")
def reshape(op: Builder, a: Attributes, x: Value, target: Value = None) -> fx.Node:
    """Change the shape. A batch size that the file fixes stays free."""
    source, leads = op.tensor(x), op.leads(x)
    sizes: list[Any] = op.numbers(target) if target is not None else list(a.ints("shape") or [])
    if not a.get("allowzero", 0):
        sizes = [op.size(x, dim) if isinstance(size, int) and size == 0 else size for dim, size in enumerate(sizes)]
    dims = op.dims(x)
    if op.fixes_batch(x) and dims and sizes and all(isinstance(size, int) for size in sizes):
        after = op.source.shapes.get(op.node.output[0])
        if sizes[0] == dims[0]:
            sizes[0] = op.size(x, 0)
        elif after and None not in after[1:]:
            sizes = [-1, *after[1:]]
    if _is_flatten(op, x, sizes):
        rest = math.prod(n for n in dims[1:] if n is not None) if dims and None not in dims[1:] else None
        return op.shaped(op.lead(op.call(torch.flatten, source, 1), leads), [dims[0] if dims else None, rest])
    known = [size if isinstance(size, int) and size > 0 else None for size in sizes]
    return op.shaped(op.lead(op.call(torch.reshape, source, sizes), leads), known)


def _is_flatten(op: Builder, x: Value, sizes: list[Any]) -> bool:
    """Return whether ``sizes`` are the batch and all other dimensions of ``x`` merged."""
    dims = op.dims(x)
    if len(sizes) != 2 or not dims or len(dims) < 2:
        return False
    rest = math.prod(n for n in dims[1:] if n is not None) if None not in dims[1:] else None
    batch = isinstance(sizes[0], fx.Node) and sizes[0] is op.size(x, 0)
    return (batch and sizes[1] in (-1, rest)) or (sizes[0] == -1 and rest is not None and sizes[1] == rest)


@operator("Flatten")
def flatten(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Flatten to a matrix."""
    axis = op.axis(x, a.get("axis", 1))
    return op.call(torch.flatten, op.tensor(x), 1) if axis == 1 else op.call(flattened, op.tensor(x), axis)


@operator("Transpose")
def transpose(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Permute the dimensions."""
    order = a.ints("perm") or list(range(op.known_rank(x)))[::-1]
    if order == sorted(order):
        return op.tensor(x)
    dims = op.dims(x)
    y = op.lead(op.call(torch.permute, op.tensor(x), order), op.leads(x) and order[0] == 0)
    return op.shaped(y, dims and [dims[dim] for dim in order])


@operator("Unsqueeze")
def unsqueeze(op: Builder, a: Attributes, x: Value, axes: Value = None) -> fx.Node:
    """Add dimensions of size one."""
    places = a.ints("axes") if axes is None else op.ints(axes, "axes")
    y = op.tensor(x)
    if places and min(places) < 0 and len(places) > 1:
        rank = op.known_rank(x) + len(places)
        places = [place % rank for place in places]
    leads = op.leads(x)
    for place in sorted(places or []):
        leads = leads and place != 0
        y = op.call(torch.unsqueeze, y, place)
    dims: Any = op.dims(x)
    for place in sorted(places or []) if dims is not None else []:
        dims = [*dims[:place], 1, *dims[place:]]
    return op.shaped(op.lead(y, leads), dims) if y is not x else y


@operator("Squeeze")
def squeeze(op: Builder, a: Attributes, x: Value, axes: Value = None) -> fx.Node:
    """Remove dimensions of size one."""
    places = a.ints("axes") if axes is None else op.ints(axes, "axes")
    if places is None:
        dims = op.dims(x)
        if dims is None or None in dims:
            raise Unsupported("the file does not state which dimensions have size one")
        places = [dim for dim, size in enumerate(dims) if size == 1 and not (dim == 0 and op.fixes_batch(x))]
    places = [op.axis(x, place) for place in places]
    y, leads = (op.batch_of_file(x) if 0 in places else op.tensor(x)), op.leads(x) and 0 not in places
    if not places:
        return y
    for place in sorted(places, reverse=min(places) >= 0):
        # PyTorch ignores a dimension of another size.
        y = op.call(torch.squeeze, y, place)
    dims = op.dims(x)
    return op.shaped(op.lead(y, leads), dims and [size for dim, size in enumerate(dims) if dim not in places])


@operator("Concat")
def concat(op: Builder, a: Attributes, *given: Value) -> fx.Node:
    """Concatenate tensors. A constant with the batch size fixed by the file is repeated."""
    axis, parts = op.axis(given[0], a.get("axis")), [op.tensor(value) for value in given]
    if len(parts) == 1:
        return parts[0]
    leading = next((value for value in given if op.fixes_batch(value)), None)
    if leading is not None and axis != 0 and op.batch == 1:
        like = op.tensor(leading)
        constants = [isinstance(value, np.ndarray) and value.ndim > 1 for value in given]
        parts = [op.call(for_batch, p, like) if known else p for p, known in zip(parts, constants, strict=True)]
    return op.call(torch.cat, parts, axis)


@operator("Split")
def split(op: Builder, a: Attributes, x: Value, sizes: Value = None) -> Any:
    """Split a tensor into parts."""
    axis, count = op.axis(x, a.get("axis", 0)), len(op.node.output)
    source = op.batch_of_file(x) if axis == 0 else op.tensor(x)
    known: Any = a.ints("split") if sizes is None else op.numbers(sizes)
    if known is None:
        dims = op.dims(x)
        size = dims[axis] if dims else None
        if size is None:
            raise Unsupported("the file does not state the size that it divides")
        step = -(-size // a.get("num_outputs", count))
        known = [min(step, size - start) for start in range(0, size, step)]
    parts = op.call(torch.split, source, known, axis)
    return tuple(op.call(python.getitem, parts, place) for place in range(count))


@operator("Slice")
def cut(op: Builder, a: Attributes, x: Value, starts: Value = None, ends: Value = None, *more: Value) -> fx.Node:
    """Slice a tensor along some dimensions."""
    first = a.ints("starts") or [] if starts is None else op.numbers(starts)
    last = a.ints("ends") or [] if ends is None else op.numbers(ends)
    given = (*more, None, None)
    axes = a.ints("axes") if given[0] is None else op.ints(given[0], "axes")
    steps = [1] * len(first) if given[1] is None else op.ints(given[1], "steps")
    y = op.tensor(x)
    for start, stop, axis, step in zip(first, last, axes or range(len(first)), steps, strict=True):
        beyond = isinstance(stop, int) and (stop >= _END or (step < 0 and stop <= -_END))
        end: Any = None if beyond else stop
        if (start, end, step) == (0, None, 1):
            continue
        y = op.batch_of_file(x) if op.axis(x, axis) == 0 and y is x else y
        y = op.call(sliced, y, op.axis(x, axis), start, end, step)
    rank = op.rank(x)
    return op.shaped(y, None if rank is None or y is x else [None] * rank)


@operator("Gather")
def gather(op: Builder, a: Attributes, x: Value, indices: Value) -> fx.Node:
    """Select indices of a dimension."""
    axis, dims = op.axis(x, a.get("axis", 0)), op.dims(x)
    flat = axis == 0 and op.fixes_batch(x) and dims is not None and len(dims) == 1
    if flat and isinstance(indices, np.ndarray) and indices.ndim > 1:
        # PyTorch's exporter writes contiguous strides this way.
        whole = np.array_equal(indices.reshape(-1), np.arange((dims or [0])[0] or 0))
        if whole:
            return op.call(torch.reshape, op.tensor(x), [-1, *indices.shape[1:]])
    leads = op.leads(x) and axis != 0
    source = op.batch_of_file(x) if axis == 0 else op.tensor(x)
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        y = op.lead(op.call(torch.select, source, axis, int(indices)), leads)
        return op.shaped(y, dims and [*dims[:axis], *dims[axis + 1 :]] if axis >= 0 else None)
    if isinstance(indices, np.ndarray) and indices.ndim == 1 and (not indices.size or indices.min() >= 0):
        y = op.lead(op.call(torch.index_select, source, axis, op.tensor(indices)), leads)
        return op.shaped(y, dims and [*dims[:axis], indices.size, *dims[axis + 1 :]] if axis >= 0 else None)
    return op.call(gathered, source, op.tensor(indices), axis)


@operator("GatherElements")
def gather_elements(op: Builder, a: Attributes, x: Value, indices: Value) -> fx.Node:
    """Select one index of a dimension for each element."""
    return op.call(gathered_elements, op.tensor(x), op.tensor(indices), a.get("axis", 0))


@operator("Expand")
def expand(op: Builder, a: Attributes, x: Value, target: Value) -> fx.Node:
    """Expand dimensions of size one."""
    return op.call(expanded, op.tensor(x), op.numbers(target))


@operator("Tile")
def tile(op: Builder, a: Attributes, x: Value, repeats: Value) -> fx.Node:
    """Repeat a tensor along each dimension."""
    return op.call(torch.tile, op.tensor(x), op.numbers(repeats))


@operator("Range")
def count(op: Builder, a: Attributes, start: Value, end: Value, step: Value) -> Any:
    """Return a range of numbers."""
    numbers = [op.numbers(value)[0] for value in (start, end, step)]
    known = [value.dtype for value in (start, end, step) if isinstance(value, np.ndarray)]
    whole = not known or known[0].kind in "iu"
    if len(known) == 3:
        first, last, by = (number for number in numbers if not isinstance(number, fx.Node))
        op.check_elements(math.ceil((last - first) / by))
        return np.arange(first, last, by, dtype=known[0])
    return op.call(torch.arange, *numbers, dtype=torch.int64 if whole else torch.float32, device="cpu")


@operator("Pad")
def pad(op: Builder, a: Attributes, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> fx.Node:
    """Pad the borders, or crop them."""
    given: list[Any] = (a.ints("pads") or []) if pads is None else op.numbers(pads)
    fill = a.get("value", 0.0) if value is None else op.weight(value, "value").item()
    pairs = list(zip(given[: len(given) // 2], given[len(given) // 2 :], strict=True))
    if axes is not None:
        placed = {op.axis(x, axis): pair for axis, pair in zip(op.ints(axes, "axes"), pairs, strict=True)}
        pairs = [placed.get(dim, (0, 0)) for dim in range(op.known_rank(x))]
    rank = len(pairs)
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    if not pairs:
        return op.tensor(x)
    mode = a.text("mode", "constant")
    if mode == "constant":
        return op.call(F.pad, op.tensor(x), [n for pair in reversed(pairs) for n in pair], mode, fill)
    # PyTorch supports these only for all dimensions after the channels.
    pairs = [(0, 0)] * (rank - 2 - len(pairs)) + pairs
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if len(pairs) != rank - 2 or mode not in names:
        raise Unsupported(f"mode {mode!r} over batch or channels")
    return op.call(F.pad, op.tensor(x), [n for pair in reversed(pairs) for n in pair], names[mode])


@operator("DepthToSpace")
def to_space(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Move channels into blocks of pixels."""
    if a.text("mode", "DCR") == "CRD":
        return op.call(F.pixel_shuffle, op.tensor(x), a.get("blocksize"))
    return op.call(depth_to_space, op.tensor(x), a.get("blocksize"))


@operator("SpaceToDepth")
def to_depth(op: Builder, a: Attributes, x: Value) -> fx.Node:
    """Move blocks of pixels into channels."""
    return op.call(space_to_depth, op.tensor(x), a.get("blocksize"))
