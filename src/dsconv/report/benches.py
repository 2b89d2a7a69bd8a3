"""Bar charts of the times of networks in several runtimes."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsconv.benchmarking.machine import machine_notes
from dsconv.benchmarking.results import OURS, Bench, Timing, plural
from dsconv.errors import import_extra
from dsconv.files import as_path, replacing
from dsconv.report.pictures import COLOURS

_BAR_INCHES = 0.26
_MOST_INCHES = 16
_RUNTIMES = dict(zip((OURS, "PyTorch", "ONNX Runtime", "OpenVINO", "MNN"), COLOURS, strict=False))
# Opacity of a runtime's colour, on white.
_SHADES = {"float32": 0.35, "bf16": 0.65, "not compiled": 0.5, "direct": 0.8, "winograd": 0.8, "Winograd": 0.8}


def draw_benches(path: str | os.PathLike[str], benches: Sequence[Bench]) -> Path:
    """Write a picture: for each network, a group of bars for each batch size and number of threads.

    A bar is the median time per image, with its quartiles; the label above the bar of another runtime is the ratio of
    dsconv's time to its time.

    Args:
        path: path of the file, written atomically; its suffix is the format, such as ``.png`` or ``.svg``.
        benches: one or more, each for one network.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    make_figure = import_extra("report", "matplotlib.figure").Figure
    names = list(dict.fromkeys(timing.contestant for bench in benches for timing in bench.timings))
    groups = max(len(_settings(bench)) for bench in benches)
    width = max(3.6, groups * (len(names) + 1) * _BAR_INCHES) + 0.8
    columns = max(1, min(int(_MOST_INCHES / width), len(benches)))
    rows = math.ceil(len(benches) / columns)
    figure = make_figure(figsize=(columns * width, rows * 3.4 + 1.1), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, bench in zip(axes, benches, strict=False):
        _panel(axis, bench, names)
    for axis in axes[len(benches) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    ncols = max(1, min(len(labels), int(columns * width / 1.8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    notes = ["Bars: median, lines: quartiles, numbers: dsconv's time over theirs.", *machine_notes(benches[0].machine)]
    figure.suptitle("\n".join(notes), fontsize=8, wrap=True)
    path = as_path(path)
    with replacing(path) as beside:
        figure.savefig(beside)
    return path


def _settings(bench: Bench) -> list[tuple[int, int]]:
    return list(dict.fromkeys((timing.batch_size, timing.threads) for timing in bench.timings))


def _panel(axis: Any, bench: Bench, names: Sequence[str]) -> None:
    settings = _settings(bench)
    found = {(timing.contestant, timing.batch_size, timing.threads): timing for timing in bench.timings}
    for i, name in enumerate(names):
        places = [j * (len(names) + 1) + i for j in range(len(settings))]
        timings = [found.get((name, *setting)) for setting in settings]
        heights = [math.nan if timing is None else timing.ms_per_image for timing in timings]
        spread = list(zip(*map(_spread, timings), strict=True))
        whiskers = {"ecolor": "#444444", "elinewidth": 0.8}
        axis.bar(places, heights, 0.9, yerr=spread, error_kw=whiskers, color=_colour(name), label=name)
        for x, timing in zip(places, timings, strict=True):
            ratio = None if timing is None or name == OURS else bench.ratio(timing)
            if timing is not None and ratio is not None:
                top = (x, timing.third_quartile_ms / timing.batch_size)
                place = {"textcoords": "offset points", "rotation": 90, "ha": "center", "va": "bottom"}
                axis.annotate(f"{ratio:.2f}", top, (0, 3), **place, fontsize=7)
    middles = [j * (len(names) + 1) + (len(names) - 1) / 2 for j in range(len(settings))]
    axis.set_xticks(middles, [f"batch {batch}\n{plural(threads)}" for batch, threads in settings], fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(x=0.02, y=0.15)
    axis.set_ylabel("ms per image (lower is better)", fontsize=8)
    axis.set_title(bench.title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _spread(timing: Timing | None) -> tuple[float, float]:
    """Return the distances of the quartiles of the time per image from its median, below and above."""
    if timing is None:
        return math.nan, math.nan
    below, above = timing.median_ms - timing.first_quartile_ms, timing.third_quartile_ms - timing.median_ms
    return below / timing.batch_size, above / timing.batch_size


def _colour(name: str) -> tuple[float, ...]:
    runtime = next(runtime for runtime in _RUNTIMES if name.startswith(runtime))
    shade = next((share for precision, share in _SHADES.items() if name.endswith(precision)), 1.0)
    colour = [int(_RUNTIMES[runtime][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(1 - shade * (1 - part) for part in colour)
