"""The C library by ctypes, as ``include/dsconv.h`` declares it. ctypes holds no GIL while a function runs."""

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from enum import IntEnum
from pathlib import Path

from dsconv_runtime.errors import DataError, DSConvError

_ABI_VERSION = 1
MAX_RANK = 8
MAX_THREADS = 1024
FLOAT32 = 1


class Status(IntEnum):
    OK = 0
    INVALID_ARGUMENT = 1
    INVALID_FILE = 2
    UNSUPPORTED = 3
    IO_ERROR = 4
    NO_MEMORY = 5
    INTERNAL_ERROR = 6


class Tensor(ctypes.Structure):
    """``dsconv_tensor``."""

    _fields_ = (
        ("data", c_void_p),
        ("bytes", c_size_t),
        ("strides", POINTER(c_int64)),
        ("type", c_int),
        ("rank", c_size_t),
        ("shape", c_int64 * MAX_RANK),
    )


_FUNCTIONS = {
    "dsconv_abi_version": (c_uint32, ()),
    "dsconv_version": (c_char_p, ()),
    "dsconv_isa": (c_char_p, ()),
    "dsconv_error": (c_char_p, ()),
    "dsconv_set_threads": (c_int, (c_int,)),
    "dsconv_threads": (c_int, ()),
    "dsconv_open": (c_int, (c_char_p, POINTER(c_void_p))),
    "dsconv_open_memory": (c_int, (c_void_p, c_size_t, POINTER(c_void_p))),
    "dsconv_close": (None, (c_void_p,)),
    "dsconv_input_count": (c_size_t, (c_void_p,)),
    "dsconv_output_count": (c_size_t, (c_void_p,)),
    "dsconv_input_name": (c_char_p, (c_void_p, c_size_t)),
    "dsconv_output_name": (c_char_p, (c_void_p, c_size_t)),
    "dsconv_size_count": (c_size_t, (c_void_p,)),
    "dsconv_input_shape": (c_int, (c_void_p, c_size_t, c_size_t, POINTER(Tensor))),
    "dsconv_output_shape": (c_int, (c_void_p, c_size_t, c_size_t, POINTER(Tensor))),
    "dsconv_size_step": (c_int64, (c_void_p,)),
    "dsconv_preprocess": (c_char_p, (c_void_p,)),
    "dsconv_class_count": (c_size_t, (c_void_p,)),
    "dsconv_class_name": (c_char_p, (c_void_p, c_size_t)),
    "dsconv_weight_bytes": (c_size_t, (c_void_p,)),
    "dsconv_run_bytes": (c_int, (c_void_p, POINTER(Tensor), c_size_t, POINTER(c_size_t))),
    "dsconv_run": (c_int, (c_void_p, POINTER(Tensor), c_size_t, POINTER(Tensor), c_size_t)),
}


def _load() -> ctypes.CDLL:
    name = {"win32": "dsconv.dll", "darwin": "libdsconv.dylib"}.get(sys.platform, "libdsconv.so")
    path = Path(__file__).with_name(name)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded: {error}. Install dsconv-runtime again.", path=str(path)) from error
    for function, (result, arguments) in _FUNCTIONS.items():
        called = getattr(loaded, function)
        called.restype, called.argtypes = result, arguments
    if (found := loaded.dsconv_abi_version()) != _ABI_VERSION:
        raise ImportError(
            f"{path} has version {found} of the C interface, and this package was written for {_ABI_VERSION}. "
            "Install dsconv-runtime again.",
            path=str(path),
        )
    return loaded


library = _load()


def check(status: int) -> None:
    """Raise what the last call of this thread returned, in the library's words, unless that was OK."""
    if status != Status.OK:
        raise _error_of(Status(status), library.dsconv_error().decode())


def _error_of(status: Status, message: str) -> Exception:
    match status:
        case Status.INVALID_ARGUMENT | Status.UNSUPPORTED:
            return DataError(message)
        case Status.IO_ERROR:
            return OSError(message)
        case Status.NO_MEMORY:
            return MemoryError(message)
        case _:
            return DSConvError(message)
