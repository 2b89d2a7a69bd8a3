"""``dsconv sensitivity``: what each layer costs in accuracy when it alone is quantized."""

from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv import report, zoo
from dsconv.cli.common import (
    FILE_HELP,
    REFERENCE_HELP,
    BatchSize,
    Channels,
    Config,
    Crop,
    Data,
    Force,
    Interpolation,
    Json,
    Limit,
    Mean,
    ModelOfFile,
    Plot,
    Preset,
    Resize,
    Scale,
    Seed,
    Std,
    Weights,
    check_format,
    check_out,
    is_quantized_file,
    load_file,
    original_of,
    preparation,
    preprocess_of,
    print_json,
    print_table,
    read_config,
    say,
)


def sensitivity(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=FILE_HELP, show_default=False)],
    data: Data = None,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help=REFERENCE_HELP)] = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    preset: Preset = "default",
    config: Config = None,
    limit: Limit = 32,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    plot: Plot = None,
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
    """Show how far the network strays when one layer of it alone is quantized: KL divergence, without labels.

    Layers are quantized as --preset or --config say, or are those of FILE.
    """
    given = preparation(locals())
    is_file = is_quantized_file(file_or_model)
    if not is_file and (reference or model):
        raise typer.BadParameter("--reference and --model go with a quantized FILE, not with a float model.")
    if is_file and (preset != "default" or config is not None):
        raise typer.BadParameter("a quantized FILE has its own settings: --preset and --config go with a float model.")
    if plot is not None:
        check_out(plot, force)
        check_format(plot)
    settings: Any
    if is_file:
        say(f"loading {file_or_model}")
        settings = load_file(Path(file_or_model), model)
        name = reference or model or original_of(settings, file_or_model)
    else:
        settings, name = read_config(preset, config), file_or_model
    say(f"building {name} with weights {weights}")
    network = zoo.build(name, weights=weights)
    found = dsconv.sensitivity(
        network,
        settings,
        images=data,
        preprocess=preprocess_of(network, name, given),
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    if plot is not None:
        layers = found.layers().items()
        report.draw_sensitivity(plot, {layer: {trial.name: trial.kl for trial in trials} for layer, trials in layers})
    if as_json:
        facts = {"model": file_or_model, "reference_model": name, "data": None if data is None else str(data)}
        print_json({**facts, "plot": None if plot is None else str(plot), **found.to_dict()})
        return
    print_table(found)
    if plot is not None:
        print(f"Wrote {plot}.")
