"""Which shape of kernel takes rows of so many classes: every choice by size of the CUDA backend, in one table.

No device has run these yet: the shapes come from what a multiprocessor holds (65,536 registers, 2,048 threads) and from
what the kernels compile to (`python tests/codegen.py`). ``python -m pytest bench --device cuda -k shapes`` measures
every candidate for a row; the table is to be set from that.
"""

from __future__ import annotations

from typing import NamedTuple

SIZE = {"f": 4, "d": 8, "H": 2, "h": 2}


class RowShape(NamedTuple):
    """How a row is shared out."""

    threads: int  # of a block, that share a row
    height: int  # rows of a block, 1 if a row has more threads than a warp
    words: int  # of four bytes, that a thread holds of a row; see `held`
    parts: (
        int  # blocks that hold a row together, a cluster of 8 at most; 0: one goes over it, and again for its gradient
    )

    def held(self, code: str, dense: bool) -> int:
        """Values that a thread holds: half as many beside a target with mass on every class."""
        return self.words * 4 // SIZE[code] >> dense

    def bounds(self, code: str, dense: bool, even: bool, capability: tuple[int, int]) -> tuple[int, int]:
        """Threads of a block, and how many blocks a multiprocessor must have registers for at the same time.

        1024 threads may have 64 registers each, the least that 32 words do with, and only as assembled for sm_90.
        """
        block = self.threads * self.height
        together = (256, 512, 512) if capability < (9, 0) else (512, 768, 1024)
        least = together[even + (self.parts > 0)]
        return block, 1 if dense or code == "d" else max(least // block, 1)

    def serves(self, code: str, dense: bool, capability: tuple[int, int]) -> bool:
        """Whether there is a kernel: 512 threads have 128 registers each at most, and parts know no mass of others."""
        if capability < (9, 0) and (self.parts > 1 or self.threads == 1024):
            return False  # no clusters
        if self.parts > 1 and dense:
            return False
        return self.threads < 512 or not (dense or code == "d")

    def reach(self, code: str, dense: bool) -> float:
        """How many classes a row may have."""
        return self.threads * self.held(code, dense) * self.parts if self.parts else float("inf")


# The first that reaches is taken.
ROWS = (
    RowShape(8, 16, 16, 1),
    RowShape(8, 16, 32, 1),
    RowShape(32, 4, 32, 1),
    RowShape(128, 1, 32, 1),
    RowShape(256, 1, 32, 1),
    RowShape(512, 1, 32, 1),
    RowShape(1024, 1, 32, 1),
    RowShape(1024, 1, 32, 2),
    RowShape(1024, 1, 32, 4),
    RowShape(1024, 1, 32, 8),
    RowShape(256, 1, 32, 0),
)

# What a benchmark tries: few threads that go over a row for its value alone, and blocks of other sizes.
CANDIDATES = (
    *ROWS,
    RowShape(32, 4, 32, 0),
    *(RowShape(threads, 1, 32, 0) for threads in (64, 128, 512)),
    RowShape(64, 1, 32, 1),
    *(RowShape(threads, 1, 32, parts) for threads in (256, 512) for parts in (2, 4, 8)),
)

forced: RowShape | None = None  # by a benchmark or a test, for the rows that it reaches


def row_shape(classes: int, code: str, dense: bool, capability: tuple[int, int]) -> RowShape:
    """The shape for rows of so many classes."""
    shapes = ROWS if forced is None else (forced, *ROWS)
    return next(s for s in shapes if s.reach(code, dense) >= classes and s.serves(code, dense, capability))
