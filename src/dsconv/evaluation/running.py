"""Runs networks over images: a pass with progress, logits of a batch, and the mode and device for both."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsconv.data.folder import Batches
from dsconv.data.inputs import Batch, call, describe
from dsconv.errors import DataError, ModelError, first_line, usable_device
from dsconv.evaluation.scores import Sums, total_of
from dsconv.layers.inputs import as_input_of, device_of
from dsconv.modes import evaluation_mode
from dsconv.names import OnInterrupt, check_on_interrupt
from dsconv.progress import progress_bar

Step = TypeVar("Step")


@dataclass
class ImagePass:
    """One pass over the images, with progress and Ctrl-C heeded."""

    what: str
    batches: Batches
    progress: bool
    on_interrupt: OnInterrupt
    interrupted: bool = False

    def __post_init__(self) -> None:
        check_on_interrupt(self.on_interrupt)

    def over(self, step: Callable[[Batch, Tensor | None], Step]) -> list[Step]:
        """Return the results of ``step`` for each batch of images and labels.

        Raises:
            DataError: there are no images.
        """
        # One entry per whole batch, added up afterwards: an interrupt never leaves half a batch counted.
        results: list[Step] = []
        with progress_bar(self.progress, self.what, self.batches.total, "img") as advance:
            try:
                for x, labels in self.batches:
                    results.append(step(x, labels))
                    advance(len(x))
            except KeyboardInterrupt:
                if self.on_interrupt == "raise" or not results:
                    raise
                self.interrupted = True
        if not results:
            why = "the images hold none"
            if broken := self.batches.broken:
                why = f"none of {len(broken)} files can be read, the first ({broken[0].path}): {broken[0].reason}"
            raise DataError(f"There are no images to evaluate: {why}.")
        return results

    def figures(self, scores: Iterable[Sums]) -> dict[str, Any]:
        """Return the arguments of an Evaluation."""
        total = total_of(scores)
        count = int(total["images"])
        return {
            "images": count,
            "top1": 100 * total["top1"] / count if "top1" in total else None,
            "top5": 100 * total["top5"] / count if "top5" in total else None,
            "nonfinite": int(total["nonfinite"]),
            "seconds": total["seconds"],
            "broken": self.batches.broken,
            "interrupted": self.interrupted,
        }


@contextmanager
def ready(models: list[nn.Module], device: str | torch.device | None) -> Iterator[None]:
    """Put ``models`` into evaluation mode, inference mode and on ``device`` for as long as the block lasts."""
    homes = [device_of(model) for model in models]
    try:
        for model in models:
            if device is not None:
                with usable_device(device):
                    model.to(device)
        with evaluation_mode(models), torch.inference_mode():
            yield
    finally:
        if device is not None:
            for model, home in zip(models, homes, strict=True):
                model.to(home)


def timed_logits(name: str, model: nn.Module, x: Batch) -> tuple[Tensor, float]:
    """Return float64 logits (N, classes) on the CPU and the seconds they took; copying them waits for the device."""
    x = as_input_of(model, x)
    start = time.perf_counter()
    output = forward(name, model, x)
    logits = logits_in(output)
    if not isinstance(logits, Tensor):
        raise ModelError(f"The {name} must return logits (N, classes), got {type(output).__name__}.")
    values = logits.cpu()
    seconds = time.perf_counter() - start
    if values.ndim < 2 or values.shape[:2].numel() != values.numel() or len(values) != len(x):
        raise ModelError(f"The {name} must return logits ({len(x)}, classes), got a tensor {tuple(values.shape)}.")
    return values.flatten(1).double(), seconds


_UNABLE = (RuntimeError, TypeError)


def forward(
    name: str, model: nn.Module, x: Batch, errors: type[Exception] | tuple[type[Exception], ...] = _UNABLE
) -> Any:
    """Return the output of ``model``, called ``name`` in the ModelError that takes the place of ``errors``."""
    x = as_input_of(model, x)
    try:
        return call(model, x)
    except errors as error:
        raise ModelError(f"{name}: it cannot run on {describe(x)}: {first_line(error)}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    several = isinstance(error, TypeError) and "missing" in str(error) and "argument" in str(error)
    return ": several arguments go into dsconv.Inputs(x, y)" if several else ""


def logits_in(output: Any) -> Any:
    """Return the field ``logits`` of what a model returned, or its first field, item or value, or itself."""
    if isinstance(output, Mapping):
        return output.get("logits", next(iter(output.values()), None))
    if is_dataclass(output):
        values = [getattr(output, field.name) for field in fields(output)]
        first = next((value for value in values if isinstance(value, Tensor)), output)
        return getattr(output, "logits", first)
    first = output[0] if isinstance(output, tuple | list) and output else output
    return getattr(output, "logits", first)
