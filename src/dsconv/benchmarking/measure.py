"""Fair turns of several contestants in one process, and statistics of their times."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

SHORTEST_TURN_S = 0.002
FEWEST_TURNS = 5
# A call of this duration is not affected by the previous contents of the caches.
_LONG_CALL_S = 0.02
_LONGEST_SETTLING_S = 0.1


class Clock(NamedTuple):
    """Functions that return the time, in seconds."""

    now: Callable[[], float] = time.perf_counter
    used_by_process: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep


REAL = Clock()


class Quartiles(NamedTuple):
    """Quartiles of times, in their unit."""

    first: float
    median: float
    third: float


def quartiles(times: Sequence[float]) -> Quartiles:
    """Return the quartiles of two or more times, treated as the whole population (``inclusive`` in :mod:`statistics`).

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 90.0])
    Quartiles(first=2.0, median=3.0, third=4.0)
    """
    return Quartiles(*statistics.quantiles(times, n=4, method="inclusive"))


def shortest(call: Callable[[], object], repeats: int = 3, clock: Clock = REAL) -> float:
    """Return the least time of a few calls in seconds, after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = clock.now()
        call()
        times.append(clock.now() - start)
    return min(times)


class Race:
    """Turns of several contestants, in a random order in every round.

    A turn takes at least 2 ms, and begins with an uncounted call unless calls are long: it loads the contestant's data
    into the caches and wakes its threads. Every runtime has its own threads, which by default spin for a while after
    their work. This would cost the next contestant a core, but disabling it would slow down a runtime in its own turn:
    therefore it stays enabled, and with several threads a turn begins only when this process has stopped using
    processor time.

    Args:
        calls: the timed functions; each is called a few times here, for warm-up and to estimate its duration.
        threads: number of threads of each contestant.

    Attributes:
        times: duration of one call, in seconds, by contestant and turn.
        unsettled: number of turns before which the threads of another contestant had not stopped within 0.1 s.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], threads: int, clock: Clock = REAL):
        self.calls, self.threads, self.clock = calls, threads, clock
        self.estimates = [shortest(call, clock=clock) for call in calls]
        self.times: list[list[float]] = [[] for _ in calls]
        self.unsettled = 0

    def rounds(self, *, turns: int | None = None, seconds: float = 0.0) -> Iterator[float]:
        """Run ``turns`` rounds, or for ``seconds`` and at least 5; yield the fraction done, 0..1, after each round."""
        order, chance = list(range(len(self.calls))), random.Random(0)
        start, done = self.clock.now(), 0
        while done < (turns or FEWEST_TURNS) or (turns is None and self.clock.now() - start < seconds):
            # In a fixed order, each contestant would always follow the same predecessor.
            chance.shuffle(order)
            for index in order:
                self.times[index].append(self._turn(index))
            done += 1
            part = done / (turns or FEWEST_TURNS)
            if turns is None and seconds:
                part = min(part, (self.clock.now() - start) / seconds)
            yield min(1.0, part)

    def _turn(self, index: int) -> float:
        call, estimate, now = self.calls[index], self.estimates[index], self.clock.now
        if self.threads > 1 and not settle(self.clock):
            self.unsettled += 1
        if estimate < _LONG_CALL_S:
            call()
        count = max(1, math.ceil(SHORTEST_TURN_S / estimate))
        start = now()
        for _ in range(count):
            call()
        return (now() - start) / count


def settle(clock: Clock = REAL) -> bool:
    """Wait until no thread of this process spins any more; return whether this happened within 0.1 s."""
    end = clock.now() + _LONGEST_SETTLING_S
    while clock.now() < end:
        used = clock.used_by_process()
        clock.sleep(0.001)
        if clock.used_by_process() - used < 0.0002:
            return True
    return False
