"""``dsconv compile``: writes a quantized network as a file that runs without PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dsconv
from dsconv.cli import options as opt
from dsconv.cli.checks import check_out, check_own_settings, check_source, is_quantized_file, read_classes, read_config
from dsconv.cli.mistakes import Mistakes
from dsconv.cli.networks import begin, load_or_quantize
from dsconv.cli.output import print_json, print_table, say
from dsconv.cli.preparation import check_size, image_shape, read_size
from dsconv.names import check_weights

if TYPE_CHECKING:
    from dsconv.compilation.saving.writing import Saved

_SIZES_HELP = (
    "Height and width of images, in pixels: the file accepts these, and other sizes that need the same steps. Repeat "
    "the option if the steps depend on the size. Without it, the size of the network's preprocessing is used."
)
_CLASSES_HELP = "Names of the classes, one per line, in the order of the network's outputs, to store in the file."
_OTHER_SIZES_HELP = (
    "Whether the file accepts images of other sizes, if these need the same steps. The check takes time."
)
_FAST_START_HELP = (
    "Write weights in the layout of the kernels: a larger file, which opens several times faster and which processes "
    "share."
)


def compile(
    model_or_file: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help=opt.FILE_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write.", show_default=False)],
    size: Annotated[
        list[str] | None, typer.Option(metavar="PIXELS|[CHANNELSx]HEIGHTxWIDTH", help=_SIZES_HELP, show_default=False)
    ] = None,
    classes: Annotated[Path | None, typer.Option(metavar="FILE.txt", help=_CLASSES_HELP)] = None,
    fast_start: Annotated[bool, typer.Option("--fast-start", help=_FAST_START_HELP)] = False,
    other_sizes: Annotated[bool, typer.Option(help=_OTHER_SIZES_HELP)] = True,
    weights: opt.Weights = "default",
    preset: opt.Preset = "default",
    config: opt.Config = None,
    model: opt.ModelOrReference = None,
    threads: opt.Threads = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Write a network as a file that runs without PyTorch: by dsconv_runtime in Python, by libdsconv in C."""
    mistakes = Mistakes()
    is_file = is_quantized_file(model_or_file)
    given: list[str | None] = [*size] if size else [None]
    shapes = [mistakes.check(read_size, text) for text in given]
    settings = mistakes.check(read_config, preset, config)
    names = mistakes.check(read_classes, classes)
    mistakes.check(check_own_settings, [model_or_file], preset, config, weights)
    mistakes.check(check_source, model_or_file, model if is_file else None)
    for shape in shapes:
        mistakes.check(check_size, {}, model_or_file, shape)
    mistakes.check(check_weights, weights)
    mistakes.check(check_out, force, out=out)
    mistakes.end()

    begin(threads)
    import torch

    from dsconv import zoo

    qmodel = load_or_quantize(model_or_file, settings, weights=weights, model=model)
    preprocess = zoo.preprocess_of(qmodel)
    images = [image_shape(preprocess, model_or_file, shape) for shape in shapes]
    examples = [torch.zeros(1, *image, dtype=torch.float32, device="cpu") for image in images]
    say("compiling")
    fast = dsconv.compile(qmodel, examples[0])
    saved = fast.save(out, sizes=examples[1:], classes=names, fast_start=fast_start, other_sizes=other_sizes)
    if as_json:
        plan = {"steps": len(fast.plan.steps), "memory_bytes": fast.plan.memory_bytes}
        prepared = None if preprocess is None else preprocess.model_dump(mode="json")
        taken = {"sizes": images, "size_step": saved.size_step}
        print_json({"file": str(out), "file_bytes": saved.bytes, **taken, "preprocess": prepared, **plan})
        return
    print_table(fast.plan)
    sizes = ", ".join("x".join(map(str, image)) for image in images)
    print(f"Wrote {out}: {saved.bytes:,} bytes, for batches of any size and images of {sizes}; {_others(saved)}.")


def _others(saved: "Saved") -> str:
    """Return a description of the other image sizes that a file accepts."""
    match saved.size_step:
        case 0:
            return f"no other size, since {saved.why_fixed}"
        case 1:
            return "and of other heights and widths"
        case step:
            return f"and of heights and widths that differ from these by multiples of {step}"
