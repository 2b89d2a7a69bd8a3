"""``dsconv report``: writes an HTML page with all figures of a quantized file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dsconv.cli import options as opt
from dsconv.cli.checks import check_data, check_extras, check_file, check_out, check_own_weights, read_classes
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, image_folder, load_file, metric_of
from dsconv.cli.output import print_json, say, warn
from dsconv.cli.preparation import image_shape, preparation_of, read_preparation, read_size, say_preparation
from dsconv.errors import DataError, FileFormatError
from dsconv.names import check_metric_name, check_task, check_weights

_SENSITIVITY_HELP = "Number of images for quantizing each layer alone; 0 skips this part."


def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file written by dsconv quantize.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Page to write.", show_default=False)],
    reference: opt.ReferenceToCompare = None,
    weights: opt.Weights = "default",
    model: opt.ModelOfFile = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=opt.DATA_HELP)] = None,
    limit: opt.LimitOrAll = None,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = 0,
    threads: opt.Threads = None,
    classes: opt.Classes = None,
    sensitivity_images: Annotated[int, typer.Option(min=0, help=_SENSITIVITY_HELP)] = 16,
    runs: Annotated[int, typer.Option(min=0, help="Number of timed runs, at least 2; 0 skips the timing.")] = 20,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A file written by dsconv bench --out.")
    ] = None,
    size: opt.Size = None,
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
    """Write an HTML page on a quantized file: size, accuracy, distributions, errors and times of its layers.

    It opens without a network connection. Parts that need --reference, --data or --bench state so if these are missing.
    """
    options = locals()
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, options, str(file), model, reference, needed=data is not None)
    shape = mistakes.check(read_size, size)
    mistakes.check(check_own_weights, str(file), reference, weights)
    mistakes.usage(runs == 1, "--runs: expected 0 or at least 2, got 1.")
    mistakes.check(check_file, file, model, reference)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    names = mistakes.check(read_classes, classes)
    mistakes.check(_check_bench, bench)
    mistakes.check(check_out, force, out=out)
    mistakes.check(check_extras, "report", "jinja2")
    mistakes.usage(
        metric is not None and (data is None or reference is None),
        "--metric compares with --reference on --data: name both.",
    )
    kind = mistakes.check(check_task, task)
    mistakes.check(check_metric_name, metric)
    mistakes.end()

    begin(threads)
    from dsconv import zoo
    from dsconv.benchmarking.results import read_benches
    from dsconv.report import gather, write_page

    benches = [] if bench is None else read_benches(bench)
    say(f"loading {file}")
    network, original = load_file(file, model, reference), None
    if reference:
        original = build(reference, weights)
    preprocess, images = zoo.preprocess_of(network), None
    if data is not None or given:
        preprocess = preparation_of(given, str(file), network, original)
        say_preparation(preprocess, data)
        images = None if data is None else image_folder(data, preprocess, names)
    try:
        input_shape = image_shape(preprocess, str(file), shape)
    except DataError:
        input_shape = None
    found = gather(
        network,
        name=file.name,
        reference=original,
        images=images,
        preprocess=preprocess,
        classes=names or (),
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        sensitivity_images=sensitivity_images,
        input_shape=input_shape,
        runs=runs,
        benches=benches,
        task=kind,
        data_range=data_range,
        metric=metric_of(metric),
        progress=not quiet,
    )
    for broken in found.accuracy.broken if found.accuracy else ():
        warn(f"left out: {broken.path}: {broken.reason}")
    write_page(out, found)
    if as_json:
        print_json({"page": str(out), **found.to_dict()})
    else:
        print(f"Wrote {out}: {out.stat().st_size:,} bytes.")


def _check_bench(path: Path | None) -> None:
    """Raise an error for an invalid file of ``dsconv bench``, as far as its outermost structure shows."""
    if path is None:
        return
    try:
        networks = json.loads(path.read_bytes())["networks"]
    except (ValueError, TypeError, KeyError, RecursionError):
        networks = None
    if not isinstance(networks, list):
        raise FileFormatError(f"{path}: expected JSON written by dsconv bench --out")
