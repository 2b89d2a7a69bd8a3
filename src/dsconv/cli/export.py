"""``dsconv export``: writes a quantized file as an ONNX file for other runtimes."""

from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_data, check_extras, check_file, check_out, read_classes
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, image_folder, load_file, read_images
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import (
    check_one_size,
    check_size,
    image_shape,
    preparation_of,
    read_preparation,
    read_size,
    say_preparation,
)
from dsconv.names import OPSET, Style

_STYLE_HELP = (
    "qdq: 4-bit integers with block scales, for a small file; function: the same as function calls; "
    "int8: plain 8 bits, for speed on today's runtimes; float."
)
_FULL_RANGE_HELP = (
    "int8: let weights use all 8 bits, which is more accurate; correct only on processors with 32-bit accumulators for "
    "products of bytes (x86 with VNNI, Arm)."
)
_DATA_HELP = "Folder of images, without labels, for the ranges of int8 and a comparison of the written file."


def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file written by dsconv quantize.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.onnx", help="File to write.", show_default=False)],
    style: Annotated[Style, typer.Option(help=_STYLE_HELP)] = "qdq",
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    classes: opt.Classes = None,
    full_range: Annotated[bool, typer.Option("--full-range", help=_FULL_RANGE_HELP)] = False,
    limit: opt.Limit = 32,
    batch_size: opt.BatchSize = 32,
    size: opt.Size = None,
    opset: Annotated[int, typer.Option(help="ONNX opset version.")] = OPSET,
    model: opt.ModelOrReference = None,
    threads: opt.Threads = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Write a quantized network as an ONNX file, with any batch size.

    With --data, the command also shows how far ONNX Runtime's outputs for the file are from those of dsconv, and the
    times of both.
    """
    options = locals()
    # Without images, ranges for int8 are those of noise with the preprocessing of images.
    needed = data is not None or style == "int8"
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, options, str(file), model, needed=needed)
    shape = mistakes.check(read_size, size)
    mistakes.check(check_one_size, size, resize, crop)
    names = mistakes.check(read_classes, classes)
    mistakes.usage(classes is not None and data is None, "--classes are those of the images: give these, with --data.")
    mistakes.usage(full_range and style != "int8", "--full-range applies to --style int8 only.")
    mistakes.check(check_file, file, model)
    mistakes.check(check_size, options, str(file), shape)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, out=out)
    runtime = ["onnxruntime"] if style == "int8" or data is not None else []
    mistakes.check(check_extras, "onnx", "onnx", "onnxscript", *runtime)
    mistakes.end()

    begin(threads)
    import torch

    from dsconv import zoo
    from dsconv.onnx import OnnxNetwork

    say(f"loading {file}")
    qmodel = load_file(file, model)
    preprocess = None
    if needed or given or zoo.preprocess_of(qmodel) is not None:
        preprocess = preparation_of(given, str(file), qmodel, size=shape)
        zoo.set_preprocess(qmodel, preprocess)
        if needed:
            say_preparation(preprocess, data)
    sizes = image_shape(preprocess, str(file), shape)
    images, folder = None, None
    if data is not None:
        assert preprocess is not None
        # Read before the export, so that bad images are reported first.
        images = read_images(data, preprocess, limit)
        folder = image_folder(data, preprocess, names)
    say(f"exporting as {style}")
    ranges = images if style == "int8" else None
    example = torch.zeros(1, *sizes, dtype=torch.float32, device="cpu")
    settings: dict[str, Any] = {"images": ranges, "full_range": full_range, "opset": opset}
    dsconv.export_onnx(qmodel, example, out, style, **settings, progress=not quiet)
    facts: dict[str, Any] = {"file": str(out), "file_bytes": out.stat().st_size, "style": style, "opset": opset}
    facts["preprocess"] = None if preprocess is None else preprocess.model_dump(mode="json")
    compared = None
    if folder is not None:
        compared = dsconv.compare(
            qmodel, OnnxNetwork(out), folder, limit=limit, batch_size=batch_size, per_layer=False, progress=not quiet
        )
    if as_json:
        print_json(facts | ({} if compared is None else {"data": str(data), "comparison": compared.to_dict()}))
        return
    if compared is not None:
        print_table(compared)
        print("reference: the network in dsconv; quantized: the file in ONNX Runtime.")
    print(f"Wrote {out}: {facts['file_bytes']:,} bytes, style {style}, opset {opset}.")
