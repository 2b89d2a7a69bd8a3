"""Distance between outputs of a quantized network and those of its reference: the single definition for all uses.

The kind of a network's outputs is determined from the shape of its main output, the one called ``logits`` or else the
first:

* ``classification``: logits ``(N, classes)`` of two or more classes;
* ``images``: ``(N, 1, H, W)`` or ``(N, 3, H, W)``;
* ``segmentation``: logits ``(N, classes, H, W)`` of each pixel, with any other number of classes;
* ``other``: everything else.

A user's ``task`` overrides this. Logits of each position ``(N, classes, T)`` are ``other`` unless the user passes
``segmentation``, because boxes and sequences have the same shape. Further outputs with the shape of the task are
measured like the main one, and the rest as ``other``.

The distance of two networks is the sum, over outputs, of

* the KL divergence ``KL(softmax(f) || softmax(q))`` of logits in nats, averaged over the positions of an image and over
  images;
* the relative error ``sum (f - q)^2 / sum f^2`` of other outputs; if the shapes differ, the error is all of ``f``.

For a classifier, outputs other than logits are ignored: they are the features from which the logits are computed. A
single logit, ``(N, 1)`` or ``(N, 1, H, W)`` with a task given by the user, belongs to the second of two classes: the
logit of the first is 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsconv.errors import ConfigError, ModelError
from dsconv.evaluation.outputs import check_same, main_output
from dsconv.names import Task, check_task

Output = Tensor | list[Tensor]
"""Output for a batch, or a list with the output for each image."""

MeasureName = Literal["KL divergence", "relative error", "KL divergence and relative error"]

_PICTURE_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Kinds:
    """Kinds of a network's outputs.

    Attributes:
        task: kind of the main output, or the one given by the user.
        main: name of the main output; None if there are no floating-point outputs.
        of: kind of each floating-point output.
        counted: names of the outputs that contribute to the distance.

    >>> kinds = Kinds.told_by({"out": torch.zeros(2, 21, 8, 8), "boxes": torch.zeros(2, 4)}, 2)
    >>> kinds.of, kinds.measure
    ({'out': 'segmentation', 'boxes': 'other'}, 'KL divergence and relative error')
    """

    task: Task
    main: str | None
    of: dict[str, Task]
    counted: tuple[str, ...]

    @classmethod
    def told_by(cls, outputs: Mapping[str, Output], images: int, task: Task | None = None) -> "Kinds":
        """Determine the kinds from the outputs for a batch of ``images``, or from the task given by the user.

        Raises:
            ConfigError: the task does not exist.
        """
        check_task(task)
        floats = {name: output for name, output in outputs.items() if _first(output).is_floating_point()}
        shapes = {name: _shape(output, images) for name, output in floats.items()}
        main = main_output({name: _first(output) for name, output in floats.items()})
        told = task or ("other" if main is None or isinstance(outputs[main], list) else _task(shapes[main]))
        of: dict[str, Task] = {
            name: told if _fits(shape, told, said=task is not None) else "other" for name, shape in shapes.items()
        }
        counted = tuple(name for name, kind in of.items() if kind == told or told != "classification")
        # A user may claim logits where no output has their shape: something must count all the same.
        return cls(told, main, of, counted or tuple(of))

    @property
    def measure(self) -> MeasureName:
        """Name of the distance."""
        logits = {is_logits(self.of[name]) for name in self.counted}
        if len(logits) == 2:
            return "KL divergence and relative error"
        return "KL divergence" if logits == {True} else "relative error"


class Teller:
    """Determines the kinds of a network's outputs from its first batch, and checks that later batches match.

    Args:
        name: name of the network, for errors.
        task: task given by the user.
        data_range: range of the pixel values.

    Raises:
        ConfigError: the task does not exist, or ``data_range`` is not above 0.
    """

    def __init__(self, name: str, task: Task | None, data_range: float | None = None):
        check_task(task)
        if data_range is not None and not 0 < data_range < math.inf:
            raise ConfigError(f"data_range: expected a number above 0, got {data_range!r}")
        self._name, self._said = name, task
        self._names: list[str] = []
        self._kinds: Kinds | None = None

    def kinds(self, outputs: Mapping[str, Output], images: int) -> Kinds:
        """Return the kinds of the outputs of a batch.

        Raises:
            ModelError: an earlier batch had other outputs.
        """
        if self._kinds is None:
            self._kinds, self._names = Kinds.told_by(outputs, images, self._said), list(outputs)
        check_same(self._names, outputs, (f"the {self._name}, for the first batch,", "for another batch it"))
        return self._kinds

    @property
    def task(self) -> Task:
        """Task of the batches so far."""
        return "other" if self._kinds is None else self._kinds.task

    @property
    def measure(self) -> MeasureName:
        """Name of the distance of the batches so far."""
        return "relative error" if self._kinds is None else self._kinds.measure


def is_logits(kind: Task) -> bool:
    """Return whether outputs of this kind are logits."""
    return kind in ("classification", "segmentation")


def _first(output: Output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _shape(output: Output, images: int) -> tuple[int, ...] | None:
    """Return the shape of the output for one image; None if there is no output per image."""
    if isinstance(output, list):
        return tuple(output[0].shape)
    return tuple(output.shape[1:]) if output.dim() and len(output) == images else None


def _task(shape: tuple[int, ...] | None) -> Task:
    if not shape:
        return "other"
    if shape[0] > 1 and all(side == 1 for side in shape[1:]):
        return "classification"
    if len(shape) != 3:
        return "other"
    return "images" if shape[0] in _PICTURE_CHANNELS else "segmentation"


def _fits(shape: tuple[int, ...] | None, task: Task, *, said: bool) -> bool:
    if not shape or task == "other":
        return task == "other"
    if task == "classification":
        return (said or shape[0] > 1) and all(side == 1 for side in shape[1:])
    if task == "images":
        return len(shape) == 3 and shape[0] in _PICTURE_CHANNELS
    return len(shape) > 1 if said else _task(shape) == "segmentation"


def logits_of(output: Tensor, kind: Task) -> Tensor:
    """Return logits ``(N, classes)``, or ``(N, classes, ...)`` of positions, with at least two classes."""
    logits = output.flatten(1) if kind == "classification" else output
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], 1)


def divergence(f: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``T^2 KL(softmax(f / T) || softmax(q / T))`` in nats of logits ``(N, classes, ...)``, as ``(N,)``.

    The result is the mean over positions. A position where ``f`` is not finite counts as 0.

    >>> f = torch.tensor([[2.0, 0.0]])
    >>> divergence(f, f), divergence(f, f.flip(1))
    (tensor([0.]), tensor([1.5232]))
    """
    known = f.isfinite().all(1, keepdim=True)
    log_f, log_q = ((logits / temperature).log_softmax(1) for logits in (torch.where(known, f, 0.0), q))
    at = torch.where(known, log_f.exp() * (log_f - log_q), 0.0).sum(1)
    return temperature**2 * rows(at).mean(1)


def rows(tensor: Tensor) -> Tensor:
    """Return a tensor ``(N, ...)`` as ``(N, values)``; ``(N,)`` has one value each."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)


def errors(f: Tensor, q: Tensor, kind: Task, temperature: float = 1.0) -> Tensor:
    """Return the divergence of logits ``(N, ...)``, or ``sum (f - q)^2`` of other outputs, of each image, ``(N,)``."""
    if is_logits(kind):
        return divergence(logits_of(f, kind), logits_of(q, kind), temperature)
    return rows(torch.where(f.isfinite(), f - q, 0.0).square()).sum(1)


def powers(outputs: Mapping[str, Output], kinds: Kinds) -> dict[str, float]:
    """Return ``sum f^2`` of each output with a relative error, over its finite values.

    Raises:
        ModelError: there are no floating-point outputs.
    """
    if not kinds.counted:
        raise ModelError(f"expected floating-point outputs, by which networks are compared, got {', '.join(outputs)}")
    relative = [name for name in kinds.counted if not is_logits(kinds.of[name])]
    return {
        name: sum(float(f[f.isfinite()].double().square().sum()) for f in _tensors(outputs[name])) for name in relative
    }


def distances(
    f: Mapping[str, Output],
    q: Mapping[str, Output],
    images: int,
    kinds: Kinds,
    power: Mapping[str, float],
    temperature: float = 1.0,
) -> Tensor:
    """Return the distance of each image of a batch, ``(N,)``, differentiable in ``q``.

    Args:
        f, q: outputs of the reference and of the quantized network.
        images: N.
        kinds: kinds of the reference's outputs.
        power: mean ``sum f^2`` per image, by output, from :func:`powers` over many images.
        temperature: temperature T of the logits.
    """
    found = [
        _by_image(f[name], q[name], images, kinds.of[name], power.get(name) or 1.0, temperature)
        for name in kinds.counted
    ]
    return torch.stack(found).sum(0)


def _by_image(f: Output, q: Output, images: int, kind: Task, power: float, temperature: float) -> Tensor:
    scale = 1.0 if is_logits(kind) else power
    if isinstance(f, Tensor) and isinstance(q, Tensor) and f.shape == q.shape and f.dim() and len(f) == images:
        return errors(f, q, kind, temperature) / scale
    pairs = list(zip(_tensors(f), _tensors(q), strict=True))
    each = [
        errors(a[None], b[None], kind, temperature) if a.shape == b.shape else a.square().sum().reshape(1)
        for a, b in pairs
    ]
    # An output that is not per image counts for all of them equally.
    return torch.cat(each).expand(images) / (scale * (1 if isinstance(f, list) else images))


def tensors_of(outputs: Mapping[str, Output]) -> list[Tensor]:
    """Return all tensors in outputs."""
    return [tensor for output in outputs.values() for tensor in _tensors(output)]


def _tensors(output: Output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else output
