"""Tables as text and as HTML: results describe their table once, in ``__rich__``."""

from html import escape
from typing import Any


class Printed:
    """Result that prints as the table of its ``__rich__``: as text, and in notebooks as HTML.

    >>> class Sizes(Printed):
    ...     def __rich__(self):
    ...         from rich.table import Table
    ...         table = Table("layer", "kB")
    ...         table.add_row("a < b", "1.5")
    ...         return table
    >>> "a < b" in str(Sizes()), "<td>a &lt; b</td>" in Sizes()._repr_html_()
    (True, True)
    """

    def __rich__(self) -> Any:
        """Return an object for rich: a table, a text, or a group of these."""
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def as_text(table: Any) -> str:
    """Return the text that rich prints for ``table``, 140 columns wide and without colours.

    >>> as_text("no table, but as wide").rstrip()
    'no table, but as wide'
    """
    from rich.console import Console

    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def as_html(shown: Any) -> str:
    """Return a table, a text, or a group of these as HTML elements, with escaped text.

    >>> as_html("no [bold]table[/bold], 1 < 2")
    '<p>no table, 1 &lt; 2</p>'
    """
    from rich.console import Group
    from rich.table import Table

    if isinstance(shown, Group):
        return "\n".join(map(as_html, shown.renderables))
    if not isinstance(shown, Table):
        return f"<p>{_words(shown)}</p>"
    lines = []
    if shown.title:
        lines.append(f"<p><strong>{_words(shown.title)}</strong></p>")
    aligned = [f' style="text-align: {column.justify}"' * (column.justify != "left") for column in shown.columns]
    cells = zip(aligned, (column.header for column in shown.columns), strict=True)
    lines += ["<table>", "<thead>", _row("th", cells), "</thead>", "<tbody>"]
    for row, values in zip(shown.rows, zip(*(column.cells for column in shown.columns), strict=True), strict=True):
        lines.append(_row("td", zip(aligned, values, strict=True), str(row.style or "")))
    lines += ["</tbody>", "</table>"]
    if shown.caption:
        lines.append(f"<p>{_words(shown.caption)}</p>")
    return "\n".join(lines)


# Notebook equivalents of rich's row styles, for light and dark backgrounds.
_STYLES = {"bold": "font-weight: bold", "italic": "font-style: italic", "yellow": "opacity: 0.6"}


def _row(element: str, cells: Any, style: str = "") -> str:
    shown = f' style="{_STYLES[style]}"' if style in _STYLES else ""
    return f"<tr{shown}>{''.join(f'<{element}{aligned}>{_words(cell)}</{element}>' for aligned, cell in cells)}</tr>"


def _words(text: Any) -> str:
    """Return a rich text, or markup, as HTML."""
    from rich.text import Text

    plain = text.plain if isinstance(text, Text) else Text.from_markup(text).plain
    return escape(plain).replace("\n", "<br>")
