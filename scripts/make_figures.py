"""Pictures of docs/method.md, drawn from numbers that dsconv.numerics computes; the same bytes at every run.

python scripts/make_figures.py               # into docs/figures/
python scripts/make_figures.py --out FOLDER
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dsconv
from dsconv.files import replacing
from dsconv.numerics import dequantize_weight, quantize_activation, quantize_weight, quantize_weight_shifted

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
# Pages are light or dark: pictures have no background, and words beside shapes have a grey that is readable on both.
INTEGER, SCALE, FLOAT, INK, WORD = "#9fd3f3", "#f7c977", "#d4d4d4", "#1a1a1a", "#808080"
BITS, BLOCK = 4, 8
# Width of the labels, in cells.
LEFT = 3.3


@dataclass(frozen=True)
class Example:
    """One output at one tap: 16 weights and the 16 activations that they multiply, in two blocks of 8."""

    w: torch.Tensor
    x: torch.Tensor
    vqk: torch.Tensor
    kds: torch.Tensor
    mantissa: torch.Tensor
    exponent: torch.Tensor


def example() -> Example:
    generator = torch.Generator().manual_seed(11)
    w = 0.1 * torch.randn(2 * BLOCK, generator=generator)
    x = (torch.randn(2 * BLOCK, generator=generator) * torch.tensor([1.0, 0.2]).repeat_interleave(BLOCK)).relu()
    vqk, kds = quantize_weight(w.view(1, -1, 1, 1), bits=BITS, block_size=BLOCK)
    mantissa, exponent = quantize_activation(x.view(1, -1, 1, 1), bits=BITS, block_size=BLOCK)
    return Example(w, x, *(t.flatten() for t in (vqk, kds, mantissa, exponent)))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure whose unit is a cell, of half an inch."""
    figure = Figure((0.5 * width, 0.5 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def box(
    axes: Axes, x: float, y: float, width: float, text: str, colour: str, size: float = 12, high: float = 1
) -> None:
    axes.add_patch(matplotlib.patches.Rectangle((x, y), width, high, facecolor=colour, edgecolor=WORD, linewidth=0.7))
    axes.text(x + width / 2, y + high / 2, text, ha="center", va="center", color=INK, fontsize=size)


def word(axes: Axes, x: float, y: float, text: str, size: float = 12, ha: str = "center") -> None:
    axes.text(x, y, text, ha=ha, va="center", color=WORD, fontsize=size, fontweight="bold")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], width: float = 1.2) -> None:
    style = {"arrowstyle": "-|>", "color": WORD, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def row(axes: Axes, y: float, label: str, cells: Sequence[str], colour: str) -> None:
    """Draw a label and 16 cells, with a gap between the blocks."""
    word(axes, LEFT - 0.3, y + 0.5, label, ha="right")
    for i, text in enumerate(cells):
        box(axes, column(i), y, 1, text, colour, 10)


def column(i: int) -> float:
    return LEFT + i + 0.5 * (i // BLOCK)


def integers(values: torch.Tensor) -> list[str]:
    return [f"{int(value)}".replace("-", "\N{MINUS SIGN}") for value in values]


def power(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def decimals(values: torch.Tensor, digits: int = 2) -> list[str]:
    return [f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}") for value in values.tolist()]


def blocks(e: Example) -> Figure:
    """Draw a row of weights as integers and a scale per block, and a row of activations as mantissas and exponents."""
    figure, axes = canvas(20, 7.4)
    rows = [("weights", decimals(e.w), FLOAT), ("VQK", integers(e.vqk), INTEGER)]
    for y, (label, cells, colour) in enumerate(rows):
        row(axes, 0.2 + 1.1 * y, label, cells, colour)
    rows = [("activations", decimals(e.x), FLOAT), ("mantissas", integers(e.mantissa), INTEGER)]
    for y, (label, cells, colour) in enumerate(rows):
        row(axes, 4 + 1.1 * y, label, cells, colour)
    word(axes, LEFT - 0.3, 2.9, "KDS", ha="right")
    word(axes, LEFT - 0.3, 6.7, "exponent", ha="right")
    for block in range(2):
        x = column(BLOCK * block)
        box(axes, x, 2.4, BLOCK, f"\N{MULTIPLICATION SIGN} {decimals(e.kds, 4)[block]}", SCALE)
        exponent = int(e.exponent[block])
        box(axes, x, 6.2, BLOCK, f"\N{MULTIPLICATION SIGN} {power(exponent)} = {2.0**exponent:g}", SCALE)
    return figure


def rounding(e: Example) -> Figure:
    """Draw activations of the two blocks on the grids of their exponents."""
    figure = Figure((10, 3.4))
    for block, axes in enumerate(figure.subplots(1, 2)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        step = 2.0 ** int(e.exponent[block])
        values, mantissas = e.x[part], e.mantissa[part]
        axes.bar(range(BLOCK), values, 0.55, color=FLOAT, edgecolor=WORD, linewidth=0.7)
        axes.hlines(mantissas * step, torch.arange(BLOCK) - 0.4, torch.arange(BLOCK) + 0.4, INK, linewidth=5)
        axes.hlines(mantissas * step, torch.arange(BLOCK) - 0.38, torch.arange(BLOCK) + 0.38, INTEGER, linewidth=3)
        axes.set_yticks([step * level for level in range(2**BITS)], [])
        axes.set_yticks([0, step * (2**BITS - 1)], ["0", "15"], minor=True)
        axes.tick_params(axis="y", which="both", color=WORD, labelcolor=WORD)
        axes.grid(axis="y", color=WORD, alpha=0.35, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xticks(range(BLOCK), integers(mantissas), color=WORD, fontweight="bold")
        axes.set_ylim(0, step * (2**BITS - 0.6))
        axes.set_title(
            f"block {block + 1}: steps of {power(int(e.exponent[block]))} = {step:g}", color=WORD, fontsize=11
        )
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
    figure.supxlabel("bars: values; lines: what they are rounded to; below: mantissas", color=WORD, fontsize=12)
    figure.tight_layout()
    return figure


def inner_loop(e: Example) -> Figure:
    """Draw the two blocks multiplied and summed as integers, then one float multiply-add for each."""
    figure, axes = canvas(20, 8.4)
    row(axes, 0.2, "VQK", integers(e.vqk), INTEGER)
    row(axes, 1.3, "mantissas", integers(e.mantissa), INTEGER)
    word(axes, LEFT - 0.3, 3.6, "integers", ha="right")
    word(axes, LEFT - 0.3, 5.3, "float", ha="right")
    word(axes, LEFT - 0.3, 7.6, "output", ha="right")
    total = 0.0
    for block in range(2):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        s = int((e.vqk[part].int() * e.mantissa[part].int()).sum())
        exponent, kds = int(e.exponent[block]), float(e.kds[block])
        total += kds * 2.0**exponent * s
        middle = column(BLOCK * block) + BLOCK / 2
        arrow(axes, (middle, 2.35), (middle, 3.05))
        box(axes, middle - 2, 3.1, 4, f"S = {integers(torch.tensor([s]))[0]}", INTEGER, 13)
        arrow(axes, (middle, 4.15), (middle, 4.75))
        scale = f"y += {decimals(e.kds, 4)[block]} \N{MULTIPLICATION SIGN} {power(exponent)} \N{MULTIPLICATION SIGN} S"
        box(axes, middle - 3.6, 4.8, 7.2, scale, SCALE, 13)
        arrow(axes, (middle, 5.85), (column(BLOCK) + (block - 1) * 0.8, 7.05))
    exact = float(e.w @ e.x)
    text = f"y = {decimals(torch.tensor([total]), 3)[0]}    in float32: {decimals(torch.tensor([exact]), 3)[0]}"
    box(axes, column(BLOCK) - 4.9, 7.1, 9.3, text, FLOAT, 13)
    return figure


def levels(_: Example) -> Figure:
    """Draw 64 real weights and the levels of a block, without and with a shift."""
    weight = dsconv.demo.load_network().get_submodule("layer3.conv2").weight.detach()
    block = weight[7:8, 32:96, 1:2, 1:2]
    rules = {
        "KDS q": (*quantize_weight(block, BITS, 64), None),
        "KDS q + shift": quantize_weight_shifted(block, BITS, 64),
    }
    figure = Figure((10, 2.9))
    axes = figure.add_axes((0.17, 0.13, 0.8, 0.8))
    for y, (vqk, kds, shift) in enumerate(rules.values()):
        half = 2 ** (BITS - 1)
        lines = [float(kds) * q + (0.0 if shift is None else float(shift)) for q in range(-half, half)]
        rounded = dequantize_weight(vqk, kds, 64, shift)
        axes.vlines(lines, y - 0.3, y + 0.3, SCALE, linewidth=4)
        heights = torch.linspace(y - 0.24, y + 0.24, 64)
        axes.scatter(block.flatten(), heights, 13, INTEGER, edgecolors=WORD, linewidths=0.5, zorder=3)
        error = float((rounded - block).square().mean().sqrt() / block.square().mean().sqrt())
        axes.text(0, y + 0.43, f"root mean square error {100 * error:.1f} %", color=WORD, ha="center", va="center")
    axes.set_yticks([0, 1], list(rules), color=WORD, fontweight="bold")
    axes.set_ylim(1.55, -0.4)
    axes.tick_params(axis="x", color=WORD, labelcolor=WORD)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    return figure


def folding(_: Example) -> Figure:
    """Draw the same operations called one by one, and as one step of a program."""
    figure, axes = canvas(23.4, 7.4)
    parts = ["quantize", "DSConv", "BatchNorm", "+ residual", "ReLU", "quantize", "DSConv"]
    word(axes, 0.1, 0.5, "one by one", 13, "left")
    for i, text in enumerate(parts):
        x = 0.1 + 3.4 * i
        box(axes, x, 1.1, 2.7, text, INTEGER if text in ("quantize", "DSConv") else FLOAT, high=1.3)
        if i:
            arrow(axes, (x - 0.65, 1.75), (x - 0.05, 1.75), 3.5 if parts[i - 1] == "quantize" else 1.2)
    word(axes, 0.1, 3.7, "as a program", 13, "left")
    fused = "DSConv;  BatchNorm;  + residual;  ReLU;  quantize"
    box(axes, 3.5, 4.3, 13, fused, INTEGER, high=1.3)
    box(axes, 20.5, 4.3, 2.7, "DSConv", INTEGER, high=1.3)
    arrow(axes, (1.1, 4.95), (3.45, 4.95), 3.5)
    arrow(axes, (16.55, 4.95), (20.45, 4.95), 3.5)
    for x, width, text in ((0.1, 3.5, "mantissas and exponents"), (11.5, 1.2, "float32, through memory")):
        arrow(axes, (x, 6.9), (x + 2, 6.9), width)
        word(axes, x + 2.3, 6.9, text, ha="left")
    return figure


FIGURES: dict[str, Callable[[Example], Figure]] = {
    "blocks": blocks,
    "rounding": rounding,
    "inner_loop": inner_loop,
    "levels": levels,
    "folding": folding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="where to (%(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    e = example()
    # Ids are hashes of their contents, with this salt in place of a random one.
    with matplotlib.rc_context({"svg.hashsalt": "dsconv"}):
        for name, make in FIGURES.items():
            with replacing(out / f"{name}.svg") as beside:
                make(e).savefig(beside, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
