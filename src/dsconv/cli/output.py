"""Output of the commands: figures on stdout, everything else on stderr."""

import json
import math
import os
import sys
from typing import Any

_quiet = False


def hush(quiet: bool) -> bool:
    """Set whether :func:`say` is ``quiet`` for the command that begins, and return that."""
    global _quiet
    _quiet = quiet
    return quiet


def say(message: str) -> None:
    """Print the activity of a command on stderr, unless it is quiet."""
    if not _quiet:
        warn(message)


def warn(message: str) -> None:
    """Print a message for the user on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_table(table: Any) -> None:
    """Print a table as wide as the window, or without a limit to a file or a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    Console(width=width, highlight=False).print(table)


def print_json(data: Any) -> None:
    """Print strict JSON: an infinite or undefined figure becomes null."""
    print(json_text(data))


def json_text(data: Any) -> str:
    """Return the text that :func:`print_json` prints."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
