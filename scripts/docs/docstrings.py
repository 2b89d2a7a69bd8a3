"""Extension of griffe that converts docstrings, which are written for ``help()`` and doctest, to Markdown."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?m)^( *)>>> .*\n?(?:^(?! *$).*\n?)*")
_TABLE = re.compile(r"(?m)^( *)==+  +=[= ]+\n(?:.*\n)*? *==+  +=[= ]+\n(?:.*\n)*? *==+  +=[= ]+$")
_ROLE = re.compile(r":(?:func|class|mod|meth|attr):(`[^`]+`)")


class Markdown(griffe.Extension):
    """Fences examples and tables, and makes plain code of roles."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = _ROLE.sub(r"\1", obj.docstring.value.rstrip() + "\n")
            text = _EXAMPLE.sub(lambda found: _fenced("pycon", found), text)
            obj.docstring.value = _TABLE.sub(lambda found: _fenced("text", found), text)


def _fenced(language: str, found: re.Match[str]) -> str:
    indent, body = found[1], found[0].rstrip("\n")
    return f"{indent}```{language}\n{body}\n{indent}```\n"
