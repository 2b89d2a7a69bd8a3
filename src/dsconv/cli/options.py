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
    "Of the float model: a state dictionary (safetensors or torch.save), those that come with it, or none; "
    "an ONNX file has its own then."
)
FILE_HELP = f"A file that dsconv quantize wrote, or a float model: {MODEL_HELP}"
DATA_HELP = "Images in class folders, or listed in a labels.csv (file,class_index), or unlabelled."
UNLABELLED_HELP = "Folder of images, which need no labels."


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
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=hush, help="Print nothing on stderr but warnings and errors."),
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
_MEASURES = "Measures of outputs"
Task = Annotated[
    str | None,
    choice(
        TASKS,
        show_default="told by the shape of the main output",
        rich_help_panel=_MEASURES,
        help="Kind of the outputs: logits of an image, logits of each pixel, images, or others.",
    ),
]
DataRange = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        show_default="that of each image",
        rich_help_panel=_MEASURES,
        help="Of images that a network makes: their largest value less their least, for PSNR and SSIM.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="path/to/file.py:function",
        rich_help_panel=_MEASURES,
        help="A distance of your own, of the outputs of the float network, those of the quantized one, and labels; "
        "smaller is better.",
    ),
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
