"""What must be known of labels before anything is written."""

import numpy as np
from numba import from_dtype
from numba.core import types

from nbloss.cpu.compile import Kernel, array_type
from nbloss.cpu.simd import allocated, inline, plane_of, side_by_side, sums_of_pairs
from nbloss.problem import Array

# Labels that are scanned as one, by any thread: by one thread alone, 16 x 21 x 256 x 256 took 1.06 times as long.
PIECE = 1 << 14


@inline
def _lines(labels, f):
    """Labels [f] in two dimensions, side by side in the last."""
    plane = plane_of(labels, f)
    return plane if plane.strides[1] == plane.itemsize and plane.shape[1] > 1 else plane.T


@inline
def _pieces_of(lines):
    """In how many pieces each line is scanned."""
    return (lines.shape[1] + PIECE - 1) // PIECE


@inline
def pieces_of(labels):
    """In how many pieces labels, (far, outer, inner), are scanned."""
    lines = _lines(labels, 0)
    return labels.shape[0] * lines.shape[0] * _pieces_of(lines)


@inline
def scan_piece(found, labels, weight, classes, ignore, piece):
    """Put (labels out of range, weight of those that count) of a piece of a line in its place of `found`.

    That they lie side by side makes it vectors, 7 us for 65536 labels instead of 41.
    """
    lines = _lines(labels, 0)
    of_line, count = _pieces_of(lines), lines.shape[0]
    i = piece // of_line
    start = (piece - i * of_line) * PIECE
    lines = _lines(labels, i // count)
    i -= i // count * count
    line = side_by_side(lines[i, start : min(start + PIECE, lines.shape[1])])
    bad = 0
    kept = 0
    for k in range(line.shape[0]):
        label = np.int64(line[k])
        outside = (label < 0) | (label >= classes)
        bad += (label != ignore) & outside
        kept += label != ignore
    weight_sum = 0.0
    if weight.shape[0]:
        # Two levels of sums: added one by one, 2^20 weights of 0.1 would be off by 1000 ulp.
        for first in range(0, line.shape[0], 128):
            some = 0.0
            for k in range(first, min(first + 128, line.shape[0])):
                label = np.int64(line[k])
                if label != ignore and 0 <= label < classes:
                    some += weight[label]
            weight_sum += some
    found[2 * piece] = bad
    found[2 * piece + 1] = weight_sum if weight.shape[0] else kept


def can_scan(labels: Array) -> bool:
    """Whether a kernel can scan the labels that it is given."""
    along = (step == labels.itemsize for n, step in zip(labels.shape[1:], labels.strides[1:]) if n > 1)
    return labels[0].size == 1 or any(along)


def _scan_driver(labels, weight, classes, ignore):
    pieces = pieces_of(labels)
    found = allocated(2 * pieces)
    for piece in range(pieces):
        scan_piece(found, labels, weight, classes, ignore, piece)
    bad, weight_sum = sums_of_pairs(found)
    return float(bad), float(weight_sum)


SCAN = Kernel(
    "scan",
    _scan_driver,
    lambda t, weight: (
        array_type(t, 3),
        types.Array(from_dtype(np.dtype(weight)), 1, "C", readonly=True),
        types.int64,
        types.int64,
    ),
)


def scan_labels(labels: Array, weight: Array, classes: int, ignore: int) -> tuple[float, float]:
    """What must be known of the labels before anything is written: (how many are out of range, weight of the rest)."""
    flat = np.ascontiguousarray(labels).reshape(1, 1, -1)
    found: tuple[float, float] = SCAN.variant(False, flat.dtype.char, weight.dtype.char)(flat, weight, classes, ignore)
    return found
