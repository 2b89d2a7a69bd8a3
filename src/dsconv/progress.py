"""Progress of long tasks on stderr: a bar in a terminal; occasional lines in a log or a notebook."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_FIRST_SECONDS, _EVERY_SECONDS = 10.0, 30.0


class Advance(Protocol):
    """Callback that reports the amount done since the last call and, if it changes, the current activity."""

    def __call__(self, count: float, doing: str = "") -> None: ...


@contextmanager
def progress_bar(
    shown: bool, what: str, total: int | None, unit: str, *, done: int = 0, refreshes: bool = True
) -> Iterator[Advance]:
    """Show the progress of the block, with its rate and the remaining time.

    Args:
        shown: False shows nothing.
        what: the work, in a word or two.
        total: number of things to do, None if unknown.
        unit: name of these things, in the plural.
        done: number already done before, which does not count for the rate.
        refreshes: whether a thread keeps the bar moving; without it, the bar moves when something is done.

    Yields:
        A function to call with the count of things done, see :class:`Advance`.
    """
    if not shown:
        yield _ignore
    elif _is_terminal():
        with _bar(what, total, unit, done, refreshes) as advance:
            yield advance
    else:
        lines = _Lines(what, total, unit, done)
        yield lines.advance
        lines.end()


def _ignore(count: float, doing: str = "") -> None:
    pass


def _is_terminal() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _bar(what: str, total: int | None, unit: str, done: int, refreshes: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"- {unit}/s" if speed is None else _rate(speed, unit))

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), auto_refresh=refreshes) as bar:
        task, last = bar.add_task(escape(what), total=total, completed=done), 0.0

        def advance(count: float, doing: str = "") -> None:
            nonlocal last
            bar.update(task, advance=count, description=escape(", ".join(filter(None, (what, doing)))))
            if not refreshes and time.monotonic() - last > 0.2:
                bar.refresh()
                last = time.monotonic()

        yield advance


class _Lines:
    """Text lines printed at intervals of seconds when something is done; short tasks print none."""

    def __init__(self, what: str, total: int | None, unit: str, done: int):
        self._what, self._total, self._unit = what, total, unit
        self._done: float = done
        self._before = done
        self._since = time.monotonic()
        self._next = self._since + _FIRST_SECONDS
        self._said = False

    def advance(self, count: float, doing: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY_SECONDS
        rate = (self._done - self._before) / (now - self._since)
        parts = [self._count()]
        if rate > 0:
            parts.append(_rate(rate, self._unit))
        if rate > 0 and self._total is not None:
            parts.append(f"about {_duration((self._total - self._done) / rate)} left")
        self._say(", ".join([*parts, doing] if doing else parts))

    def end(self) -> None:
        if self._said:
            self._say(f"{self._count()}, took {_duration(time.monotonic() - self._since)}")

    def _count(self) -> str:
        of = "" if self._total is None else f" of {self._total:,}"
        return f"{int(self._done):,}{of} {self._unit}"

    def _say(self, text: str) -> None:
        self._said = True
        print(f"{self._what}: {text}", file=sys.stderr, flush=True)


def _rate(rate: float, unit: str) -> str:
    """
    >>> _rate(35.24, "img"), _rate(0.0312, "layers")
    ('35.2 img/s', '0.031 layers/s')
    """
    return f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{rate:.2g} {unit}/s"


def _duration(seconds: float) -> str:
    """
    >>> _duration(95), _duration(754), _duration(20000)
    ('95 s', '13 min', '5.6 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
