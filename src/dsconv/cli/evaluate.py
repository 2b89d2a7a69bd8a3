"""``dsconv evaluate``: how good a network is on a folder of images, and how close to its float original."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import dsconv
from dsconv import zoo
from dsconv.cli.common import (
    FILE_HELP,
    Json,
    ModelOfFile,
    Weights,
    is_quantized_file,
    load_file,
    print_json,
    print_table,
    say,
)
from dsconv.conversion import model_info
from dsconv.data import Preprocess
from dsconv.errors import DataError

_image = partial(
    typer.Option,
    metavar="NUMBER[,NUMBER,NUMBER]",
    rich_help_panel="Preparation of the images, in place of what the model asks for",
)
_SIZE = "PIXELS|HEIGHTxWIDTH|none"
_DATA_HELP = "Images in class folders, or listed in a labels.csv (file,class_index), or unlabelled."


def evaluate(
    file_or_model: Annotated[str, typer.Argument(metavar="FILE_OR_MODEL", help=FILE_HELP, show_default=False)],
    data: Annotated[Path, typer.Option(metavar="DIR", help=_DATA_HELP, show_default=False)],
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="Float model to compare FILE with.")] = None,
    weights: Weights = "default",
    model: ModelOfFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images beside this one.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run, as PyTorch names it: cpu, cuda.")] = "cpu",
    as_json: Json = False,
    resize: Annotated[str | None, _image(metavar=_SIZE, help="Length of the shorter side, or of both.")] = None,
    crop: Annotated[str | None, _image(metavar=_SIZE, help="Size of the centre crop.")] = None,
    mean: Annotated[str | None, _image(help="Subtracted.")] = None,
    std: Annotated[str | None, _image(help="Divided by, after that.")] = None,
    scale: Annotated[str | None, _image(metavar="NUMBER", help="Value of white before that: 1 or 255.")] = None,
    channels: Annotated[str | None, _image(metavar="rgb|bgr|gray", help="Which, in which order.")] = None,
    interpolation: Annotated[str | None, _image(metavar="NAME", help="bilinear, bicubic, nearest, ...")] = None,
) -> None:
    """Measure a quantized file, or a float model, on a folder of images.

    With --reference: agreement, KL divergence and SQNR too. Ctrl-C ends it with the figures so far.
    """
    names = Preprocess.model_fields
    given = {name: _value(text) for name, text in locals().items() if name in names and text is not None}
    is_file = is_quantized_file(file_or_model)
    if not is_file and (reference or model):
        raise typer.BadParameter("--reference and --model go with a quantized FILE, not with a float model.")
    if is_file and not reference and weights != "default":
        raise typer.BadParameter("a quantized FILE has its own weights: --weights are those of --reference.")

    say(f"loading {file_or_model}")
    network = load_file(Path(file_or_model), model) if is_file else zoo.build(file_or_model, weights=weights)
    options: dict[str, Any] = {
        "preprocess": _preprocess(network, file_or_model, given),
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
        result = dsconv.compare(zoo.build(reference, weights=weights), network, data, **options)
    else:
        result = dsconv.evaluate(network, data, **options)
    # What executes a layer depends on where it is.
    quantization = _quantization(network.to(device))
    if as_json:
        facts = {"model": file_or_model, "reference_model": reference, "data": str(data), "quantization": quantization}
        print_json({**facts, "preprocess": options["preprocess"].model_dump(mode="json"), **result.to_dict()})
    else:
        print_table(result)
        print(*(f"{name}: {value}" for name, value in (quantization or {"weights": "float"}).items()), sep=", ")
    if result.interrupted:
        raise typer.Exit(130)


def _preprocess(network: nn.Module, name: str, given: dict[str, Any]) -> Preprocess:
    own = zoo.preprocess_of(network)
    if own is None and not given:
        raise DataError(
            f"{name} does not say how its images are prepared: give --resize, --crop, --mean, --std, as it was trained"
        )
    return Preprocess(**{**(own.model_dump() if own else {}), **given})


def _quantization(network: nn.Module) -> dict[str, Any] | None:
    """What an accuracy is to be read with; None for a float network."""
    info = model_info(network)
    if info is None:
        return None
    names = ("weight_bits", "activation_bits", "activation_sign", "block_size", "weight_shift")
    found = dsconv.summary(network)
    settings = {name: getattr(info.config, name) for name in names}
    return {"effective_bits": round(found.effective_bits, 3), **settings, "backend": ", ".join(found.backends)}


def _value(text: str) -> Any:
    """``none``, a number, several as in ``0.5,0.5,0.5`` or ``224x320``, or a word; Preprocess checks which it takes."""
    try:
        numbers = json.loads(f"[{text.replace('x', ',')}]")
    except ValueError:
        return None if text == "none" else text
    return numbers[0] if len(numbers) == 1 else numbers
