"""The loop over blocks of units that row-wise kernels have in common, and those over pieces of a unit's classes."""

import numpy as np
from numba import prange

from nbloss.cpu.given import Mode, Operands, Scratch
from nbloss.cpu.operands import arrays_at, numbers_at
from nbloss.cpu.scanning import scan_piece
from nbloss.cpu.simd import (
    UNLESS_NEW,
    add_wide,
    allocated,
    borrowed,
    broadcast,
    inline,
    is_mapped,
    lanes,
    lent_to,
    plane_of,
    sums_of_pairs,
    take,
    total,
    unallocated,
)
from nbloss.cpu.targets import CLASS_INDEX
from nbloss.problem import LOSS_ONLY

NUMBERS = (0,) * 14  # as many as follow the layout of the operands
UNCHECKED, CHECKED = 1, 2  # how a call scans its labels: CHECKED does nothing if one is out of range


def driver_of(chunk, sum_piece=None, write_piece=None, kept=None):
    """The driver of a kernel that writes what is asked for of a unit, and returns the sum of its losses, by `chunk`.

    Or of one that does it in three steps: `sum_piece` for pieces of a unit's classes, `chunk` for the unit, and
    `write_piece`. Between them, `kept` numbers are kept of each lane of each piece.
    """
    in_pieces = sum_piece is not None  # Numba leaves out what is not asked for
    sum_at, write_at = _at_place(sum_piece), _at_place(write_piece)

    # own_factor is `factor`; for a mean it is divided by `divisor`, the weight of the labels where they are scanned.
    def driver(
        units, step, first_block, stop_block, layout, share, uniform, like,
        x, t, q, weight, upstream, out, loss, factor, divisor,
    ):  # fmt: skip
        addresses = (x, t, q, weight, upstream, out, loss)
        x, t, q, weight, upstream, out, loss = arrays_at(addresses, layout)
        numbers = numbers_at(addresses, layout, NUMBERS)
        kind, value, form, nontemporal, ignore, scan, scanned, mean, per_unit, breadth, room, fold, cuts, pieces = (
            numbers
        )
        if nontemporal & UNLESS_NEW and is_mapped(out):
            nontemporal = 0
        mode = Mode(kind, value, form, nontemporal, ignore, share, uniform)
        classes, bad = x.shape[2], 0.0
        if scan:  # labels out of range must be known before anything is written
            found = allocated(2 * scanned)
            for piece in prange(scanned):
                scan_piece(found, t, weight, classes, ignore, piece)
            bad, divisor = sums_of_pairs(found)
        if scan == CHECKED and bad > 0:
            stop_block = first_block
        own_factor = np.float64(factor) / divisor if mean else factor
        mass = 0.0
        if kind == CLASS_INDEX and uniform != 0.0:  # smoothing spreads the same mass over every row
            mass = np.float64(uniform) * _weight_of_classes(weight, classes, like)
        # One array for three: 16 labels, the numbers of a vector (8 in float64), and the tile.
        words = 24 + (room * weight.itemsize + 7) // 8
        per_plane = (units + step - 1) // step
        sizes = room, per_unit, breadth, fold, cuts, pieces
        places = (stop_block - first_block) * step * pieces
        kept_memory = unallocated(0)
        if in_pieces:
            kept_memory = allocated((places * breadth * kept + 1) * lanes(like) * weight.itemsize // 8)
            for place in prange(places):
                memory = allocated(words)
                sum_at(
                    x, t, q, weight, upstream, out, loss, memory, kept_memory, sizes, mass, own_factor, like,
                    mode, place, first_block, units, step,
                )  # fmt: skip
                # Numba frees an array after its last use, and does not see those through `lent_to`: this is one.
                memory[0] = 0.0
        part = allocated(stop_block - first_block)
        for block in prange(first_block, stop_block):
            memory = allocated(words)
            f = block // per_plane
            start = (block - f * per_plane) * step
            given, scratch = _work(
                x, t, q, weight, upstream, out, loss, f, memory, kept_memory, start - (block - first_block) * step,
                sizes, mass, own_factor, like,
            )  # fmt: skip
            value_sum = 0.0
            for unit in range(start, min(units, start + step)):
                value_sum += chunk(given, mode, unit, like, scratch)
            part[block - first_block] = value_sum + 0 * memory.size
        if in_pieces and form != LOSS_ONLY:
            for place in prange(places):
                memory = allocated(words)
                write_at(
                    x, t, q, weight, upstream, out, loss, memory, kept_memory, sizes, mass, own_factor, like,
                    mode, place, first_block, units, step,
                )  # fmt: skip
                memory[0] = 0.0
        value_sum = 0.0
        for k in range(part.size):
            value_sum += part[k]
        value_sum += 0 * kept_memory.size
        return float(value_sum), float(bad), float(divisor)  # no NumPy scalars where this runs as Python

    return driver


def _at_place(do):
    """What does `do` with the place-th piece from a block on, where each has room for `step` units of them."""

    @inline
    def at_place(
        x, t, q, weight, upstream, out, loss, memory, kept, sizes, mass, own_factor, like,
        mode, place, first_block, units, step,
    ):  # fmt: skip
        pieces, per_plane = sizes[-1], (units + step - 1) // step
        slot = place // pieces
        block = first_block + slot // step
        f = block // per_plane
        unit = (block - f * per_plane) * step + slot - slot // step * step
        given, scratch = _work(
            x, t, q, weight, upstream, out, loss, f, memory, kept, unit - slot, sizes, mass, own_factor, like
        )
        if unit < units:
            do(given, mode, unit, place - slot * pieces, like, scratch)

    return at_place


@inline
def _work(x, t, q, weight, upstream, out, loss, f, memory, kept, first, sizes, mass, own_factor, like):
    """The operands of plane f, and the scratch memory for them."""
    given = Operands(
        plane_of(x, f), plane_of(t, f), plane_of(q, f), borrowed(weight), plane_of(upstream, f), plane_of(out, f),
        plane_of(loss, f),
    )  # fmt: skip
    room, per_unit, breadth, fold, cuts, pieces = sizes
    labels = lent_to(np.int64(0), memory, 0, lanes(like))
    numbers = lent_to(like, memory, 16, lanes(like))
    tile = lent_to(like, memory, 24, room)
    kept = lent_to(like, kept, 0, kept.size * 8 // numbers.itemsize)
    return given, Scratch(tile, numbers, labels, kept, first, per_unit, breadth, fold, cuts, pieces, mass, own_factor)


@inline
def _weight_of_classes(weight, classes, like):
    if weight.shape[0] == 0:
        return np.float64(classes)
    weight_sum = broadcast(0.0, np.float64(0.0))
    for j in range(0, classes, lanes(like)):
        weight_sum = add_wide(weight_sum, take(weight, j, min(lanes(like), classes - j), 0.0, like))
    return total(weight_sum)
