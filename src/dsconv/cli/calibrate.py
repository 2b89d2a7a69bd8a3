"""``dsconv calibrate``: a quantized network is rounded again on unlabelled images."""

import time
from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv.cli.common import (
    FILE_HELP,
    UNLABELLED_HELP,
    AnyRange,
    Channels,
    Config,
    Crop,
    Device,
    Force,
    Interpolation,
    Json,
    Limit,
    Mean,
    ModelOfFile,
    Preset,
    Reference,
    Resize,
    Scale,
    Std,
    Threads,
    Weights,
    begin,
    check_data,
    check_out,
    check_source,
    is_quantized_file,
    load_file,
    original_of,
    preparation_of,
    print_json,
    print_table,
    read_config,
    read_preparation,
    resumable,
    say,
    say_preparation,
    state_beside,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.names import check_weights

_OUT_HELP = "File to write: *.safetensors."
_RESUME_HELP = "Continue a calibration that was stopped, from the file beside OUT that it left."


def calibrate(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=FILE_HELP, show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help=UNLABELLED_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help=_OUT_HELP, show_default=False)],
    reference: Reference = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    preset: Preset = "default",
    config: Config = None,
    limit: Limit = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of places in the images.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME_HELP)] = False,
    memory: Annotated[float, typer.Option(min=0.01, metavar="GIB", help="Rough bound of what activations take.")] = 4.0,
    threads: Threads = None,
    device: Device = "cpu",
    any_range: AnyRange = False,
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
    """Round the weights of a quantized network again so that, on your images, each layer puts out what it did in float.

    FILE, or MODEL quantized as --preset or --config say. The images need no labels, and there is no training. A part
    of them is held back; where calibration makes the network worse on these, OUT is the network as it was.
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
    mistakes.check(check_source, file_or_model, model, reference)
    mistakes.check(check_weights, weights)
    settings = mistakes.check(read_config, preset, config)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, out=out)
    state = mistakes.check(state_beside, out, resume, "calibration")
    mistakes.end()

    begin(threads, device)
    from dsconv import zoo
    from dsconv.conversion import model_info

    qmodel = None
    if is_file:
        say(f"loading {file_or_model}")
        qmodel = load_file(Path(file_or_model), model, reference)
        name = reference or model or original_of(qmodel, file_or_model)
    else:
        name = file_or_model
    say(f"building {name} with weights {weights}")
    network = zoo.build(name, weights=weights)
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
            progress=True,
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
