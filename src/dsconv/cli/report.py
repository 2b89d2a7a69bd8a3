"""``dsconv report``: all that can be said of a quantized file, as one page of HTML."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dsconv.cli.common import (
    DATA_HELP,
    BatchSize,
    Channels,
    Classes,
    Crop,
    Force,
    Interpolation,
    Json,
    LimitOrAll,
    Mean,
    ModelOfFile,
    ReferenceToCompare,
    Resize,
    Scale,
    Size,
    Std,
    Threads,
    Weights,
    Workers,
    begin,
    check_data,
    check_extras,
    check_file,
    check_out,
    image_folder,
    image_shape,
    load_file,
    preparation_of,
    print_json,
    read_classes,
    read_preparation,
    read_size,
    say,
    say_preparation,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.errors import DataError, FileFormatError
from dsconv.names import check_weights

_SENSITIVITY_HELP = "Quantize each layer alone on this many images; 0: do not."


def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that dsconv quantize wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Page to write.", show_default=False)],
    reference: ReferenceToCompare = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=DATA_HELP)] = None,
    limit: LimitOrAll = None,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    threads: Threads = None,
    classes: Classes = None,
    sensitivity_images: Annotated[int, typer.Option(min=0, help=_SENSITIVITY_HELP)] = 16,
    runs: Annotated[int, typer.Option(min=0, help="Runs that are timed, at least 2; 0: none.")] = 20,
    bench: Annotated[Path | None, typer.Option(metavar="FILE.json", help="What dsconv bench --out wrote.")] = None,
    size: Size = None,
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
    """Write a page of HTML on a quantized file: size, accuracy, distributions, errors and times of its layers.

    It opens without a network. Parts that need --reference, --data or --bench say so where these are missing.
    """
    options = locals()
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, options, str(file), model, reference, needed=data is not None)
    shape = mistakes.check(read_size, size)
    mistakes.usage(
        not reference and weights != "default",
        "a quantized FILE has its own weights: --weights are those of --reference.",
    )
    mistakes.usage(runs == 1, "--runs: expected 0 or at least 2, got 1.")
    mistakes.check(check_file, file, model, reference)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    names = mistakes.check(read_classes, classes)
    mistakes.check(_check_bench, bench)
    mistakes.check(check_out, force, out=out)
    mistakes.check(check_extras, "report", "jinja2")
    mistakes.end()

    begin(threads)
    from dsconv import zoo
    from dsconv.benchmarking.results import read_benches
    from dsconv.report import gather, write_page

    benches = [] if bench is None else read_benches(bench)
    say(f"loading {file}")
    network, original = load_file(file, model, reference), None
    if reference:
        say(f"building {reference} with weights {weights}")
        original = zoo.build(reference, weights=weights)
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
        progress=True,
    )
    for broken in found.accuracy.broken if found.accuracy else ():
        say(f"left out: {broken.path}: {broken.reason}")
    write_page(out, found)
    if as_json:
        print_json({"page": str(out), **found.to_dict()})
    else:
        print(f"Wrote {out}: {out.stat().st_size:,} bytes.")


def _check_bench(path: Path | None) -> None:
    """Raise what is wrong with a file of ``dsconv bench``, as far as its outermost structure tells."""
    if path is None:
        return
    try:
        networks = json.loads(path.read_bytes())["networks"]
    except (ValueError, TypeError, KeyError, RecursionError):
        networks = None
    if not isinstance(networks, list):
        raise FileFormatError(f"{path}: expected JSON that dsconv bench --out wrote")
