"""Ctrl-C and termination signals for the command line: all of them end a command in the same way."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_received: list[int] = []


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt also for SIGTERM and SIGHUP within the block, so that no incomplete results remain.

    A signal that is ignored (``nohup``), or has another handler, is unchanged.
    """
    before = install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install() -> dict[int, Any]:
    """Install the handlers of :func:`stoppable`, and return the previous ones."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        return {}
    handler = partial(_stop, os.getpid())
    by_default = (signal.SIG_DFL, signal.default_int_handler)
    return {n: signal.signal(n, handler) for n in _SIGNALS if signal.getsignal(n) in by_default}


def exit_code() -> int | None:
    """Return the exit code that shells report for the received signal, None without a signal."""
    return 128 + _received[0] if _received else None


def _stop(process: int, number: int, frame: object) -> None:
    if os.getpid() != process and number != signal.SIGINT:
        # A forked process, which is ended by its parent with this signal.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _received.append(number)
    raise KeyboardInterrupt
