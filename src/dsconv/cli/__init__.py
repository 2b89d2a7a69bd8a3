"""Command line. Each command is a module here: it reads its options, calls the library and prints."""

import io
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import dsconv
from dsconv import stopping
from dsconv.cli.adapt import adapt
from dsconv.cli.bench import bench
from dsconv.cli.calibrate import calibrate
from dsconv.cli.compile import compile
from dsconv.cli.demo import demo
from dsconv.cli.evaluate import evaluate
from dsconv.cli.export import export
from dsconv.cli.inspect import inspect
from dsconv.cli.mistakes import Command, one_paragraph
from dsconv.cli.optimize import optimize
from dsconv.cli.profile import profile
from dsconv.cli.quantize import quantize
from dsconv.cli.report import report
from dsconv.cli.search import search
from dsconv.cli.sensitivity import sensitivity
from dsconv.cli.tradeoff import tradeoff
from dsconv.errors import DSConvError

app = typer.Typer(
    name="dsconv",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXAMPLES: dict[Callable[..., None], str] = {
    optimize: """dsconv optimize torchvision/resnet50 --data photos --out resnet50.safetensors

dsconv optimize torchvision/resnet50 --data imagenet/val --top1-drop 1 --time-limit 1h --out resnet50.safetensors

dsconv optimize net.py:make --weights net.pt --crop 224 --data photos --ms 5 --out net.safetensors""",
    quantize: """dsconv quantize torchvision/resnet50 --out resnet50.safetensors

dsconv quantize net.py:make --weights net.pt --preset paper --block-size 64 --out net.safetensors

dsconv quantize timm/resnet18 --weight-bits 3 --override 'layer4.*=weight_bits:2' --out r18.safetensors""",
    evaluate: """dsconv evaluate resnet50.safetensors --data imagenet/val

dsconv evaluate resnet50.safetensors --reference torchvision/resnet50 --data photos --limit 1000

dsconv evaluate net.py:make --weights net.pt --data images --resize 256 --crop 224""",
    tradeoff: """dsconv tradeoff w4.safetensors w3.safetensors mixed.safetensors

dsconv tradeoff w4.safetensors w3.safetensors --data imagenet/val --time --plot pareto.png --out figures.csv""",
    bench: """dsconv bench torchvision/resnet50 --plot bench.png

dsconv bench resnet50.safetensors --batch-size 1,8 --threads 1,2 --out bench.json

dsconv bench torchvision/resnet18 torchvision/vgg16 --weights random --preset w4a4 --against onnxruntime,openvino""",
    profile: "dsconv profile resnet50.safetensors --batch-size 8 --threads 2",
    compile: """dsconv compile resnet50.safetensors --out resnet50.dsconv

dsconv compile torchvision/fcn_resnet50 --size 320x480 --size 480x320 --out fcn.dsconv""",
    export: """dsconv export resnet50.safetensors --out resnet50.onnx

dsconv export resnet50.safetensors --style int8 --data photos --out resnet50.int8.onnx""",
    inspect: "dsconv inspect resnet50.safetensors",
    report: """dsconv report resnet50.safetensors --out resnet50.html

dsconv report resnet50.safetensors --reference torchvision/resnet50 --data photos --out resnet50.html""",
    sensitivity: """dsconv sensitivity torchvision/squeezenet1_1 --preset w4a4 --plot layers.png

dsconv sensitivity squeezenet.safetensors --data photos""",
    search: """dsconv search torchvision/squeezenet1_1 --preset w4a4 --effective-bits 4.7 --out mixed.json

dsconv search net.py:make --weights net.pt --crop 224 --data photos --bytes 8e5 --plot pareto.png --out mixed.json""",
    calibrate: """dsconv calibrate squeezenet.safetensors --data photos --out calibrated.safetensors

dsconv calibrate torchvision/squeezenet1_1 --config mixed.json --data photos --limit 256 --out mixed.safetensors""",
    adapt: """dsconv adapt calibrated.safetensors --data photos --out adapted.safetensors --log adapted.csv

torchrun --nproc-per-node 2 -m dsconv adapt net.safetensors --data photos --device cuda --out adapted.safetensors""",
    demo: "dsconv demo --out demo-out",
}
for command, examples in _EXAMPLES.items():
    app.command(cls=Command, epilog=f"Examples:\n\n{examples}")(command)


@app.command(cls=Command, hidden=True)
@wraps(tradeoff, assigned=("__annotations__",))
def compare(**options: Any) -> None:
    """Run dsconv tradeoff under its former name, for one version."""
    print("dsconv compare is deprecated: use dsconv tradeoff, which does the same", file=sys.stderr)
    tradeoff(**options)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsconv {dsconv.__version__}")
        raise typer.Exit


@app.callback(epilog="Try it: dsconv demo. Help on a command: dsconv quantize --help.")
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run trained convolutional networks in low-bit integers, without labelled data."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 fixable error, 2 wrong usage, 130 interrupted, 143 terminated."""
    warnings.showwarning = lambda message, *_: print(f"warning: {one_paragraph(message)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files and layers may contain characters that the encoding of the terminal lacks.
            stream.reconfigure(errors="backslashreplace")
    with stopping.stoppable():
        try:
            app()
        except BaseException as error:
            sys.exit(_exit(error))


def _exit(error: BaseException) -> int | str | None:
    """Return the argument of ``sys.exit`` for the exception that ended a command."""
    failed = not isinstance(error, SystemExit) or bool(error.code)
    # Interrupted imports may raise any error.
    if failed and (code := stopping.exit_code()):
        return code
    match error:
        case SystemExit():
            return error.code
        case DSConvError() | OSError():
            return f"error: {one_paragraph(error)}"
        case MemoryError():
            return "error: there is not enough memory: use a smaller batch, smaller images, or a smaller network"
        case KeyboardInterrupt():
            return 130
    traceback.print_exception(error)
    if place := _failed_forward(error):
        reason = one_paragraph(error) or type(error).__name__
        return f"error: the network itself failed, in {place}: {reason}: check that it runs on these inputs"
    return "error: this is a bug in dsconv: please report it with the lines above"


def _failed_forward(error: BaseException) -> str | None:
    """Return the file and line of a network's own ``forward`` in which an error was raised; None outside of one."""
    own = [Path(module.__file__ or "").parent for name in ("dsconv", "torch") if (module := sys.modules.get(name))]
    frames = reversed(traceback.extract_tb(error.__traceback__))
    others = (f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in own))
    place = next((f for f in others if f.name == "forward"), None)
    return place and f"{place.filename}:{place.lineno}"
