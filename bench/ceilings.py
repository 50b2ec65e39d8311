"""What the machine's memory allows: copy and read bandwidth of all threads, by whoever is fastest at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit, prange

from bench import peers
from bench.cases import Array
from nbloss.cpu.simd import broadcast, inline, lanes, load, prefetch_far, stream, total

BYTES = 1 << 28  # beyond most caches; where one holds more, `moving` visits all of it before it comes back
COUNT = BYTES // 4  # elements
PIECE = COUNT // 8  # 32 MiB, about the size of what is compared: the fastest way is chosen by these
ROWS = 64  # pieces that threads share
STEP = ROWS * 4 * 16  # elements, of four vectors a row
FAR = 2048  # elements ahead of which `numba, ahead` fetches


@inline
def _copy_row(source, target, ahead, like):  # type: ignore[no-untyped-def]
    for j in range(0, source.shape[0], lanes(like)):
        prefetch_far(source, j + ahead, like)
        stream(target, j, load(source, j, like))


@njit(parallel=True, nogil=True)
def _copy(source, target, ahead, like):  # type: ignore[no-untyped-def]
    for i in prange(source.shape[0]):
        _copy_row(source[i], target[i], ahead, like)


@inline
def _read_row(source, ahead, like):  # type: ignore[no-untyped-def]
    a = broadcast(0.0, like)
    b, c, d = a, a, a
    step = lanes(like)
    for j in range(0, source.shape[0], 4 * step):
        for k in range(4):
            prefetch_far(source, j + k * step + ahead, like)
        a = a + load(source, j, like)
        b = b + load(source, j + step, like)
        c = c + load(source, j + 2 * step, like)
        d = d + load(source, j + 3 * step, like)
    return total(a + b + (c + d))


@njit(parallel=True, nogil=True)
def _read(source, sums, ahead, like):  # type: ignore[no-untyped-def]
    for i in prange(source.shape[0]):
        sums[i] = _read_row(source[i], ahead, like)


@dataclass
class Ceiling:
    """The fastest way found to move memory, and the seconds that all of it takes, by its fastest piece."""

    library: str
    run: Callable[[int, int], Any]  # moves `count` elements from `start` on
    each: int  # bytes that are moved for an element
    seconds: float

    @property
    def bandwidth(self) -> float:
        return COUNT * self.each / self.seconds

    def moving(self, size: int) -> tuple[Callable[[], Any], int]:
        """A function that moves about `size` bytes, elsewhere each time, and how many it moves.

        As many as what it is compared with: on a shared machine, a short run finds a quiet moment more easily.
        """
        count = min(max(size // self.each // STEP, 1) * STEP, COUNT)
        starts = cycle(range(0, COUNT - count + 1, count))
        return lambda: self.run(next(starts), count), count * self.each


def aligned(count: int) -> Array:
    """Float32 at a multiple of 64 bytes, as streaming stores need them; written once, so that its pages are its own."""
    raw = np.ones(count + 16, np.float32)
    skip = -raw.ctypes.data % 64 // 4
    return raw[skip : skip + count]


def measure(libraries: list[str], rounds: int) -> dict[str, Ceiling]:
    """The best of all ways to copy and to read, in alternating rounds."""
    source, target = aligned(COUNT), aligned(COUNT)
    sums, like = np.zeros(ROWS, np.float32), np.float32(0)

    def rows(array: Array, start: int, count: int) -> Array:
        return array[start : start + count].reshape(ROWS, -1)

    ways: dict[str, dict[str, Callable[[int, int], Any]]] = {
        "copy": {
            "numba": lambda start, n: _copy(rows(source, start, n), rows(target, start, n), 0, like),
            "numba, ahead": lambda start, n: _copy(rows(source, start, n), rows(target, start, n), FAR, like),
            "numpy": lambda start, n: np.copyto(target[start : start + n], source[start : start + n]),
        },
        "read": {
            "numba": lambda start, n: _read(rows(source, start, n), sums, 0, like),
            "numba, ahead": lambda start, n: _read(rows(source, start, n), sums, FAR, like),
            "numpy": lambda start, n: np.max(source[start : start + n]),
        },
    }
    if "torch" in libraries and not peers.why_missing("torch"):
        import torch

        torch.set_num_threads(peers.threads())
        a, b = torch.from_numpy(source), torch.from_numpy(target)
        ways["copy"]["torch"] = lambda start, n: b[start : start + n].copy_(a[start : start + n])
        ways["read"]["torch"] = lambda start, n: torch.amax(a[start : start + n])
    ceilings = {}
    for name, contestants in ways.items():
        best = dict.fromkeys(contestants, float("inf"))
        for k in range(rounds + 1):
            for library, run in contestants.items():
                for piece in range(0, COUNT, PIECE):
                    start = perf_counter()
                    run(piece, PIECE)
                    if k:  # the first round compiles
                        best[library] = min(best[library], perf_counter() - start)
        fastest = min(best, key=best.__getitem__)
        seconds = best[fastest] * (COUNT // PIECE)
        ceilings[name] = Ceiling(fastest, contestants[fastest], 8 if name == "copy" else 4, seconds)
    return ceilings
