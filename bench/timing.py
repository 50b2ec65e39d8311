"""Contestants that take turns.

pytest-benchmark times one function in rounds and calls a `setup` before each round, outside its clock. The others take
their turns in that setup: so all contestants alternate through the same stretch of time (a slow minute of a shared
machine is slow for everyone). All are timed here in the same way; the harness keeps statistics of nbloss beside it,
which hold some 0.2 us of its own a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

WARM_BELOW = 0.02  # seconds: shorter calls get untimed ones first, which wake threads and refill caches
TURN = 5e-5  # seconds of untimed calls, at most HEAT of them
HEAT = 5


@dataclass
class Timing:
    """Seconds of each timed call; `first` is that of the very first one, which may compile."""

    first: float
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return median(self.seconds)


class Turns:
    """One contestant's share of the rounds."""

    def __init__(self, run: Callable[[], Any], first: float, share: float, bounds: tuple[int, int]) -> None:
        self.run = run
        self.timing = Timing(first)
        estimate = _estimate(run)
        self.warmups = 0 if estimate > WARM_BELOW else min(HEAT, 1 + int(TURN / max(estimate, 1e-9)))
        low, high = bounds
        low *= 1 if estimate > WARM_BELOW else 2
        self.rounds = min(high, max(low, int(share / (estimate * (1 + self.warmups)))))

    def warm_up(self) -> None:
        for _ in range(self.warmups):
            self.run()

    def take(self, done: int, of: int) -> None:
        """A turn in round `done`, unless this contestant is so slow that it sits this one out."""
        if (done + 1) * self.rounds // of > done * self.rounds // of:
            self.warm_up()
            self.call()

    def call(self) -> None:
        self.timing.seconds.append(_once(self.run))


def _once(run: Callable[[], Any]) -> float:
    start = perf_counter()
    result = run()
    seconds = perf_counter() - start
    del result  # freeing it is no part of the call
    return seconds


def _estimate(run: Callable[[], Any]) -> float:
    """Seconds of a call: the best of two, and of more where they are short, for the first ones wake threads."""
    seconds = [_once(run), _once(run)]
    while sum(seconds) < 0.1 and len(seconds) < 8:
        seconds.append(_once(run))
    return min(seconds)


def alternate(
    benchmark: Any, leader: str, contestants: dict[str, tuple[Callable[[], Any], float]], budget: float, quick: bool
) -> dict[str, Timing]:
    """Time (callable, seconds of its first call) each; the harness times the leader."""
    share = budget / len(contestants)
    bounds = (3, 30) if quick else (5, 4000)  # 400 short calls are over in 40 ms, within one swing of a shared machine
    turns = {name: Turns(run, first, share, bounds) for name, (run, first) in contestants.items()}
    head = turns[leader]
    others = [t for name, t in turns.items() if name != leader]
    for other in others:
        other.rounds = min(other.rounds, head.rounds)
    done = 0

    def before_each_round() -> None:
        nonlocal done
        shift = done % max(1, len(others))
        for other in others[shift:] + others[:shift]:
            other.take(done, head.rounds)
        head.warm_up()
        done += 1

    benchmark.pedantic(head.call, setup=before_each_round, rounds=head.rounds, iterations=1)
    return {name: t.timing for name, t in turns.items() if t.timing.seconds}


def time_of(seconds: float) -> str:
    """Seconds in three figures."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if float(f"{seconds * factor:.3g}") >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
