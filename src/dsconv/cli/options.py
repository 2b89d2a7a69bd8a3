"""Options that several commands share, with their help texts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dsconv.cli.output import hush
from dsconv.cpu import cores
from dsconv.names import PRESETS, TASKS

MODEL_HELP = (
    "torchvision/NAME, timm/NAME, dsconv/digits_resnet, path/to/model.onnx or path/to/file.py:factory; "
    "arguments of the factory may follow as ?key=value&key=value."
)
WEIGHTS_HELP = (
    "Weights of the float model: a state dictionary (safetensors or torch.save), its pretrained ones, or random ones; "
    "an ONNX file keeps its own."
)
FILE_HELP = f"A file written by dsconv quantize, or a float model: {MODEL_HELP}"
DATA_HELP = "Folder of images: in class folders, listed in a labels.csv (file,class_index), or unlabelled."
UNLABELLED_HELP = "Folder of images; labels are not needed."


def choice(names: Sequence[str], **options: Any) -> Any:
    """Return the option of one of ``names``, with completion; the command validates it with all other arguments."""
    return typer.Option(metavar="|".join(names), autocompletion=lambda: list(names), **options)


Weights = Annotated[str, typer.Option(metavar="FILE|default|random", help=WEIGHTS_HELP)]
_PRESET_HELP = "default: W4A8 for today's processors; paper: the published method, W4A4."
Preset = Annotated[str, choice(PRESETS, help=_PRESET_HELP)]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json|FILE.yaml", help="Settings as JSON or YAML, in place of a preset."),
]
_MODEL_OF_FILE_HELP = "Float model to load FILE into, if FILE does not name it: path/to/file.py:factory."
ModelOfFile = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help=f"{_MODEL_OF_FILE_HELP} --reference does the same."),
]
ModelOrReference = Annotated[
    str | None, typer.Option("--model", "--reference", metavar="MODEL", help=_MODEL_OF_FILE_HELP)
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Float model that FILE was made from, if FILE does not name it; FILE is loaded into it.",
    ),
]
ReferenceToCompare = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Float model that FILE was made from, to compare with. It also serves as --model."
    ),
]
_SIZE_HELP = "Height and width of an image in pixels (one number sets both), in place of the network's own."
Size = Annotated[str | None, typer.Option(metavar="PIXELS|[CHANNELSx]HEIGHTxWIDTH", help=_SIZE_HELP)]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
AnyRange = Annotated[
    bool,
    typer.Option("--any-range", help="Accept images whose values are far outside the range that the network expects."),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=hush, help="Print only warnings and errors on stderr."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help=f"{UNLABELLED_HELP} Without it, noise is used.")]
_CLASSES_HELP = (
    "Names of the classes, one per line, in the order of the network's outputs; without it, class folders are sorted "
    "as numbers if all names are whole numbers, otherwise as text."
)
Classes = Annotated[Path | None, typer.Option(metavar="FILE.txt", help=_CLASSES_HELP)]
_limit = typer.Option(min=1, metavar="IMAGES", help="Use at most this many images, evenly spaced over the folder.")
Limit = Annotated[int, _limit]
LimitOrAll = Annotated[int | None, _limit]
BatchSize = Annotated[int, typer.Option(min=1, metavar="IMAGES", help="Images per batch.")]
Workers = Annotated[int, typer.Option(min=0, metavar="PROCESSES", help="Additional processes that read images.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise that replaces images.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=cores(),
        metavar="THREADS",
        show_default="PyTorch's default",
        help="Number of CPU threads.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Device that runs the networks, as PyTorch names it: cpu, cuda, cuda:1.")
]
_MEASURES = "Measures of outputs"
Task = Annotated[
    str | None,
    choice(
        TASKS,
        show_default="from the shape of the main output",
        rich_help_panel=_MEASURES,
        help="Kind of outputs: logits per image, logits per pixel, images, or others.",
    ),
]
DataRange = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        show_default="range of each image",
        rich_help_panel=_MEASURES,
        help="Value range (maximum minus minimum) of the images that a network outputs, for PSNR and SSIM.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="path/to/file.py:function",
        rich_help_panel=_MEASURES,
        help="Custom distance, a function of the float network's outputs, the quantized network's and the labels; "
        "smaller is better.",
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw a picture: *.png, *.svg, *.pdf.")]

_image = partial(
    typer.Option,
    metavar="NUMBER[,NUMBER,NUMBER]",
    rich_help_panel="Preprocessing of images: each replaces the network's setting; the default applies if it has none",
)
_SIZE = "PIXELS|HEIGHTxWIDTH|none"
Resize = Annotated[
    str | None,
    _image(
        metavar=_SIZE,
        help="First step, in pixels: the shorter side, with the aspect ratio kept; or height and width. Default none.",
    ),
]
Crop = Annotated[
    str | None,
    _image(metavar=_SIZE, help="Second step, in pixels: centre crop, a square or height and width. Default none."),
]
Mean = Annotated[
    str | None,
    _image(
        help="Subtracted, in units of --scale: one for all channels, or one each in the order of --channels. Default 0."
    ),
]
Std = Annotated[str | None, _image(help="Divisor after the subtraction, in the same units and order. Default 1.")]
Scale = Annotated[
    str | None,
    _image(metavar="NUMBER", help="Value of white before --mean is subtracted (black is 0): 1 or 255. Default 1."),
]
Channels = Annotated[
    str | None, _image(metavar="rgb|bgr|gray", help="Channels that the network expects, in this order. Default rgb.")
]
Interpolation = Annotated[
    str | None,
    _image(
        metavar="NAME",
        help="Filter of --resize: nearest, box, bilinear, hamming, bicubic or lanczos. Default bilinear.",
    ),
]
