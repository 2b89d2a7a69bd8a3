"""Ctrl-C for the processes that tests start."""

import signal


def heeded() -> None:
    """To be called in a new process: a job in the background inherits that it ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
