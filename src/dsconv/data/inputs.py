"""Model inputs for a batch: one tensor, or the arguments of a call."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dsconv.errors import DataError, one_line
from dsconv.structures import PLAIN, Way, leaves, mapped, paths_in, tensors_in


class _Shown:
    """Prints as the given text."""

    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text


class Inputs:
    """Arguments of one model call for a batch: with ``Inputs(x, mask=m)`` the model is called as ``model(x, mask=m)``.

    Arguments are tensors of any dtype, numbers, strings, None, and lists, tuples, dictionaries and dataclasses of
    these. The batch size is the first size of the first tensor that is not a scalar. Tensors with the same first size
    have a row for each sample of the batch, the others belong to all samples; in a batch of one sample, every tensor
    whose first size is 1 has a row for it. If the first argument is a list of tensors ``(C, H, W)``, as for
    torchvision's detectors, and the only one with tensors, it is a batch of that many images, which may differ in size.

    Attributes:
        args, kwargs: the arguments.
        tensors: all tensors among them, in order.
        batched: whether each of these has a row for each sample; False for the tensors of a list of images.
        of_images: whether the batch is such a list.

    Raises:
        DataError: there is no tensor with a batch size, or an object may contain tensors that cannot be found.

    >>> batch = Inputs(torch.zeros(4, 3, 8, 8), {"tokens": torch.ones(4, 5, dtype=torch.int64)}, scale=2.0)
    >>> len(batch), batch[1:3]
    (4, Inputs(float32 (2, 3, 8, 8), {'tokens': int64 (2, 5)}, scale=2.0))
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs
        if self._is_one_tensor() and args[0].dim():  # the usual case, which each call of a compiled network creates
            self.tensors, self.batched, self.of_images, self._count = [args[0]], [True], False, len(args[0])
            return
        self.tensors = tensors_in((args, kwargs))
        sizes = [len(x) for x in self.tensors if x.dim()]
        if not sizes:
            got = one_line(repr(self), 300)
            raise DataError(f"inputs: expected a tensor (N, ...) among the arguments, got none in {got}")
        others = [value for _, value in leaves((args, kwargs)) if not isinstance(value, (Tensor, *PLAIN))]
        if others:
            array = isinstance(others[0], np.ndarray)
            hint = ": pass torch.from_numpy(it)" if array else ", whose tensors cannot be determined"
            raise DataError(
                "inputs: expected tensors, numbers and texts, or lists, tuples, dictionaries and dataclasses of them, "
                f"got {type(others[0]).__name__}{hint}"
            )
        first = args[0] if args and isinstance(args[0], list) else []
        self.of_images = len(first) == len(self.tensors) and all(isinstance(x, Tensor) and x.dim() == 3 for x in first)
        self._count = len(first) if self.of_images else sizes[0]
        self.batched = [not self.of_images and x.dim() > 0 and len(x) == self._count for x in self.tensors]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, which: slice | Tensor) -> "Inputs":
        """Return the samples at ``which``: a slice, indices int64 ``(n,)``, or a bool mask ``(N,)``."""
        if self.of_images:
            places = torch.arange(self._count, dtype=torch.int64, device="cpu")[which].tolist()
            return Inputs([self.tensors[place] for place in places], *self.args[1:], **self.kwargs)
        return self._changed(lambda x, batched: x[which] if batched else x)

    def __repr__(self) -> str:
        text = lambda x: _Shown(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}")  # noqa: E731
        args, kwargs = mapped(text, (self.args, self.kwargs))
        return f"Inputs({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None = None) -> "Inputs":
        """Return the same inputs on a device, floating-point tensors in ``dtype``."""
        return self._changed(lambda x, _: x.to(device, dtype if x.is_floating_point() else None))

    def arguments(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``args`` and ``kwargs`` with other ``tensors``."""
        remaining = iter(tensors)
        args, kwargs = mapped(lambda _: next(remaining), (self.args, self.kwargs))
        return args, kwargs

    def filled(self, tensors: Iterable[Tensor]) -> "Inputs":
        """Return the same arguments with other ``tensors``; ``batched`` is unchanged."""
        made, others = object.__new__(Inputs), list(tensors)
        made.args, made.kwargs = self.arguments(others)
        made.tensors, made.batched, made.of_images = others, self.batched, self.of_images
        made._count = self._count if self.of_images else len(others[self.batched.index(True)])
        return made

    def structure(self) -> str:
        """Return a text of everything except the tensors; equal for arguments that differ in their tensors alone."""
        return "" if self._is_one_tensor() else repr(mapped(lambda _: None, (self.args, self.kwargs)))

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors by name: the parameter of ``model.forward``, and the path to a tensor within it.

        >>> class Model(nn.Module):
        ...     def forward(self, image, extra): ...
        >>> list(Inputs(torch.zeros(1, 3), {"mask": torch.zeros(1, 2)}).named(Model()))
        ['image', 'extra_mask']
        """
        parameters = list(inspect.signature(model.forward).parameters.values())
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "x")
        names += [f"{rest}_{place}" for place in range(len(self.args) - len(names))]
        arguments = [*zip(names, self.args, strict=False), *self.kwargs.items()]
        return {"_".join([name, *map(str, way)]): x for name, value in arguments for way, x in paths_in(value)}

    def _is_one_tensor(self) -> bool:
        return len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)

    def _changed(self, change: Callable[[Tensor, bool], Tensor]) -> "Inputs":
        return self.filled(change(x, batched) for x, batched in zip(self.tensors, self.batched, strict=True))


def input_names(inputs: Inputs, model: nn.Module) -> list[str]:
    """Return the names of the tensors of ``inputs`` in a file; a single tensor is called ``x``."""
    return ["x"] if len(inputs.tensors) == 1 else list(inputs.named(model))


def output_name(way: Way, taken: Sequence[str]) -> str:
    """Return the name in a file of the model output at this path, different from those already ``taken``."""
    parts = way if way and isinstance(way[0], str) else ("y", *way)
    name = "_".join(map(str, parts))
    return f"{name}_out" if name in taken else name


Batch: TypeAlias = Tensor | Inputs
"""Tensor ``(N, ...)``, or the arguments of a call; both support ``len``, ``[...]`` and ``to``."""

AnyBatch = TypeVar("AnyBatch", Tensor, Inputs, Batch)


def as_inputs(example: Any) -> Inputs:
    """Return an example of a model's arguments as Inputs: a tuple has all arguments, anything else is the only one.

    >>> as_inputs((torch.zeros(1, 3), torch.zeros(1, 2)))
    Inputs(float32 (1, 3), float32 (1, 2))
    """
    if isinstance(example, Inputs):
        return example
    return Inputs(*example) if type(example) is tuple else Inputs(example)


def call(model: Callable[..., Any], x: Batch) -> Any:
    """Call ``model`` on a batch."""
    return model(*x.args, **x.kwargs) if isinstance(x, Inputs) else model(x)


def in_batches(x: AnyBatch, size: int) -> list[AnyBatch]:
    """Split a batch into batches of at most ``size`` samples."""
    return [x[first : first + size] for first in range(0, len(x), size)]


def joined(batches: Sequence[Batch]) -> Batch:
    """Return several batches as one.

    >>> joined([Inputs(torch.zeros(2, 3)), Inputs(torch.zeros(1, 3))])
    Inputs(float32 (3, 3))
    """
    first = batches[0]
    if not isinstance(first, Inputs):
        return torch.cat([x for x in batches if isinstance(x, Tensor)])
    parts = [x for x in batches if isinstance(x, Inputs)]
    if not any(first.batched):
        return Inputs([tensor for part in parts for tensor in part.tensors], *first.args[1:], **first.kwargs)
    rows = zip(*(part.tensors for part in parts), strict=True)
    return first.filled(torch.cat(row) if own else row[0] for row, own in zip(rows, first.batched, strict=True))


def tensors_of(x: Batch) -> list[Tensor]:
    """Return the tensors of a batch."""
    return x.tensors if isinstance(x, Inputs) else [x]


def in_float32(x: Batch) -> Batch:
    """Return a batch with its floating-point tensors in float32."""
    if isinstance(x, Inputs):
        return x.filled(tensor.float() if tensor.is_floating_point() else tensor for tensor in x.tensors)
    return x.float() if x.is_floating_point() else x


def by_sample(x: Batch) -> Tensor:
    """Return the values of each sample as float32 ``(N, values)`` on the CPU.

    Images of several sizes are cut to the number of values of the smallest.

    >>> by_sample(Inputs(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)))
    tensor([[1., 1., 0.],
            [1., 1., 0.]])
    """
    if not isinstance(x, Inputs):
        return x.float().flatten(1).cpu()
    if not any(x.batched):
        fewest = min(image.numel() for image in x.tensors)
        return torch.stack([image.float().flatten()[:fewest].cpu() for image in x.tensors])
    rows = [tensor for tensor, batched in zip(x.tensors, x.batched, strict=True) if batched]
    return torch.cat([tensor.float().reshape(len(x), -1).cpu() for tensor in rows], 1)


def shape_of(x: Batch) -> tuple[Any, ...]:
    """Return what batches must share to be joined: sample shapes, dtypes, and the arguments that are not tensors.

    >>> shape_of(torch.zeros(4, 3, 8, 8))
    (3, 8, 8)
    """
    if not isinstance(x, Inputs):
        return tuple(x.shape[1:])
    if not any(x.batched):
        return ("images",)
    sizes = [tuple(t.shape[own:]) for t, own in zip(x.tensors, x.batched, strict=True)]
    return (*sizes, x.structure())


def describe(x: Batch) -> str:
    """Return a description of a batch, for messages.

    >>> describe(torch.zeros(2, 3)), describe(Inputs(torch.zeros(2, 3), flag=True))
    ('images of shape (2, 3), torch.float32, cpu', 'Inputs(float32 (2, 3), flag=True)')
    """
    if isinstance(x, Inputs) and x.structure():
        return repr(x)
    (tensor,) = tensors_of(x)
    return f"images of shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
