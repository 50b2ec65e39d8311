"""A tile of rows, vectors across rows, for few classes or for a class axis that is not last.

A tile (classes, vectors of rows, lanes) is copied next to the core, where strides cost nothing.
"""

import numpy as np

from nbloss.cpu.columns import column_of, facts_of, finish_classes, no_sums, sum_beside_turn, sum_classes
from nbloss.cpu.given import Turn
from nbloss.cpu.per_row import add_losses, nan_if_infinite, row_labels
from nbloss.cpu.simd import (
    VECTOR_BYTES,
    aligned_at,
    as_line,
    as_rows,
    broadcast,
    inline,
    lanes,
    lent_to,
    line_at,
    line_before,
    load,
    load_transposed,
    maximum,
    plane_of,
    read_into,
    store,
    store_transposed,
    total,
    write_from,
    write_lines,
)
from nbloss.cpu.sums import no_sum, sum_of
from nbloss.cpu.targets import PROBABILITIES
from nbloss.cpu.vecmath import log1p
from nbloss.problem import LOSS_ONLY

NEG_INF = -np.inf
FACTS = 3  # numbers a row that its loss is made of
# Where two tiles take turns, the next one is copied while this one is worked out, FETCHED lines or more behind what is
# fetched; but not tiles of more than SMALL bytes.
#
# By vectors: tiles are as wide as there are classes. While one is summed, each exponential has beside it a vector of a
# class of the other: its results, if they go past the caches, then the logits that take their place. In bursts, between
# two tiles, 16 x 21 x 256 x 256 took 1.14 times as long, and with the gradient 1.3 times.
#
# Else by classes, some beside each vector of rows. Classes that are a multiple of PAGE bytes apart lie in the same sets
# of a cache, which hold WAYS lines or less: of more classes, what is fetched a tile ahead is gone before it is copied.
# 150 planes of 256 x 256 take 0.75 of the time; planes at other distances, it would be up to 1.4.
PAGE, WAYS, SMALL, FETCHED = 4096, 16, 1 << 17, 24


def are_aliased(classes, apart):
    """Whether classes that lie so many bytes apart push each other out of the caches."""
    return classes > WAYS and apart % PAGE == 0


def room_of_tile(dense, aliased, classes, per_unit, breadth, step, past_caches):
    """Elements of memory for a tile, or two, and, behind it, the FACTS of its unit's rows.

    One vector of rows is transposed in blocks of (step, step), and takes as much again to be written past the caches;
    of several, another one lies before each class.
    """
    facts = FACTS * (per_unit + 1) * step
    if breadth > 1:
        by_vector = breadth == classes and not dense
        in_turns = (by_vector or aliased) and classes * (breadth + 1) * VECTOR_BYTES <= SMALL
        return facts + (2 if in_turns else 1) * classes * (breadth + 1) * step
    return facts + (classes + step) * step + ((classes + 1) * step if past_caches else 0)


@inline
def tiles(operands, mode, unit, like, scratch):
    """`per_unit` vectors of rows, `breadth` to a tile: writes what is asked for, returns the sum of their losses."""
    x, out, form, nontemporal = operands.x, operands.out, mode.form, mode.nontemporal
    tile, per_unit, breadth = scratch.memory, scratch.per_unit, scratch.breadth
    classes = x.shape[1]
    step = lanes(like)
    planes, per_plane = x.shape[0], (x.shape[2] + per_unit * step - 1) // (per_unit * step)
    if abs(x.strides[0]) < abs(x.strides[2]):  # planes share lines of memory: unit by unit across them
        i = unit % planes
        start = unit // planes * per_unit * step
    else:
        i = unit // per_plane
        start = (unit - i * per_plane) * per_unit * step
    stop = min(start + per_unit * step, x.shape[2])
    # The tile is (classes, breadth, lanes), of more than one vector with another one before each class, for `_write`.
    before = np.int64(0 if breadth == 1 else step)
    lead = before + breadth * step
    lined_up = breadth == 1 and x.strides[1] == x.itemsize
    # Where in `tile` the FACTS of the unit's rows lie, line by line, up to its end.
    facts_step = (per_unit + 1) * step
    facts_at = tile.shape[0] - FACTS * facts_step
    # Rows one after the other go past the caches by whole lines: what a tile leaves of its last line is written with
    # the next tile. Rows alone begin and end within lines: of 64 classes, that took 1.5 times as long.
    # band: where in `tile` finished rows wait, in the order of `out`; written: elements of out[i] that are done.
    in_line = out.strides[1] == out.itemsize and out.strides[2] == classes * out.itemsize
    by_line = nontemporal and lined_up and in_line and classes >= 2 * step
    band, written = facts_at - (classes + 1) * step, start * classes
    # Where the tile that is worked out lies, and the other, which the next one is copied to meanwhile; both are 0 where
    # there is room for one only. Its room is asked, not the options: smoothing of 1e-46 is 0 in float32.
    turns = breadth > 1 and facts_at > classes * lead
    by_vector = turns and breadth == classes and mode.kind != PROBABILITIES and mode.uniform == 0.0
    here, other = np.int64(0), np.int64(classes * lead if turns else 0)
    # Whether results may be moved by vectors, and the first row of those that wait in the other tile to be, or -1.
    in_step = out.strides[2] == out.itemsize and out.strides[1] % (out.itemsize * step) == 0
    writes = by_vector and nontemporal and in_step and aligned_at(out[i, 0], like) >= 0
    late = np.int64(-1)
    low, high = start, _end_of_tile(out, i, start, stop, breadth, nontemporal, like)
    while low < stop:
        after = _end_of_tile(out, i, high, stop, breadth, nontemporal, like)
        if lined_up:
            m = broadcast(NEG_INF, like)
            for j in range(0, classes, step):
                top = load_transposed(tile, j * step, x[i], j, low, min(step, classes - j), high - low, like)
                m = maximum(top, m)
        else:
            if low == start or not turns:
                for j in range(classes):
                    read_into(tile, here + j * lead + before, x[i, j], low, high, like)
            m = broadcast(NEG_INF, like)
            for j in range(classes):
                m = maximum(load(tile, here + j * lead + before, like), m)
        copies = turns and after > high  # then this tile is `breadth` vectors of rows
        moves = copies and by_vector and after - high == breadth * step
        for k in range(low, high, step):
            count, at = min(step, high - k), here + before + k - low
            done = (k - low) // step
            if copies:
                fetched = _next_classes(x, high, after, done, breadth, like)
                if not moves:
                    for j in range(classes * done // breadth, classes * (done + 1) // breadth):
                        read_into(tile, other + j * lead + before, x[i, j], high, after, like)
            else:
                fetched = _next_tile(x, low, k, breadth, lined_up, like)
            m = nan_if_infinite(m)
            labels = row_labels(operands, mode, scratch, i, k, count, like)
            column = column_of(i, k, count, labels, m, m)
            if moves:
                its_out = line_at(plane_of(out, i), done, x.shape[2])
                turn = Turn(x[i, done], high, other + done * lead + before, late >= 0, its_out, late)
                sums, m = sum_beside_turn(operands, mode, column, tile, classes, at, lead, fetched[0], turn, like)
            else:
                sums, m = sum_classes(
                    operands, mode, column, tile, 0, classes, at, lead, no_sums(like), fetched, breadth, like
                )
            known, facts = facts_of(operands, mode, column, scratch, sums, like)
            finish_classes(operands, mode, column, tile, 0, classes, at, lead, facts, like)
            at = facts_at + k - start
            store(tile, at, known[0])
            store(tile, at + facts_step, known[1])
            store(tile, at + 2 * facts_step, known[2])
        if form != LOSS_ONLY:
            if breadth == 1 and out.strides[1] == out.itemsize:
                end = high * classes
                target = out[i, :, low:high]
                values = lent_to(out, tile, band, end - written)
                if by_line:
                    target = as_rows(values[low * classes - written :], classes)
                for j in range(0, classes, step):
                    store_transposed(tile, j * step, target, j, 0, min(step, classes - j), high - low, like)
                if by_line:
                    written = write_lines(values, as_line(out[i]), written, end, high < stop, like)
            elif writes and low > start and stop - high >= 2 * breadth * step:
                late = low  # the next tile will be of whole vectors, and the one behind it too
            else:
                late = np.int64(-1)
                for j in range(classes):
                    at, to = here + j * lead, other + j * lead
                    _write(tile, at, to, before, out[i, j], low, high, low > start, high < stop, nontemporal, like)
        low, high = high, after
        here, other = other, here
    if not mode.value:  # gradients of 10 classes take 0.93 of the time, of 3 classes 0.88
        return 0.0
    return _losses(operands.loss, tile, facts_at, facts_step, i, start, stop, like)


@inline
def _write(tile, at, to, before, out, low, high, is_later, more, nontemporal, like):
    """out[low:high], which lies in `tile` a vector behind `at`.

    Past the caches by whole lines: what is left of the last one goes to `to`, a vector before this class in the next
    tile, and is written with that. Where two tiles wrote a part each, the line was read first, and all that is written
    later waited for it (16 x 21 x 256 x 256: 1.2 times).
    """
    begin, end = low, high
    if nontemporal and before:
        begin = line_before(out, low, like) if is_later else low
        end = line_before(out, high, like) if more else high
    write_from(tile, at + before + begin - low, out, begin, end, nontemporal, like)
    if end < high:
        store(tile, to, load(tile, at + high - low, like))


@inline
def _end_of_tile(out, i, low, stop, breadth, nontemporal, like):
    """Where a tile that begins at `low` ends."""
    high = low + breadth * lanes(like)
    if nontemporal and breadth > 1:  # tiles begin where lines of `out` do: 0.9 of the time
        high = line_before(out[i, 0], high, like)
    return min(high, stop)


@inline
def _losses(loss, tile, facts_at, facts_step, i, start, stop, like):
    """The losses of a unit's rows, and their sum. Apart from all else, the logarithms of several vectors overlap."""
    step = lanes(like)
    value_sum = no_sum()
    for k in range(start, stop, step):
        at = facts_at + k - start
        whole, a = load(tile, at, like), load(tile, at + facts_step, like)
        log_norm = log1p(load(tile, at + 2 * facts_step, like))
        value_sum = add_losses(value_sum, loss, i, k, stop - k, whole, a, log_norm, like)
    return total(sum_of(value_sum))


@inline
def _next_tile(x, low, k, breadth, lined_up, like):
    """What is fetched while the vector of rows at k is worked out, in a tile from `low` on: what the next tile reads.

    A line for each vector of this one and class by class (across the classes, 150 planes of 256 x 256 took 1.6 to 1.9
    times as long), from the second vector on and beyond the last (1.1 times). Gives where, and the lines to the end of
    the class there.
    """
    step, classes = lanes(like), x.shape[1]
    if lined_up:  # one row after the other, no end of a class
        return (k + step) * (x.strides[2] // x.itemsize), classes + 1
    return _line_of(x, low + (breadth + 1) * step, (k - low) // step * classes, breadth, like)


@inline
def _next_classes(x, high, after, done, breadth, like):
    """As `_next_tile`, for tiles in turns: what is copied FETCHED lines later, or more; near the end of the next tile,
    the first lines of the one behind it.

    Beside each vector of rows, as many lines are copied, and fetched, as there are classes.
    """
    classes = x.shape[1]
    start, done = high, done + (FETCHED + classes - 1) // classes
    if done >= breadth:
        start, done = after, done - breadth
    if classes == breadth:  # each time one class, without the division: 0.98 of the time
        return start + done * (x.strides[1] // x.itemsize), breadth
    return _line_of(x, start, done * classes, breadth, like)


@inline
def _line_of(x, start, number, breadth, like):
    """Where a line of the tile from `start` on is, by its number, and how many there are to the end of its class."""
    row = number // breadth
    column = number - row * breadth
    return start + column * lanes(like) + row * (x.strides[1] // x.itemsize), breadth - column
