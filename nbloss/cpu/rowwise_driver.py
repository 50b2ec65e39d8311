"""The loop over blocks of units that row-wise kernels have in common, and those over pieces of a unit's classes."""

import numpy as np
from numba import prange

from nbloss.cpu.given import Mode, Numbers, Operands, Scratch
from nbloss.cpu.operands import arrays_at, numbers_at
from nbloss.cpu.scanning import scan_piece
from nbloss.cpu.simd import (
    UNLESS_NEW,
    VECTOR_BYTES,
    allocated,
    inline,
    is_mapped,
    lanes,
    lent_to,
    plane_of,
    take,
    total,
    unallocated,
)
from nbloss.cpu.sums import add_to, add_wide_to, no_sum, number_of, sum_of, sum_of_every, sums_of_pairs
from nbloss.cpu.targets import CLASS_INDEX
from nbloss.problem import LOSS_ONLY

NUMBERS = (0,) * len(Numbers._fields)
UNCHECKED, CHECKED = 1, 2  # how a call scans its labels: CHECKED does nothing if one is out of range
# A block's memory is one array for three: labels, of 16 lanes at most, numbers, of 64 bytes, and the tile.
NUMBERS_AT, TILE_AT = 16, 16 + VECTOR_BYTES // 8


def driver_of(chunk, sum_piece=None, write_piece=None, kept=None):
    """The driver of a kernel that writes what is asked for of a unit, and returns the sum of its losses, by `chunk`.

    Or of one that does it in three steps: `sum_piece` for pieces of a unit's classes, `chunk` for the unit, and
    `write_piece`. Between them, `kept` numbers are kept of each lane of each piece.
    """
    in_pieces = sum_piece is not None  # Numba leaves out what is not asked for
    sum_at, write_at = _at_place(sum_piece), _at_place(write_piece)

    @inline
    def block_at(addresses, layout, memory, kept, sizes, mass, own_factor, like, mode, block, first_block, units, step):
        """The sum of the losses of a block of units."""
        per_plane = (units + step - 1) // step
        f = block // per_plane
        start = (block - f * per_plane) * step
        first = start - (block - first_block) * step
        given, scratch = _work(addresses, layout, f, memory, kept, first, sizes, mass, own_factor, like)
        value_sum = 0.0, 0.0
        for unit in range(start, min(units, start + step)):
            value_sum = add_to(value_sum, chunk(given, mode, unit, like, scratch))
        return number_of(value_sum)

    # own_factor is `factor`; for a mean it is divided by `divisor`, the weight of the labels where they are scanned.
    # Only parts make arrays of addresses: here Numba would count references to them, two thirds of the driver's text.
    def driver(
        units, step, first_block, stop_block, layout, share, uniform, like,
        x, t, q, weight, upstream, out, loss, factor, divisor,
    ):  # fmt: skip
        addresses = (x, t, q, weight, upstream, out, loss)
        numbers = numbers_at(addresses, layout, NUMBERS)
        (kind, value, form, nontemporal, ignore, scan, scanned, mean, per_unit, breadth, room, fold, cuts, pieces) = (
            numbers
        )
        nontemporal, mass, words = _settled(addresses, layout, kind, nontemporal, uniform, room, like)
        mode = Mode(kind, value, form, nontemporal, ignore, share, uniform)
        bad = 0.0
        if scan:  # labels out of range must be known before anything is written
            found = allocated(2 * scanned)
            for piece in prange(scanned):
                _scan_at(addresses, layout, found, mode, piece)
            bad, divisor = sums_of_pairs(found)
        if scan == CHECKED and bad > 0:
            stop_block = first_block
        own_factor = np.float64(factor) / divisor if mean else factor
        sizes = room, per_unit, breadth, fold, cuts, pieces
        places = (stop_block - first_block) * step * pieces
        kept_memory = unallocated(0)
        if in_pieces:
            kept_memory = allocated((places * breadth * kept + 1) * VECTOR_BYTES // 8)
            for place in prange(places):
                sum_at(
                    addresses, layout, allocated(words), kept_memory, sizes, mass, own_factor, like, mode,
                    place, first_block, units, step,
                )  # fmt: skip
        part = allocated(stop_block - first_block)
        for block in prange(first_block, stop_block):
            part[block - first_block] = block_at(
                addresses, layout, allocated(words), kept_memory, sizes, mass, own_factor, like, mode,
                block, first_block, units, step,
            )  # fmt: skip
        if in_pieces and form != LOSS_ONLY:
            for place in prange(places):
                write_at(
                    addresses, layout, allocated(words), kept_memory, sizes, mass, own_factor, like, mode,
                    place, first_block, units, step,
                )  # fmt: skip
        value_sum = sum_of_every(part, 0, 1)
        return float(value_sum), float(bad), float(divisor)  # no NumPy scalars where this runs as Python

    return driver


def _at_place(do):
    """What does `do` with the place-th piece from a block on, where each has room for `step` units of them."""

    @inline
    def at_place(addresses, layout, memory, kept, sizes, mass, own_factor, like, mode, place, first_block, units, step):
        pieces, per_plane = sizes[-1], (units + step - 1) // step
        slot = place // pieces
        block = first_block + slot // step
        f = block // per_plane
        unit = (block - f * per_plane) * step + slot - slot // step * step
        given, scratch = _work(addresses, layout, f, memory, kept, unit - slot, sizes, mass, own_factor, like)
        if unit < units:
            do(given, mode, unit, place - slot * pieces, like, scratch)

    return at_place


@inline
def _settled(addresses, layout, kind, nontemporal, uniform, room, like):
    """(how results are written, dense target mass of every row, float64 words of memory that a block needs)."""
    x, _, _, weight, _, out, _ = arrays_at(addresses, layout)
    if nontemporal & UNLESS_NEW and is_mapped(out):
        nontemporal = 0
    mass = 0.0
    if kind == CLASS_INDEX and uniform != 0.0:  # smoothing spreads the same mass over every row
        mass = np.float64(uniform) * _weight_of_classes(weight, x.shape[2], like)
    words = TILE_AT + (room * weight.itemsize + 7) // 8
    return nontemporal, mass, words


@inline
def _scan_at(addresses, layout, found, mode, piece):
    x, t, _, weight, _, _, _ = arrays_at(addresses, layout)
    scan_piece(found, t, weight, x.shape[2], mode.ignore, piece)


@inline
def _work(addresses, layout, f, memory, kept, first, sizes, mass, own_factor, like):
    """The operands of plane f, and the scratch memory for them."""
    x, t, q, weight, upstream, out, loss = arrays_at(addresses, layout)
    given = Operands(
        plane_of(x, f), plane_of(t, f), plane_of(q, f), weight, plane_of(upstream, f), plane_of(out, f),
        plane_of(loss, f),
    )  # fmt: skip
    room, per_unit, breadth, fold, cuts, pieces = sizes
    labels = lent_to(np.int64(0), memory, 0, lanes(like))
    numbers = lent_to(like, memory, NUMBERS_AT, lanes(like))
    tile = lent_to(like, memory, TILE_AT, room)
    kept = lent_to(like, kept, 0, kept.size * 8 // numbers.itemsize)
    return given, Scratch(tile, numbers, labels, kept, first, per_unit, breadth, fold, cuts, pieces, mass, own_factor)


@inline
def _weight_of_classes(weight, classes, like):
    if weight.shape[0] == 0:
        return np.float64(classes)
    weight_sum = no_sum()
    for j in range(0, classes, lanes(like)):
        weight_sum = add_wide_to(weight_sum, take(weight, j, min(lanes(like), classes - j), 0.0, like))
    return total(sum_of(weight_sum))
