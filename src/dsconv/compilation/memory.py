"""Placement of buffers in one block of memory."""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(eq=False)
class Buffer:
    """Memory that is needed from step ``first`` to step ``last``, inclusive.

    Attributes:
        size: in bytes, a multiple of 64.
        offset: set by :func:`place`.
    """

    size: int
    first: int
    last: int
    offset: int = 0

    def use(self, step: int) -> None:
        """Record that a step needs it."""
        self.first, self.last = min(self.first, step), max(self.last, step)

    def meets(self, other: "Buffer") -> bool:
        """Return whether there is a step that needs both."""
        return self.first <= other.last and other.first <= self.last


def place(buffers: Sequence[Buffer]) -> int:
    """Set the offset of each buffer such that none overlaps another one while both are needed; return the end.

    The largest come first, each at the lowest offset at which it fits: "Greedy by Size for Offset Calculation" of
    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020.

    >>> buffers = [Buffer(64, 0, 1), Buffer(128, 1, 2), Buffer(64, 2, 3)]
    >>> place(buffers), [buffer.offset for buffer in buffers]
    (192, [128, 0, 128])
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        offset = 0
        for other in sorted((b for b in placed if b.meets(buffer)), key=lambda b: b.offset):
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, other.offset + other.size)
        buffer.offset = offset
        placed.append(buffer)
    return max((b.offset + b.size for b in buffers), default=0)
