"""Hook of MkDocs that generates parts of docs/commands.md and docs/reference.md from the code at every build."""

import importlib
import inspect
import re
import subprocess
import sys
from typing import Any

from dsconv import cli

_MARK = re.compile(r"<!-- (commands|names of (\S+)) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its marks replaced by the generated parts."""
    return _MARK.sub(lambda mark: names(mark[2]) if mark[2] else commands(), markdown)


def commands() -> str:
    """Return every command with its arguments, options and examples, as typer documents them."""
    call = [sys.executable, "-m", "typer", "dsconv.cli", "utils", "docs", "--name", "dsconv"]
    text = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    text = text[text.index("\n## ") :]
    for command in cli.app.registered_commands:
        if command.hidden:
            text = re.sub(rf"(?s)\n## `dsconv {command.callback.__name__}`.*?(?=\n## |\Z)", "", text)
    # Typer does not escape these; Markdown would set *.png, *.svg in italics and join examples.
    text = re.sub(r"(?m)^(\* `[^`]+`:)(.*)$", lambda line: line[1] + line[2].replace("*", r"\*"), text)
    return re.sub(r"(?m)^(dsconv|torchrun) .*$", r"```console\n\g<0>\n```", text)


def names(module: str) -> str:
    """Return directives of mkdocstrings for the public names of a module: their definitions, under these names."""
    source = importlib.import_module(module)
    blocks = []
    for name in source.__all__:
        thing = getattr(source, name)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            where = f"{thing.__module__}.{thing.__qualname__}"
            blocks.append(f"::: {where}\n    options:\n      heading: {module}.{name}\n      toc_label: {name}\n")
    return "\n".join(blocks)
