"""``dsconv inspect``: shows the contents of a file of a quantized model."""

from pathlib import Path
from typing import Annotated

import typer

from dsconv.cli import options as opt
from dsconv.cli.checks import check_there
from dsconv.cli.output import print_json, print_table
from dsconv.errors import one_line


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file written by dsconv quantize.", show_default=False)
    ],
    as_json: opt.Json = False,
) -> None:
    """Show the contents of a quantized file, from the file alone; its checksum is verified."""
    if file.is_dir():
        file /= "model.safetensors"
    check_there(file)
    from dsconv.data import Preprocess
    from dsconv.io import describe

    header, summary = describe(file)
    file_bytes = file.stat().st_size
    if as_json:
        facts = header.model_dump(mode="json", exclude={"layers", "in_float", "settings", "aliases", "network"})
        print_json({"file": str(file), "file_bytes": file_bytes, "checksum_ok": True, **facts, **summary.to_dict()})
        return
    lines = (
        f"{file}: {file_bytes:,} bytes, written by dsconv {header.dsconv_version}, checksum correct",
        f"architecture: {header.architecture or ('in the file' if header.network else 'not named')}, a "
        f"{header.model_class}",
        f"config: {header.config}",
        f"preprocessing of images: {Preprocess(**header.preprocess) if header.preprocess else 'not stated'}",
        f"calibrated on: {header.calibrated_on or 'no'} images; adapted on: {header.adapted_on or 'no'} images",
    )
    # A file may contain anything, including control sequences for the terminal.
    print(*(one_line(line, 10_000) for line in lines), sep="\n")
    print_table(summary)
