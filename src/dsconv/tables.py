"""Tables as text."""

from typing import Any


def as_text(table: Any) -> str:
    """What rich prints of ``table``, 140 columns wide and without colours.

    >>> as_text("no table, but as wide").rstrip()
    'no table, but as wide'
    """
    from rich.console import Console

    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
