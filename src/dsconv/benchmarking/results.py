"""Results of a benchmark of a network, as plain data and as a table."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.benchmarking.machine import machine_notes
from dsconv.errors import FileFormatError
from dsconv.tables import Printed

if TYPE_CHECKING:
    from rich.console import Group

OURS = "dsconv"
# Tools that make int8 models, and the contestants that use them.
_INT8 = {
    "Q/DQ models of onnxruntime.quantization": ("ONNX Runtime int8", "OpenVINO int8"),
    "models of MNN's converter": ("MNN int8",),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one contestant for one batch.

    Attributes:
        contestant: ``dsconv`` (compiled), ``dsconv, not compiled``, ``dsconv, direct`` or ``dsconv, winograd``
            (compiled, with the other algorithm), or a runtime and the precision it computed in.
        executed: kernels that computed the layers, as named by the runtime.
        weight_bytes: size of the weights and all other constants given to the runtime; for dsconv, their packed size in
            a file, and for MNN the whole file.
        batch_size: samples per call.
        threads: number of threads that the contestant was told to use.
        turns: number of timed turns.
        first_quartile_ms, median_ms, third_quartile_ms: time of one call, over the turns.
    """

    contestant: str
    executed: str
    weight_bytes: int
    batch_size: int
    threads: int
    turns: int
    first_quartile_ms: float
    median_ms: float
    third_quartile_ms: float

    @property
    def ms_per_image(self) -> float:
        """Median time divided by the batch size."""
        return self.median_ms / self.batch_size


@dataclass(frozen=True, kw_only=True)
class Bench(Printed):
    """Times of a quantized network and of other runtimes; prints as a table.

    Attributes:
        network: its name.
        input_shape: shape of one image, ``(C, H, W)``; for several tensors, of a sample of the first.
        input_shapes: if the network takes several tensors, the shapes of a sample by name; empty for one.
        config: settings of the quantized network as plain data, None if unknown.
        calibration: data used to find the ranges of activations of int8 models.
        timings: times by batch size, number of threads and contestant; dsconv comes first.
        not_run: contestants that did not take part, with the reason.
        unsettled_turns: number of turns that began while threads of another contestant may still have been spinning.
        machine: machine of the measurement, see :func:`dsconv.benchmarking.machine.machine`.
        interrupted: whether it was stopped early.
    """

    network: str
    input_shape: tuple[int, ...]
    config: dict[str, Any] | None
    calibration: str
    timings: tuple[Timing, ...]
    not_run: dict[str, str]
    unsettled_turns: int
    machine: dict[str, Any]
    interrupted: bool = False
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of its network, and the size of a sample."""
        shapes = self.input_shapes or {"": self.input_shape}
        sizes = [f"{name} {'x'.join(map(str, shape))}".strip() for name, shape in shapes.items()]
        return ", ".join([self.network, *sizes])

    def ratio(self, timing: Timing) -> float | None:
        """Return the time of compiled dsconv over that of ``timing``: below 1 dsconv is faster. None without it."""
        return self._over(timing, (OURS, timing.batch_size, timing.threads))

    def speedup(self, timing: Timing) -> float | None:
        """Return the contestant's median time on one thread over that of ``timing``. None if not measured on one."""
        return self._over(timing, (timing.contestant, timing.batch_size, 1))

    def _over(self, timing: Timing, other: tuple[str, int, int]) -> float | None:
        for found in self.timings:
            if (found.contestant, found.batch_size, found.threads) == other:
                return found.median_ms / timing.median_ms
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        rows = [
            {
                **asdict(timing),
                "ms_per_image": timing.ms_per_image,
                "ours_over_this": self.ratio(timing),
                "speedup_over_one_thread": self.speedup(timing),
            }
            for timing in self.timings
        ]
        return {**asdict(self), "timings": rows}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __rich__(self) -> "Group":
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=Text(self.title), title_justify="left")
        columns: dict[str, Callable[[Timing], str]] = {
            "ms": lambda timing: digits(timing.median_ms),
            "quartiles": lambda timing: f"{digits(timing.first_quartile_ms)} .. {digits(timing.third_quartile_ms)}",
            "ms per\nimage": lambda timing: digits(timing.ms_per_image),
            "ours /\ntheirs": lambda timing: "" if timing.contestant == OURS else _cell(self.ratio(timing)),
            "speed-\nup": lambda timing: _cell(self.speedup(timing)),
            "weights\nMB": lambda timing: f"{timing.weight_bytes / 1e6:.2f}",
        }
        if all(timing.batch_size == 1 for timing in self.timings):
            del columns["ms per\nimage"]
        if not self._scales():
            del columns["speed-\nup"]
        table.add_column("", overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        setting = None
        for timing in self.timings:
            if setting != (setting := (timing.batch_size, timing.threads)):
                table.add_section()
                table.add_row(f"batch {timing.batch_size}, {plural(timing.threads)}", style="italic")
            cells = [cell(timing) for cell in columns.values()]
            table.add_row(Text(timing.contestant), *cells, style="bold" if timing.contestant == OURS else None)
        return Group(table, *map(Text, self._notes()))

    def _scales(self) -> bool:
        return len({timing.threads for timing in self.timings}) > 1 and any(map(self.speedup, self.timings))

    def _notes(self) -> Iterator[str]:
        if self.interrupted:
            yield "Interrupted: settings are missing, or have fewer turns."
        turns = sorted({timing.turns for timing in self.timings})
        number = " to ".join(map(str, dict.fromkeys((turns[0], turns[-1]))))
        yield f"Medians of {number} turns{'; speed-up over one thread' if self._scales() else ''}."
        executed = {timing.contestant: timing.executed for timing in self.timings}
        yield from (f"{name} ran: {what}." for name, what in executed.items())
        for reason in dict.fromkeys(self.not_run.values()):
            names = ", ".join(name for name, found in self.not_run.items() if found == reason)
            yield f"Not run: {names}: {reason}."
        for maker, made in _INT8.items():
            if any(name.startswith(made) for name in executed):
                yield f"int8: {maker}, per channel, calibrated on {self.calibration}."
        yield from machine_notes(self.machine)
        if self.unsettled_turns:
            yield f"{self.unsettled_turns} turns began while another contestant's threads were possibly still spinning."


def read_benches(path: str | os.PathLike[str]) -> list[Bench]:
    """Read the file written by ``dsconv bench --out``.

    Raises:
        FileFormatError: the file is something else.
        OSError: it cannot be read.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(dict[str, list[Bench]]).validate_json(Path(path).read_bytes())["networks"]
    except (ValidationError, KeyError, RecursionError):
        raise FileFormatError(f"{os.fspath(path)}: expected JSON written by dsconv bench --out") from None


def plural(threads: int) -> str:
    """Return the number of threads in words."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def digits(value: float) -> str:
    """Return a positive number with three significant digits, or three decimals.

    >>> [digits(value) for value in (0.04567, 1.2, 1234.5)]
    ['0.046', '1.20', '1234']
    """
    return f"{value:.{min(3, max(0, 2 - math.floor(math.log10(value))))}f}"


def _cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
