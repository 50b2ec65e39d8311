"""What must be known of labels before anything is written."""

import numpy as np
from numba import from_dtype
from numba.core import types

from nbloss.cpu.compile import Kernel, array_type
from nbloss.cpu.simd import allocated, inline, line_from
from nbloss.cpu.sums import add_to, number_of, sums_of_pairs
from nbloss.problem import Array

# Labels that are scanned as one, by any thread: by one thread alone, 16 x 21 x 256 x 256 took 1.06 times as long.
PIECE = 1 << 14


def _along(labels: Array) -> bool:
    """Whether labels are scanned along their last axis, rather than the one before."""
    return labels.strides[2] == labels.itemsize and labels.shape[2] > 1


_is_along = inline(_along)


def pieces_of(labels: Array) -> int:
    """In how many pieces labels, (far, outer, inner), are scanned."""
    far, outer, inner = labels.shape
    length, count = (inner, outer) if _along(labels) else (outer, inner)
    return far * count * -(-length // PIECE)


@inline
def scan_piece(found, labels, weight, classes, ignore, piece):
    """Put (labels out of range, weight of those that count) of a piece of a line in its place of `found`.

    As they lie side by side, LLVM makes vectors of the loop: 7 us for 65536 labels instead of 41.
    """
    _, outer, inner = labels.shape
    along = _is_along(labels)
    length, lines = (inner, outer) if along else (outer, inner)
    of_line = (length + PIECE - 1) // PIECE
    number = piece // of_line
    start = (piece - number * of_line) * PIECE
    f = number // lines
    number -= f * lines
    i, k = (number, start) if along else (start, number)
    line = line_from(labels, f, i, k, min(PIECE, length - start))
    bad = 0
    kept = 0
    for k in range(line.shape[0]):
        label = np.int64(line[k])
        outside = (label < 0) | (label >= classes)
        bad += (label != ignore) & outside
        kept += label != ignore
    weight_sum = 0.0, 0.0
    if weight.shape[0]:
        for first in range(0, line.shape[0], 16):
            some = 0.0
            for k in range(first, min(first + 16, line.shape[0])):
                label = np.int64(line[k])
                if label != ignore and 0 <= label < classes:
                    some += weight[label]
            weight_sum = add_to(weight_sum, some)
    found[2 * piece] = bad
    found[2 * piece + 1] = number_of(weight_sum) if weight.shape[0] else kept


def can_scan(labels: Array) -> bool:
    """Whether a kernel can scan the labels that it is given."""
    along = (step == labels.itemsize for n, step in zip(labels.shape[1:], labels.strides[1:]) if n > 1)
    return labels[0].size == 1 or any(along)


def _scan_driver(pieces, labels, weight, classes, ignore):
    found = allocated(2 * pieces)
    for piece in range(pieces):
        scan_piece(found, labels, weight, classes, ignore, piece)
    bad, weight_sum = sums_of_pairs(found)
    return float(bad), float(weight_sum)


SCAN = Kernel(
    "scan",
    _scan_driver,
    lambda t, weight: (
        types.intp,
        array_type(t, 3),
        types.Array(from_dtype(np.dtype(weight)), 1, "C", readonly=True),
        types.int64,
        types.int64,
    ),
)


def scan_labels(labels: Array, weight: Array, classes: int, ignore: int) -> tuple[float, float]:
    """What must be known of the labels before anything is written: (how many are out of range, weight of the rest)."""
    flat = np.ascontiguousarray(labels).reshape(1, 1, -1)
    scan = SCAN.variant(False, flat.dtype.char, weight.dtype.char)
    found: tuple[float, float] = scan(pieces_of(flat), flat, weight, classes, ignore)
    return found
