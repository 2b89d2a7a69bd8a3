"""``dsconv bench``: quantized networks beside other runtimes, whole, in turns in one process."""

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

import dsconv
from dsconv import report, zoo
from dsconv.benchmarking import PEERS, Bench
from dsconv.benchmarking.machine import cores
from dsconv.cli.common import (
    FILE_HELP,
    Config,
    FastMath,
    Force,
    Json,
    ModelOfFile,
    Preset,
    Size,
    Weights,
    check_format,
    check_out,
    image_shape,
    is_quantized_file,
    json_text,
    load_file,
    preprocess_for,
    print_json,
    print_table,
    read_config,
    read_images,
    read_size,
    say,
)
from dsconv.config import QuantConfig
from dsconv.conversion import model_info
from dsconv.files import replacing
from dsconv.nn import DSLayer

_CALIBRATION_IMAGES = 8
_DATA_HELP = "Images to run, and to calibrate the int8 models of other runtimes on, in place of random ones."
_SECONDS_HELP = "For each network, batch size and number of threads, once all are warm (10); at least 5 turns."


def bench(
    models_or_files: Annotated[
        list[str], typer.Argument(metavar="MODEL_OR_FILE...", help=FILE_HELP, show_default=False)
    ],
    against: Annotated[str, typer.Option(metavar="NAME,...", help="Runtimes to measure beside dsconv.")] = ",".join(
        PEERS
    ),
    batch_size: Annotated[str, typer.Option(metavar="NUMBER,...", help="Images per batch.")] = "1",
    threads: Annotated[str, typer.Option(metavar="NUMBER,...", help="Threads of each runtime.")] = "1",
    size: Size = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help=_DATA_HELP)] = None,
    weights: Weights = "default",
    preset: Preset = "default",
    config: Config = None,
    model: ModelOfFile = None,
    fast_math: FastMath = False,
    seconds: Annotated[float | None, typer.Option(min=0.001, help=_SECONDS_HELP)] = None,
    turns: Annotated[int | None, typer.Option(min=2, help="Of each runtime, in place of --seconds.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write all figures here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the times as bars.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time quantized networks beside PyTorch, ONNX Runtime and OpenVINO.

    All run in this process, in turns; other runtimes run a FILE as the float network that it stands for. Ctrl-C ends it
    with the figures so far.
    """
    if turns is not None and seconds is not None:
        raise typer.BadParameter("choose one of --seconds and --turns.")
    if all(map(is_quantized_file, models_or_files)) and (weights != "default" or preset != "default" or config):
        raise typer.BadParameter("a quantized FILE has its own: --weights, --preset and --config are for models.")
    peers = against.split(",")
    if unknown := set(peers) - set(PEERS):
        raise typer.BadParameter(f"--against: expected some of {', '.join(PEERS)}, got {', '.join(unknown)!r}.")
    batch_sizes, counts = _numbers("--batch-size", batch_size), _numbers("--threads", threads, most=cores())
    shape = read_size(size)
    settings = read_config(preset, config)
    for path in filter(None, (out, plot)):
        check_out(path, force)
    if plot:
        check_format(plot)
    found: list[Bench] = []
    interrupted = False
    try:
        for name in models_or_files:
            reference, qmodel = _networks(name, weights, settings, model)
            result = dsconv.bench(
                reference,
                qmodel,
                _images(qmodel, name, shape, data),
                against=peers,
                batch_sizes=batch_sizes,
                threads=counts,
                turns=turns,
                seconds=seconds or 10.0,
                fast_math=fast_math,
                name=name,
                progress=True,
                on_interrupt="partial",
            )
            found.append(result)
            # Errors in a later network leave what was measured.
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


def _as_dict(found: list[Bench]) -> dict[str, Any]:
    return {"networks": [result.to_dict() for result in found]}


def _networks(name: str, weights: str, settings: QuantConfig, model: str | None) -> tuple[nn.Module, nn.Module]:
    """The float network and the quantized one."""
    if is_quantized_file(name):
        say(f"loading {name}")
        qmodel = load_file(Path(name), model)
        info = model_info(qmodel)
        assert info is not None
        # That the file named it, or the user, is what it was loaded by.
        reference = zoo.build(model or str(info.architecture), weights="random")
        layers = {name: layer for name, layer in qmodel.named_modules() if isinstance(layer, DSLayer)}
        weights_of = {f"{name}.weight": layer.dequantized_weight() for name, layer in layers.items()}
        reference.load_state_dict(qmodel.state_dict() | weights_of, strict=False)
        return reference, qmodel
    say(f"building {name} with weights {weights}")
    reference = zoo.build(name, weights=weights)
    say("quantizing")
    return reference, dsconv.quantize(reference, settings)


def _images(qmodel: nn.Module, name: str, size: list[int], data: Path | None) -> Tensor | tuple[int, ...]:
    """Images of a folder, or the shape of random ones."""
    shape = image_shape(qmodel, name, size)
    if data is None:
        return shape
    return read_images(data, preprocess_for(qmodel, shape, bool(size)), _CALIBRATION_IMAGES)


def _numbers(option: str, text: str, most: int | None = None) -> list[int]:
    """``1,8`` as numbers of 1 to ``most``."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1 or (most is not None and max(numbers) > most):
        limit = "whole numbers from 1" if most is None else f"numbers from 1 to {most}, the cores that there are"
        raise typer.BadParameter(f"{option}: expected {limit}, separated by commas, got {text!r}.")
    return numbers
