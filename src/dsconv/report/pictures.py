"""Pictures of weights before and after, the error of each layer, search results, and comparisons of networks."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsconv.benchmarking.results import plural
from dsconv.errors import ConfigError, import_extra
from dsconv.files import as_path, replacing
from dsconv.tradeoffs import Candidate, Cost, Tradeoff

# The palette of Okabe and Ito, which is suitable for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_FLOAT = "#BBBBBB"
_MARKERS = "osD^v"
_BINS = 81
_SHOWN = 2


def draw(
    path: str | os.PathLike[str],
    network: nn.Module,
    quantized: Mapping[str, nn.Module],
    layer_sqnr_db: Mapping[str, Mapping[str, float]],
    *,
    layers: Sequence[str],
) -> Path:
    """Write a picture: histograms of weights before and after, and the output SQNR of every layer as bars.

    Args:
        path: path of the file, written atomically; its suffix is the format, such as ``.png`` or ``.svg``.
        network: the float network.
        quantized: the networks made from it, by the name of their settings. Histograms show the first two.
        layer_sqnr_db: for each of these, the output SQNR in dB by layer, as measured by :func:`dsconv.compare`.
        layers: names of the layers whose weights are shown.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    names = list(quantized)[:_SHOWN]
    figure = _figure(4 * len(layers), 2.4 * len(names) + 3.8)
    parts = figure.subfigures(2, 1, height_ratios=[2.4 * len(names), 3.8], squeeze=False)
    above, below = parts[0][0], parts[1][0]
    axes = above.subplots(len(names), len(layers), squeeze=False, sharex="col", sharey="col")
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        for column, layer in enumerate(layers):
            axis = axes[row][column]
            _histogram(axis, _weight(network, layer), _weight(quantized[name], layer), name, colour)
            if row == 0:
                axis.set_title(f"weights of {layer}", fontsize=11)
            if column == 0:
                axis.set_ylabel("number of weights")
            if row == len(names) - 1:
                axis.set_xlabel("value of the weight")
    _bars(below.subplots(), layer_sqnr_db)
    return _written(figure, path)


def draw_sensitivity(
    path: str | os.PathLike[str], layers: Mapping[str, Mapping[str, float]], measure: str = "KL divergence"
) -> Path:
    """Write a picture of the cost of each layer alone.

    Args:
        path: as in :func:`draw`.
        layers: for each layer, in order, the distance from the float network by the name of its settings.
        measure: name of the distance, see :class:`dsconv.mixed.Sensitivity`.

    Raises:
        MissingExtraError, OSError: as :func:`draw`.
    """
    figure = _figure(max(6.0, 0.32 * len(layers) + 2), 4.2)
    axis = figure.subplots()
    settings = list(dict.fromkeys(name for values in layers.values() for name in values))
    for i, name in enumerate(settings):
        places = [j for j, values in enumerate(layers.values()) if name in values]
        heights = [values[name] for values in layers.values() if name in values]
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % len(_MARKERS)]
        axis.plot(places, heights, marker, color=colour, label=name)
    axis.set_xticks(range(len(layers)), list(layers), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_title("One layer quantized, all others in float", fontsize=11)
    _distance(axis, [value for values in layers.values() for value in values.values()], measure)
    axis.grid(axis="x", color=_FLOAT, linewidth=0.4)
    axis.legend(frameon=False, ncols=4, fontsize=8)
    return _written(figure, path)


def draw_pareto(
    path: str | os.PathLike[str],
    curve: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
    measure: str = "KL divergence",
) -> Path:
    """Write a picture of the least predicted distance from the float network at each size.

    Args:
        path: as in :func:`draw`.
        curve: pairs of effective bits per weight and distance.
        chosen: the same for the selected point.
        measure: name of the distance, see :class:`dsconv.mixed.Sensitivity`.

    Raises:
        MissingExtraError, OSError: as :func:`draw`.
    """
    figure = _figure(6.0, 4.2)
    axis = figure.subplots()
    axis.plot(*zip(*curve, strict=True), "o-", color=COLOURS[0], markersize=4, label="least distance")
    axis.plot(*chosen, "D", color=COLOURS[5], markersize=8, label="chosen")
    axis.set_xlabel("bits per weight of the whole network")
    axis.set_title("Sum of the distances of single layers", fontsize=11)
    _distance(axis, [distance for _, distance in curve], measure)
    axis.legend(frameon=False)
    return _written(figure, path)


def draw_tradeoff(path: str | os.PathLike[str], found: Tradeoff) -> Path:
    """Write a picture of the accuracy of networks over their size, and over their time if it was measured.

    Networks on the Pareto front are filled and joined by a line; the dashed line is the float network. Times have their
    quartiles.

    Args:
        path: as in :func:`draw`.
        found: a tradeoff with accuracies.

    Raises:
        ConfigError: there are no accuracies.
        MissingExtraError, OSError: as :func:`draw`.
    """
    first = found.candidates[0].evaluation
    if first is None:
        raise ConfigError("found: expected a Tradeoff with accuracies, which needs images and a reference")
    figure = _figure(5.2 * len(found.costs) + 1, 5.0)
    units = {"bytes": "size in MB", "ms": f"ms per image, {plural(found.threads)}"}
    axes = figure.subplots(1, len(found.costs), squeeze=False, sharey=True)[0]
    for axis, cost in zip(axes, found.costs, strict=True):
        front = found.front(cost)
        axis.plot(*zip(*(_place(candidate, cost) for candidate in front), strict=True), "-", color=_FLOAT, zorder=1)
        for i, candidate in enumerate(found.candidates):
            colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
            style = {"markerfacecolor": colour if candidate in front else "none", "label": candidate.name}
            x, y = _place(candidate, cost)
            axis.plot(x, y, marker, color=colour, markersize=8, **style)
            if cost == "ms" and candidate.times_ms is not None:
                axis.plot((candidate.times_ms.first, candidate.times_ms.third), (y, y), color=colour, linewidth=0.8)
        axis.set_xlabel(units[cost])
        if found.reference is not None:
            if found.reference.measure == found.candidates[0].measure:
                accuracy = found.reference.accuracy
                axis.axhline(accuracy, color="#666666", linestyle="--", linewidth=1, label="float32", zorder=0)
            axis.set_xlabel(f"{units[cost]} (float32: {_cost(found.reference, cost):.3g})")
        axis.margins(0.08)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(found.costs), frameon=False, fontsize=8)
    quartiles = "; lines: quartiles of the time" if "ms" in found.costs else ""
    figure.suptitle(f"Filled: on the Pareto front{quartiles}", fontsize=10)
    measure = found.candidates[0].measure.replace("agreement", "agreement with float32")
    axes[0].set_ylabel(f"{measure}, {first.images:,} images")
    return _written(figure, path)


def _place(candidate: Candidate, cost: Cost) -> tuple[float, float]:
    """Return megabytes or milliseconds, and accuracy."""
    return _cost(candidate, cost), math.nan if candidate.accuracy is None else candidate.accuracy


def _cost(candidate: Candidate, cost: Cost) -> float:
    value = candidate.bytes / 1e6 if cost == "bytes" else candidate.ms
    assert value is not None
    return value


def _distance(axis: Any, values: Sequence[float], measure: str) -> None:
    if any(value > 0 for value in values) and not any(value < 0 for value in values):
        axis.set_yscale("log")
    what = "KL divergence of the logits in nats" if measure == "KL divergence" else measure
    axis.set_ylabel(f"{what}\n(lower is better)")
    axis.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Any:
    figure = import_extra("report", "matplotlib.figure").Figure
    return figure(figsize=(width, height), dpi=130, layout="constrained")


def _written(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = as_path(path)
    with replacing(path) as beside:
        figure.savefig(beside)
    return path


def _weight(network: nn.Module, layer: str) -> torch.Tensor:
    weight: torch.Tensor = network.get_submodule(layer).weight  # type: ignore[assignment]
    return weight.detach().float().flatten().cpu()


def _histogram(axis: Any, before: torch.Tensor, after: torch.Tensor, name: str, colour: str) -> None:
    edge = float(torch.maximum(before.abs().max(), after.abs().max()))
    bins = torch.linspace(-edge, edge, _BINS + 1, dtype=torch.float32, device="cpu").tolist()
    axis.hist(before.numpy(), bins, color=_FLOAT, label="float32")
    axis.hist(after.numpy(), bins, histtype="step", color=colour, linewidth=1.3, label=name)
    axis.legend(loc="upper right", frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis: Any, layer_sqnr_db: Mapping[str, Mapping[str, float]]) -> None:
    layers = list(dict.fromkeys(name for values in layer_sqnr_db.values() for name in values))
    finite = [v for values in layer_sqnr_db.values() for v in values.values() if math.isfinite(v)]
    top = max(finite, default=0.0) + 4
    width = 0.84 / max(1, len(layer_sqnr_db))
    for i, (name, values) in enumerate(layer_sqnr_db.items()):
        places = [j - 0.42 + (i + 0.5) * width for j in range(len(layers))]
        heights = [min(values.get(layer, math.nan), top) for layer in layers]
        axis.bar(places, heights, 0.92 * width, color=COLOURS[i % len(COLOURS)], label=name)
        for x, layer in zip(places, layers, strict=True):
            if layer not in values:
                axis.text(x, 0.5, "in float", rotation=90, ha="center", va="bottom", fontsize=9)
            elif math.isinf(values[layer]):
                axis.text(x, 0.5, "exact", rotation=90, ha="center", va="bottom", fontsize=9, color="white")
    axis.set_xticks(range(len(layers)), layers, rotation=20, ha="right", rotation_mode="anchor")
    axis.set_ylabel("SQNR of the output in dB\n(higher is better)")
    axis.set_title("Output of each layer against float32, including errors of the layers before", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.legend(frameon=False, ncols=len(layer_sqnr_db), loc="upper right")
