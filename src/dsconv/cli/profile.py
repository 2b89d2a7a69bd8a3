"""``dsconv profile``: where the time of a compiled network goes."""

from pathlib import Path
from typing import Annotated

import typer

import dsconv
from dsconv.cli.common import (
    FILE_HELP,
    BatchSize,
    Config,
    FastMath,
    Json,
    ModelOrReference,
    Preset,
    Size,
    Threads,
    Weights,
    begin,
    check_size,
    check_source,
    image_shape,
    is_quantized_file,
    load_file,
    print_json,
    print_table,
    read_config,
    read_size,
    say,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.names import check_weights


def profile(
    model_or_file: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help=FILE_HELP, show_default=False)],
    batch_size: BatchSize = 1,
    threads: Threads = 1,
    runs: Annotated[int, typer.Option(min=2, help="Runs that are timed.")] = 20,
    size: Size = None,
    weights: Weights = "default",
    preset: Preset = "default",
    config: Config = None,
    model: ModelOrReference = None,
    fast_math: FastMath = False,
    as_json: Json = False,
) -> None:
    """Time each step of a compiled network on random images."""
    mistakes = Mistakes()
    is_file = is_quantized_file(model_or_file)
    shape = mistakes.check(read_size, size)
    settings = mistakes.check(read_config, preset, config)
    mistakes.usage(
        is_file and (weights != "default" or preset != "default" or bool(config)),
        "a quantized FILE has its own: --weights, --preset and --config are for models.",
    )
    mistakes.check(check_source, model_or_file, model if is_file else None)
    mistakes.check(check_size, {}, model_or_file, shape)
    mistakes.check(check_weights, weights)
    mistakes.end()

    begin(threads)
    import torch

    from dsconv import zoo

    if is_file:
        say(f"loading {model_or_file}")
        qmodel = load_file(Path(model_or_file), model)
    else:
        say(f"building {model_or_file} with weights {weights}, quantizing")
        qmodel = dsconv.quantize(zoo.build(model_or_file, weights=weights), settings)
    image = image_shape(zoo.preprocess_of(qmodel), model_or_file, shape)
    x = torch.randn(batch_size, *image, dtype=torch.float32, device="cpu")
    say("compiling")
    found = dsconv.profile(dsconv.compile(qmodel, x, fast_math=fast_math), x, runs=runs)
    print_json(found.to_dict()) if as_json else print_table(found)
