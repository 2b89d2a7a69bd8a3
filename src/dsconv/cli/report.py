"""``dsconv report``: all that can be said of a quantized file, as one page of HTML."""

from pathlib import Path
from typing import Annotated

import typer

from dsconv import zoo
from dsconv.benchmarking.results import read_benches
from dsconv.cli.common import (
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
    check_out,
    image_folder,
    image_shape,
    load_file,
    preparation,
    preprocess_of,
    print_json,
    read_classes,
    read_size,
    say,
)
from dsconv.errors import DataError, import_extra
from dsconv.report import gather, write_page

_DATA_HELP = "Images in class folders, or listed in a labels.csv (file,class_index), or unlabelled."
_SENSITIVITY_HELP = "Quantize each layer alone on this many images; 0: do not."


def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that dsconv quantize wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Page to write.", show_default=False)],
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="Float model that FILE was made from.")] = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images beside this one.")] = 0,
    classes: Classes = None,
    sensitivity_images: Annotated[int, typer.Option(min=0, help=_SENSITIVITY_HELP)] = 16,
    runs: Annotated[int, typer.Option(min=0, help="That are timed, at least 2; 0: none.")] = 20,
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
    given, shape = preparation(locals()), read_size(size)
    if not reference and weights != "default":
        raise typer.BadParameter("a quantized FILE has its own weights: --weights are those of --reference.")
    if runs == 1:
        raise typer.BadParameter("--runs: expected 0 or at least 2, got 1.")
    check_out(out, force)
    import_extra("report", "jinja2")
    benches = [] if bench is None else read_benches(bench)
    names = read_classes(classes)

    say(f"loading {file}")
    network = load_file(file, model)
    if reference:
        say(f"building {reference} with weights {weights}")
    try:
        input_shape = image_shape(network, str(file), shape)
    except DataError:
        input_shape = None
    found = gather(
        network,
        name=file.name,
        reference=zoo.build(reference, weights=weights) if reference else None,
        images=None if data is None else image_folder(data, preprocess_of(network, str(file), given), names),
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
