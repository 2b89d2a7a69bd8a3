"""``dsconv tradeoff``: several quantized files of one network, side by side."""

from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv.cli.common import (
    DATA_HELP,
    BatchSize,
    Channels,
    Classes,
    Crop,
    Device,
    Force,
    Interpolation,
    Json,
    LimitOrAll,
    Mean,
    ModelOfFile,
    Reference,
    Resize,
    Scale,
    Size,
    Std,
    Threads,
    Weights,
    Workers,
    begin,
    check_data,
    check_file,
    check_one_preparation,
    check_out,
    check_plot,
    check_size,
    image_folder,
    image_shape,
    json_text,
    load_file,
    original_of,
    preparation_of,
    print_json,
    print_table,
    read_classes,
    read_preparation,
    read_size,
    say,
    say_preparation,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.files import replacing
from dsconv.names import check_weights

_FILES_HELP = "Files that dsconv quantize wrote, all of one float model."
_OUT_SUFFIXES = (".json", ".csv")


def tradeoff(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=_FILES_HELP, show_default=False)],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=f"{DATA_HELP} For the accuracy.")] = None,
    reference: Reference = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    time: Annotated[bool, typer.Option("--time", help="Time them as well, on one image and in turns.")] = False,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Seconds that --time takes, once all are warm.")] = 10.0,
    size: Size = None,
    classes: Classes = None,
    limit: LimitOrAll = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    device: Device = "cpu",
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

    Accuracy is that of --reference, or else of the float model that the first file names; it is measured on --device.
    Times are of the CPU, on --threads or else 1. Ctrl-C ends it with the figures so far.
    """
    options = locals()
    mistakes = Mistakes()
    needed = data is not None
    given = mistakes.check(read_preparation, options, str(files[0]), model, reference, needed=needed)
    if needed:
        mistakes.check(check_one_preparation, files, given)
    shape = mistakes.check(read_size, size)
    mistakes.usage(len(set(files)) < len(files), "a FILE is given twice: name each once.")
    mistakes.usage(
        data is None and bool(plot or given or classes or weights != "default" or (reference and not time)),
        "--plot, --reference, --weights, --classes and the preparation of images are about accuracy: say on which "
        "images, with --data.",
    )
    mistakes.usage(size is not None and not time, "--size is of the image of --time.")
    mistakes.usage(
        out is not None and out.suffix not in _OUT_SUFFIXES,
        f"--out: expected a name that ends in {' or '.join(_OUT_SUFFIXES)}, got {out and out.name!r}.",
    )
    for file in files:
        mistakes.check(check_file, file, model, reference)
    if time:
        mistakes.check(check_size, options, str(files[0]), shape)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    names = mistakes.check(read_classes, classes)
    mistakes.check(check_out, force, out=out, plot=plot)
    mistakes.check(check_plot, plot)
    mistakes.end()

    begin(threads, device)
    from dsconv import report, zoo

    say(f"loading {', '.join(map(str, files))}")
    networks = {str(file): load_file(file, model, reference) for file in files}
    first, network = next(iter(networks.items()))
    original = None
    if data is not None or time:
        name = reference or model or original_of(network, first)
        # To the time of a network its weights do not matter.
        original = zoo.build(name, weights=weights if data is not None else "random")
    preprocess, images, time_shape = None, None, None
    if data is not None:
        preprocess = preparation_of(given, first, network, original)
        say_preparation(preprocess, data)
        images = image_folder(data, preprocess, names)
    if time:
        time_shape = image_shape(preprocess or zoo.preprocess_of(network), first, shape)
    found = dsconv.tradeoff(
        networks,
        original,
        images,
        time_shape=time_shape,
        threads=threads or 1,
        seconds=seconds,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        device=device,
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
