"""``dsconv calibrate``: rounds a quantized network again on unlabelled images."""

import time
from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import (
    check_data,
    check_goes_with_file,
    check_out,
    check_own_settings,
    check_source,
    is_quantized_file,
    read_config,
    state_beside,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, load_file, original_of, resumable
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import preparation_of, read_preparation, say_preparation
from dsconv.names import check_task, check_weights

_OUT_HELP = "File to write: *.safetensors."
_RESUME_HELP = "Continue a stopped calibration from its state file beside OUT."


def calibrate(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=opt.FILE_HELP, show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help=opt.UNLABELLED_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_OUT_HELP, show_default=False)],
    reference: opt.Reference = None,
    weights: opt.Weights = "default",
    model: opt.ModelOfFile = None,
    preset: opt.Preset = "default",
    config: opt.Config = None,
    limit: opt.Limit = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of output positions.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
    memory: Annotated[
        float, typer.Option(min=0.01, metavar="GIB", help="Approximate limit of memory for activations.")
    ] = 4.0,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    any_range: opt.AnyRange = False,
    task: opt.Task = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Round the weights of a quantized network again so that its layer outputs match the float model on your images.

    The network is FILE, or MODEL quantized according to --preset or --config. Labels are not needed, and there is no
    training. Some images are held back; if calibration makes the network worse on these, OUT is the uncalibrated
    network.
    """
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), file_or_model, model, reference)
    is_file = is_quantized_file(file_or_model)
    mistakes.check(check_goes_with_file, file_or_model, reference, model)
    mistakes.check(check_own_settings, [file_or_model], preset, config)
    mistakes.check(check_source, file_or_model, model, reference)
    mistakes.check(check_weights, weights)
    settings = mistakes.check(read_config, preset, config)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, out=out)
    state = mistakes.check(state_beside, out, resume, "calibration")
    kind = mistakes.check(check_task, task)
    mistakes.end()

    begin(threads, device)
    from dsconv.conversion import model_info

    qmodel = None
    if is_file:
        say(f"loading {file_or_model}")
        qmodel = load_file(Path(file_or_model), model, reference)
        name = reference or model or original_of(qmodel, file_or_model)
    else:
        name = file_or_model
    network = build(name, weights)
    preprocess = preparation_of(given, file_or_model, qmodel, network)
    say_preparation(preprocess, data)
    if qmodel is None:
        say("quantizing")
        qmodel = dsconv.quantize(network, settings, preprocess=preprocess)
    start = time.perf_counter()
    with resumable(state):
        result = dsconv.calibrate(
            qmodel,
            network,
            data,
            preprocess=preprocess,
            limit=limit,
            seed=seed,
            state=state,
            resume=resume,
            device=device,
            memory_bytes=int(memory * 2**30),
            any_range=any_range,
            task=kind,
            progress=not quiet,
        )
        seconds = time.perf_counter() - start
        dsconv.save(result, out)
    state.unlink()
    info, file_bytes = model_info(result), out.stat().st_size
    assert info is not None
    if as_json:
        facts = {"model": file_or_model, "reference_model": name, "data": str(data), "file": str(out)}
        work = {"file_bytes": file_bytes, "calibrate_seconds": seconds, "config": info.config.to_dict()}
        figures = {"effective_bits": dsconv.summary(result).effective_bits, **info.calibration.to_dict()}
        print_json({**facts, **work, "preprocess": preprocess.model_dump(mode="json"), **figures})
    else:
        print_table(info.calibration)
        print(f"Wrote {out}: {file_bytes:,} bytes; calibrated in {seconds:.1f} s.")
