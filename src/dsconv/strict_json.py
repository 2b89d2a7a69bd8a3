"""Strict parsing of untrusted JSON: input that Python's parser accepts or fails on otherwise raises ValueError."""

import json
import math
import re
from typing import Any

_DEEPEST = 64
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")


def loads(text: str | bytes, *, finite: bool = True) -> Any:
    """Return the value of a JSON text, UTF-8 if it is bytes; with NaN and infinities unless ``finite``.

    Raises:
        ValueError: it is not JSON, or it has a duplicate name, NaN or infinity, more than 64 levels, a number too large
            for Python, or invalid characters.

    >>> loads('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: the name 'a' occurs twice
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if _depth(text) > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    numbers: dict[str, Any] = {"parse_constant": _refused, "parse_float": _finite} if finite else {}
    value = json.loads(text, object_pairs_hook=_without_duplicates, **numbers)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it contains half a character (a lone surrogate)") from None
    return value


def finite_or_none(value: float | None) -> float | None:
    """Return a figure for JSON: an infinite or undefined one becomes None."""
    return value if value is None or math.isfinite(value) else None


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:80]!r} occurs twice")
        found[name] = value
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
