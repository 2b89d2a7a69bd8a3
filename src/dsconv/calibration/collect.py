"""Statistics of a layer for calibration: the moments of its quantized inputs and of the float network's outputs.

A layer's weight has the layout ``(G, R, d)``: G groups, R outputs per group, and the d input values of an output, in
the order in which blocks run: tap by tap with the channels of a tap contiguous; or channel by channel for flattened
blocks.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsconv.backends import quantized
from dsconv.layers import DSLayer
from dsconv.numerics.rounding import Blocks, quadratic

# Number of inputs processed at a time.
_CHUNK = 1 << 22


def blocks_of(layer: DSLayer) -> Blocks:
    """Return how the input values of an output of ``layer`` are divided into blocks."""
    reads, channels = layer.vqk[0].numel(), layer.vqk.shape[1]
    width = reads if layer.config.blocks == "flat" else channels
    return Blocks(reads // width, width, min(width, layer.config.block_size))


def as_rows(layer: DSLayer, value: Tensor) -> Tensor:
    """Return a weight ``(O, C/groups, *K)``, or a KDS-sized tensor, as ``(G, R, d)`` or ``(G, R, blocks)``."""
    tapwise = value if layer.config.blocks == "flat" or value.dim() == 2 else value.flatten(2).mT
    return tapwise.reshape(layer.groups, len(value) // layer.groups, -1)


def from_rows(layer: DSLayer, rows: Tensor, shape: torch.Size) -> Tensor:
    """Invert :func:`as_rows`."""
    if layer.config.blocks == "flat" or len(shape) == 2:
        return rows.reshape(shape)
    return rows.reshape(shape[0], -1, shape[1]).mT.reshape(shape)


def places(total: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Return up to ``wanted`` different numbers below ``total``, int64, in increasing order.

    >>> places(3, 5, torch.Generator())
    tensor([0, 1, 2])
    """
    if total <= wanted:
        return torch.arange(total, dtype=torch.int64, device="cpu")
    order = torch.randperm(total, generator=generator, dtype=torch.int64, device="cpu")
    return order[:wanted].sort().values


def count_places(layer: DSLayer, y: Tensor) -> int:
    """Return the number of positions at which ``layer`` computes its output ``y``: images times pixels."""
    return y.numel() // len(layer.vqk)


def batched(layer: Any, value: Tensor) -> Tensor:
    """Return ``value``, an input or output of ``layer``, with a batch dimension, which is added if missing."""
    return value if layer.dims == 0 or value.dim() == layer.dims + 2 else value.unsqueeze(0)


def outputs_at(layer: DSLayer, y: Tensor, where: Tensor) -> Tensor:
    """Return float32 ``(n, O)``: the output ``y`` of ``layer``, or of its original, at positions ``where (n,)``."""
    if layer.dims == 0:
        return y.reshape(-1, y.shape[-1])[where].float()
    return _channels_at(y, (len(y), *y.shape[2:]), where).float()


def inputs_at(layer: Any, x: Tensor, size: torch.Size, where: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yield the rounded input values that ``layer`` reads from ``x`` for the output of ``size`` at positions ``where``.

    Yields float32 ``(G, n, d)`` and the part of ``where`` that it belongs to.
    """
    linear = layer.dims == 0
    read = x.reshape(-1, x.shape[-1]) if linear else layer.windows(x, size[2:])
    step = max(1, _CHUNK // (layer.vqk[0].numel() * layer.groups))
    for start in range(0, len(where), step):
        part = slice(start, start + step)
        if linear:
            yield quantized(read[where[part]], layer.config, groups=1)[None], part
            continue
        taps = _channels_at(read, (size[0], *size[2:]), where[part])
        taps = (taps.flip(tuple(range(2, taps.dim()))) if layer.transposed else taps).flatten(2)
        if layer.config.blocks == "flat":
            taken = torch.unflatten(quantized(taps.flatten(1), layer.config, layer.groups), 1, (layer.groups, -1))
        else:
            # The blocks of a pixel do not depend on the tap that reads it.
            taken = torch.unflatten(quantized(taps, layer.config, layer.groups), 1, (layer.groups, -1)).mT.flatten(2)
        yield taken.transpose(0, 1), part


def _channels_at(value: Tensor, size: tuple[int, ...], where: Tensor) -> Tensor:
    """Return ``value (N, C, *S, ...)`` at positions of ``size (N, *S)``: ``(n, C, ...)``."""
    index: list[Any] = [*torch.unravel_index(where, size)]
    return value[(index[0], slice(None), *index[1:])]


class Moments:
    """First and second moments of inputs ``x``, and of the residual of outputs ``y`` with the float weight ``w``.

    With ``r = y - w x``, after :meth:`finish`:

    Attributes:
        count: number of samples.
        h: covariance of x ``(G, d, d)``.
        g: covariance of r with x ``(G, R, d)``.
        mean_x, mean_r: ``(G, d)`` and ``(G, R)``.
        noise, signal: variances of r and of y ``(G, R)``.
    """

    def __init__(self, w: Tensor):
        groups, rows, reads = w.shape
        self.w, self.count = w, 0
        self.h, self.g = w.new_zeros(groups, reads, reads), w.new_zeros(groups, rows, reads)
        self.mean_x, self.mean_r, self.mean_y = w.new_zeros(groups, reads), *w.new_zeros(2, groups, rows)
        self.noise, self.signal = w.new_zeros(2, groups, rows)
        self._origin: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples ``x (G, n, d)`` and ``y (n, O)``."""
        y = torch.unflatten(y, 1, self.w.shape[:2]).transpose(0, 1)
        r = y - x @ self.w.mT
        if self._origin is None:
            # Near the means, float32 sums of squares are exact enough.
            self._origin = x.mean(1), r.mean(1), y.mean(1)
        x, r, y = (value - origin.unsqueeze(1) for value, origin in zip((x, r, y), self._origin, strict=True))
        self.count += x.shape[1]
        self.h += x.mT @ x
        self.g += r.mT @ x
        for mean, square, value in (
            (self.mean_x, None, x),
            (self.mean_r, self.noise, r),
            (self.mean_y, self.signal, y),
        ):
            mean += value.sum(1)
            if square is not None:
                square += value.square().sum(1)

    def is_finite(self) -> bool:
        """Return whether all samples were finite."""
        return all(bool(sums.isfinite().all()) for sums in (self.h, self.g, self.noise, self.signal))

    def finish(self) -> None:
        """Convert the sums to moments."""
        assert self._origin is not None
        for sums in (self.h, self.g, self.mean_x, self.mean_r, self.mean_y, self.noise, self.signal):
            sums /= self.count
        self.h -= self.mean_x.unsqueeze(2) * self.mean_x.unsqueeze(1)
        self.g -= self.mean_r.unsqueeze(2) * self.mean_x.unsqueeze(1)
        self.noise -= self.mean_r.square()
        self.signal -= self.mean_y.square()
        self.mean_x += self._origin[0]
        self.mean_r += self._origin[1]

    def bias(self, v: Tensor) -> Tensor:
        """Return the bias ``(G, R)`` with which weights ``v`` have the mean output of the float network."""
        bias: Tensor = self.mean_r - ((v - self.w) @ self.mean_x.unsqueeze(2)).squeeze(2)
        return bias

    def error(self, v: Tensor, bias: Tensor) -> float:
        """Return the mean squared error of outputs of ``v`` and ``bias``, relative to their variance; NaN without."""
        change = v - self.w
        squares = self.noise - 2 * (change * self.g).sum(2) + quadratic(change, self.h)
        squares = squares + (self.bias(v) - bias).square()
        signal = float(self.signal.sum())
        return max(0.0, float(squares.sum())) / signal if signal > 0 else math.nan
