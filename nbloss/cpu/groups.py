"""Rows of some tens to some hundreds of classes, a group of as many as a vector has lanes at a time.

Vectors run along the classes, which lie side by side, as in ``rows``; what is one number a row is worked out for the
whole group, as in ``tiles``. So short rows are neither transposed nor waited for one by one.
"""

import numpy as np

from nbloss.cpu.group_rows import (
    AT_TARGET,
    EXP_MAX,
    EXPS,
    FACTOR,
    FOLDED,
    INVERSE,
    LABEL,
    LOG_NORM,
    LOWEST,
    MAXIMUM,
    OWN,
    ROUND_TO,
    SLOPE,
    TAKEN,
    X_T,
    A,
    R,
    dense_sums,
    row_exps,
    row_maximum,
    row_rest,
    row_sum,
    write_row,
)
from nbloss.cpu.labels import label_at
from nbloss.cpu.per_row import (
    add_losses,
    gradient_facts,
    nan_if_infinite,
    row_factors,
    row_facts,
    row_labels,
    row_weights,
    rows_of,
)
from nbloss.cpu.simd import (
    as_line,
    broadcast,
    first,
    inline,
    lanes,
    lent_to,
    load,
    load_one,
    maxima,
    row_of,
    store,
    store_one,
    total,
    totals,
    where,
    write_lines,
)
from nbloss.cpu.sums import no_sum, sum_of, two_sum
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES
from nbloss.cpu.vecmath import log1p, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOSS_ONLY


@inline
def _scale_of_group(memory, count, like):
    """(maxima of a group's rows, scaled_exp of them, whether some is large), from the maxima by lanes."""
    m = maxima(memory, FOLDED, like)
    m = nan_if_infinite(where(first(count, m), m, 0.0))
    scale = scale_of(m)
    some_large, taken, lowest, round_to = scale
    store(memory, TAKEN, taken)
    store(memory, LOWEST, lowest)
    store(memory, ROUND_TO, round_to)
    return m, scaled_exp(m, scale), some_large


@inline
def _exps_of_group(operands, memory, lead, ahead, i, low, count, stop, some_large, like):
    """Exponentials of a group's rows, each `lead` after the one before; and the maxima, by lanes, of the next group."""
    x, q, step = operands.x, operands.q, lanes(like)
    for k in range(count):
        taken, lowest = load_one(memory, TAKEN + k, like), load_one(memory, LOWEST + k, like)
        scale = taken, lowest, load_one(memory, ROUND_TO + k, like)
        row, other = row_of(x, i, low + k), row_of(x, i, min(low + k + step, stop - 1))
        masses, at = row_of(q, i, low + k), EXPS + k * lead
        # Asked before the loop, 1.05 to 1.1 times faster; by parts of their own, or LLVM merges the calls.
        if some_large:
            top = row_exps(memory, at, row, True, scale, other, masses, ahead, like)
        else:
            top = row_exps(memory, at, row, False, scale, other, masses, ahead, like)
        store(memory, FOLDED + k * step, top)


@inline
def _targets_of_group(x, memory, lead, i, low, count, like):
    """(exponentials of the targets, which are left out of the rows' sums from now on, their logits)."""
    for k in range(count):
        label = label_at(memory, LABEL + k)
        label = label if label > 0 else np.int64(0)
        at = EXPS + k * lead + label
        store_one(memory, OWN + k, load_one(memory, at, like))
        store_one(memory, X_T + k, load_one(row_of(x, i, low + k), label, like))
        store_one(memory, at, broadcast(0.0, like))
    return load(memory, OWN, like), load(memory, X_T, like)


@inline
def _sums_of_group(memory, lead, classes, count, all_terms, exp_max, like):
    """Of each row, the sum of its exponentials: of all terms, or without one that attains the maximum."""
    step = lanes(like)
    other_folded = FOLDED + step * step
    if all_terms:
        for k in range(count):
            store(memory, FOLDED + k * step, row_sum(memory, EXPS + k * lead, classes, like))
        return totals(memory, FOLDED, like)
    for k in range(count):
        rest, ties = row_rest(memory, EXPS + k * lead, classes, load_one(memory, EXP_MAX + k, like), like)
        store(memory, FOLDED + k * step, rest)
        store(memory, other_folded + k * step, ties)
    return totals(memory, FOLDED, like) + (totals(memory, other_folded, like) - 1.0) * exp_max


@inline
def _dense_sums_of_group(operands, mode, memory, i, low, count, like):
    """`dense_sums` of each row."""
    step = lanes(like)
    other_folded = FOLDED + step * step
    for k in range(count):
        row, masses = row_of(operands.x, i, low + k), row_of(operands.q, i, low + k)
        gap, mass = dense_sums(row, masses, operands.weight, mode, load_one(memory, MAXIMUM + k, like), like)
        store(memory, FOLDED + k * step, gap)
        store(memory, other_folded + k * step, mass)
    return totals(memory, FOLDED, like), totals(memory, other_folded, like)


@inline
def _write_group(operands, mode, memory, lead, i, low, count, stop, by_line, written, like):
    """What is asked for of a group's rows, whose facts lie in memory. Returns how far it is written `by_line`."""
    x, _, q, weight, _, out, _ = operands
    kind, classes, step = mode.kind, out.shape[1], lanes(like)
    end = (low + count) * classes
    values = lent_to(out, memory, EXPS - 2 * step, end - written)
    for k in range(count):
        target = row_of(out, i, low + k)
        if by_line:
            target = lent_to(out, values, (low + k) * classes - written, classes)
        label = label_at(memory, LABEL + k)
        if kind == CLASS_INDEX and label < 0:
            for at in range(0, classes, step):
                store(target, min(at, classes - step), broadcast(0.0, like))
        else:
            row, other = row_of(x, i, low + k), row_of(q, i, low + k)
            write_row(row, other, weight, target, mode, memory, k, EXPS + k * lead, like)
            if kind == CLASS_INDEX:
                store_one(target, label, load_one(memory, AT_TARGET + k, like))
    if by_line:
        written = write_lines(values, as_line(out[i]), written, end, low + count < stop, like)
    return written


@inline
def groups(operands, mode, unit, like, scratch):
    """`per_unit` rows: writes what is asked for, and returns the sum of their losses."""
    x, out, loss = operands.x, operands.out, operands.loss
    kind, form, uniform = mode.kind, mode.form, mode.uniform
    memory, classes, step = scratch.memory, x.shape[1], lanes(like)
    i, start, stop = rows_of(unit, x.shape[2], scratch.per_unit)
    lead = (classes + step - 1) // step * step
    ahead = 2 * step * (x.strides[2] // x.itemsize)
    # By whole lines, see ``tiles``: finished rows lie from two vectors before the exponentials on, where one vector may
    # wait for the rest of its line, and where none is written over an exponential that is still needed.
    by_line = mode.nontemporal and out.strides[2] == classes * out.itemsize
    written = start * classes
    zero = broadcast(0.0, like)
    value_sum = no_sum()
    for k in range(min(step, stop - start)):
        store(memory, FOLDED + k * step, row_maximum(row_of(x, i, start + k), like))
    m, exp_max, some_large = _scale_of_group(memory, min(step, stop - start), like)
    for low in range(start, stop, step):
        count = min(step, stop - low)
        labels = row_labels(operands, mode, scratch, i, low, count, like)
        inverse = 1.0 / exp_max
        _exps_of_group(operands, memory, lead, ahead, i, low, count, stop, some_large, like)
        following = _scale_of_group(memory, count, like)  # here, where nothing waits for it
        store(memory, MAXIMUM, m)
        store(memory, EXP_MAX, exp_max)
        store(memory, LABEL, labels)

        # Sums leave out the target, or else all classes that attain the maximum. A softmax needs all, and has no loss.
        own, x_t, gap, mass = exp_max, m, zero, broadcast(scratch.row_mass, like)
        if kind == CLASS_INDEX:
            own, x_t = _targets_of_group(x, memory, lead, i, low, count, like)
        every = kind == NO_TARGET and form == GRADIENT
        if every:
            own = zero
        rest = _sums_of_group(memory, lead, classes, count, kind == CLASS_INDEX or every, exp_max, like)
        if kind == PROBABILITIES or uniform != 0.0:
            gap, own_mass = _dense_sums_of_group(operands, mode, memory, i, low, count, like)
            if kind == PROBABILITIES:
                mass = own_mass
        w_t = row_weights(operands, mode, scratch, labels, count, like)
        found = row_facts(mode, labels, w_t, m, exp_max, inverse, x_t, rest, own, gap, mass, like)
        norm, r, kept, whole, a_of_loss, r_of_loss = found
        log_norm = log1p(r_of_loss)
        log_sum = log_norm
        # With what m - x_t is rounded by, the loss is rounded twice, not three times.
        if kind == CLASS_INDEX and uniform == 0.0:
            gap, lost = two_sum(m, -x_t)
            log_sum = where(gap < np.inf, log_norm + lost, log_norm)
        value_sum = add_losses(value_sum, loss, i, low, count, whole, a_of_loss, log_sum, like)

        if form != LOSS_ONLY:
            factor = row_factors(operands, scratch, i, low, count, like)
            a, slope, at_target = gradient_facts(mode, factor, w_t, exp_max, rest, own, norm, kept, mass)
            store(memory, INVERSE, inverse)
            store(memory, R, r)
            store(memory, LOG_NORM, log_norm)
            store(memory, A, a)
            store(memory, SLOPE, slope)
            store(memory, FACTOR, factor)
            store(memory, AT_TARGET, at_target)
            written = _write_group(operands, mode, memory, lead, i, low, count, stop, by_line, written, like)
        m, exp_max, some_large = following
    return total(sum_of(value_sum))
