"""``dsconv evaluate``: how good a network is on a folder of images, and how close to its float original."""

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import dsconv
from dsconv import zoo
from dsconv.cli.common import (
    FILE_HELP,
    Channels,
    Classes,
    Crop,
    Interpolation,
    Json,
    Mean,
    ModelOfFile,
    Resize,
    Scale,
    Std,
    Weights,
    image_folder,
    is_quantized_file,
    load_file,
    preparation,
    preprocess_of,
    print_json,
    print_table,
    read_classes,
    say,
)
from dsconv.conversion import model_info

_DATA_HELP = "Images in class folders, or listed in a labels.csv (file,class_index), or unlabelled."


def evaluate(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=FILE_HELP, show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help=_DATA_HELP, show_default=False)],
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="Float model to compare FILE with.")] = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    classes: Classes = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images beside this one.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run, as PyTorch names it: cpu, cuda.")] = "cpu",
    as_json: Json = False,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    channels: Channels = None,
    interpolation: Interpolation = None,
) -> None:
    """Measure a quantized file, or a float model, on a folder of images.

    With --reference: agreement, KL divergence and SQNR too. Ctrl-C ends it with the figures so far.
    """
    given = preparation(locals())
    is_file = is_quantized_file(file_or_model)
    if not is_file and (reference or model):
        raise typer.BadParameter("--reference and --model go with a quantized FILE, not with a float model.")
    if is_file and not reference and weights != "default":
        raise typer.BadParameter("a quantized FILE has its own weights: --weights are those of --reference.")

    names = read_classes(classes)
    say(f"loading {file_or_model}")
    network = load_file(Path(file_or_model), model) if is_file else zoo.build(file_or_model, weights=weights)
    preprocess = preprocess_of(network, file_or_model, given)
    images = image_folder(data, preprocess, names)
    options: dict[str, Any] = {
        "limit": limit,
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "progress": True,
        "on_interrupt": "partial",
    }
    result: Any
    if reference:
        say(f"building {reference} with weights {weights}")
        result = dsconv.compare(zoo.build(reference, weights=weights), network, images, **options)
    else:
        result = dsconv.evaluate(network, images, **options)
    # What executes a layer depends on where it is.
    quantization = _quantization(network.to(device))
    if as_json:
        facts = {"model": file_or_model, "reference_model": reference, "data": str(data), "quantization": quantization}
        print_json({**facts, "preprocess": preprocess.model_dump(mode="json"), **result.to_dict()})
    else:
        print_table(result)
        print(*(f"{name}: {value}" for name, value in (quantization or {"weights": "float"}).items()), sep=", ")
    if result.interrupted:
        raise typer.Exit(130)


def _quantization(network: nn.Module) -> dict[str, Any] | None:
    """What an accuracy is to be read with; None for a float network."""
    info = model_info(network)
    if info is None:
        return None
    names = ("weight_bits", "activation_bits", "activation_sign", "block_size", "weight_shift")
    found = dsconv.summary(network)
    settings = {name: getattr(info.config, name) for name in names}
    settings |= {"calibrated_on": info.calibrated_on, "adapted_on": info.adapted_on}
    return {"effective_bits": round(found.effective_bits, 3), **settings, "backend": ", ".join(found.backends)}
