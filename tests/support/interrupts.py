"""Ctrl-C and hang-ups for the processes that tests start."""

import signal


def heeded() -> None:
    """Restore the handlers in a new process: background jobs inherit that SIGINT is ignored, those of nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
