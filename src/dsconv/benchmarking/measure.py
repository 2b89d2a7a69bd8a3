"""Fair turns of several contestants in one process, and what of their times is reported."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

SHORTEST_TURN_S = 0.002
FEWEST_TURNS = 5
# A call as long as this does not notice what the caches held before it.
_LONG_CALL_S = 0.02
_LONGEST_SETTLING_S = 0.1


class Clock(NamedTuple):
    """Where the time comes from; each in seconds."""

    now: Callable[[], float] = time.perf_counter
    used_by_process: Callable[[], float] = time.process_time
    sleep: Callable[[float], None] = time.sleep


REAL = Clock()


class Quartiles(NamedTuple):
    """Of times, in their unit."""

    first: float
    median: float
    third: float


def quartiles(times: Sequence[float]) -> Quartiles:
    """Quartiles of two or more times, which are taken for all there are (``inclusive`` in :mod:`statistics`).

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 90.0])
    Quartiles(first=2.0, median=3.0, third=4.0)
    """
    return Quartiles(*statistics.quantiles(times, n=4, method="inclusive"))


def shortest(call: Callable[[], object], repeats: int = 3, clock: Clock = REAL) -> float:
    """Least time of a few calls in seconds, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = clock.now()
        call()
        times.append(clock.now() - start)
    return min(times)


class Race:
    """Turns of several contestants, in an order that is random in every round.

    A turn is of at least 2 ms, and begins with a call that is not counted unless calls are long: it brings the
    contestant's data back into the caches and wakes its threads. Every runtime keeps its own threads, which by default
    spin for a while after their work. That would cost the next contestant a core, and turning it off would slow down a
    runtime in its own turn: so it stays on, and with several threads a turn begins only when this process has stopped
    using processor time.

    Args:
        calls: what is timed; each is called a few times here, to warm up and to see how long it takes.
        threads: of each contestant.

    Attributes:
        times: of one call, in seconds, by contestant and turn.
        unsettled: number of turns before which the threads of another had not come to rest within 0.1 s.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], threads: int, clock: Clock = REAL):
        self.calls, self.threads, self.clock = calls, threads, clock
        self.estimates = [shortest(call, clock=clock) for call in calls]
        self.times: list[list[float]] = [[] for _ in calls]
        self.unsettled = 0

    def rounds(self, *, turns: int | None = None, seconds: float = 0.0) -> Iterator[float]:
        """Run ``turns`` rounds, or for ``seconds`` and at least 5; yields after each round what part is done, 0..1."""
        order, chance = list(range(len(self.calls))), random.Random(0)
        start, done = self.clock.now(), 0
        while done < (turns or FEWEST_TURNS) or (turns is None and self.clock.now() - start < seconds):
            # A fixed order would give each the same predecessor's leftovers every time.
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
    """Wait until no thread of this process spins any more; whether that came about within 0.1 s."""
    end = clock.now() + _LONGEST_SETTLING_S
    while clock.now() < end:
        used = clock.used_by_process()
        clock.sleep(0.001)
        if clock.used_by_process() - used < 0.0002:
            return True
    return False
