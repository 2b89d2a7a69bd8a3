"""``dsconv compare``: several quantized files of one network, side by side."""

from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv import report, zoo
from dsconv.benchmarking.machine import cores
from dsconv.cli.common import (
    REFERENCE_HELP,
    Channels,
    Classes,
    Crop,
    Force,
    Interpolation,
    Json,
    Mean,
    ModelOfFile,
    Resize,
    Scale,
    Size,
    Std,
    Weights,
    check_format,
    check_out,
    image_folder,
    image_shape,
    json_text,
    load_file,
    original_of,
    preparation,
    preprocess_of,
    print_json,
    print_table,
    read_classes,
    read_size,
    say,
)
from dsconv.files import replacing

_FILES_HELP = "Files that dsconv quantize wrote, all of one float model."
_DATA_HELP = "Images in class folders, or listed in a labels.csv (file,class_index), or unlabelled: for the accuracy."
_OUT_SUFFIXES = (".json", ".csv")


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=_FILES_HELP, show_default=False)],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help=REFERENCE_HELP)] = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    time: Annotated[bool, typer.Option("--time", help="Time them as well, on one image and in turns.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=cores(), help="That they are timed on.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.001, help="That the timing takes, once all are warm.")] = 10.0,
    size: Size = None,
    classes: Classes = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images beside this one.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json|FILE.csv", help="Write all figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy over size, and over time with --time.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    channels: Channels = None,
    interpolation: Interpolation = None,
) -> None:
    """Show size, bits and settings of several quantized files of one network; with --data what they cost in accuracy.

    Accuracy is that of --reference, or else of the float model that the first file names. Ctrl-C ends it with the
    figures so far.
    """
    given = preparation(locals())
    shape = read_size(size)
    if len(set(files)) < len(files):
        raise typer.BadParameter("a FILE is given twice: name each once.")
    if data is None and (plot or given or classes or weights != "default" or (reference and not time)):
        raise typer.BadParameter(
            "--plot, --reference, --weights, --classes and the preparation of images are about accuracy: say on which "
            "images, with --data."
        )
    if size is not None and not time:
        raise typer.BadParameter("--size is of the image of --time.")
    if out is not None and out.suffix not in _OUT_SUFFIXES:
        raise typer.BadParameter(f"--out: expected a name that ends in {' or '.join(_OUT_SUFFIXES)}, got {out.name!r}.")
    for path in filter(None, (out, plot)):
        check_out(path, force)
    if plot is not None:
        check_format(plot)
    names = read_classes(classes)
    say(f"loading {', '.join(map(str, files))}")
    networks = {str(file): load_file(file, model) for file in files}
    first, network = next(iter(networks.items()))
    original = None
    if data is not None or time:
        name = reference or model or original_of(network, first)
        # To the time of a network its weights do not matter.
        original = zoo.build(name, weights=weights if data is not None else "random")
    found = dsconv.tradeoff(
        networks,
        original,
        None if data is None else image_folder(data, preprocess_of(network, first, given), names),
        time_shape=image_shape(network, first, shape) if time else None,
        threads=threads,
        seconds=seconds,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        progress=True,
        on_interrupt="partial",
    )
    if out is not None:
        text = found.to_csv() if out.suffix == ".csv" else json_text(found.to_dict()) + "\n"
        with replacing(out) as beside:
            beside.write_text(text, "utf-8")
    if plot is not None:
        report.draw_tradeoff(plot, found)
    print_json(found.to_dict()) if as_json else print_table(found)
    if found.interrupted:
        raise typer.Exit(130)
