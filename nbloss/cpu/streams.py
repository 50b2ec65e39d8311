"""Vectors of rows of so many classes that tiles of them would leave the caches, and take more memory than the logits.

They are read once for their sums, online log-sum-exp in which each row has a reference of its own, and once more for
what is written, a block of classes at a time.
"""

import numpy as np

from nbloss.cpu.columns import add_to, column_of, facts_of, finish_classes, no_sums, parts_of, sum_classes
from nbloss.cpu.per_row import add_losses, nan_if_infinite
from nbloss.cpu.rows import LOWEST_32, LOWEST_64, MARGIN
from nbloss.cpu.simd import (
    any_lane,
    broadcast,
    inline,
    is_single,
    lanes,
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
from nbloss.cpu.targets import CLASS_INDEX, PROBABILITIES, add_gap
from nbloss.cpu.vecmath import log1p, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOSS_ONLY

FINISHING = 6  # numbers of a row that `finish_classes` needs
KEPT = 11  # numbers of a row that are kept from block to block: maximum, reference, and sums or what they come to


@inline
def _finite(m, like):
    """The maximum of classes none of which may be there so far."""
    return maximum(m, broadcast(LOWEST_32 if is_single(broadcast(0.0, like)) else LOWEST_64, like))


@inline
def _raised(mode, sums, m, top, reference, like):
    """(sums, maxima, references) once maxima of further classes, `top`, are known.

    Where c of `scale_of` is 0, the quotient is a power of two, and nothing is rounded.
    """
    former, m = m, maximum(top, m)
    rest, gap, mass, ties, x_t = parts_of(sums)
    if any_lane(m > reference):
        raised = where(m > reference, m + MARGIN, reference)
        ratio = scaled_exp(reference, scale_of(raised)) / scaled_exp(reference, scale_of(reference))
        rest, reference = (rest[0] * ratio, rest[1] * ratio), raised
    if mode.kind != CLASS_INDEX and any_lane(m > former):  # what attained the maximum so far joins the sum
        term = (ties[0] + ties[1]) * scaled_exp(_finite(former, like), scale_of(reference))
        rest = add_to(rest, where(m > former, term, 0.0))
        ties = where(m > former, 0.0, ties[0]), where(m > former, 0.0, ties[1])
    if mode.kind == PROBABILITIES or mode.uniform != 0.0:
        gap = add_to(gap, add_gap(broadcast(0.0, like), mass[0] + mass[1], _finite(m, like), _finite(former, like)))
    return (*rest, *gap, *mass, *ties, x_t), m, reference


@inline
def streams(operands, mode, unit, like, scratch):
    """`breadth` vectors of rows: writes what is asked for, returns the sum of their losses."""
    x, out, loss = operands.x, operands.out, operands.loss
    memory, span, breadth = scratch.memory, scratch.per_unit, scratch.breadth
    classes, step, lead = x.shape[1], lanes(like), breadth * lanes(like)
    next_class = x.strides[1] // x.itemsize
    per_plane = (x.shape[2] + lead - 1) // lead
    i = unit // per_plane
    start = (unit - i * per_plane) * lead
    stop = min(start + lead, x.shape[2])
    # A block is (span, breadth, lanes) at the beginning of memory; what is KEPT follows, a vector beyond.
    kept_at = span * lead + step
    none = broadcast(-np.inf, like)
    for k in range(start, stop, step):
        at = kept_at + (k - start) * KEPT
        store_all(memory, at, (none, _finite(none, like)))
        store_all(memory, at + 2 * step, no_sums(like))
    for begin in range(0, classes, span):
        end = min(begin + span, classes)
        for k in range(start, stop, step):
            at, count, block = kept_at + (k - start) * KEPT, min(step, stop - k), k - start - begin * lead
            top = none
            for j in range(begin, end):
                v = read(x[i, j], k, count, 0.0, like)
                prefetch_far(x[i, j], k + span * next_class, like)
                store(memory, block + j * lead, v)
                top = maximum(v, top)
            m, reference = load_all(memory, at, (none, none))
            sums = load_all(memory, at + 2 * step, no_sums(like))
            sums, m, reference = _raised(mode, sums, m, top, reference, like)
            store_all(memory, at, (m, reference))
            column = column_of(operands, mode, scratch, i, k, count, _finite(m, like), reference, like)
            fetched = k + step + begin * next_class, np.int64(1)
            sums, _ = sum_classes(operands, mode, column, memory, begin, end, block, lead, sums, fetched, 1, like)
            store_all(memory, at + 2 * step, sums)
    value_sum = broadcast(0.0, np.float64(0.0))
    for k in range(start, stop, step):
        at, count = kept_at + (k - start) * KEPT, min(step, stop - k)
        m, reference = load_all(memory, at, (none, none))
        m = nan_if_infinite(m)
        store(memory, at, m)
        column = column_of(operands, mode, scratch, i, k, count, m, reference, like)
        known, facts = facts_of(operands, mode, column, scratch, load_all(memory, at + 2 * step, no_sums(like)), like)
        store_all(memory, at + 2 * step, facts)
        value_sum = add_losses(value_sum, loss, i, k, count, known[0], known[1], log1p(known[2]), like)
    if mode.form != LOSS_ONLY:
        for begin in range(0, classes, span):
            end = min(begin + span, classes)
            for k in range(start, stop, step):
                at, count, block = kept_at + (k - start) * KEPT, min(step, stop - k), k - start - begin * lead
                m, reference = load_all(memory, at, (none, none))
                column = column_of(operands, mode, scratch, i, k, count, m, reference, like)
                for j in range(begin, end):
                    v = read(x[i, j], k, count, 0.0, like)
                    prefetch_far(x[i, j], k + span * next_class, like)
                    store(memory, block + j * lead, scaled_exp(v, column.scale) if mode.form == GRADIENT else v)
                facts = load_all(memory, at + 2 * step, no_sums(like)[:FINISHING])
                finish_classes(operands, mode, column, memory, begin, end, block, lead, facts, like)
            for j in range(begin, end):
                write_from(memory, (j - begin) * lead, out[i, j], start, stop, mode.nontemporal, like)
    return total(value_sum)
