"""``dsconv export``: a quantized file as an ONNX file, for other runtimes."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dsconv
from dsconv.cli.common import (
    BatchSize,
    Classes,
    Force,
    Json,
    Limit,
    ModelOfFile,
    Size,
    check_out,
    image_folder,
    image_shape,
    load_file,
    preprocess_for,
    print_json,
    print_table,
    read_classes,
    read_images,
    read_size,
    say,
)
from dsconv.onnx import OPSET, OnnxNetwork, Style

_STYLE_HELP = (
    "qdq: integers of 4 bits with scales of blocks, for a small file; function: the same as calls of functions; "
    "int8: plain 8 bits, for speed on today's runtimes; float."
)
_FULL_RANGE_HELP = (
    "int8: let weights take all 8 bits, which is more accurate; right only on processors that add products of bytes in "
    "32 bits (x86 with VNNI, Arm)."
)
_DATA_HELP = "Images, which need no labels: ranges for int8, and a comparison of what was written."


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by dsconv quantize.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.onnx", help="File to write.", show_default=False)],
    style: Annotated[Style, typer.Option(help=_STYLE_HELP)] = "qdq",
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    classes: Classes = None,
    full_range: Annotated[bool, typer.Option("--full-range", help=_FULL_RANGE_HELP)] = False,
    limit: Limit = 32,
    batch_size: BatchSize = 32,
    size: Size = None,
    opset: Annotated[int, typer.Option(help="Of ONNX.")] = OPSET,
    model: ModelOfFile = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a quantized network as an ONNX file, of any batch size.

    With --data: how close ONNX Runtime's outputs of the file are to those of dsconv, and the time both take.
    """
    shape, names = read_size(size), read_classes(classes)
    if names and data is None:
        raise typer.BadParameter("--classes are of the images of --data.")
    check_out(out, force)
    say(f"loading {file}")
    qmodel = load_file(file, model)
    sizes = image_shape(qmodel, str(file), shape)
    preprocess = preprocess_for(qmodel, sizes, bool(shape))
    # Read before the export, so that it does not end in an error.
    images = None if data is None else read_images(data, preprocess, limit)
    folder = None if data is None else image_folder(data, preprocess, names)
    say(f"exporting as {style}")
    ranges = images if style == "int8" else None
    example = torch.zeros(1, *sizes, dtype=torch.float32, device="cpu")
    options: dict[str, Any] = {"images": ranges, "full_range": full_range, "opset": opset}
    dsconv.export_onnx(qmodel, example, out, style, **options, progress=True)
    facts: dict[str, Any] = {"file": str(out), "file_bytes": out.stat().st_size, "style": style, "opset": opset}
    compared = None
    if folder is not None:
        options = {"limit": limit, "batch_size": batch_size, "progress": True}
        compared = dsconv.compare(qmodel, OnnxNetwork(out), folder, **options, per_layer=False)
    if as_json:
        print_json(facts | ({} if compared is None else {"data": str(data), "comparison": compared.to_dict()}))
        return
    if compared is not None:
        print_table(compared)
        print("reference: the network in dsconv; quantized: the file in ONNX Runtime.")
    print(f"Wrote {out}: {facts['file_bytes']:,} bytes, style {style}, opset {opset}.")
