"""Threads of the kernels and of PyTorch."""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import ClassVar, ParamSpec, TypeVar

import torch

from dsconv.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


@cache
def parallel() -> str:
    """Return the threading library of convolutions: ``DSCONV_PARALLEL``, else ``torch`` if available, else ``pool``.

    ``torch`` is PyTorch's own threads, ``pool`` the same number of our own threads, ``serial`` the calling thread
    alone. In a forked process, ``pool`` replaces ``torch``: PyTorch's threads do not survive a fork.

    Raises:
        ConfigError: ``DSCONV_PARALLEL`` is none of these, or ``torch`` if PyTorch does not provide its threads.
    """
    wanted = os.environ.get("DSCONV_PARALLEL")
    if wanted not in (None, "torch", "pool", "serial"):
        raise ConfigError(f"DSCONV_PARALLEL: expected torch, pool or serial, got {wanted!r}")
    if wanted == "torch" and not torch_parallel_for():
        raise ConfigError(
            f"DSCONV_PARALLEL: PyTorch {torch.__version__} does not offer its threads (2.10 and later do): use pool"
        )
    chosen = wanted or ("torch" if torch_parallel_for() else "pool")
    return "pool" if _State.forked and chosen == "torch" else chosen


def threads() -> int:
    """Return the number of threads of the kernels: that of PyTorch outside of :class:`PyTorchOnOneThread`."""
    return _state.threads or torch.get_num_threads()


class _State(threading.local):
    forked: ClassVar[bool] = False
    threads: int | None = None


_state = _State()


def _begin_child() -> None:
    _State.forked = True
    parallel.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


class PyTorchOnOneThread:
    """Lets PyTorch use only the calling thread in the block, in a forked process; kernels keep their threads.

    A fork copies the calling thread alone. PyTorch's threads (OpenMP) are missing in the child, which waits for them
    forever if its parent used them.

    Args:
        always: do so in every process. Many small operations gain little from threads, and take many times as long if
            other processes use the cores, because the threads synchronize after each operation.
    """

    def __init__(self, *, always: bool = False):
        self._always = always

    def __enter__(self) -> None:
        self._before = torch.get_num_threads() if self._always or _State.forked else 1
        if self._before > 1:
            _state.threads = self._before
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._before > 1:
            torch.set_num_threads(self._before)
            _state.threads = None


def with_pytorch_on_one_thread(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> T:
        if not _State.forked:
            return function(*args, **named)
        with PyTorchOnOneThread():
            return function(*args, **named)

    return call


@cache
def torch_parallel_for() -> int:
    """Return the address of libtorch's ``torch_parallel_for``, or 0."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        run = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(run, ctypes.c_void_p).value or 0
