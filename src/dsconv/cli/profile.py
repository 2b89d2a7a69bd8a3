"""``dsconv profile``: times the steps of a compiled network."""

from typing import Annotated

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_own_settings, check_source, is_quantized_file, read_config
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, load_or_quantize
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import check_size, image_shape, read_size
from dsconv.names import check_weights


def profile(
    model_or_file: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help=opt.FILE_HELP, show_default=False)],
    batch_size: opt.BatchSize = 1,
    threads: opt.Threads = 1,
    runs: Annotated[int, typer.Option(min=2, help="Number of timed runs.")] = 20,
    size: opt.Size = None,
    weights: opt.Weights = "default",
    preset: opt.Preset = "default",
    config: opt.Config = None,
    model: opt.ModelOrReference = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Time each step of a compiled network on random images."""
    mistakes = Mistakes()
    is_file = is_quantized_file(model_or_file)
    shape = mistakes.check(read_size, size)
    settings = mistakes.check(read_config, preset, config)
    mistakes.check(check_own_settings, [model_or_file], preset, config, weights)
    mistakes.check(check_source, model_or_file, model if is_file else None)
    mistakes.check(check_size, {}, model_or_file, shape)
    mistakes.check(check_weights, weights)
    mistakes.end()

    begin(threads)
    import torch

    from dsconv import zoo

    qmodel = load_or_quantize(model_or_file, settings, weights=weights, model=model)
    image = image_shape(zoo.preprocess_of(qmodel), model_or_file, shape)
    x = torch.randn(batch_size, *image, dtype=torch.float32, device="cpu")
    say("compiling")
    found = dsconv.profile(dsconv.compile(qmodel, x), x, runs=runs)
    print_json(found.to_dict()) if as_json else print_table(found)
