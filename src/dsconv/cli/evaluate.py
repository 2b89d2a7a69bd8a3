"""``dsconv evaluate``: accuracy of a network on a folder of images, and its distance from its float original."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import (
    check_data,
    check_goes_with_file,
    check_own_weights,
    check_source,
    is_quantized_file,
    read_classes,
)
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, build, image_folder, load_file, metric_of
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import preparation_of, read_preparation, say_preparation
from dsconv.names import check_metric_name, check_task, check_weights

if TYPE_CHECKING:
    from torch import nn


def evaluate(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=opt.FILE_HELP, show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help=opt.DATA_HELP, show_default=False)],
    reference: opt.ReferenceToCompare = None,
    weights: opt.Weights = "default",
    model: opt.ModelOfFile = None,
    classes: opt.Classes = None,
    limit: opt.LimitOrAll = None,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = 0,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
    task: opt.Task = None,
    data_range: opt.DataRange = None,
    metric: opt.Metric = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    scale: opt.Scale = None,
    channels: opt.Channels = None,
    interpolation: opt.Interpolation = None,
) -> None:
    """Measure a quantized file, or a float model, on a folder of images.

    With --reference, the command also shows agreement, KL divergence and SQNR of each output. Ctrl-C ends the command
    with the figures so far.
    """
    mistakes = Mistakes()
    given = mistakes.check(read_preparation, locals(), file_or_model, model, reference)
    is_file = is_quantized_file(file_or_model)
    mistakes.check(check_goes_with_file, file_or_model, reference, model)
    mistakes.check(check_own_weights, file_or_model, reference, weights)
    mistakes.check(check_source, file_or_model, model, reference)
    mistakes.check(check_weights, weights)
    mistakes.check(check_data, data)
    names = mistakes.check(read_classes, classes)
    kind = mistakes.check(check_task, task)
    mistakes.check(check_metric_name, metric)
    mistakes.usage(
        metric is not None and reference is None, "--metric compares with --reference: give --reference, too."
    )
    mistakes.end()

    begin(threads, device)
    from dsconv import zoo

    say(f"loading {file_or_model}")
    source = Path(file_or_model)
    network = load_file(source, model, reference) if is_file else zoo.build(file_or_model, weights=weights)
    original = None
    if reference:
        original = build(reference, weights)
    preprocess = preparation_of(given, file_or_model, network, original)
    say_preparation(preprocess, data)
    images = image_folder(data, preprocess, names)
    options: dict[str, Any] = {
        "task": kind,
        "data_range": data_range,
        "limit": limit,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "progress": not quiet,
        "on_interrupt": "partial",
    }
    result: Any
    if original is not None:
        result = dsconv.compare(original, network, images, metric=metric_of(metric), **options)
    else:
        result = dsconv.evaluate(network, images, **options)
    # The backend of a layer depends on its device.
    quantization = _quantization(network.to(device))
    if as_json:
        facts = {"model": file_or_model, "reference_model": reference, "data": str(data), "quantization": quantization}
        print_json({**facts, "preprocess": preprocess.model_dump(mode="json"), **result.to_dict()})
    else:
        print_table(result)
        print(*(f"{name}: {value}" for name, value in (quantization or {"weights": "float"}).items()), sep=", ")
    if result.interrupted:
        raise typer.Exit(130)


def _quantization(network: "nn.Module") -> dict[str, Any] | None:
    """Return the settings that qualify an accuracy; None for a float network."""
    from dsconv.conversion import model_info

    info = model_info(network)
    if info is None:
        return None
    names = ("weight_bits", "activation_bits", "activation_sign", "block_size", "weight_shift")
    found = dsconv.summary(network)
    settings = {name: getattr(info.config, name) for name in names}
    settings |= {"calibrated_on": info.calibrated_on, "adapted_on": info.adapted_on}
    return {"effective_bits": round(found.effective_bits, 3), **settings, "backend": ", ".join(found.backends)}
