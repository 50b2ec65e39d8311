"""Vectors of rows of so many classes that tiles of them would leave the caches, and take more memory than the logits.

They are read for their maxima, for their sums, and for their results, a block of classes at a time.
"""

import numpy as np

from nbloss.cpu.columns import column_of, facts_of, finish_classes, no_sums, sum_classes
from nbloss.cpu.simd import (
    add_wide,
    broadcast,
    first,
    inline,
    lanes,
    load,
    load_all,
    maximum,
    read,
    store,
    store_all,
    total,
    where,
    write,
    write_from,
)
from nbloss.cpu.targets import row_loss
from nbloss.cpu.vecmath import log1p, scaled_exp
from nbloss.problem import GRADIENT, LOSS_ONLY

FACTS = 6  # of `finish_classes`
KEPT = 10  # numbers of a row that are kept from block to block: its maximum, and then its sums or what they come to


@inline
def streams(operands, mode, unit, like, scratch):
    """`breadth` vectors of rows: writes what is asked for, returns the sum of their losses."""
    x, out, loss = operands.x, operands.out, operands.loss
    memory, span, breadth = scratch.memory, scratch.per_unit, scratch.breadth
    classes, step, lead = x.shape[1], lanes(like), breadth * lanes(like)
    per_plane = (x.shape[2] + lead - 1) // lead
    i = unit // per_plane
    start = (unit - i * per_plane) * lead
    stop = min(start + lead, x.shape[2])
    # A block is (span, breadth, lanes) at the beginning of memory; what is KEPT follows, a vector beyond.
    kept_at = span * lead + step
    for k in range(start, stop, step):
        at = kept_at + (k - start) * KEPT
        store(memory, at, broadcast(-np.inf, like))
        store_all(memory, at + step, no_sums(like))
    for begin in range(0, classes, span):
        end = min(begin + span, classes)
        for k in range(start, stop, step):
            at, count = kept_at + (k - start) * KEPT, min(step, stop - k)
            m = load(memory, at, like)
            for j in range(begin, end):
                m = maximum(read(x[i, j], k, count, 0.0, like), m)
            store(memory, at, m)
    for begin in range(0, classes, span):
        end = min(begin + span, classes)
        for k in range(start, stop, step):
            at, count, block = kept_at + (k - start) * KEPT, min(step, stop - k), k - start - begin * lead
            for j in range(begin, end):
                store(memory, block + j * lead, read(x[i, j], k, count, 0.0, like))
            column = column_of(operands, mode, scratch, i, k, count, load(memory, at, like), like)
            fetched = k + (begin + span) * (x.strides[1] // x.itemsize), np.int64(1)
            sums = load_all(memory, at + step, no_sums(like))
            sums, _ = sum_classes(operands, mode, column, memory, begin, end, block, lead, sums, fetched, 1, like)
            store_all(memory, at + step, sums)
    value_sum = broadcast(0.0, np.float64(0.0))
    for k in range(start, stop, step):
        at, count = kept_at + (k - start) * KEPT, min(step, stop - k)
        column = column_of(operands, mode, scratch, i, k, count, load(memory, at, like), like)
        known, facts = facts_of(operands, mode, column, scratch, load_all(memory, at + step, no_sums(like)), like)
        store_all(memory, at + step, facts)
        value = row_loss(known[0], known[1], log1p(known[2]))
        if loss.shape[1]:
            write(loss[i], k, count, value, like)
        value_sum = add_wide(value_sum, where(first(count, value), value, 0.0))
    if mode.form != LOSS_ONLY:
        for begin in range(0, classes, span):
            end = min(begin + span, classes)
            for k in range(start, stop, step):
                at, count, block = kept_at + (k - start) * KEPT, min(step, stop - k), k - start - begin * lead
                column = column_of(operands, mode, scratch, i, k, count, load(memory, at, like), like)
                for j in range(begin, end):
                    v = read(x[i, j], k, count, 0.0, like)
                    store(memory, block + j * lead, scaled_exp(v, column.scale) if mode.form == GRADIENT else v)
                facts = load_all(memory, at + step, no_sums(like)[:FACTS])
                finish_classes(operands, mode, column, memory, begin, end, block, lead, facts, like)
            for j in range(begin, end):
                write_from(memory, (j - begin) * lead, out[i, j], start, stop, mode.nontemporal, like)
    return total(value_sum)
