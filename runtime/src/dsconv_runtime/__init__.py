"""Run networks that ``dsconv compile`` wrote, in low-bit integers, without PyTorch.

>>> import numpy as np
>>> net = Network("digits.dsconv")
>>> net(np.zeros((1, 1, 8, 8), np.float32)).shape
(1, 10)
"""

from dsconv_runtime._library import MAX_THREADS, check, library
from dsconv_runtime.errors import DataError, DSConvError, FileFormatError
from dsconv_runtime.images import prepare
from dsconv_runtime.network import Network, Size, TensorInfo

__all__ = [
    "DSConvError",
    "DataError",
    "FileFormatError",
    "Network",
    "Size",
    "TensorInfo",
    "__version__",
    "isa",
    "prepare",
    "set_threads",
    "threads",
]

__version__: str = library.dsconv_version().decode()


def isa() -> str:
    """Return the instruction set in use: the best of the processor, at most that of the variable ``DSCONV_MAX_ISA``.

    >>> isa() != ""
    True
    """
    return str(library.dsconv_isa().decode())


def threads() -> int:
    """Return the number of threads that networks run on.

    >>> threads() >= 1
    True
    """
    return int(library.dsconv_threads())


def set_threads(number: int) -> None:
    """Set the number of threads, 1 to 1024, that networks of this process run on.

    At first it is that of the processors that the process may use. Runs that meet share the threads: one has them, the
    others go on alone.

    Raises:
        TypeError: it is no whole number.
        DataError: it is out of range.

    >>> before = threads()
    >>> set_threads(1)
    >>> threads()
    1
    >>> set_threads(before)
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"number: expected a whole number from 1 to {MAX_THREADS}, got {number!r}")
    if not 1 <= number <= MAX_THREADS:
        raise DataError(f"number: expected a whole number from 1 to {MAX_THREADS}, got {number}")
    check(library.dsconv_set_threads(number))
