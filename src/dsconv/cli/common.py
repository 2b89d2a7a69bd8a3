"""What the commands share: options, and how they print. Figures go to stdout, all the rest to stderr."""

import json
import math
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

MODEL_HELP = (
    "torchvision/NAME, timm/NAME, dsconv/digits_resnet or path/to/file.py:factory; "
    "arguments of the factory may follow as ?key=value&key=value."
)
WEIGHTS_HELP = "Of the float model: a state dictionary (safetensors or torch.save), those that come with it, or none."
Weights = Annotated[str, typer.Option(metavar="FILE|default|random", help=WEIGHTS_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_table(table: Any) -> None:
    """As wide as the window; in a file or a pipe there is none to fit into."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    Console(width=width, highlight=False).print(table)


def print_json(data: Any) -> None:
    """Strict JSON: a figure that is infinite or undefined becomes null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
