"""What the commands share: options, and how they print. Figures go to stdout, all the rest to stderr."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import dsconv
from dsconv import strict_json, zoo
from dsconv.config import PRESETS, QuantConfig
from dsconv.conversion import model_info
from dsconv.data import ImageFolder, Preprocess, batches
from dsconv.errors import ConfigError, DataError, ModelError, import_extra
from dsconv.files import check_place

MODEL_HELP = (
    "torchvision/NAME, timm/NAME, dsconv/digits_resnet or path/to/file.py:factory; "
    "arguments of the factory may follow as ?key=value&key=value."
)
WEIGHTS_HELP = "Of the float model: a state dictionary (safetensors or torch.save), those that come with it, or none."
FILE_HELP = f"A file that dsconv quantize wrote, or a float model: {MODEL_HELP}"
REFERENCE_HELP = "Float model that FILE was made from, where FILE does not name it."
Weights = Annotated[str, typer.Option(metavar="FILE|default|random", help=WEIGHTS_HELP)]
_PRESET_HELP = "default: W4A8 for today's processors; paper: the published method, W4A4."
Preset = Annotated[str, typer.Option(metavar="|".join(PRESETS), help=_PRESET_HELP)]
Config = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Settings as JSON, in place of a preset.")]
_MODEL_OF_FILE_HELP = "Float model to load FILE into, where FILE cannot name it: path/to/file.py:factory."
ModelOfFile = Annotated[str | None, typer.Option("--model", metavar="MODEL", help=_MODEL_OF_FILE_HELP)]
_SIZE_HELP = "Of an image, in place of what the model asks for."
Size = Annotated[str | None, typer.Option(metavar="PIXELS|[CHANNELSx]HEIGHTxWIDTH", help=_SIZE_HELP)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")]
AnyRange = Annotated[
    bool, typer.Option("--any-range", help="Take images that are far outside the range that the network expects.")
]
FastMath = Annotated[
    bool,
    typer.Option(
        "--fast-math",
        help="SiLU and sigmoid by kernels of dsconv, too, not by PyTorch; averages in an order of its own.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of images, which need no labels; none: noise.")]
_CLASSES_HELP = (
    "Names of the classes, one a line, in the order of the network's outputs; without it, class folders are sorted by "
    "their numbers if all names are whole numbers, and else as text."
)
Classes = Annotated[Path | None, typer.Option(metavar="FILE.txt", help=_CLASSES_HELP)]
Limit = Annotated[int, typer.Option(min=1, help="Use this many images, evenly spaced.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Seed = Annotated[int, typer.Option(help="Of the noise that takes the place of images.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a picture as well: *.png, *.svg, *.pdf.")]

_image = partial(
    typer.Option,
    metavar="NUMBER[,NUMBER,NUMBER]",
    rich_help_panel="Preparation of the images, in place of what the model asks for",
)
_SIZE = "PIXELS|HEIGHTxWIDTH|none"
Resize = Annotated[str | None, _image(metavar=_SIZE, help="Length of the shorter side, or of both.")]
Crop = Annotated[str | None, _image(metavar=_SIZE, help="Size of the centre crop.")]
Mean = Annotated[str | None, _image(help="Subtracted.")]
Std = Annotated[str | None, _image(help="Divided by, after that.")]
Scale = Annotated[str | None, _image(metavar="NUMBER", help="Value of white before that: 1 or 255.")]
Channels = Annotated[str | None, _image(metavar="rgb|bgr|gray", help="Which, in which order.")]
Interpolation = Annotated[str | None, _image(metavar="NAME", help="bilinear, bicubic, nearest, ...")]


def is_quantized_file(name: str) -> bool:
    """Whether an argument is a file that ``dsconv quantize`` wrote, and no model."""
    return Path(name).suffix == ".safetensors" or Path(name).is_file()


def load_file(path: Path, model: str | None) -> nn.Module:
    """Quantized network of a file, into the float model of that name where the file has none."""
    if model:
        return dsconv.load(path, zoo.build(model, weights="random"))
    try:
        return dsconv.load(path)
    except ModelError as error:
        raise ModelError(f"{error}; here, name it with --model") from None


def original_of(qmodel: nn.Module, file: str) -> str:
    """Name of the float model that a file says its network was made from."""
    info = model_info(qmodel)
    if info is None or info.architecture is None:
        raise ModelError(f"{file} does not name the float model it was made from: name it with --reference")
    return info.architecture


def read_config(preset: str, path: Path | None) -> QuantConfig:
    """Settings of a preset, or of the file that takes its place."""
    if path is None:
        return QuantConfig.preset(preset)
    if preset != "default":
        raise typer.BadParameter("choose one of --preset and --config.")
    try:
        return QuantConfig.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: expected settings as JSON: {error}") from None


def read_size(text: str | None) -> list[int]:
    """``224``, ``224x320`` or ``1x28x28`` as ``[C, H, W]`` without what is not given."""
    numbers = [int(number) for number in re.findall(r"\d+", text or "")]
    if text is not None and ("x".join(map(str, numbers)) != text or len(numbers) > 3 or 0 in numbers):
        raise typer.BadParameter(f"--size: expected PIXELS, HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH, got {text!r}.")
    return numbers * 2 if len(numbers) == 1 else numbers


def image_shape(qmodel: nn.Module, name: str, size: list[int]) -> tuple[int, int, int]:
    """``(C, H, W)`` of what a network takes: of :func:`read_size`, where that is empty of what the model says."""
    own = zoo.preprocess_of(qmodel)
    gray = size[:-2] == [1] or (own is not None and own.channels == "gray")
    pixels = size[-2:] or (own and (own.crop or own.resize))
    if not isinstance(pixels, list | tuple):
        raise DataError(f"{name} does not say of which size its images are: give --size")
    height, width = pixels
    return (size[:-2] or [1 if gray else 3])[0], height, width


def preparation(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a command's options say of the preparation of images."""
    return {n: _value(text) for n, text in options.items() if n in Preprocess.model_fields and text is not None}


def preprocess_of(network: nn.Module, name: str, given: Mapping[str, Any]) -> Preprocess:
    """What ``network`` says of itself, with what is ``given`` laid over it."""
    own = zoo.preprocess_of(network)
    if own is None and not given:
        raise DataError(
            f"{name} does not say how its images are prepared: give --resize, --crop, --mean, --std, as it was trained"
        )
    return Preprocess(**{**(own.model_dump() if own else {}), **given})


def preprocess_for(qmodel: nn.Module, shape: tuple[int, int, int], sized: bool) -> Preprocess:
    """What a network says of itself, or little where it does not, but for images of ``shape`` where ``sized``."""
    preprocess = zoo.preprocess_of(qmodel) or Preprocess(channels="gray" if shape[0] == 1 else "rgb")
    return preprocess.model_copy(update={"resize": shape[1:], "crop": None}) if sized else preprocess


def read_images(data: Path, preprocess: Preprocess, limit: int) -> Tensor:
    """``limit`` images of a folder, evenly spaced."""
    source = batches(data, preprocess=preprocess, batch_size=limit, limit=limit)
    images = [images for images, _ in source]
    for broken in source.broken:
        say(f"left out: {broken.path}: {broken.reason}")
    if not images:
        raise DataError(f"none of the first images of {data} can be read")
    return torch.cat(images)


def read_classes(path: Path | None) -> list[str] | None:
    """Names of a file, one a line; None without a file."""
    if path is None:
        return None
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: expected names of classes as UTF-8 text: {error}") from None
    if not names:
        raise DataError(f"{path}: expected names of classes, one a line, it is empty")
    first: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{path}, line {line}: expected the name of a class, the line is blank: delete it")
        if (other := first.setdefault(name, line)) != line:
            raise DataError(f"{path}, line {line}: {name!r} is the name of line {other} already: name each class once")
    return names


def image_folder(data: Path, preprocess: Preprocess, classes: list[str] | None) -> ImageFolder:
    """The images of ``--data``; says how its class folders are ordered."""
    folder = ImageFolder(data, preprocess, classes)
    if folder.order is not None:
        say(f"class folders {folder.order_in_words}")
    return folder


def check_out(path: Path, force: bool) -> None:
    """A command may take minutes: what is wrong with the file it is to write is said before."""
    check_place(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path}: there is such a file already: add --force to replace it, or choose another")


def state_beside(out: Path, resume: bool, work: str) -> Path:
    """File from which ``work`` that was stopped is resumed; it is there if, and only if, that is asked for."""
    state = out.with_name(f"{out.name}.state")
    if state.exists() != resume:
        there, todo = ("no", "leave out --resume") if resume else ("a", f"add --resume, or delete {state}")
        raise ConfigError(f"{state}: there is {there} {work} to resume: {todo}")
    return state


@contextmanager
def resumable(state: Path) -> Iterator[None]:
    """Say, where the block is stopped, that its work goes on from ``state``."""
    try:
        yield
    except (KeyboardInterrupt, OSError, ConfigError):
        if state.exists():
            say(f"stopped: what is done is in {state}; the same command with --resume goes on from there")
        raise


def check_format(plot: Path) -> None:
    """Likewise with the format of a picture."""
    known = import_extra("report", "matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if plot.suffix[1:] not in known:
        raise typer.BadParameter(
            f"--plot: expected a name that ends in one of .{', .'.join(known)}, got {plot.name!r}."
        )


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_table(table: Any) -> None:
    """As wide as the window; in a file or a pipe there is none to fit into."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    Console(width=width, highlight=False).print(table)


def print_json(data: Any) -> None:
    """Strict JSON: a figure that is infinite or undefined becomes null."""
    print(json_text(data))


def json_text(data: Any) -> str:
    """What :func:`print_json` prints."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _value(text: str) -> Any:
    """``none``, a number, several as in ``0.5,0.5,0.5`` or ``224x320``, or a word; Preprocess checks which it takes."""
    try:
        numbers = strict_json.loads(f"[{text.replace('x', ',')}]")
    except ValueError:
        return None if text == "none" else text
    return numbers[0] if len(numbers) == 1 else numbers
