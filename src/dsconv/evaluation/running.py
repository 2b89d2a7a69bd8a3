"""Execution of networks over images: a pass with progress, outputs of a batch, and the mode and device for both."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsconv.data.folder import Batches, Labels
from dsconv.data.inputs import Batch, call, describe
from dsconv.errors import DataError, ModelError, first_line, usable_device
from dsconv.evaluation.measures import Output
from dsconv.evaluation.outputs import check_outputs, outputs_by_image
from dsconv.evaluation.scores import Sums, map_figures, total_of
from dsconv.layers.inputs import as_input_of, device_of
from dsconv.modes import evaluation_mode
from dsconv.names import OnInterrupt, check_on_interrupt
from dsconv.progress import progress_bar

Step = TypeVar("Step")


@dataclass
class ImagePass:
    """One pass over the images, with progress and handling of Ctrl-C."""

    what: str
    batches: Batches
    progress: bool
    on_interrupt: OnInterrupt
    interrupted: bool = False

    def __post_init__(self) -> None:
        check_on_interrupt(self.on_interrupt)

    def over(self, step: Callable[[Batch, Labels | None], Step]) -> list[Step]:
        """Return the results of ``step`` for each batch of images and labels.

        Raises:
            DataError: there are no images.
        """
        # One entry per complete batch, summed afterwards: an interrupt never leaves half a batch counted.
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
            **map_figures(total),
            "nonfinite": int(total["nonfinite"]),
            "seconds": total["seconds"],
            "broken": self.batches.broken,
            "interrupted": self.interrupted,
        }


@contextmanager
def ready(models: list[nn.Module], device: str | torch.device | None) -> Iterator[None]:
    """Put ``models`` into evaluation mode, inference mode and on ``device`` for the duration of the block."""
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


def timed_outputs(name: str, model: nn.Module, x: Batch) -> tuple[Any, dict[str, Output], float]:
    """Return the output of ``model``, its tensors on the CPU by name, and the seconds; copying waits for the device.

    Raises:
        ModelError: the model cannot run on ``x``, or returns no tensor.
    """
    x = as_input_of(model, x)
    start = time.perf_counter()
    output = forward(name, model, x)
    found = outputs_by_image(output, len(x))
    outputs = {key: t.cpu() if isinstance(t, Tensor) else [one.cpu() for one in t] for key, t in found.items()}
    seconds = time.perf_counter() - start
    check_outputs(name, output, outputs)
    return output, outputs, seconds


def outputs_of(name: str, model: nn.Module, x: Batch, dtype: torch.dtype) -> dict[str, Output]:
    """Return the tensors that ``model`` returns for ``x``, by name, with floating-point ones in ``dtype``.

    Raises:
        ModelError: as :func:`timed_outputs`.
    """
    output = forward(name, model, x)
    found = outputs_by_image(output, len(x))
    check_outputs(name, output, found)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return {key: cast(t) if isinstance(t, Tensor) else [cast(one) for one in t] for key, t in found.items()}


_UNABLE = (RuntimeError, TypeError)


def forward(
    name: str, model: nn.Module, x: Batch, errors: type[Exception] | tuple[type[Exception], ...] = _UNABLE
) -> Any:
    """Return the output of ``model``, called ``name`` in the ModelError that replaces ``errors``."""
    x = as_input_of(model, x)
    try:
        return call(model, x)
    except errors as error:
        raise ModelError(f"{name}: it cannot run on {describe(x)}: {first_line(error)}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    several = isinstance(error, TypeError) and "missing" in str(error) and "argument" in str(error)
    return ": several arguments go into dsconv.Inputs(x, y)" if several else ""
