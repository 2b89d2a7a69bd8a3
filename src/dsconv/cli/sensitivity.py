"""``dsconv sensitivity``: what each layer costs in accuracy when it alone is quantized."""

from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv.cli.common import (
    FILE_HELP,
    BatchSize,
    Channels,
    Config,
    Crop,
    Data,
    Device,
    Force,
    Interpolation,
    Json,
    Limit,
    Mean,
    ModelOfFile,
    Plot,
    Preset,
    Reference,
    Resize,
    Scale,
    Seed,
    Std,
    Threads,
    Weights,
    begin,
    check_data,
    check_out,
    check_plot,
    check_source,
    is_quantized_file,
    load_file,
    original_of,
    preparation_of,
    print_json,
    print_table,
    read_config,
    read_preparation,
    say,
    say_preparation,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.names import check_weights


def sensitivity(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=FILE_HELP, show_default=False)],
    data: Data = None,
    reference: Reference = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    preset: Preset = "default",
    config: Config = None,
    limit: Limit = 32,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
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
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), file_or_model, model, reference)
    is_file = is_quantized_file(file_or_model)
    mistakes.usage(
        not is_file and bool(reference or model),
        "--reference and --model go with a quantized FILE, not with a float model.",
    )
    mistakes.usage(
        is_file and (preset != "default" or config is not None),
        "a quantized FILE has its own settings: --preset and --config go with a float model.",
    )
    settings: Any = mistakes.check(read_config, preset, config)
    mistakes.check(check_source, file_or_model, model, reference)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, plot=plot)
    mistakes.check(check_plot, plot)
    mistakes.end()

    begin(threads, device)
    from dsconv import report, zoo

    name, qmodel = file_or_model, None
    if is_file:
        say(f"loading {file_or_model}")
        settings = qmodel = load_file(Path(file_or_model), model, reference)
        name = reference or model or original_of(qmodel, file_or_model)
    say(f"building {name} with weights {weights}")
    network = zoo.build(name, weights=weights)
    preprocess = preparation_of(given, file_or_model, qmodel, network)
    say_preparation(preprocess, data)
    found = dsconv.sensitivity(
        network,
        settings,
        images=data,
        preprocess=preprocess,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=True,
    )
    if plot is not None:
        layers = found.layers().items()
        report.draw_sensitivity(plot, {layer: {trial.name: trial.kl for trial in trials} for layer, trials in layers})
    if as_json:
        facts = {"model": file_or_model, "reference_model": name, "data": None if data is None else str(data)}
        written = {"plot": None if plot is None else str(plot), "preprocess": preprocess.model_dump(mode="json")}
        print_json({**facts, **written, **found.to_dict()})
        return
    print_table(found)
    if plot is not None:
        print(f"Wrote {plot}.")
