"""``dsconv tradeoff``: compares several quantized files of one network."""

from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_data, check_file, check_out, check_plot, read_classes
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, image_folder, load_file, metric_of, original_of
from dsconv.cli.output import json_text, print_json, print_table, say
from dsconv.cli.preparation import (
    check_one_preparation,
    check_size,
    image_shape,
    preparation_of,
    read_preparation,
    read_size,
    say_preparation,
)
from dsconv.files import replacing
from dsconv.names import check_metric_name, check_task, check_weights

_FILES_HELP = "Files written by dsconv quantize, all from one float model."
_OUT_SUFFIXES = (".json", ".csv")


def tradeoff(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=_FILES_HELP, show_default=False)],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=f"{opt.DATA_HELP} It is for the accuracy.")] = None,
    reference: opt.Reference = None,
    weights: opt.Weights = "default",
    model: opt.ModelOfFile = None,
    time: Annotated[bool, typer.Option("--time", help="Also time the networks, on one image and in turns.")] = False,
    threads: opt.Threads = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Duration of --time in seconds, after warm-up.")] = 10.0,
    size: opt.Size = None,
    classes: opt.Classes = None,
    limit: opt.LimitOrAll = None,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = 0,
    device: opt.Device = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json|FILE.csv", help="Write all figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy over size, and with --time over time.")
    ] = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    task: opt.Task = None,
    data_range: opt.DataRange = None,
    metric: opt.Metric = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Show size, bits and settings of several quantized files of one network; with --data also their accuracy.

    Accuracy is relative to --reference, or else to the float model that the first file names; it is measured on
    --device. Times are CPU times, on --threads or else 1. Ctrl-C ends the command with the figures so far.
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
        "--plot, --reference, --weights, --classes and the preprocessing of images concern accuracy: give the images, "
        "with --data.",
    )
    mistakes.usage(
        data is None and bool(task or data_range or metric),
        "--task, --data-range and --metric concern accuracy: give the images, with --data.",
    )
    mistakes.usage(size is not None and not time, "--size is the size of the image of --time: add --time.")
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
    kind = mistakes.check(check_task, task)
    mistakes.check(check_metric_name, metric)
    mistakes.end()

    begin(threads, device)
    from dsconv import report, zoo

    say(f"loading {', '.join(map(str, files))}")
    networks = {str(file): load_file(file, model, reference) for file in files}
    first, network = next(iter(networks.items()))
    original = None
    if data is not None or time:
        name = reference or model or original_of(network, first)
        # The weights of a network do not affect its time.
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
        task=kind,
        data_range=data_range,
        metric=metric_of(metric),
        progress=not quiet,
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
