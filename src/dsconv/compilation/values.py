"""Tensors of a program.

An image tensor ``(N, C, H, W)``, ``(N, C)`` or ``(N, C, D, H, W)`` is a :class:`Value`. It exists as float32 with
contiguous channels, if that is required, and quantized in every :class:`Format` that a layer requires; the step that
makes it writes all of them. Concatenated tensors are written into the memory of the whole, and slices of channels are
read in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx


class Seen(NamedTuple):
    """Tensor of a node as images: channels, height and width, and the channel dimension.

    A tensor ``(N * H * W, C)`` has the pixels of all images as rows.
    """

    size: tuple[int, int, int]
    dim: int


class Format(NamedTuple):
    """Quantization of a layer's input: blocks of ``block_size`` over ``depth`` values of each of the groups."""

    depth: int
    block_size: int
    groups: int
    wide: bool
    bits: int
    sign: str
    shift: bool


@dataclass(eq=False)
class Quantized:
    """Value in one format, with a border of zeros around each frame, as wide as required by any layer that reads it."""

    format: Format
    size: tuple[int, int]
    frames: int = 1
    pad: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Value:
    """Image tensor.

    Attributes:
        size: channels, height and width; the frames of a volume are stacked vertically.
        dim: the channel dimension of its node's tensor.
        frames: number of frames.
        direct: whether the step that makes it can also quantize it.
        in_float: whether it is required in float32.
        outside: whether it is outside the program's memory: an input, an output, or made by PyTorch.
        quantized: its quantized forms in every required format.
        pieces: the values of which it is a concatenation.
        home: the value whose memory contains it, from channel ``first`` on: it is one of its pieces or views.
        views: values that are slices of its channels.
        parts: quantized concatenations that contain it, and the first channel in each.
    """

    node: fx.Node
    size: tuple[int, int, int]
    dim: int = 1
    frames: int = 1
    direct: bool = False
    in_float: bool = False
    outside: bool = False
    quantized: dict[Format, Quantized] = field(default_factory=dict)
    pieces: tuple["Value", ...] = ()
    home: "Value | None" = None
    first: int = 0
    views: list["Value"] = field(default_factory=list)
    parts: list[tuple[Quantized, int]] = field(default_factory=list)

    def want(self, wanted: Format, pad: tuple[int, int] = (0, 0)) -> Quantized:
        """Return its quantized form in that format, with a border of at least ``pad``."""
        if self.home is not None and self.home.size == self.size:
            return self.home.want(wanted, pad)
        _, height, width = self.size
        made = Quantized(wanted, (height // self.frames, width), self.frames)
        found = self.quantized.setdefault(wanted, made)
        found.pad = (max(found.pad[0], pad[0]), max(found.pad[1], pad[1]))
        return found

    def place(self) -> tuple["Value", int]:
        """Return the value whose memory contains it, and its first channel there."""
        if self.home is None:
            return self, 0
        root, first = self.home.place()
        return root, first + self.first

    def root(self) -> "Value":
        """Return the value whose memory contains it."""
        return self.place()[0]

    def places(self) -> list[tuple["Value", int]]:
        """Return each piece, and its first channel in the whole."""
        ends = [0]
        for piece in self.pieces:
            ends.append(ends[-1] + piece.size[0])
        return list(zip(self.pieces, ends, strict=False))

    def parts_are_blocks(self, wanted: Format) -> bool:
        """Return whether each piece, as it is made, can be quantized separately."""
        alone = len(set(self.pieces)) == len(self.pieces)
        whole = all(first % wanted.block_size == 0 for _, first in self.places())
        return alone and whole and wanted.groups == 1 and all(piece.direct for piece in self.pieces)

    def index_of(self, part: Sequence["Value"]) -> int | None:
        """Return the index at which the values ``part`` are consecutive pieces of it."""
        for at in range(len(self.pieces) - len(part) + 1):
            if all(a is b for a, b in zip(self.pieces[at:], part, strict=False)):
                return at
        return None
