"""From a kernel to its result: blocks, threads, and an ordered sum.

Blocks depend on the shape alone and each writes a partial sum of its own; the partial sums are added in their
order. Serial and parallel drivers run the same blocks, so the number of threads never shows in a result, and
falling back to one thread is always right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
from numba.np.ufunc import parallel as numba_parallel

from nbloss import processes
from nbloss.cpu.compile import Kernel, warn_once

BLOCK = 1 << 14  # elements a block: 64 KiB of float32
# Elements from which other threads are woken. Two that are awake pay earlier (2e5 elements: 166 against 250 us), but
# after 30 ms of sleep GNU OpenMP took 5 ms for it on two virtual cores: calls under ~0.3 ms stay on one thread.
PARALLEL = 1 << 19
PER_CALL = 1 << 27  # elements a driver call: Ctrl-C is heard between two calls, every ~0.1 s a core

_threads: int | None = None  # None: the default


def set_num_threads(n: int) -> None:
    global _threads
    _threads = n


def get_num_threads() -> int:
    # Worker threads do not survive a fork, and GNU OpenMP aborts or hangs a child that asks for them.
    if processes.forked:
        return 1
    return default_threads() if _threads is None else _threads


def max_threads() -> int:
    """What Numba can start: the processors of this process, or what NUMBA_NUM_THREADS says."""
    return int(numba.config.NUMBA_NUM_THREADS)


@cache
def default_threads() -> int:
    """As many as Numba starts, or fewer where a container's share of processor time is smaller (Linux, cgroup 2)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(max_threads(), -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such file, or no quota: "max"
        return max_threads()


def layer() -> str | None:
    """Numba's threading layer, started if need be; None, with a warning, where the one asked for cannot be loaded."""
    try:
        numba_parallel._launch_threads()
    except ValueError as error:
        warn_once(f"nbloss computes on one thread: {' '.join(str(error).split())}")
        return None
    return str(numba.threading_layer())


class Launch:
    """A kernel over `units` of `unit_elements` elements of each plane: all of a call but its memory and its numbers.

    Planes are the places along the `far` axis of the operands; of many classes, units are cut into `pieces`, for
    threads to share. A kernel takes `units`, how many of them make a block, the first block and the one after the last,
    `constants`, and then what a call gives; the result is a tuple of sums, added in order.
    """

    def __init__(
        self,
        kernel: Kernel,
        dtypes: tuple[str, ...],
        constants: tuple[Any, ...],
        units: int,
        unit_elements: int,
        planes: int = 1,
        pieces: int = 1,
    ) -> None:
        self._kernel, self._dtypes = kernel, dtypes
        step = max(1, BLOCK // max(1, unit_elements))
        self._blocks = planes * -(-units // step)
        self._shared = self._blocks * pieces
        self._elements = planes * units * unit_elements
        self._units, self._step, self._constants = units, step, constants
        self._blocks_a_call = max(1, PER_CALL // (step * max(1, unit_elements)))
        self.is_one_call = self._blocks <= self._blocks_a_call

    def quickest(self) -> Callable[..., Sequence[float]]:
        """What `__call__` does, as fast as can be: the serial kernel itself where one call on one thread is all."""
        if self._elements >= PARALLEL or not self.is_one_call:
            return self
        serial = self._kernel.variant(False, *self._dtypes)
        return partial(serial, self._units, self._step, 0, self._blocks, *self._constants)

    def __call__(self, *args: Any) -> list[float]:
        threads = _threads_for(self._shared, self._elements)
        driver = self._kernel.variant(threads > 1, *self._dtypes)
        users = numba.get_num_threads() if threads > 1 else 0
        total: list[float] = []
        try:
            if threads > 1:
                numba.set_num_threads(threads)
            for first in range(0, self._blocks, self._blocks_a_call):
                stop = min(self._blocks, first + self._blocks_a_call)
                sums = driver(self._units, self._step, first, stop, *self._constants, *args)
                total = [a + b for a, b in zip(total, sums)] if total else list(sums)
        finally:
            if threads > 1:
                numba.set_num_threads(users)
        return total


def _threads_for(pieces: int, elements: int) -> int:
    if elements < PARALLEL:
        return 1
    threads = min(get_num_threads(), pieces)
    return threads if threads > 1 and _layer_is_safe() else 1


def _layer_is_safe() -> bool:
    """The workqueue layer aborts the process when two threads use it at once."""
    name = layer()
    return name is not None and (name != "workqueue" or threading.active_count() == 1)
