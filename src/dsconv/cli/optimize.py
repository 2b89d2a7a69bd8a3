"""``dsconv optimize``: quantizes a network within a budget or to a target of accuracy."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_data, check_extras, check_out, read_classes, state_beside
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, image_folder, metric_of, resumable
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import image_shape, preparation_of, read_preparation, say_preparation
from dsconv.errors import DSConvError, MissingExtraError
from dsconv.files import replacing
from dsconv.names import check_metric_name, check_model_name, check_task, check_weights

if TYPE_CHECKING:
    from dsconv.data.preprocess import Preprocess
    from dsconv.optimization import Attempt, Optimization

_BUDGET = "Budget: upper limits, which all hold. Without a budget and a target: 4.7 effective bits"
_TARGET = "Target: required accuracy on held-back images; all given ones hold. Needs --data"
_OUT_HELP = "File to write: *.safetensors. The settings (*.json) and a report (*.html) are written beside it."
_DATA_HELP = f"{opt.DATA_HELP} Half of the images are for measurements. Without it, the search uses noise."
_TIME_HELP = "Limit of the total time: 90s, 10m, 2h or none. Steps that exceed it are left out, and listed."
_RESUME_HELP = "Continue a stopped run from its state folder beside OUT."
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def optimize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=opt.MODEL_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_OUT_HELP, show_default=False)],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    effective_bits: Annotated[
        float | None,
        typer.Option(min=0, help="Bits per weight, including KDS and float layers.", rich_help_panel=_BUDGET),
    ] = None,
    max_bytes: Annotated[
        float | None,
        typer.Option("--bytes", min=0, help="Bytes of the quantized file without its header.", rich_help_panel=_BUDGET),
    ] = None,
    ms: Annotated[
        float | None,
        typer.Option(
            min=0, help="Milliseconds per image, compiled and timed on this machine.", rich_help_panel=_BUDGET
        ),
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Minimum percentage of images with the class of the float model.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(min=0, help="Maximum mean KL divergence from the float model, in nats.", rich_help_panel=_TARGET),
    ] = None,
    top1_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Maximum loss of top-1 accuracy in percentage points; needs labels.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    distance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Maximum relative error of outputs that are not logits, or of --metric.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    time_limit: Annotated[str, typer.Option(metavar="TIME", help=_TIME_HELP)] = "10m",
    weights: opt.Weights = "default",
    classes: opt.Classes = None,
    limit: opt.Limit = 1000,
    batch_size: opt.BatchSize = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random choices.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    any_range: opt.AnyRange = False,
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
    """Quantize a trained network within a budget or to a target of accuracy, in one command.

    A few recipes of search, calibration and adaptation are tried. The command keeps the smallest network that meets the
    target (with --ms the fastest), or without a target the closest to float within the budget. Times are on --threads,
    or else 1. If budget or target is not met, OUT is the network that comes closest, and the exit code 1.
    """
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), model)
    limits = {"effective_bits": effective_bits, "bytes": max_bytes, "ms": ms}
    figures = {"agreement": agreement, "kl": kl, "top1_drop": top1_drop, "distance": distance}
    budget, target = ({n: v for n, v in each.items() if v is not None} for each in (limits, figures))
    mistakes.usage(
        bool(target) and data is None,
        "--agreement, --kl, --top1-drop and --distance are measured on images: give a folder of them, with --data.",
    )
    mistakes.usage(classes is not None and data is None, "--classes are those of the images: give these, with --data.")
    seconds = mistakes.check(_seconds, time_limit)
    settings, page = out.with_suffix(".json"), out.with_suffix(".html")
    mistakes.usage(out in (settings, page), f"--out: expected a name as net.safetensors, got {out.name!r}.")
    mistakes.check(check_model_name, model)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    names = mistakes.check(read_classes, classes)
    mistakes.check(check_out, force, out=out, settings=settings, report=page)
    state = mistakes.check(state_beside, out, resume, "previous run")
    mistakes.check(check_extras, "search", "highspy")
    kind = mistakes.check(check_task, task)
    mistakes.check(check_metric_name, metric)
    mistakes.end()

    begin(threads, device)
    from dsconv.optimization.saved import remove_state

    network = build(model, weights)
    preprocess = preparation_of(given, model, network)
    say_preparation(preprocess, data)
    with resumable(state):
        found = dsconv.optimize(
            network,
            None if data is None else image_folder(data, preprocess, names),
            budget=budget or None,
            target=target or None,
            time_limit=seconds,
            preprocess=preprocess if data is None else None,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            threads=threads or 1,
            device=device,
            state=state,
            resume=resume,
            any_range=any_range,
            task=kind,
            metric=metric_of(metric),
            progress=not quiet,
            on_attempt=_say_attempt,
        )
        dsconv.save(found.model, out)
        with replacing(settings) as beside:
            beside.write_text(found.config.to_json() + "\n", "utf-8")
    remove_state(state)
    reported = _report(page, found, network, preprocess, names)
    again = _repeated(found, model, settings, data)
    if as_json:
        facts = {"model": model, "data": None if data is None else str(data), "file": str(out)}
        written = {"config": str(settings), "report": str(page) if reported else None, "commands": again}
        print_json({**facts, **written, "preprocess": preprocess.model_dump(mode="json"), **found.to_dict()})
    else:
        print_table(found)
        files = [f"{out}: {out.stat().st_size:,} bytes", str(settings), *([str(page)] if reported else [])]
        print(f"Wrote {', '.join(files)}. The same settings without the search: {' && '.join(again)}")
    if found.shortfall is not None:
        raise DSConvError(f"budget or target is not met: {found.shortfall}; {out} holds the network that comes closest")


def _seconds(text: str) -> float | None:
    """Return ``90``, ``90s``, ``10m`` or ``2h`` in seconds; None for ``none``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if text != "none" and (found is None or not float(found[1])):
        raise typer.BadParameter(f"--time-limit: expected a time above 0 as 90s, 10m or 2h, or none, got {text!r}.")
    return None if found is None else float(found[1]) * _SECONDS[found[2]]


def _say_attempt(attempt: "Attempt") -> None:
    found = attempt.evaluation
    parts = [f"{attempt.bytes / 1e6:.2f} MB", f"{attempt.effective_bits:.2f} bits"]
    if found.agreement is not None:
        parts.append(f"agreement {found.agreement:.2f} %")
    say(f"{attempt.name}: {', '.join([*parts, f'{found.measure} {found.distance:.4g}', f'{attempt.seconds:.0f} s'])}")


def _report(
    page: Path, found: "Optimization", network: object, preprocess: "Preprocess", classes: list[str] | None
) -> bool:
    """Write a report on the selected network and print a message; skip it if the required package is missing."""
    try:
        check_extras("report", "jinja2")
    except MissingExtraError as missing:
        say(f"no report: {missing}")
        return False
    dsconv.write_report(
        page,
        found.model,
        name=page.stem,
        reference=network,
        images=None if found.synthetic else found.held_out,
        preprocess=preprocess,
        classes=classes or (),
        sensitivity_images=0,
        task=found.best.evaluation.task,
        optimization=found,
        input_shape=image_shape(preprocess, page.stem, []) if found.synthetic else None,
    )
    return True


def _repeated(found: "Optimization", model: str, settings: Path, data: Path | None) -> list[str]:
    """Return the commands that quantize the network with the settings found, and repeat the further steps."""
    if not found.best.calibrated:
        return [f"dsconv quantize {model} --config {settings} --out again.safetensors"]
    commands = [f"dsconv calibrate {model} --config {settings} --data {data} --out again.safetensors"]
    if found.best.adapted:
        commands.append(f"dsconv adapt again.safetensors --data {data} --out adapted.safetensors")
    return commands
