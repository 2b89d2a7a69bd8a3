"""Ctrl-C and hang-ups for the processes that tests start."""

import signal


def heeded() -> None:
    """To be called in a new process: jobs in the background inherit that they ignore SIGINT, those of nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
