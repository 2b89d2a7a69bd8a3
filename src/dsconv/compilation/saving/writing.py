"""Writing of a compiled network to a file."""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsconv.compilation.operators.convolution import LEAST_JOINED_BYTES
from dsconv.compilation.plan import plan_of
from dsconv.compilation.program import Program
from dsconv.compilation.saving import schema
from dsconv.compilation.saving.flatbuffer import encoded
from dsconv.compilation.saving.recording import Layer, Recording
from dsconv.errors import ModelError
from dsconv.files import replacing
from dsconv.layers import DSLayer
from dsconv.names import COMPILED_MAGIC
from dsconv.ops import winograd_weights

FORMAT = 1
PREFIX = struct.Struct("<8sIIQQQII16x")
"""Magic, format version, zero; header size in bytes, offset and size of the data; CRC-32 of both."""
ALIGNMENT = 64
# Kernels may read this many bytes past their constants.
_READ_PAST_END = 64
# Weights in the kernels' layout are used in place in the file, if they are hardly larger than their integers.
_LARGEST_PACKED = 1.1


class Size(NamedTuple):
    """Programs for inputs of one size: for one sample and for several."""

    one: Program
    several: Program

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of a sample of each input."""
        return [port.shape for port in self.one.ports()[0]]


Probe = Callable[[int, int, bool], Size]
"""Returns the programs for inputs with more rows and columns, one for all batch sizes if the last argument is true.

It raises a ModelError if there are none.
"""
# If programs for these many more rows and columns are the same, they are the same for all, or for all multiples.
_FAR, _OTHERS = (32, 64), {1: (19, 5), 32: (96, 32)}


class Saved(NamedTuple):
    """Result of writing a compiled network to a file.

    Attributes:
        bytes: size of the file.
        size_step: heights and widths of images may differ by multiples of this from the given ones: 1 is any size that
            is large enough for the network, 0 no other size.
        why_fixed: reason why no other size is accepted; empty if one is.
    """

    bytes: int
    size_step: int
    why_fixed: str


class _Data:
    """Data after the header, without duplicates."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size = 0
        self._places: dict[bytes, schema.Bytes] = {}

    def add(self, values: Tensor | np.ndarray[Any, Any]) -> schema.Bytes:
        array = values.detach().cpu().contiguous().numpy() if isinstance(values, Tensor) else values
        piece = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        key = hashlib.sha256(piece).digest()
        if key not in self._places:
            self._places[key] = schema.Bytes(self.size, len(piece))
            self.pieces.append(piece + bytes(-len(piece) % ALIGNMENT))
            self.size += len(self.pieces[-1])
        return self._places[key]


class _Network:
    """Tables of a file, and its data."""

    def __init__(self, layers: Iterable[DSLayer], fast_start: bool):
        self.data, self._fast_start = _Data(), fast_start
        self.constants: list[schema.Bytes] = []
        self.weights: list[schema.Weights] = []
        self.programs: list[schema.Program] = []
        self._numbers: dict[bytes, int] = {}
        # A captured graph has copies of the packed weights of layers.
        self._layers = {_digest(layer.packed[0]): layer for layer in layers if layer.packed is not None}

    def add(self, size: Size) -> None:
        """Add the programs for one size; other sizes with the same tables share them."""
        for made in self._programs(size):
            known = self._find(made)
            if known is None:
                self.programs.append(made)
            else:
                known.sizes = [*known.sizes, *made.sizes]

    def add_free(self, probe: Probe) -> str:
        """Add programs for sizes that were not given, if possible; return the reason if not."""
        first = self.programs[0]
        both = first.one_sample and first.several_samples
        try:
            far = self._programs(probe(*_FAR, both))
        except ModelError as error:
            return str(error)
        for step, more in _OTHERS.items():
            try:
                alike = _alike(far, self._programs(probe(*more, both)))
            except ModelError:
                alike = False
            if alike:
                for made in far:
                    known = self._find(made)
                    if known is None:
                        self.programs.append(made)
                    (known or made).size_step = step
                return ""
        return "steps for other sizes are others, in a way that does not follow from the sizes"

    def _programs(self, size: Size) -> list[schema.Program]:
        """Return the tables for one sample and for several, or one for both."""
        one, several = self._program(size.one), self._program(size.several)
        one.one_sample, several.several_samples = True, True
        for program in (one, several):
            program.sizes = [schema.Size([schema.Shape(shape) for shape in size.shapes()])]
        if _same_steps(one, several):
            return [replace(one, several_samples=True)]
        return [one, several]

    def _find(self, made: schema.Program) -> schema.Program | None:
        """Return the program with the same steps, for the same number of samples."""
        return next((known for known in self.programs if _alike([known], [made])), None)

    def _program(self, program: Program) -> schema.Program:
        """Return the tables of a program, without the size."""
        recording = Recording(program, self._constant, self._layer)
        inputs, outputs = ([recording.port(port) for port in ports if port is not None] for ports in program.ports())
        cached_bytes, any_size = program.cached_bytes or 0, 0
        tensors = recording.memory, recording.floats, recording.quantizeds
        settings = any_size, cached_bytes, LEAST_JOINED_BYTES
        return schema.Program(False, False, (), *settings, inputs, outputs, *tensors, recording.steps)

    def _constant(self, tensor: Tensor) -> int:
        place = self.data.add(tensor)
        if place not in self.constants:
            self.constants.append(place)
        return self.constants.index(place)

    def _layer(self, packed: Layer, sizes: schema.ConvSizes, weight_bits: int) -> int:
        digest = _digest(packed)
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = len(self.weights)
            self.weights.append(self._weights(packed[0], self._layers[digest], sizes))
        return number

    def _weights(self, packed: Tensor, layer: DSLayer, sizes: schema.ConvSizes) -> schema.Weights:
        integers, config = _bits(layer.vqk, layer.config.weight_bits), layer.config
        kds, shift = layer.kds, layer.kds_shift
        in_place = self._fast_start or packed.nbytes <= _LARGEST_PACKED * integers.nbytes
        if in_place and sizes.winograd:
            _, kds, shift = winograd_weights(layer.vqk, kds, shift, config)
        half = kds.dtype == torch.float16

        def stored(scale: Tensor | None) -> Any:
            return None if scale is None else self.data.add(scale if half else scale.float())

        form, weight = (schema.PACKED, packed) if in_place else (schema.INTEGERS, integers)
        settings = sizes.winograd, config.weight_bits, config.block_size, half
        return schema.Weights(
            form, *settings, self.data.add(weight), stored(kds), None if shift is None else stored(shift)
        )


def _same_steps(one: schema.Program, other: schema.Program) -> bool:
    """Return whether programs are equal except for the input sizes, which determine all other sizes."""
    neither: dict[str, Any] = {"one_sample": False, "several_samples": False, "sizes": (), "size_step": 0}
    return replace(one, **neither) == replace(other, **neither)


def _alike(one: Sequence[schema.Program], other: Sequence[schema.Program]) -> bool:
    """Return whether programs for two sizes are equal."""
    return len(one) == len(other) and all(
        (a.one_sample, a.several_samples) == (b.one_sample, b.several_samples) and _same_steps(a, b)
        for a, b in zip(one, other, strict=True)
    )


def write(
    path: Path,
    sizes: Sequence[Size],
    probe: Probe | None,
    layers: Iterable[DSLayer],
    names: tuple[Sequence[str], Sequence[str]],
    preprocess: str | None,
    classes: Sequence[str] | None,
    fast_start: bool,
) -> Saved:
    """Write the programs of a network for several sizes of its inputs, and for all sizes that share their steps.

    Args:
        path: replaced when the file is complete.
        sizes: programs without steps of PyTorch.
        probe: makes the programs for further sizes; None if the file is for no others.
        layers: layers of which the programs were made.
        names: names of inputs and outputs.
        preprocess: preprocessing of the images, as JSON.
        classes: names of the classes.
        fast_start: store all weights in the layout of the kernels.
    """
    made = _Network(layers, fast_start)
    for size in sizes:
        made.add(size)
    why_fixed = made.add_free(probe) if probe is not None else "no others were asked for"
    size_step = max(program.size_step for program in made.programs)
    version = metadata.version("dsconv")
    inputs, outputs = names
    network = schema.Network(version, inputs, outputs, preprocess, classes, made.constants, made.weights, made.programs)
    header = encoded(network, schema.IDENTIFIER)
    pieces = [*made.data.pieces, bytes(_READ_PAST_END)]
    begin = -(-(PREFIX.size + len(header)) // ALIGNMENT) * ALIGNMENT
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    data_size = made.data.size + _READ_PAST_END
    prefix = PREFIX.pack(COMPILED_MAGIC, FORMAT, 0, len(header), begin, data_size, zlib.crc32(header), checksum)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(prefix + header + bytes(begin - PREFIX.size - len(header)))
        file.writelines(pieces)
    return Saved(begin + data_size, size_step, why_fixed)


def check_saved(program: Program, names: Sequence[str]) -> None:
    """Raise an error if a program cannot be saved.

    Raises:
        ModelError: PyTorch computes some of its steps or outputs.
    """
    calls = [step for step in program.steps if step.in_pytorch]
    if calls:
        listed = [f"{step.name or 'the model'}: {step.operator}" for step in plan_of(program).in_pytorch]
        raise ModelError(
            f"the network cannot be saved for a runtime without PyTorch: PyTorch computes {len(calls)} of its "
            f"{len(program.steps)} steps: {', '.join(dict.fromkeys(listed))}"
        )
    for name, port in zip(names, program.ports()[1], strict=True):
        if port is None:
            raise ModelError(
                f"output {name!r} is not a tensor that the network's steps compute from the samples: remove it from "
                "the outputs of the model"
            )


def _digest(packed: Layer) -> bytes:
    made = hashlib.sha256()
    for tensor in packed:
        made.update(b"" if tensor is None else tensor.numpy().tobytes())
    return made.digest()


def _bits(vqk: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Return integers of ``bits`` bits as a dense bit stream, lowest bits first, with the smallest one subtracted."""
    unsigned = (vqk.detach().cpu().to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).flatten().numpy()
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")
