"""What the machine's memory allows: copy and read bandwidth of all threads, by whoever is fastest at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit, prange

from bench import peers
from bench.cases import Array
from nbloss.cpu.simd import broadcast, inline, lanes, load, stream, total

BYTES = 1 << 28  # far beyond any cache
ROWS = 64  # pieces that threads share


@inline
def _copy_row(source, target, like):  # type: ignore[no-untyped-def]
    for j in range(0, source.shape[0], lanes(like)):
        stream(target, j, load(source, j, like))


@njit(parallel=True, nogil=True)
def _copy(source, target, like):  # type: ignore[no-untyped-def]
    for i in prange(source.shape[0]):
        _copy_row(source[i], target[i], like)


@inline
def _read_row(source, like):  # type: ignore[no-untyped-def]
    a = broadcast(0.0, like)
    b, c, d = a, a, a
    step = lanes(like)
    for j in range(0, source.shape[0], 4 * step):
        a = a + load(source, j, like)
        b = b + load(source, j + step, like)
        c = c + load(source, j + 2 * step, like)
        d = d + load(source, j + 3 * step, like)
    return total(a + b + (c + d))


@njit(parallel=True, nogil=True)
def _read(source, sums, like):  # type: ignore[no-untyped-def]
    for i in prange(source.shape[0]):
        sums[i] = _read_row(source[i], like)


@dataclass
class Ceiling:
    """The fastest way found to move `moved` bytes, and the seconds it took at best in this run."""

    library: str
    run: Callable[[], Any]
    moved: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        return self.moved / self.seconds


def aligned(count: int) -> Array:
    """Float32 at a multiple of 64 bytes, as streaming stores need them; written once, so that its pages are its own."""
    raw = np.ones(count + 16, np.float32)
    skip = -raw.ctypes.data % 64 // 4
    return raw[skip : skip + count]


def measure(libraries: list[str], rounds: int) -> dict[str, Ceiling]:
    """The best of all ways to copy and to read, in alternating rounds."""
    source, target = aligned(BYTES // 4), aligned(BYTES // 4)
    rows = source.reshape(ROWS, -1)
    copied, sums, like = target.reshape(ROWS, -1), np.zeros(ROWS, np.float32), np.float32(0)
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "copy": {"numba": lambda: _copy(rows, copied, like), "numpy": lambda: np.copyto(target, source)},
        "read": {"numba": lambda: _read(rows, sums, like), "numpy": lambda: np.max(source)},
    }
    if "torch" in libraries and not peers.why_missing("torch"):
        import torch

        torch.set_num_threads(peers.threads())
        a, b = torch.from_numpy(source), torch.from_numpy(target)
        ways["copy"]["torch"] = lambda: b.copy_(a)
        ways["read"]["torch"] = lambda: torch.amax(a)
    ceilings = {}
    for name, contestants in ways.items():
        best = dict.fromkeys(contestants, float("inf"))
        for k in range(rounds + 1):
            for library, run in contestants.items():
                start = perf_counter()
                run()
                if k:  # the first round compiles
                    best[library] = min(best[library], perf_counter() - start)
        fastest = min(best, key=best.__getitem__)
        ceilings[name] = Ceiling(fastest, contestants[fastest], BYTES * (2 if name == "copy" else 1), best[fastest])
    return ceilings
