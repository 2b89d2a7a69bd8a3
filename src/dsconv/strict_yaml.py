"""Strict parsing of users' YAML, restricted to the values of JSON: anything else is a ValueError with its line."""

import math
from typing import Any

from dsconv.errors import import_extra

_DEEPEST = 64
_PLAIN = (str, int, float, bool, type(None))


def loads(text: str | bytes) -> Any:
    """Return the value of a YAML text, UTF-8 if it is bytes, read by PyYAML's safe loader.

    Raises:
        ValueError: it is not YAML, or it has a duplicate name, a name that is not a string, an alias, a tag, a date,
            NaN or infinity, more than 64 levels, or several documents.
        MissingExtraError: PyYAML is not installed: ``pip install 'dsconv[yaml]'``.

    >>> loads("weight_bits: 3\\nlinear: float\\noverrides: {'layer4.*': {weight_bits: 2}}")
    {'weight_bits': 3, 'linear': 'float', 'overrides': {'layer4.*': {'weight_bits': 2}}}
    >>> loads("weight_bits: 3\\nweight_bits: 4")
    Traceback (most recent call last):
    ...
    ValueError: line 2: the name 'weight_bits' occurs twice
    """
    yaml = import_extra("yaml", "yaml")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        # Checked on events, before any alias is expanded: aliases may represent any number of copies.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise _wrong(event, f"it is nested deeper than {_DEEPEST} levels")
            if isinstance(event, yaml.AliasEvent):
                raise _wrong(event, f"*{event.anchor} is an alias, which is not supported: put a text with * in quotes")
            if getattr(event, "tag", None) is not None:
                raise _wrong(event, f"the tag {event.tag} is not supported: leave it out")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return None if node is None else _value(loader, node)
    except yaml.YAMLError as error:
        if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
            raise ValueError(str(error)) from None
        said = ": ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"line {error.problem_mark.line + 1}: {said}") from None


def _value(loader: Any, node: Any) -> Any:
    if node.id == "sequence":
        return [_value(loader, item) for item in node.value]
    if node.id == "mapping":
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = loader.construct_object(key) if key.id == "scalar" else None
            if not isinstance(name, str):
                shown = key.value if key.id == "scalar" else f"a {key.id}"
                raise _wrong(key, f"expected a name, got {shown}: put it in quotes")
            if name in found:
                raise _wrong(key, f"the name {name[:80]!r} occurs twice")
            found[name] = _value(loader, value)
        return found
    value = loader.construct_object(node)
    if not isinstance(value, _PLAIN):
        raise _wrong(node, f"{node.value} is a {type(value).__name__}, which JSON does not have: put it in quotes")
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(node, f"{node.value} is not a number in JSON")
    return value


def _wrong(place: Any, what: str) -> ValueError:
    return ValueError(f"line {place.start_mark.line + 1}: {what}")
