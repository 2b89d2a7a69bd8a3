"""Times of the steps of a compiled network."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dsconv.benchmarking.machine import machine, machine_notes
from dsconv.benchmarking.measure import quartiles
from dsconv.benchmarking.results import digits, plural
from dsconv.compilation.compiled import CompiledModel
from dsconv.data.inputs import as_inputs, call
from dsconv.errors import ModelError
from dsconv.modes import check_module
from dsconv.ops import peak_rate
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one step of a compiled network.

    Attributes:
        name, operator, backend, fused, shape: as in :class:`dsconv.compilation.PlanStep`.
        first_quartile_ms, median_ms, third_quartile_ms: time for the whole batch, over the runs.
        macs: multiply-adds per image; 0 if it is not a layer.
        bytes: bytes read and written per image, including constants.
        gmac_per_s: multiply-adds per second for the batch at the median time, in 1e9.
        of_peak: ratio of this to the peak rate of the threads in dot products with all data in the L1 cache.
    """

    name: str
    operator: str
    backend: str
    fused: tuple[str, ...]
    shape: tuple[int, ...]
    first_quartile_ms: float
    median_ms: float
    third_quartile_ms: float
    macs: int
    bytes: int
    gmac_per_s: float
    of_peak: float


@dataclass(frozen=True, kw_only=True)
class Profile(Printed):
    """Times of the steps of a compiled network; prints as a table.

    Attributes:
        steps: the steps in execution order.
        batch_size, threads, runs: settings of the measurement.
        median_ms: time of a whole run.
        peak_gmac_per_s: peak rate measured in dot products of bytes, of one thread times the number of threads.
        machine: see :func:`dsconv.benchmarking.machine.machine`.
    """

    steps: tuple[StepTime, ...]
    batch_size: int
    threads: int
    runs: int
    median_ms: float
    peak_gmac_per_s: float
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> "Group":
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("layer", "operator", "executed by", "fused", "output"):
            table.add_column(column, overflow="fold")
        for column in ("ms", "quartiles", "% of time", "kB", "GMAC/s", "% of peak"):
            table.add_column(column, justify="right", no_wrap=True)
        whole = sum(step.median_ms for step in self.steps)
        for step in self.steps:
            rate = (f"{step.gmac_per_s:.0f}", f"{100 * step.of_peak:.0f}") if step.macs else ("", "")
            table.add_row(
                *map(Text, (step.name, step.operator, step.backend, ", ".join(step.fused))),
                "x".join(map(str, step.shape)),
                digits(step.median_ms),
                f"{digits(step.first_quartile_ms)} .. {digits(step.third_quartile_ms)}",
                f"{100 * step.median_ms / whole:.1f}",
                f"{step.bytes / 1e3:.0f}",
                *rate,
                style="yellow" if step.backend == "PyTorch" else None,
            )
        return Group(table, *map(Text, self._notes(whole)))

    def _notes(self, whole: float) -> list[str]:
        macs = sum(step.macs for step in self.steps) * self.batch_size
        rate = macs / self.median_ms / 1e6
        share = 100 * rate / self.peak_gmac_per_s
        return [
            f"Batch {self.batch_size}, {plural(self.threads)}: {digits(self.median_ms)} ms, of which steps take "
            f"{digits(whole)}; medians of {self.runs} runs.",
            f"{macs / 1e9:.3g} GMAC at {rate:.0f} GMAC/s, {share:.0f} % of the {self.peak_gmac_per_s:.0f} that "
            f"{plural(self.threads)} reached in dot products on data in the L1 cache.",
            *machine_notes(self.machine),
        ]


def profile(model: CompiledModel, x: Any, *, runs: int = 20) -> Profile:
    """Measure the time of each step of a compiled network for a batch, on the current number of PyTorch threads.

    Args:
        model: from :func:`dsconv.compile`.
        x: float32 ``(N, ...)`` on the CPU, at least one image; or other arguments as for :func:`dsconv.compile`.
        runs: number of timed runs, at least 2, after 3 warm-up runs.

    Raises:
        DataError, ValueError: ``x`` contains no such tensor, or ``runs`` is below 2.
        ModelError: the model cannot be captured for the image size.

    >>> import dsconv
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)).eval()
    >>> fast = dsconv.compile(dsconv.quantize(net), torch.zeros(1, 3, 8, 8))
    >>> [(step.operator, step.macs) for step in profile(fast, torch.zeros(1, 3, 8, 8), runs=2).steps]
    [('dsconv.conv2d', 62208), ('aten.max_pool2d', 0)]
    """
    check_module("model", model)
    if not isinstance(model, CompiledModel):
        raise ModelError(f"model: expected what dsconv.compile returns, got {type(model).__name__}: compile it first")
    if runs < 2:
        raise ValueError(f"runs: expected at least 2, got {runs}")
    inputs = as_inputs(x)
    if not len(inputs):
        raise ValueError("x: expected at least one image, got an empty batch")
    call(model, inputs)  # captures the program for this layout and batch
    program, plan, _ = model.program_for(inputs)
    times, totals = [], []
    with torch.inference_mode():
        for _ in range(3):
            program(inputs.tensors)
        for _ in range(runs):
            seconds = torch.zeros(len(program.steps), dtype=torch.float64, device="cpu")
            totals.append(_timed(partial(program, inputs.tensors, seconds)))
            times.append(seconds.tolist())
    threads = torch.get_num_threads()
    peak = threads * peak_rate(0.2)
    steps = []
    for index, (step, row) in enumerate(zip(program.steps, plan.steps, strict=True)):
        first, median, third = (1e3 * value for value in quartiles([taken[index] for taken in times]))
        macs = step.macs()
        rate = len(inputs) * macs / (median / 1e3) if median else math.nan
        facts = {name: getattr(row, name) for name in ("name", "operator", "backend", "fused", "shape")}
        steps.append(
            StepTime(
                **facts,
                first_quartile_ms=first,
                median_ms=median,
                third_quartile_ms=third,
                macs=macs,
                bytes=step.bytes(program.quantized_bytes),
                gmac_per_s=rate / 1e9,
                of_peak=rate / peak,
            )
        )
    return Profile(
        steps=tuple(steps),
        batch_size=len(inputs),
        threads=threads,
        runs=runs,
        median_ms=1e3 * quartiles(totals).median,
        peak_gmac_per_s=peak / 1e9,
        machine=machine(),
    )


def _timed(call: Callable[[], object]) -> float:
    since = time.perf_counter()
    call()
    return time.perf_counter() - since
