"""Writes a compiled network as a file."""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
"""Magic, version of the format, zero; bytes of the header, beginning and bytes of the data; CRC-32 of both."""
ALIGNMENT = 64
# Kernels may read so many bytes behind their constants.
_READ_PAST_END = 64
# Weights as the kernels read them are used where they lie in the file, if they are hardly larger than their integers.
_LARGEST_PACKED = 1.1


class Size(NamedTuple):
    """The programs for inputs of one size: of one sample and of several."""

    one: Program
    several: Program


class _Data:
    """What lies behind the header, each piece once."""

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
    """The tables of a file, and its data."""

    def __init__(self, layers: Iterable[DSLayer], fast_start: bool):
        self.data, self._fast_start = _Data(), fast_start
        self.constants: list[schema.Bytes] = []
        self.weights: list[schema.Weights] = []
        self.programs: list[schema.Program] = []
        self._numbers: dict[bytes, int] = {}
        # A captured graph has copies of what layers have packed.
        self._layers = {_digest(layer.packed[0]): layer for layer in layers if layer.packed is not None}

    def add(self, size: Size) -> None:
        """Add the programs of one size; where they are the same for one sample and several, it is one."""
        one, several = self._program(size.one), self._program(size.several)
        one.one_sample, several.several_samples = True, True
        if (one.float_tensors, one.steps, one.inputs, one.outputs) == (
            several.float_tensors,
            several.steps,
            several.inputs,
            several.outputs,
        ) and one.quantized_tensors == several.quantized_tensors:
            several.one_sample = True
            self.programs.append(several)
        else:
            self.programs += [one, several]

    def _program(self, program: Program) -> schema.Program:
        recording = Recording(program, self._constant, self._layer)
        inputs, outputs = ([schema.Port(*port) for port in ports if port is not None] for ports in program.ports())
        at_once = 0 if program.images_at_once is None else max(1, program.images_at_once)
        steps = recording.floats, recording.quantizeds, recording.steps
        return schema.Program(False, False, at_once, inputs, outputs, *steps)

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


def write(
    path: Path,
    sizes: Sequence[Size],
    layers: Iterable[DSLayer],
    names: tuple[Sequence[str], Sequence[str]],
    preprocess: str | None,
    classes: Sequence[str] | None,
    fast_start: bool,
) -> int:
    """Write the programs of a network for several sizes of its inputs; returns the size of the file in bytes.

    Args:
        path: is replaced when the file is complete.
        sizes: without steps of PyTorch.
        layers: of which the programs were made.
        names: of inputs and outputs.
        preprocess: how images are prepared, in JSON.
        classes: their names.
        fast_start: all weights are as the kernels read them.
    """
    made = _Network(layers, fast_start)
    for size in sizes:
        made.add(size)
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
    return begin + data_size


def check_saved(program: Program, names: Sequence[str]) -> None:
    """Check that a program can be saved.

    Raises:
        ModelError: PyTorch computes some of its steps or outputs.
    """
    calls = [step for step in program.steps if step.in_pytorch]
    if calls:
        listed = [f"{step.name or 'the model'}: {step.operator}" for step in plan_of(program).in_pytorch]
        raise ModelError(
            f"the network cannot be saved for a runtime without PyTorch, which computes {len(calls)} of its "
            f"{len(program.steps)} steps: {', '.join(dict.fromkeys(listed))}"
        )
    for name, port in zip(names, program.ports()[1], strict=True):
        if port is None:
            raise ModelError(
                f"output {name!r} is no tensor that the network's steps make of the samples: leave it out of what the "
                "model returns"
            )


def _digest(packed: Layer) -> bytes:
    made = hashlib.sha256()
    for tensor in packed:
        made.update(b"" if tensor is None else tensor.numpy().tobytes())
    return made.digest()


def _bits(vqk: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Integers of ``bits`` bits side by side, the lowest bits first, less the smallest one."""
    unsigned = (vqk.detach().cpu().to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).flatten().numpy()
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")
