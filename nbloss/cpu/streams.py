"""Vectors of rows of so many classes that tiles of them would leave the caches, and take more memory than the logits;
and few rows, whose classes lie apart, cut into pieces that threads share and folded into the lanes of a vector.

A piece of the classes is read once for its sums, online log-sum-exp in which each lane has a reference of its own, a
block of classes at a time. Sums of all pieces are put together in order. What is written takes one more reading.

Folded, a line is as many classes of all rows as a vector has lanes for; the classes that are left are a piece too.

Beside a block, which is read down its columns, the next one is fetched line by line: memory is fastest so. What is
kept of a block lies side by side, or where it is written an odd number of vectors apart: in sets of the cache of its
own. With both, losses and gradients of 32000 classes of 512 rows take 0.77 of the time.
"""

import numpy as np

from nbloss.cpu.columns import (
    SUMS,
    column_of,
    facts_of,
    finish_classes,
    next_vector,
    no_sums,
    parts_of,
    sum_classes,
    to_next_class,
)
from nbloss.cpu.given import Operands
from nbloss.cpu.labels import IGNORED, load_labels
from nbloss.cpu.per_row import add_losses, nan_if_infinite, row_labels, rows_of
from nbloss.cpu.rows import LOWEST_32, LOWEST_64, MARGIN
from nbloss.cpu.simd import (
    any_lane,
    broadcast,
    folded,
    inline,
    is_single,
    lanes,
    line_at,
    load,
    load_all,
    maximum,
    prefetch_far,
    read,
    store,
    store_all,
    total,
    where,
    write_from,
)
from nbloss.cpu.sums import add_to, no_sum, sum_of
from nbloss.cpu.targets import CLASS_INDEX, PROBABILITIES, add_gap
from nbloss.cpu.vecmath import log1p, scale_of, scaled_exp
from nbloss.problem import GRADIENT

FINISHING = 6  # numbers of a row that `finish_classes` needs
# What is kept of each lane of a piece: m and the reference, sums, or what they come to, and the label.
SUMS_AT, LABELS_AT, KEPT = 2, 2 + SUMS, 3 + SUMS


def room_of_stream(lines, breadth, step):
    """Elements of memory for a block of so many lines, which `write_piece` keeps an odd number of vectors apart."""
    return (lines * (breadth | 1) + 1) * step


@inline
def _finite(m, like):
    """The maximum of classes none of which may be there so far."""
    return maximum(m, broadcast(LOWEST_32 if is_single(broadcast(0.0, like)) else LOWEST_64, like))


@inline
def _raised(mode, sums, former, m, old, reference, like):
    """Sums beside maxima `former`, relative to `old` references, as they are beside m, relative to `reference`.

    Where c of `scale_of` is 0, the quotient is a power of two, and nothing is rounded.
    """
    rest, gap, mass, ties, x_t = parts_of(sums)
    if any_lane(reference > old):
        ratio = scaled_exp(old, scale_of(reference)) / scaled_exp(old, scale_of(old))
        ratio = where(reference > old, ratio, 1.0)
        rest = rest[0] * ratio, rest[1] * ratio
    if mode.kind != CLASS_INDEX and any_lane(m > former):  # what attained the maximum so far joins the sum
        term = (ties[0] + ties[1]) * scaled_exp(_finite(former, like), scale_of(reference))
        rest = add_to(rest, where(m > former, term, 0.0))
        ties = where(m > former, 0.0, ties[0]), where(m > former, 0.0, ties[1])
    if mode.kind == PROBABILITIES or mode.uniform != 0.0:
        gap = add_to(gap, add_gap(broadcast(0.0, like), mass[0] + mass[1], _finite(m, like), _finite(former, like)))
    return (*rest, *gap, *mass, *ties, x_t)


@inline
def _pair(a, b):
    """Two sums, each with what rounding took from it, as one."""
    added = add_to(a, b[0])
    return added[0], added[1] + b[1]


@inline
def _together(a, b):
    """The sums of two parts of a row, relative to one reference, as one; the target's x is 0 where it is not."""
    a_rest, a_gap, a_mass, a_ties, a_x_t = parts_of(a)
    b_rest, b_gap, b_mass, b_ties, b_x_t = parts_of(b)
    rest, gap, mass, ties = _pair(a_rest, b_rest), _pair(a_gap, b_gap), _pair(a_mass, b_mass), _pair(a_ties, b_ties)
    return (*rest, *gap, *mass, *ties, a_x_t + b_x_t)


@inline
def _place_of(operands, unit, scratch, like):
    """(i, start, stop, at): a unit is the lanes from `start` to `stop` of lines in row i; it is kept from `at` on."""
    lead, width = scratch.breadth * lanes(like), operands.x.shape[2] * scratch.fold
    i, start, stop = rows_of(unit, width, lead)
    return i, start, stop, (unit - scratch.first) * scratch.pieces * lead * KEPT


@inline
def _piece_of(operands, piece, scratch):
    """(operands of a piece, its first class, how many classes make a line)."""
    x, t, q, weight, upstream, out, loss = operands
    fold, cuts = scratch.fold, scratch.cuts
    lines = x.shape[1] // fold
    first, end = lines * piece // cuts * fold, lines * (piece + 1) // cuts * fold
    if piece == cuts:
        first, end, fold = lines * fold, x.shape[1], 1
    count = (end - first) // fold
    x, q, out = folded(x, first, count, fold), folded(q, first, count, fold), folded(out, first, count, fold)
    return Operands(x, t, q, weight[first:], upstream, out, loss), first, fold


@inline
def _lines_labelled(operands, mode, scratch, i, k, count, first, end, fold, like):
    """For each lane, which line of a piece holds its label: `lines` if none does, IGNORED if no class is labelled."""
    if mode.kind != CLASS_INDEX:
        return broadcast(0.0, like)
    t, copied = operands.t, scratch.labels
    lines, rows = operands.x.shape[1], operands.x.shape[2] // fold
    for c in range(count):
        of_line = c // rows if fold > 1 else 0
        label = np.int64(t[i, k + c - of_line * rows])
        if label == mode.ignore or label < 0 or label >= end:
            copied[c] = IGNORED
        else:
            label -= first + of_line
            line = label // fold if fold > 1 else label
            copied[c] = line if 0 <= line < lines and line * fold == label else lines
    return load_labels(copied, 0, lines + 1, IGNORED, like)


@inline
def _next_block(x, end, start, stop, like):
    """For `next_vector`: the first place of the block from line `end` on, vectors to a line, the way to the next."""
    breadth = (stop - start + lanes(like) - 1) // lanes(like)
    return start + end * (x.strides[1] // x.itemsize), breadth, to_next_class(x, breadth, like)


@inline
def sum_piece(operands, mode, unit, piece, like, scratch):
    """Keep the sums of a piece of a unit's classes, and what is labelled in it, for each lane."""
    memory, kept, span = scratch.memory, scratch.kept, scratch.per_unit
    classes, step, lead = operands.x.shape[1], lanes(like), scratch.breadth * lanes(like)
    i, start, stop, at = _place_of(operands, unit, scratch, like)
    operands, first, fold = _piece_of(operands, piece, scratch)
    x = operands.x
    lines, width = x.shape[1], x.shape[2]
    next_line = x.strides[1] // x.itemsize
    stop, at = min(stop, width), at + piece * lead * KEPT
    none = broadcast(-np.inf, like)
    for k in range(start, stop, step):
        here = at + (k - start) * KEPT
        store_all(kept, here, (none, _finite(none, like)))
        store_all(kept, here + SUMS_AT * step, no_sums(like))
        labels = _lines_labelled(operands, mode, scratch, i, k, min(step, stop - k), first, classes, fold, like)
        store(kept, here + LABELS_AT * step, labels)
    for begin in range(0, lines, span):
        end = min(begin + span, lines)
        ahead, breadth, next_class = _next_block(x, end, start, stop, like)
        left = breadth
        for k in range(start, stop, step):
            count, here, block = min(step, stop - k), at + (k - start) * KEPT, -begin * step
            top = none
            for j in range(begin, end):
                line = line_at(x[i], j, width)
                v = read(line, k, count, 0.0, like)
                prefetch_far(x[i, 0], ahead, like)
                ahead, left = next_vector(ahead, left, breadth, next_class, like)
                store(memory, block + j * step, v)
                top = maximum(v, top)
            former, old = load_all(kept, here, (none, none))
            m = maximum(top, former)
            reference = where(m > old, m + MARGIN, old)
            store_all(kept, here, (m, reference))
            sums = load_all(kept, here + SUMS_AT * step, no_sums(like))
            sums = _raised(mode, sums, former, m, old, reference, like)
            column = column_of(i, k, count, load(kept, here + LABELS_AT * step, like), _finite(m, like), reference)
            fetched = k + step + begin * next_line, np.int64(1)
            sums, _ = sum_classes(operands, mode, column, memory, begin, end, block, step, sums, fetched, 1, like)
            store_all(kept, here + SUMS_AT * step, sums)


@inline
def conclude(operands, mode, unit, like, scratch):
    """Put the pieces of a unit together in order, and write its losses, whose sum is returned.

    What `write_piece` needs takes the place of the first piece's sums.
    """
    kept, fold, cuts = scratch.kept, scratch.fold, scratch.cuts
    step, lead = lanes(like), scratch.breadth * lanes(like)
    i, start, stop, at = _place_of(operands, unit, scratch, like)
    rows = operands.x.shape[2]
    none = broadcast(-np.inf, like)
    value_sum = no_sum()
    for k in range(start, min(stop, rows), step):
        count, here = min(step, rows - k), at + (k - start) * KEPT
        m, reference, sums = none, _finite(none, like), no_sums(like)
        for piece in range(scratch.pieces):
            for c in range(fold if piece < cuts else 1):  # lanes that follow are of other classes of these rows
                there = here + piece * lead * KEPT + c * rows
                its_m, its_reference = load_all(kept, there, (none, none))
                its_sums = load_all(kept, there + SUMS_AT * step, no_sums(like))
                former, old = m, reference
                m, reference = maximum(its_m, m), where(its_reference > old, its_reference, old)
                sums = _raised(mode, sums, former, m, old, reference, like)
                its_sums = _raised(mode, its_sums, its_m, m, its_reference, reference, like)
                sums = _together(sums, its_sums)
        m = nan_if_infinite(m)
        column = column_of(i, k, count, row_labels(operands, mode, scratch, i, k, count, like), m, reference)
        known, facts = facts_of(operands, mode, column, scratch, sums, like)
        value_sum = add_losses(value_sum, operands.loss, i, k, count, known[0], known[1], log1p(known[2]), like)
        store_all(kept, here, (m, reference))
        store_all(kept, here + SUMS_AT * step, facts)
        if fold > 1:
            for number in range(SUMS_AT + FINISHING):
                for c in range(here + number * step + rows, here + number * step + stop):
                    kept[c] = kept[c - rows]
    return total(sum_of(value_sum))


@inline
def write_piece(operands, mode, unit, piece, like, scratch):
    """Write what is asked for of a piece of a unit's classes."""
    memory, kept, span = scratch.memory, scratch.kept, scratch.per_unit
    step, lead = lanes(like), scratch.breadth * lanes(like)
    i, start, stop, at = _place_of(operands, unit, scratch, like)
    operands, _, _ = _piece_of(operands, piece, scratch)
    x, out = operands.x, operands.out
    lines, width, apart = x.shape[1], x.shape[2], (scratch.breadth | 1) * step
    stop = min(stop, width)
    none = broadcast(-np.inf, like)
    for begin in range(0, lines, span):
        end = min(begin + span, lines)
        ahead, breadth, next_class = _next_block(x, end, start, stop, like)
        left = breadth
        for k in range(start, stop, step):
            count, here, block = min(step, stop - k), at + (k - start) * KEPT, k - start - begin * apart
            m, reference = load_all(kept, here, (none, none))
            labels = load(kept, here + piece * lead * KEPT + LABELS_AT * step, like)
            column = column_of(i, k, count, labels, m, reference)
            for j in range(begin, end):
                line = line_at(x[i], j, width)
                v = read(line, k, count, 0.0, like)
                prefetch_far(x[i, 0], ahead, like)
                ahead, left = next_vector(ahead, left, breadth, next_class, like)
                store(memory, block + j * apart, scaled_exp(v, column.scale) if mode.form == GRADIENT else v)
            facts = load_all(kept, here + SUMS_AT * step, no_sums(like)[:FINISHING])
            finish_classes(operands, mode, column, memory, begin, end, block, apart, facts, like)
        at_once, last = np.int64(1), stop
        if apart == width and out.strides[1] == width * out.strides[2]:  # lines are vectors, one behind the other
            at_once, last = end - begin, (end - begin) * width
        for j in range(begin, end, at_once):
            write_from(memory, (j - begin) * apart, line_at(out[i], j, last), start, last, mode.nontemporal, like)
