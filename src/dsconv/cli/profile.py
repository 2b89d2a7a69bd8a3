"""``dsconv profile``: where the time of a compiled network goes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

import dsconv
from dsconv import zoo
from dsconv.benchmarking.machine import cores
from dsconv.cli.common import (
    FILE_HELP,
    Config,
    FastMath,
    Json,
    ModelOfFile,
    Preset,
    Size,
    Weights,
    image_shape,
    is_quantized_file,
    load_file,
    print_json,
    print_table,
    read_config,
    read_size,
    say,
)


def profile(
    model_or_file: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help=FILE_HELP, show_default=False)],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=cores(), help="That the network runs on.")] = 1,
    runs: Annotated[int, typer.Option(min=2, help="That are timed.")] = 20,
    size: Size = None,
    weights: Weights = "default",
    preset: Preset = "default",
    config: Config = None,
    model: ModelOfFile = None,
    fast_math: FastMath = False,
    as_json: Json = False,
) -> None:
    """Time each step of a compiled network on random images."""
    shape = read_size(size)
    settings = read_config(preset, config)
    if is_quantized_file(model_or_file):
        if weights != "default" or preset != "default" or config:
            raise typer.BadParameter("a quantized FILE has its own: --weights, --preset and --config are for models.")
        say(f"loading {model_or_file}")
        qmodel = load_file(Path(model_or_file), model)
    else:
        say(f"building {model_or_file} with weights {weights}, quantizing")
        qmodel = dsconv.quantize(zoo.build(model_or_file, weights=weights), settings)
    image = image_shape(qmodel, model_or_file, shape)
    x = torch.randn(batch_size, *image, dtype=torch.float32, device="cpu")
    torch.set_num_threads(threads)
    say("compiling")
    found = dsconv.profile(dsconv.compile(qmodel, x, fast_math=fast_math), x, runs=runs)
    print_json(found.to_dict()) if as_json else print_table(found)
