"""``dsconv demo``: runs the embedded network under several settings, and writes a file and a picture."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsconv.cli import options as opt
from dsconv.cli.networks import begin
from dsconv.cli.output import print_json, print_table, say
from dsconv.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.table import Table

    from dsconv.demo_run import Demo

_PICTURED = ("layer1.conv1", "layer2.conv2", "layer3.conv1")
_OUT = Path("demo-out")


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the file and the picture.")] = _OUT,
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Quantize a small network for handwritten digits in several ways and show the cost of each."""
    place = next((folder for folder in (out, *out.parents) if folder.exists()), out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OSError(f"{out}: not a folder that can be written to: choose another")
    begin(threads)
    from dsconv import report
    from dsconv.demo_run import run

    done = run(out, lambda name: say(f"quantizing and measuring: {name}"))
    picture, remark = None, "weights before and after quantization, and the SQNR of each layer."
    try:
        sqnr = {name: figures["layer_sqnr_db"] for name, figures in done.figures["settings"].items()}
        picture = str(report.draw(out / "demo.png", done.network, done.quantized, sqnr, layers=_PICTURED))
    except MissingExtraError as error:
        remark = str(error)
    if as_json:
        print_json({**done.figures, "picture": picture})
        return
    print(f"A small ResNet on {done.figures['images']} handwritten digits that it was not trained on:")
    print_table(_table(done))
    print(
        "Agreement, KL divergence and logit SQNR are relative to float32. "
        f"The default preset was executed by: {done.figures['backend']}.",
        f"{done.figures['file']}: the default preset; read back, its outputs are bitwise "
        f"{'the same' if done.figures['reloaded_equal'] else 'DIFFERENT'}.",
        f"{picture or 'No picture'}: {remark}",
        sep="\n",
    )


def _table(done: "Demo") -> "Table":
    from rich import box
    from rich.table import Table

    # Fits into 80 characters.
    columns = "top-1,%|agreement,%|KL,nats|SQNR,dB|bits a,weight|block|sign,of A|file,kB|time,s"
    table = Table("", box=box.SIMPLE_HEAD, padding=0)
    for column in columns.split("|"):
        table.add_column(column.replace(",", "\n", 1), justify="right", no_wrap=True)
    original = done.figures["float32"]
    size = f"{original['file_bytes'] / 1e3:.1f}"
    table.add_row("float32", f"{original['top1']:.2f}", "-", "-", "-", "32.00", "-", "float", size, "-")
    for name, figures in done.figures["settings"].items():
        cells = (
            "{top1:.2f}|{agreement:.2f}|{kl:.5f}|{logit_sqnr_db:.1f}|{effective_bits:.2f}|{block_size}{shift}|"
            "{activation_sign}|{kilobytes:.1f}|{quantize_seconds:.1f}"
        ).format(**figures, shift="+shift" * figures["weight_shift"], kilobytes=figures["file_bytes"] / 1e3)
        table.add_row(name, *cells.split("|"))
    return table
