"""``dsconv search``: chooses the bits of each layer that cost the least accuracy under a budget."""

from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_data, check_extras, check_out, check_plot, read_config, state_beside
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, metric_of, resumable
from dsconv.cli.output import print_json, print_table
from dsconv.cli.preparation import preparation_of, read_preparation, say_preparation
from dsconv.files import replacing
from dsconv.names import check_metric_name, check_model_name, check_task, check_weights

_LIMITS = "Budget: one limit, or several, which all hold"
_RESUME_HELP = "Continue a stopped search from its state file beside OUT; the budget may differ."
_OUT_HELP = "File to write: settings for dsconv quantize --config."


def search(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=opt.MODEL_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.json", help=_OUT_HELP, show_default=False)],
    effective_bits: Annotated[
        float | None,
        typer.Option(min=0, help="Bits per weight, including KDS and float layers.", rich_help_panel=_LIMITS),
    ] = None,
    max_bytes: Annotated[
        float | None,
        typer.Option("--bytes", min=0, help="Bytes of the quantized file without its header.", rich_help_panel=_LIMITS),
    ] = None,
    ms: Annotated[
        float | None,
        typer.Option(
            min=0, help="Milliseconds of the layers per image, timed on this machine.", rich_help_panel=_LIMITS
        ),
    ] = None,
    activation_bits: Annotated[
        float | None,
        typer.Option(min=0, help="Bits of activations, averaged over the weights.", rich_help_panel=_LIMITS),
    ] = None,
    data: opt.Data = None,
    weights: opt.Weights = "default",
    preset: opt.Preset = "default",
    config: opt.Config = None,
    limit: opt.Limit = 32,
    batch_size: opt.BatchSize = 16,
    seed: opt.Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
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
    """Choose the bits of each layer so that the network stays closest to float within a budget. Images need no labels.

    The command tries weights of 2 to 8 bits on top of the settings of --preset or --config, one layer at a time.
    """
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), model)
    limits = {"effective_bits": effective_bits, "bytes": max_bytes, "ms": ms, "activation_bits": activation_bits}
    budget = {name: value for name, value in limits.items() if value is not None}
    mistakes.usage(
        not budget, "expected a budget, got none: give --effective-bits, --bytes, --ms or --activation-bits."
    )
    settings = mistakes.check(read_config, preset, config)
    mistakes.check(check_model_name, model)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, out=out, plot=plot)
    mistakes.check(check_plot, plot)
    state = mistakes.check(state_beside, out, resume, "search")
    mistakes.check(check_extras, "search", "highspy")
    kind = mistakes.check(check_task, task)
    mistakes.check(check_metric_name, metric)
    mistakes.end()

    begin(threads, device)
    from dsconv import report

    network = build(model, weights)
    preprocess = preparation_of(given, model, network)
    say_preparation(preprocess, data)
    with resumable(state):
        found = dsconv.search(
            network,
            settings,
            budget=budget,
            images=data,
            preprocess=preprocess,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            task=kind,
            metric=metric_of(metric),
            state=state,
            resume=resume,
            progress=not quiet,
        )
        with replacing(out) as beside:
            beside.write_text(found.config.to_json() + "\n", "utf-8")
    state.unlink(missing_ok=True)
    if plot is not None:
        curve = [(point.effective_bits, point.distance) for point in found.pareto]
        chosen = found.point.effective_bits, found.point.distance
        report.draw_pareto(plot, curve, chosen, found.sensitivity.measure)
    if as_json:
        facts = {"model": model, "data": None if data is None else str(data), "file": str(out)}
        settled = {"budget": budget, "preprocess": preprocess.model_dump(mode="json")}
        print_json({**facts, "plot": None if plot is None else str(plot), **settled, **found.to_dict()})
        return
    print_table(found.table)
    print(f"Wrote {out}, for dsconv quantize {model} --config {out}." + (f" Wrote {plot}." if plot else ""))
