"""What the commands share: options, checks of arguments, and how they print.

Figures go to stdout, all the rest to stderr. Nothing here imports PyTorch before a network is loaded.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import dsconv
from dsconv import strict_json
from dsconv.cli.mistakes import one_paragraph
from dsconv.config import PRESETS, QuantConfig
from dsconv.cpu import cores
from dsconv.data.preprocess import Preprocess, laid_over
from dsconv.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    ModelError,
    check_extra,
    import_extra,
    usable_device,
)
from dsconv.files import check_place
from dsconv.names import check_model_name, is_registered

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dsconv.data import ImageFolder

MODEL_HELP = (
    "torchvision/NAME, timm/NAME, dsconv/digits_resnet or path/to/file.py:factory; "
    "arguments of the factory may follow as ?key=value&key=value."
)
WEIGHTS_HELP = "Of the float model: a state dictionary (safetensors or torch.save), those that come with it, or none."
FILE_HELP = f"A file that dsconv quantize wrote, or a float model: {MODEL_HELP}"
DATA_HELP = "Images in class folders, or listed in a labels.csv (file,class_index), or unlabelled."
UNLABELLED_HELP = "Folder of images, which need no labels."
Weights = Annotated[str, typer.Option(metavar="FILE|default|random", help=WEIGHTS_HELP)]
_PRESET_HELP = "default: W4A8 for today's processors; paper: the published method, W4A4."
Preset = Annotated[str, typer.Option(metavar="|".join(PRESETS), help=_PRESET_HELP)]
Config = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Settings as JSON, in place of a preset.")]
_MODEL_OF_FILE_HELP = "Float model to load FILE into, where FILE cannot name it: path/to/file.py:factory."
ModelOfFile = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help=f"{_MODEL_OF_FILE_HELP} --reference serves as well."),
]
ModelOrReference = Annotated[
    str | None, typer.Option("--model", "--reference", metavar="MODEL", help=_MODEL_OF_FILE_HELP)
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Float model that FILE was made from, where FILE does not name it; FILE is loaded into it, too.",
    ),
]
ReferenceToCompare = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Float model that FILE was made from, to compare with. Serves as --model."),
]
_SIZE_HELP = "Height and width of an image in pixels (one number: of both), in place of what the network says."
Size = Annotated[str | None, typer.Option(metavar="PIXELS|[CHANNELSx]HEIGHTxWIDTH", help=_SIZE_HELP)]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
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
Data = Annotated[Path | None, typer.Option(metavar="DIR", help=f"{UNLABELLED_HELP} Without it: noise.")]
_CLASSES_HELP = (
    "Names of the classes, one a line, in the order of the network's outputs; without it, class folders are sorted by "
    "their numbers if all names are whole numbers, and else as text."
)
Classes = Annotated[Path | None, typer.Option(metavar="FILE.txt", help=_CLASSES_HELP)]
_limit = typer.Option(min=1, metavar="IMAGES", help="Use this many images at most, evenly spaced over the folder.")
Limit = Annotated[int, _limit]
LimitOrAll = Annotated[int | None, _limit]
BatchSize = Annotated[int, typer.Option(min=1, metavar="IMAGES", help="Images per batch.")]
Workers = Annotated[int, typer.Option(min=0, metavar="PROCESSES", help="Processes that read images beside this one.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise that takes the place of images.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=cores(),
        metavar="THREADS",
        show_default="as many as PyTorch takes",
        help="Threads of the CPU that networks run on.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Where networks run, as PyTorch names it: cpu, cuda, cuda:1.")
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a picture as well: *.png, *.svg, *.pdf.")]

_image = partial(
    typer.Option,
    metavar="NUMBER[,NUMBER,NUMBER]",
    rich_help_panel="Preparation of images: each in place of what the network says; the default where it says nothing",
)
_SIZE = "PIXELS|HEIGHTxWIDTH|none"
Resize = Annotated[
    str | None,
    _image(
        metavar=_SIZE, help="First, in pixels: the shorter side, its ratio kept; or height and width. Default none."
    ),
]
Crop = Annotated[
    str | None, _image(metavar=_SIZE, help="Then, in pixels: the centre, a square or height and width. Default none.")
]
Mean = Annotated[
    str | None,
    _image(
        help="Subtracted, in units of --scale: one for all channels, or each in the order of --channels. Default 0."
    ),
]
Std = Annotated[str | None, _image(help="Divided by after that, in the same units and order. Default 1.")]
Scale = Annotated[
    str | None, _image(metavar="NUMBER", help="Value of white (black is 0) before --mean: 1 or 255. Default 1.")
]
Channels = Annotated[
    str | None, _image(metavar="rgb|bgr|gray", help="Channels that the network reads, in this order. Default rgb.")
]
Interpolation = Annotated[
    str | None,
    _image(
        metavar="NAME",
        help="Filter of --resize: nearest, box, bilinear, hamming, bicubic or lanczos. Default bilinear.",
    ),
]


# Checks of arguments, for Mistakes.check


def is_quantized_file(name: str) -> bool:
    """Whether an argument is a file that ``dsconv quantize`` wrote, or a folder that holds one, and no model."""
    path = Path(name)
    return path.suffix == ".safetensors" or path.is_file() or (path / "model.safetensors").is_file()


def check_file(path: Path, *models: str | None) -> None:
    """Raise what is wrong with a quantized file, as far as its header tells; ``models`` are to load it into."""
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise FileNotFoundError(f"{path}: expected a file written by dsconv, there is none")
    header = _header(path)
    architecture = header.get("architecture")
    if header and not any(models) and not (architecture and is_registered(architecture)):
        raise ModelError(
            f"{path}: does not say how to build the float model that it is loaded into, a {header['model_class']}: "
            "name it with --model, as path/to/file.py:factory"
        )
    for name in models if any(models) else [architecture]:
        if name:
            check_model_name(name)


def check_source(name: str, *models: str | None) -> None:
    """Raise what is wrong with an argument that is a quantized file or a float model."""
    check_file(Path(name), *models) if is_quantized_file(name) else check_model_name(name)


def check_data(path: Path | None) -> None:
    """Raise DataError where a folder of images is none."""
    if path is not None and not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(f"--data: the image folder {path} {what}")


def check_out(force: bool, **paths: Path | None) -> None:
    """Raise what is wrong with the files that a command is to write, by the names of their options."""
    wrong: list[str] = []
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        if (same := seen.setdefault(path.absolute(), option)) != option:
            wrong.append(f"{path}: --{same} and --{option} are one file: choose another for one of them")
            continue
        try:
            check_place(path)
        except OSError as error:
            wrong.append(one_paragraph(error))
            continue
        if path.exists() and not force:
            wrong.append(f"{path}: there is such a file already: add --force to replace it, or choose another")
    if wrong:
        raise OSError("; ".join(wrong))


def read_classes(path: Path | None) -> list[str] | None:
    """Return the names of a file, one a line; None without a file."""
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


def check_plot(plot: Path | None) -> None:
    """Raise what is wrong with the format of a picture, or that nothing is there to draw it."""
    if plot is None:
        return
    known = import_extra("report", "matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if plot.suffix[1:] not in known:
        raise typer.BadParameter(
            f"--plot: expected a name that ends in one of .{', .'.join(known)}, got {plot.name!r}."
        )


def check_extras(extra: str, *packages: str) -> None:
    """Raise MissingExtraError where one of the packages that ``extra`` installs is missing."""
    for package in packages:
        check_extra(extra, package)


def state_beside(out: Path, resume: bool, work: str) -> Path:
    """Return the file from which ``work`` that was stopped is resumed: there is one if, and only if, that is asked."""
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


def read_config(preset: str, path: Path | None) -> QuantConfig:
    """Return the settings of a preset, or of the file that takes its place."""
    if path is None:
        return QuantConfig.preset(preset)
    if preset != "default":
        raise typer.BadParameter("choose one of --preset and --config.")
    try:
        return QuantConfig.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: expected settings as JSON: {error}") from None


def read_size(text: str | None) -> list[int]:
    """Return ``224``, ``224x320`` or ``1x28x28`` as ``[C, H, W]`` without what is not given."""
    numbers = [int(number) for number in re.findall(r"\d+", text or "")]
    if text is not None and ("x".join(map(str, numbers)) != text or len(numbers) > 3 or 0 in numbers):
        raise typer.BadParameter(f"--size: expected PIXELS, HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH, got {text!r}.")
    return numbers * 2 if len(numbers) == 1 else numbers


def read_preparation(options: Mapping[str, Any], *names: str | None, needed: bool = True) -> dict[str, Any]:
    """Return what a command's options say of the preparation of images, as fields of :class:`Preprocess`.

    Args:
        options: of the command, by name.
        names: quantized files and float models that may say how images are prepared, the first one that does counts.
        needed: images are to be prepared.

    Raises:
        ConfigError: an option has an unusable value, or one that does not go with what the first file says.
        DataError: preparation is needed, and neither the options nor any of ``names`` can say it.
    """
    given = _given(options)
    sources = [name for name in names if name]
    known = next((said for name in sources if (said := _said(name)) is not None), None)
    if given:
        laid_over(known if isinstance(known, Preprocess) else None, given)
    elif needed and known is None and sources:
        raise unknown_preparation(sources[0])
    return given


def check_one_preparation(files: list[Path], given: dict[str, Any] | None) -> None:
    """Raise DataError where quantized files that are to see the same images say that these are prepared differently."""
    said = {str(file): known for file in files if isinstance(known := _said(str(file)), Preprocess)}
    prepared = {name: str(laid_over(known, given or {})) for name, known in said.items()}
    (first, expected), *others = prepared.items() if prepared else [("", "")]
    for name, got in others:
        if got != expected:
            raise DataError(
                f"{first} and {name} say that their images are prepared differently ({expected}; {got}): give the "
                "options that are meant for both, or evaluate each by itself"
            )


def check_size(options: Mapping[str, Any], name: str, size: list[int] | None) -> None:
    """Raise DataError where neither the options nor a quantized file say of which size images are."""
    said, given = _said(name), _given(options)
    if said == "later" or size is None:
        return
    with suppress(ConfigError):  # which read_preparation raises
        image_shape(laid_over(said, given) if said or given else None, name, size)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _value(text) for n, text in options.items() if n in Preprocess.model_fields and text is not None}


def unknown_preparation(name: str) -> DataError:
    """Return the one answer of all commands where the preparation of images is needed and nothing states it."""
    return DataError(
        f"{name} does not say how its images are prepared: give --resize, --crop, --mean, --std, --scale or "
        "--channels, as it was trained; what is left out of them has its default"
    )


def _said(name: str) -> Preprocess | Literal["later"] | None:
    """Return how ``name`` says that images are prepared; ``later``: that is known once the network is built."""
    if not is_quantized_file(name) or not (header := _header(Path(name))):
        return "later"
    if header["preprocess"] is not None:
        preprocess: Preprocess = header["preprocess"]
        return preprocess
    return "later" if header["architecture"] and is_registered(header["architecture"]) else None


def _header(path: Path) -> dict[str, Any]:
    """Return what a quantized file says of its network; nothing where it is damaged, of which loading tells more."""
    from safetensors import safe_open

    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            entries = file.metadata() or {}
        said = {name: json.loads(entries[name]) for name in ("model_class", "architecture", "preprocess")}
        if said["preprocess"] is not None:
            said["preprocess"] = Preprocess(**said["preprocess"])
        return said if isinstance(said["architecture"], str | None) else {}
    except Exception:  # of many kinds, each of which loading turns into an error of its own
        return {}


# Work on networks, which imports PyTorch


def begin(threads: int | None = None, device: str = "cpu") -> None:
    """Import PyTorch, and have it use ``threads`` threads.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    with usable_device(device):
        torch.empty(0, dtype=torch.float32, device=device)


def load_file(path: Path, model: str | None, reference: str | None = None) -> "nn.Module":
    """Return the quantized network of a file: loaded into ``model``, else as the file says, else into ``reference``."""
    from dsconv import zoo

    if model:
        return dsconv.load(path, zoo.build(model, weights="random"))
    try:
        return dsconv.load(path)
    except (ModelError, MissingExtraError) as error:
        if reference:
            return dsconv.load(path, zoo.build(reference, weights="random"))
        if isinstance(error, MissingExtraError):
            raise
        raise ModelError(f"{error}; here, name it with --model") from None


def original_of(qmodel: "nn.Module", file: str) -> str:
    """Return the name of the float model that a file says its network was made from."""
    from dsconv.conversion import model_info

    info = model_info(qmodel)
    if info is None or info.architecture is None:
        raise ModelError(f"{file} does not name the float model it was made from: name it with --reference")
    return info.architecture


def preparation_of(
    given: Mapping[str, Any], name: str, *networks: "nn.Module | None", size: list[int] | None = None
) -> Preprocess:
    """Return how images are prepared: as the first of ``networks`` that knows says, with what is ``given`` laid over.

    The ``size`` of :func:`read_size`, where it is given, takes the place of resize and crop.

    Raises:
        DataError: nothing is given, and none of them knows.
    """
    from dsconv import zoo

    said = (zoo.preprocess_of(network) for network in networks if network is not None)
    own = next((found for found in said if found is not None), None)
    if own is None and not given:
        raise unknown_preparation(name)
    return laid_over(laid_over(own, given), {"resize": tuple(size[-2:]), "crop": None} if size else {})


def image_shape(preprocess: Preprocess | None, name: str, size: list[int]) -> tuple[int, int, int]:
    """Return ``(C, H, W)`` of what a network takes: of :func:`read_size`, else of how images are prepared."""
    gray = size[:-2] == [1] or (preprocess is not None and preprocess.channels == "gray")
    pixels = size[-2:] or (preprocess and (preprocess.crop or preprocess.resize))
    if not isinstance(pixels, list | tuple):
        raise DataError(f"{name} does not say of which size its images are: give --size")
    height, width = pixels
    return (size[:-2] or [1 if gray else 3])[0], height, width


def read_images(data: Path, preprocess: Preprocess, limit: int) -> "Tensor":
    """Return ``limit`` images of a folder, evenly spaced."""
    import torch

    from dsconv.data import batches

    source = batches(data, preprocess=preprocess, batch_size=limit, limit=limit)
    images = [images for images, _ in source]
    for broken in source.broken:
        say(f"left out: {broken.path}: {broken.reason}")
    if not images:
        raise DataError(f"none of the first images of {data} can be read")
    return torch.cat(images)


def image_folder(data: Path, preprocess: Preprocess, classes: list[str] | None) -> "ImageFolder":
    """Return the images of ``--data``, and say how its class folders are ordered."""
    from dsconv.data import ImageFolder

    folder = ImageFolder(data, preprocess, classes)
    if folder.order is not None:
        say(f"class folders {folder.order_in_words}")
    return folder


# Output


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def say_preparation(preprocess: Preprocess, data: Path | None) -> None:
    """Say how images, or the noise that takes their place, are prepared."""
    say(f"{'noise' if data is None else f'images of {data}'}: {preprocess}")


def print_table(table: Any) -> None:
    """As wide as the window; in a file or a pipe there is none to fit into."""
    from rich.console import Console

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
        # A number may begin with its point, as in .5, which JSON does not know.
        numbers = strict_json.loads(f"[{re.sub(r'(?<![0-9])[.](?=[0-9])', '0.', text).replace('x', ',')}]")
    except ValueError:
        return None if text == "none" else text
    return numbers[0] if len(numbers) == 1 else numbers
