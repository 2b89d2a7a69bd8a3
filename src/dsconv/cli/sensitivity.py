"""``dsconv sensitivity``: accuracy cost of each layer when it alone is quantized."""

from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import (
    check_data,
    check_goes_with_file,
    check_out,
    check_own_settings,
    check_plot,
    check_source,
    is_quantized_file,
    read_config,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, load_file, metric_of, original_of
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import preparation_of, read_preparation, say_preparation
from dsconv.names import check_metric_name, check_task, check_weights


def sensitivity(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=opt.FILE_HELP, show_default=False)],
    data: opt.Data = None,
    reference: opt.Reference = None,
    weights: opt.Weights = "default",
    model: opt.ModelOfFile = None,
    preset: opt.Preset = "default",
    config: opt.Config = None,
    limit: opt.Limit = 32,
    batch_size: opt.BatchSize = 16,
    seed: opt.Seed = 0,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    plot: opt.Plot = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    task: opt.Task = None,
    metric: opt.Metric = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Measure the distance from float when one layer alone is quantized, without labels.

    The distance is the KL divergence of logits, the relative error of other outputs, or --metric.

    Layers are quantized according to --preset or --config, or taken from FILE.
    """
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), file_or_model, model, reference)
    is_file = is_quantized_file(file_or_model)
    mistakes.check(check_goes_with_file, file_or_model, reference, model)
    mistakes.check(check_own_settings, [file_or_model], preset, config)
    settings: Any = mistakes.check(read_config, preset, config)
    mistakes.check(check_source, file_or_model, model, reference)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, plot=plot)
    mistakes.check(check_plot, plot)
    kind = mistakes.check(check_task, task)
    mistakes.check(check_metric_name, metric)
    mistakes.end()

    begin(threads, device)
    from dsconv import report

    name, qmodel = file_or_model, None
    if is_file:
        say(f"loading {file_or_model}")
        settings = qmodel = load_file(Path(file_or_model), model, reference)
        name = reference or model or original_of(qmodel, file_or_model)
    network = build(name, weights)
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
        task=kind,
        metric=metric_of(metric),
        progress=not quiet,
    )
    if plot is not None:
        layers = {layer: {trial.name: trial.distance for trial in trials} for layer, trials in found.layers().items()}
        report.draw_sensitivity(plot, layers, found.measure)
    if as_json:
        facts = {"model": file_or_model, "reference_model": name, "data": None if data is None else str(data)}
        written = {"plot": None if plot is None else str(plot), "preprocess": preprocess.model_dump(mode="json")}
        print_json({**facts, **written, **found.to_dict()})
        return
    print_table(found)
    if plot is not None:
        print(f"Wrote {plot}.")
