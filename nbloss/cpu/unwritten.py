"""A row that has been summed and is yet to be written: what is kept of it in scratch."""

import numpy as np

from nbloss.cpu.given import Summed
from nbloss.cpu.simd import broadcast, inline, lane, lanes, load, load_one, store
from nbloss.cpu.vecmath import scale_change, scale_of

CHUNK = 64  # vectors of a row that are summed while the maximum of the next ones is found
SHORT = 256  # most vectors of a row that stays in the first-level cache with its exponentials
# Numbers of a summed row that are kept, at the end of its scratch, and room for them.
MAXIMUM, R, LOG_NORM, FACTOR, A, SLOPE, SHIFT, EXP_MAX, AT_TARGET, REFERENCE = range(10)
TERMS = 16


def room_of_row(classes, step, most):
    """Elements of memory that a row takes.

    Its exponentials (whole vectors, hence `step` more), the reference of each chunk of a long row, and TERMS numbers;
    these alone where that exceeds `most`, and exponentials are computed twice.
    """
    room = classes + step + -(-classes // (CHUNK * step)) + TERMS
    return room if room <= most else TERMS


@inline
def put_off(scratch, m, r, log_norm, factor, a, slope, shift, exp_max, at_target, reference, target, keep):
    """Keep what `unwritten_row` needs of a row besides its exponentials, which lie there if `keep`."""
    exps, labels = scratch.memory, scratch.labels
    at = exps.shape[0] - TERMS
    exps[at + MAXIMUM], exps[at + R], exps[at + LOG_NORM] = lane(m, 0), r, lane(log_norm, 0)
    exps[at + FACTOR], exps[at + A], exps[at + SLOPE] = lane(factor, 0), lane(a, 0), lane(slope, 0)
    exps[at + SHIFT], exps[at + EXP_MAX] = lane(shift, 0), lane(exp_max, 0)
    exps[at + AT_TARGET], exps[at + REFERENCE] = lane(at_target, 0), reference
    labels[0], labels[1] = target, keep


@inline
def no_row(exps, like):
    """In place of a row that is to be written."""
    zero = broadcast(0.0, like)
    scale = False, zero, zero, zero
    return Summed(zero, zero, zero, scale, exps, False, zero, zero, zero, zero, zero, zero, np.int64(-1), zero)


@inline
def unwritten_row(operands, stop, scratch, like):
    """The row that was summed and is to be written, as far as the chunk that ends at `stop`."""
    exps, labels = scratch.memory, scratch.labels
    n, step = operands.x.shape[1], lanes(like)
    size = CHUNK * step
    at = exps.shape[0] - TERMS
    m, r, log_norm = (
        load_one(exps, at + MAXIMUM, like),
        load_one(exps, at + R, like),
        load_one(exps, at + LOG_NORM, like),
    )
    factor, a, slope = load_one(exps, at + FACTOR, like), load_one(exps, at + A, like), load_one(exps, at + SLOPE, like)
    shift, exp_max = load_one(exps, at + SHIFT, like), load_one(exps, at + EXP_MAX, like)
    at_target, reference = load_one(exps, at + AT_TARGET, like), load_one(exps, at + REFERENCE, like)
    short, kept = n <= SHORT * step, labels[1] != 0
    scale = False, m, m, m
    if not (short and kept):
        scale = scale_of(reference)
    if kept and not short:
        # Bring each chunk to the row's last reference, one chunk ahead: a vector may reach into the next one.
        k = (stop - 1) // size
        for start in range((k + 1 if k else 0) * size, min((k + 2) * size, n), size):
            former = load_one(exps, n + step + start // size, like)
            if lane(former, 0) != lane(reference, 0):
                ratio = broadcast(scale_change(scale_of(former), scale), like)
                for j in range(start, min(start + size, n), step):
                    store(exps, j, load(exps, j, like) * ratio * 2.0**-64)
    inverse = 1.0 / exp_max
    return Summed(m, r, log_norm, scale, exps, kept, factor, a, slope, shift, exp_max, inverse, labels[0], at_target)
