"""``dsconv bench``: times quantized networks and other runtimes, in turns in one process."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import (
    check_data,
    check_out,
    check_own_settings,
    check_plot,
    check_source,
    header_of,
    is_quantized_file,
    read_config,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, load_file, original_of, random_inputs, read_images
from dsconv.cli.output import json_text, print_json, print_table, say
from dsconv.cli.preparation import (
    check_one_size,
    check_size,
    image_shape,
    preparation_of,
    read_preparation,
    read_size,
    say_preparation,
)
from dsconv.cpu import cores
from dsconv.errors import DataError
from dsconv.files import replacing
from dsconv.names import PEERS, check_weights, is_onnx

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dsconv.benchmarking import Bench
    from dsconv.config import QuantConfig
    from dsconv.data.inputs import Inputs

_RANDOM = 8

_DATA_HELP = "Images to run, and for calibrating the int8 models of other runtimes, in place of random ones."
_SECONDS_HELP = "Seconds per network, batch size and number of threads, after warm-up (10); at least 5 turns."


def bench(
    models_or_files: Annotated[
        list[str], typer.Argument(metavar="MODEL_OR_FILE...", help=opt.FILE_HELP, show_default=False)
    ],
    against: Annotated[str, typer.Option(metavar="NAME,...", help="Runtimes to compare with dsconv.")] = ",".join(
        PEERS
    ),
    batch_size: Annotated[
        str, typer.Option(metavar="IMAGES,...", help="Images per batch: one number or several.")
    ] = "1",
    threads: Annotated[
        str, typer.Option(metavar="THREADS,...", help="CPU threads of each runtime: one number or several.")
    ] = "1",
    size: opt.Size = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    limit: opt.Limit = 8,
    weights: opt.Weights = "default",
    preset: opt.Preset = "default",
    config: opt.Config = None,
    model: opt.ModelOrReference = None,
    seconds: Annotated[float | None, typer.Option(min=0.001, help=_SECONDS_HELP)] = None,
    turns: Annotated[
        int | None, typer.Option(min=2, help="Number of turns of each runtime, in place of --seconds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write all figures here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the times as bars.")] = None,
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
    """Time quantized networks against PyTorch, ONNX Runtime, OpenVINO and MNN.

    All run in this process, in turns; other runtimes run the float network of a FILE. Ctrl-C ends the command with the
    figures so far. An ONNX file states its inputs, which may be several tensors; --size sets their last free sizes.
    Other networks with more inputs than images need dsconv.bench in Python.
    """
    options = locals()
    mistakes = Mistakes()
    mistakes.usage(turns is not None and seconds is not None, "choose one of --seconds and --turns.")
    mistakes.check(check_own_settings, models_or_files, preset, config, weights)
    mistakes.check(check_one_size, size, resize, crop)
    peers = against.split(",")
    unknown = ", ".join(set(peers) - set(PEERS))
    mistakes.usage(bool(unknown), f"--against: expected some of {', '.join(PEERS)}, got {unknown!r}.")
    batch_sizes = mistakes.check(_numbers, "--batch-size", batch_size)
    counts = mistakes.check(_numbers, "--threads", threads, most=cores())
    shape = mistakes.check(read_size, size)
    settings = mistakes.check(read_config, preset, config)
    given: dict[str, Any] = {}
    for name in models_or_files:
        given = mistakes.check(read_preparation, options, name, model, needed=data is not None)
        mistakes.check(check_source, name, model if is_quantized_file(name) else None)
        if not is_onnx(_original(name, model) or ""):  # which states it
            mistakes.check(check_size, options, name, shape)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    mistakes.check(check_out, force, out=out, plot=plot)
    mistakes.check(check_plot, plot)
    mistakes.end()

    begin()
    from dsconv import report

    found: list[Bench] = []
    interrupted = False
    try:
        for name in models_or_files:
            float_name, reference, qmodel = _networks(name, weights, settings, model)
            inputs = _inputs(float_name, reference, qmodel, name, shape, given, data, limit)
            result = dsconv.bench(
                reference,
                qmodel,
                inputs,
                against=peers,
                batch_sizes=batch_sizes,
                threads=counts,
                turns=turns,
                seconds=seconds or 10.0,
                name=name,
                progress=not quiet,
                on_interrupt="partial",
            )
            if isinstance(inputs, dsconv.Inputs):
                result = replace(result, calibration=f"{_RANDOM} random samples")
            found.append(result)
            # If a later network fails, the measurements so far are kept.
            if out:
                with replacing(out) as beside:
                    beside.write_text(json_text(_as_dict(found)) + "\n", "utf-8")
            if plot:
                report.draw_benches(plot, found)
            if not as_json:
                print_table(result)
            if interrupted := result.interrupted:
                break
    except KeyboardInterrupt:
        if not found:
            raise
        interrupted = True
    if as_json:
        print_json(_as_dict(found))
    if interrupted:
        raise typer.Exit(130)


def _original(name: str, model: str | None) -> str | None:
    """Return the name of the float network, as far as known without building one."""
    if not is_quantized_file(name):
        return name
    return model or header_of(Path(name)).get("architecture")


def _as_dict(found: "list[Bench]") -> dict[str, Any]:
    return {"networks": [result.to_dict() for result in found]}


def _networks(
    name: str, weights: str, settings: "QuantConfig", model: str | None
) -> "tuple[str, nn.Module, nn.Module]":
    """Return the name of the float network, that network and the quantized one."""
    from dsconv import zoo
    from dsconv.layers import DSLayer

    if is_quantized_file(name):
        say(f"loading {name}")
        qmodel = load_file(Path(name), model)
        original = model or original_of(qmodel, name)
        reference = zoo.build(original, weights="random")
        layers = {name: layer for name, layer in qmodel.named_modules() if isinstance(layer, DSLayer)}
        weights_of = {f"{name}.weight": layer.dequantized_weight() for name, layer in layers.items()}
        reference.load_state_dict(qmodel.state_dict() | weights_of, strict=False)
        return original, reference, qmodel
    reference = build(name, weights)
    say("quantizing")
    return name, reference, dsconv.quantize(reference, settings)


def _inputs(
    float_name: str,
    reference: "nn.Module",
    qmodel: "nn.Module",
    name: str,
    size: list[int],
    given: dict[str, Any],
    data: Path | None,
    limit: int,
) -> "Tensor | Inputs | tuple[int, ...]":
    """Return ``limit`` images of a folder, or the shape of random ones, or the inputs of an ONNX file."""
    from dsconv import zoo

    unstated = data is None and not given
    several = _several(reference)
    if is_onnx(float_name) and unstated and (several or (not size and zoo.preprocess_of(qmodel) is None)):
        return random_inputs(Path(float_name), size, _RANDOM)
    if several:
        todo = "leave out --data and its preprocessing" if is_onnx(float_name) else "an ONNX file describes its inputs"
        raise DataError(
            f"{name} takes more than images, {', '.join(several)}: {todo}, or call dsconv.bench in Python on "
            f"dsconv.Inputs({', '.join(several)})"
        )
    if unstated and zoo.preprocess_of(qmodel) is None:
        return image_shape(None, name, size)
    preprocess = preparation_of(given, name, qmodel, size=size)
    if data is None:
        return image_shape(preprocess, name, size)
    say_preparation(preprocess, data)
    return read_images(data, preprocess, limit)


def _several(network: "nn.Module") -> list[str]:
    """Return the names of the required arguments of a network, if there is more than one."""
    parameters = inspect.signature(network.forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    return names if len(names) > 1 else []


def _numbers(option: str, text: str, most: int | None = None) -> list[int]:
    """Return ``1,8`` as numbers of 1 to ``most``."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1 or (most is not None and max(numbers) > most):
        limit = "whole numbers from 1" if most is None else f"numbers from 1 to {most}, the number of cores"
        raise typer.BadParameter(f"{option}: expected {limit}, separated by commas, got {text!r}.")
    return numbers
