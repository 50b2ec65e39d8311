"""Every choice by size of the CUDA backend: which shape of kernel takes rows of so many classes, and what others take.

Shapes are set from what an H100 took with 401 kernels, for rows of 256 to 262144 classes in float32 and bfloat16, some
of float64 and beside dense targets, value and gradient: ``python -m bench.shapes`` measures those that are left.
"""

from __future__ import annotations

from typing import NamedTuple

from nbloss.problem import LOSS_ONLY

SIZE = {"f": 4, "d": 8, "H": 2, "h": 2}
WARP, VECTOR_BYTES = 32, 16
# Bytes of shared memory that a block may have on an H100, and how many of them are kept for what threads and blocks
# tell each other, which is less than 1 KiB.
MOST_SHARED, KEPT_SHARED = 227 << 10, 2 << 10
# Vectors of shared memory beside those of a row: one before it, for what is written may begin off sixteen bytes, one
# more that it lies in if it begins so itself, and one behind it, for neighbours are read in pairs.
BESIDE = 3
HALF, THIRD = 112 << 10, 72 << 10  # with which two and three blocks go on a multiprocessor
PLANE_THREADS = 128
# A thread of a pointwise kernel does up to so many vectors, fewer where that would make fewer blocks: 2048 are three
# rounds of the 5 to 6 that fit on each of an H100's 132 multiprocessors.
POINT_THREADS, POINT_CHUNKS, POINT_BLOCKS = 256, 16, 2048
# Sums over rows and blocks: threads of a block, elements that a thread reads at once, how often, blocks of a cluster,
# if a device has any. 32768 labels took one block 9 µs.
SUM_THREADS, SUM_EACH, SUM_ROUNDS, SUM_PARTS = 1024, 8, 8, 8


class RowShape(NamedTuple):
    """How a row is shared out."""

    threads: int  # of a block, that share a row
    height: int  # rows of a block, 1 if a row has more threads than a warp
    words: int  # of four bytes, that a thread holds of a row at a time; see `held`
    parts: int  # blocks that hold a row together, a cluster of up to 8; 0: one goes over it, again for its gradient
    room: int = 0  # bytes of shared memory that a block may hold its part of a row in; 0: it does in registers

    def held(self, code: str, dense: bool) -> int:
        """Values that a thread holds: beside a target with mass on every class half as many, or as many of 16 bits."""
        return self.words * 4 // max(SIZE[code], 4 if dense else 0) >> dense

    def bounds(self, code: str, form: int, dense: bool, even: bool, capability: tuple[int, int]) -> tuple[int, int]:
        """Threads of a block, and how many blocks a multiprocessor must have registers for at the same time.

        768 threads may have 80 registers each, which gradients need; 1024 may have 64, which spills a few of them, and
        pays where threads wait for others: 8192 x 128256 in float32 took 3.00 ms so, and 4.01 ms with 95 registers.
        """
        block = self.threads * self.height
        if dense or code == "d":
            return block, 1
        if self.room:
            together = block if self.room > HALF else 1024 if self.words > 8 else 1536
            return block, max(together // block, 1)
        if capability < (9, 0):
            together = 512 if even or self.parts else 256
        elif form == LOSS_ONLY:
            together = 1024 if even else 768
        elif self.parts == 0:
            together = 512
        elif even:
            together = 1024 if self.words == 16 or self.threads >= 512 or self.parts > 1 else 768
        else:
            together = 768 if self.parts > 1 else 640
        return block, max(together // block, 1)

    def serves(self, code: str, dense: bool, capability: tuple[int, int]) -> bool:
        """Whether there is such a kernel, without too few registers for its threads."""
        if dense and (self.parts > 1 or self.room):
            return False
        if self.parts > 1 and capability < (9, 0):
            return False  # clusters are new on sm_90
        if self.room and capability < (8, 0):
            return False  # copies to shared memory that do not go by registers are new on sm_80
        if self.parts == 0 and capability < (9, 0):
            return self.threads < 512
        return self.threads < (1024 if self.room else 512) or not (dense or code == "d")

    def reach(self, code: str, dense: bool, shared: int = MOST_SHARED) -> float:
        """How many classes a row may have, where a block may have so many bytes of shared memory."""
        if self.room:
            vectors = min(self.room, shared - KEPT_SHARED) // VECTOR_BYTES - BESIDE
            return max(vectors, 0) * VECTOR_BYTES // SIZE[code] * self.parts
        return self.threads * self.held(code, dense) * self.parts if self.parts else float("inf")

    def shared(self, code: str, classes: int) -> int:
        """Bytes of shared memory that a block asks for to hold its part of a row of so many classes."""
        vectors = -(-classes * SIZE[code] // VECTOR_BYTES)
        return (-(-vectors // self.parts) + BESIDE) * VECTOR_BYTES if self.room else 0


# The first that serves and reaches is taken: registers of a block, shared memory of one or several, registers of
# several, none. Where a row begins is not asked: no sum may be added in another order for that.
WHOLE = (
    RowShape(8, 16, 16, 1),
    RowShape(8, 16, 32, 1),
    RowShape(32, 4, 16, 1),
    RowShape(32, 4, 32, 1),
    RowShape(64, 1, 32, 1),
    RowShape(128, 1, 32, 1),
    RowShape(256, 1, 32, 1),
)
STAGED = (
    *(RowShape(256, 1, 16, parts, THIRD) for parts in (1, 2)),
    RowShape(512, 1, 16, 1, MOST_SHARED),
    *(RowShape(256, 1, 16, parts, THIRD) for parts in (4, 8)),
)
SHARED = RowShape(1024, 1, 32, 8)
AGAIN = RowShape(512, 1, 32, 0), RowShape(128, 1, 32, 0)
ROWS = (*WHOLE, *STAGED, SHARED, *AGAIN)
# For its value alone a row is read once by whoever reads it. OTHERS are values of rows that end off sixteen bytes, and
# all beside dense targets: from shared memory those took 0.97 to 1.41 times as long as read again.
VALUES, OTHERS = (*WHOLE, *AGAIN), (*WHOLE, AGAIN[1])

# What a benchmark tries besides: other blocks for rows of the same size.
CANDIDATES = (
    *ROWS,
    *(RowShape(16, 8, words, 1) for words in (16, 32)),
    RowShape(512, 1, 32, 1),
    RowShape(256, 1, 32, 0),
    *(RowShape(256, 1, 32, parts) for parts in (4, 8)),
    RowShape(512, 1, 32, 8),
    RowShape(128, 1, 8, 1, 16 << 10),
    RowShape(256, 1, 8, 1, THIRD),
    *(RowShape(512, 1, 16, parts, HALF) for parts in (1, 2)),
    *(RowShape(threads, 1, 16, 8, MOST_SHARED) for threads in (512, 1024)),
    *(RowShape(1024, 1, 16, parts, MOST_SHARED) for parts in (1, 2)),
)

forced: RowShape | None = None  # by a benchmark or a test, for the rows that it reaches


def row_shape(
    classes: int, code: str, form: int, dense: bool, capability: tuple[int, int], shared: int = MOST_SHARED
) -> RowShape:
    """The shape for rows of so many classes, where a block may have so many bytes of shared memory."""
    fills = classes * SIZE[code] % VECTOR_BYTES == 0
    shapes = ROWS if form != LOSS_ONLY and not dense else VALUES if fills and not dense else OTHERS
    shapes = shapes if forced is None else (forced, *shapes)
    return next(s for s in shapes if s.reach(code, dense, shared) >= classes and s.serves(code, dense, capability))
