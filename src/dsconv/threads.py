"""The threads that kernels and PyTorch compute on."""

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
    """What runs the tasks of a convolution: ``DSCONV_PARALLEL``, else ``torch`` where PyTorch offers it, else ``pool``.

    ``torch`` is PyTorch's own threads, ``pool`` as many threads of our own, ``serial`` the calling thread alone. In a
    process that was forked, ``pool`` takes the place of ``torch``: PyTorch's threads do not survive a fork.

    Raises:
        ConfigError: ``DSCONV_PARALLEL`` is none of these, or ``torch`` where PyTorch does not offer its threads.
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
    """Return how many threads kernels run on: as many as PyTorch has outside of :class:`PyTorchOnOneThread`."""
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
    """Within it, in a process that was forked, PyTorch computes on the calling thread; kernels keep their threads.

    A fork copies the calling thread alone. PyTorch's threads (OpenMP) are missing in the child, which waits for them
    for ever if its parent used them.

    Args:
        always: do so in every process. Many operations on few numbers each gain little by more threads, and take many
            times as long where other processes use the cores: the threads wait for one another after each.
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
    """Address of libtorch's ``torch_parallel_for``, or 0."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        run = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(run, ctypes.c_void_p).value or 0
