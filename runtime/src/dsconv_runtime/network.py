"""Networks of files that ``dsconv compile`` wrote."""

import ctypes
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from dsconv_runtime._library import FLOAT32, MAX_RANK, Status, Tensor, check, library
from dsconv_runtime.errors import DataError, FileFormatError

_ALIGNMENT = 64
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of an input or output; sizes that are free, as the number of samples, are None."""

    name: str
    dtype: np.dtype[np.float32]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        """Return them in one line.

        >>> str(TensorInfo("x", np.dtype(np.float32), (None, 3, 224, 224)))
        'x: float32 (N, 3, 224, 224)'
        """
        first, *rest = self.shape
        return f"{self.name}: {self.dtype} {_shown(['N' if first is None else first, *rest])}"


@dataclass(frozen=True)
class Size:
    """Inputs of one size that a network takes, and its outputs for these."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class _Handle:
    """An open network of the library. It is closed when neither a Network nor a run holds it any more."""

    def __init__(self, pointer: int, memory: object):
        self.pointer = pointer
        self._memory = memory
        self._close = library.dsconv_close  # the module may be gone when the interpreter ends

    def __del__(self) -> None:
        self._close(self.pointer)


class Network:
    """A compiled network. Any number of threads may call it at the same time, and no GIL is held while it runs.

    The file is mapped, not read: leave it unchanged while the network is open, and replace it by renaming another file
    to its name. Processes that have the same file open share its memory.

    Args:
        path: a file that ``dsconv compile`` or ``dsconv.compile(...).save`` wrote.

    Attributes:
        inputs, outputs: name, dtype and shape of each, of the first of the ``sizes``.
        sizes: for which the network was compiled.
        size_step: heights and widths may differ from those of ``inputs`` by multiples of so many: 1 is any size that is
            large enough for the network, 0 no other size than ``sizes``. The first run of a size prepares it, which
            takes a few milliseconds, and the last 16 are remembered.
        preprocess: how images are prepared (:func:`dsconv_runtime.prepare`); None where the file does not say.
        classes: names of the classes, where the file has them.

    Raises:
        FileNotFoundError, OSError: the file cannot be opened or read.
        FileFormatError: the file is no compiled network, is damaged, or was written for a newer version.

    >>> with Network("digits.dsconv") as net:
    ...     logits = net(np.zeros((2, 1, 8, 8), np.float32))
    >>> logits.shape, logits.dtype
    ((2, 10), dtype('float32'))
    """

    def __init__(self, path: str | os.PathLike[str]):
        found = ctypes.c_void_p()
        name = os.fsdecode(path)
        if "\0" in name:
            raise ValueError(f"path: expected the path of a file, got {name!r}, which contains a null character")
        status = library.dsconv_open(os.fsencode(name), ctypes.byref(found))
        if status == Status.IO_ERROR and not Path(name).is_fifo():  # a pipe would wait for a writer
            with open(name, "rb") as file:  # says more precisely what is wrong
                if not file.read(1):
                    raise FileFormatError(f"{name}: expected a compiled network, got an empty file")
        self._begin(name, status, found, None)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """Open a network from the bytes of its file, which are copied.

        Raises:
            FileFormatError: they are no compiled network, are damaged, or were written for a newer version.

        >>> from pathlib import Path
        >>> Network.from_bytes(Path("digits.dsconv").read_bytes()).inputs[0].shape
        (None, 1, 8, 8)
        """
        values = np.frombuffer(data, np.uint8)
        memory = np.empty(values.size + _ALIGNMENT, np.uint8)
        memory = memory[-memory.ctypes.data % _ALIGNMENT :][: values.size]
        memory[:] = values
        net = cls.__new__(cls)
        found = ctypes.c_void_p()
        status = library.dsconv_open_memory(memory.ctypes.data, memory.size, ctypes.byref(found))
        net._begin(f"{memory.size} bytes", status, found, memory)
        return net

    def _begin(self, name: str, status: int, found: ctypes.c_void_p, memory: object) -> None:
        if status in (Status.INVALID_FILE, Status.UNSUPPORTED):
            message = library.dsconv_error().decode()
            raise FileFormatError(message if name in message else f"{name}: {message}")
        check(status)
        assert found.value is not None
        self._name = name
        self._handle: _Handle | None = _Handle(found.value, memory)
        handle = found.value
        counts = library.dsconv_input_count(handle), library.dsconv_output_count(handle)
        functions = (
            (library.dsconv_input_name, library.dsconv_input_shape),
            (library.dsconv_output_name, library.dsconv_output_shape),
        )
        self.size_step: int = library.dsconv_size_step(handle)
        preprocess = library.dsconv_preprocess(handle)
        classes = range(library.dsconv_class_count(handle))
        try:
            self.sizes: tuple[Size, ...] = tuple(
                Size(
                    *(
                        tuple(_info(handle, size, i, *both) for i in range(count))
                        for count, both in zip(counts, functions, strict=True)
                    )
                )
                for size in range(library.dsconv_size_count(handle))
            )
            self.preprocess: dict[str, Any] | None = None if preprocess is None else _object(preprocess)
            self.classes: tuple[str, ...] = tuple(library.dsconv_class_name(handle, i).decode() for i in classes)
        except (ValueError, RecursionError) as error:
            self.close()
            what = "its names are no UTF-8, or its preprocessing is no JSON"
            raise FileFormatError(f"{name}: the file is damaged: {what}: {error}") from None
        self.inputs, self.outputs = self.sizes[0].inputs, self.sizes[0].outputs

    def __call__(
        self, *arrays: NDArray[np.float32], **named: NDArray[np.float32]
    ) -> NDArray[np.float32] | dict[str, NDArray[np.float32]]:
        """Run the network on inputs by position, by name, or first by position and then by name.

        Args:
            arrays, named: float32 of the shapes of :attr:`inputs`, of those of one of :attr:`sizes`, or of heights and
                widths that differ from these by multiples of :attr:`size_step`, where that is not 0; and all of the
                same number of samples. They are read where they lie, whatever their strides; they are copied where
                a stride is negative or no multiple of 4 bytes.

        Returns:
            the output as float32, or where there are several, a dictionary of them by name.

        Raises:
            TypeError: an input is missing, given twice or unknown, is no array, or is not float32.
            DataError: the network does not take an input of that shape.
            ValueError: the network is closed.

        >>> net = Network("digits.dsconv")
        >>> images = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
        >>> bool((net(images) == net(**{net.inputs[0].name: images})).all())
        True
        >>> net(images[0])
        Traceback (most recent call last):
        ...
        dsconv_runtime.errors.DataError: ...
        """
        handle = self._open()
        given = [_checked(self.inputs[i].name, x) for i, x in enumerate(self._ordered(arrays, named))]
        inputs = (Tensor * len(given))(*map(_tensor, given))
        outputs = (Tensor * len(self.outputs))()
        call = handle.pointer, inputs, len(inputs), outputs, len(outputs)
        check(library.dsconv_run(*call))  # for the shapes
        results = [np.empty(output.shape[: output.rank], np.float32) for output in outputs]
        for output, result in zip(outputs, results, strict=True):
            output.data, output.bytes = result.ctypes.data, result.nbytes
        check(library.dsconv_run(*call))
        if len(results) == 1:
            return results[0]
        return {info.name: result for info, result in zip(self.outputs, results, strict=True)}

    def _ordered(self, arrays: tuple[Any, ...], named: dict[str, Any]) -> Iterator[Any]:
        names = [info.name for info in self.inputs]
        if len(arrays) > len(names):
            raise TypeError(f"inputs: expected {len(names)} ({', '.join(names)}), got {len(arrays)}")
        for name in named:
            if name not in names:
                raise TypeError(f"input {name!r} is unknown; the inputs are {', '.join(names)}")
        yield from arrays
        for name in names[len(arrays) :]:
            if name not in named:
                raise TypeError(f"input {name!r}: expected an array, got none; the inputs are {', '.join(names)}")
            yield named.pop(name)
        for name in named:
            raise TypeError(f"input {name!r} is given by position and by name")

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the network holds besides the mapped file."""
        return int(library.dsconv_weight_bytes(self._open().pointer))

    def run_bytes(self, *shapes: tuple[int, ...]) -> int:
        """Return the bytes of memory that a run on inputs of these shapes takes, ``(samples, ...)`` each.

        Raises:
            DataError: the network does not take them.

        >>> net = Network("digits.dsconv")
        >>> net.run_bytes((1, 1, 8, 8)) < net.run_bytes((1, 1, 32, 32))
        True
        """
        inputs = (Tensor * max(1, len(shapes)))()
        for tensor, (name, shape) in zip(inputs, zip_longest((i.name for i in self.inputs), shapes), strict=False):
            if shape is None or len(shape) > MAX_RANK or not all(0 <= n < 1 << 63 for n in shape):
                raise DataError(f"shapes: expected a shape of at most {MAX_RANK} sizes for input {name!r}, got {shape}")
            tensor.type, tensor.rank, tensor.shape[: len(shape)] = FLOAT32, len(shape), list(shape)
        found = ctypes.c_size_t()
        check(library.dsconv_run_bytes(self._open().pointer, inputs, len(shapes), ctypes.byref(found)))
        return found.value

    def close(self) -> None:
        """Close the network. Runs of other threads go on to their end; the memory is given back after the last one."""
        self._handle = None

    def _open(self) -> _Handle:
        if (handle := self._handle) is None:
            raise ValueError(f"{self._name} is closed: open it again with Network(path)")
        return handle

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Return file, inputs and outputs.

        >>> Network("digits.dsconv")
        Network('digits.dsconv', inputs=[x: float32 (N, 1, 8, 8)], outputs=[y: float32 (N, 10)])
        """
        inputs, outputs = (", ".join(map(str, infos)) for infos in (self.inputs, self.outputs))
        closed = ", closed" if self._handle is None else ""
        return f"Network({self._name!r}, inputs=[{inputs}], outputs=[{outputs}]{closed})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Network cannot be pickled or copied: pass its path, and open the file again")


def _info(handle: int, size: int, index: int, name: Any, shape: Any) -> TensorInfo:
    tensor = Tensor()
    check(shape(handle, size, index, ctypes.byref(tensor)))
    assert tensor.type == FLOAT32
    sizes = tuple(None if n < 0 else n for n in tensor.shape[: tensor.rank])
    return TensorInfo(name(handle, index).decode(), _FLOAT32, sizes)


def _object(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object of JSON, got {found!r:.99}")
    return found


def _checked(name: str, x: Any) -> NDArray[np.float32]:
    """Return ``x`` or a copy of it that the library can read."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"input {name!r}: expected a NumPy array of float32, got {type(x).__name__}")
    if x.dtype != _FLOAT32:
        raise TypeError(f"input {name!r}: expected float32, got {x.dtype}; convert it with .astype(numpy.float32)")
    if x.ndim > MAX_RANK:
        raise DataError(f"input {name!r}: expected at most {MAX_RANK} dimensions, got {_shown(x.shape)}")
    if x.flags.aligned and all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides):
        return x
    return x.copy()


def _tensor(x: NDArray[np.float32]) -> Tensor:
    bytes_in_reach = sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)) + x.itemsize
    return Tensor(
        data=x.ctypes.data,
        bytes=bytes_in_reach if x.size else 0,
        strides=(ctypes.c_int64 * MAX_RANK)(*(step // x.itemsize for step in x.strides)),
        type=FLOAT32,
        rank=x.ndim,
        shape=(ctypes.c_int64 * MAX_RANK)(*x.shape),
    )


def _shown(shape: Any) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
