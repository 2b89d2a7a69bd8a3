"""FlatBuffers with tables and structs declared as classes, field by field in the order of the schema."""

import struct
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, get_type_hints

import flatbuffers
import numpy as np
from flatbuffers import number_types as numbers

_SCALARS: dict[str, Any] = {
    "bool": numbers.BoolFlags,
    "byte": numbers.Int8Flags,
    "ubyte": numbers.Uint8Flags,
    "int": numbers.Int32Flags,
    "long": numbers.Int64Flags,
    "ulong": numbers.Uint64Flags,
    "float": numbers.Float32Flags,
    "double": numbers.Float64Flags,
}
"""FlatBuffers' names of the number types, for the annotations of the classes."""


class Scalar(NamedTuple):
    """Type of a number, as an annotation: its name in the schema."""

    name: str


class Struct:
    """Base of dataclasses of numbers, laid out as in C; annotations name their types."""

    @classmethod
    def layout(cls) -> tuple[struct.Struct, int]:
        """Return the packing of an instance, little-endian, and its alignment."""
        of: Any = cls
        return _layout(of)

    def packed(self) -> bytes:
        """Return an instance as bytes."""
        of: Any = type(self)
        return self.layout()[0].pack(*(getattr(self, name) for name in _kinds(of)))


class Table:
    """Base of dataclasses with numbers, strings, structs, tables, or sequences of these; None is omitted."""

    union: ClassVar[tuple[type["Table"], ...]] = ()
    """Possible tables of a field of the type ``Table``, in the order of the schema."""

    def written(self, builder: flatbuffers.Builder) -> int:
        """Write the table, and return its offset."""
        of: Any = type(self)
        kinds = _kinds(of)
        given = {name: getattr(self, name) for name in kinds}
        # A table comes after everything that it only points to.
        behind = {
            name: _behind(builder, kinds[name], value)
            for name, value in given.items()
            if value is not None and not isinstance(kinds[name], Scalar) and not isinstance(value, Struct)
        }
        slots = sum(1 + (kind is Table) for kind in kinds.values())
        builder.StartObject(slots)
        slot = 0
        for name, kind in kinds.items():
            value = given[name]
            if kind is Table:
                builder.PrependUint8Slot(slot, 0 if value is None else 1 + self.union.index(type(value)), 0)
                slot += 1
            if isinstance(value, Struct):
                builder.PrependStructSlot(slot, _inline(builder, value), 0)
            elif isinstance(kind, Scalar):
                builder.PrependSlot(_SCALARS[kind.name], slot, value, _default(of, name))
            elif value is not None:
                builder.PrependUOffsetTRelativeSlot(slot, behind[name], 0)
            slot += 1
        return int(builder.EndObject())


def encoded(table: Table, identifier: bytes) -> bytes:
    """Return a buffer whose root is ``table``; the ``identifier`` of a file has 4 bytes."""
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(table.written(builder), file_identifier=identifier)
    return bytes(builder.Output())


@cache
def _kinds(of: Any) -> dict[str, Any]:
    """Return the types of the fields: a Scalar or a class, or ``[Scalar]`` or ``[class]`` for sequences."""
    hints, found = get_type_hints(of, include_extras=True), {}
    for field in fields(of):
        hint = hints[field.name]
        found[field.name] = _kind(hint)
    return found


def _kind(hint: Any) -> Any:
    if hasattr(hint, "__metadata__"):
        return hint.__metadata__[0]
    arguments = [a for a in getattr(hint, "__args__", ()) if a is not type(None)]
    if getattr(hint, "__origin__", None) is Sequence:
        return [_kind(arguments[0])]
    return _kind(arguments[0]) if arguments else hint


@cache
def _layout(of: Any) -> tuple[struct.Struct, int]:
    text, size, widest = "<", 0, 1
    for kind in _kinds(of).values():
        flags = _SCALARS[kind.name]
        gap = -size % flags.bytewidth
        text += f"{gap}x" * bool(gap) + flags.packer_type.format[-1:]
        size += gap + flags.bytewidth
        widest = max(widest, flags.bytewidth)
    gap = -size % widest
    return struct.Struct(text + f"{gap}x" * bool(gap)), widest


def _default(of: type, name: str) -> Any:
    (default,) = [field.default for field in fields(of) if field.name == name]
    return default if isinstance(default, bool | int | float) else 0


def _inline(builder: flatbuffers.Builder, value: Struct) -> int:
    layout, alignment = value.layout()
    builder.Prep(alignment, layout.size)
    builder.head -= layout.size
    builder.Bytes[builder.head : builder.head + layout.size] = value.packed()
    return int(builder.Offset())


def _behind(builder: flatbuffers.Builder, kind: Any, value: Any) -> int:
    if isinstance(value, Table):
        return value.written(builder)
    if isinstance(value, str):
        return int(builder.CreateString(value))
    (item,) = kind
    if isinstance(item, Scalar):
        return int(builder.CreateNumpyVector(np.asarray(value, _SCALARS[item.name].packer_type.format)))
    if issubclass(item, Struct):
        layout, alignment = item.layout()
        packed = b"".join(one.packed() for one in value)
        builder.StartVector(layout.size, len(value), alignment)
        builder.head -= len(packed)
        builder.Bytes[builder.head : builder.head + len(packed)] = packed
        return int(builder.EndVector())
    places = [_behind(builder, item, one) for one in value]
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return int(builder.EndVector())
