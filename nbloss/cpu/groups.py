"""Rows of some tens to some hundreds of classes, a group of as many as a vector has lanes at a time.

Vectors run along the classes, which lie side by side, as in ``rows``; what is one number a row is worked out for the
whole group, as in ``tiles``. So short rows are neither transposed nor waited for one by one. The last vector of a row
ends with it, over a part of the one before where need be: no vector is partial.
"""

import numpy as np

from nbloss.cpu.labels import label_at
from nbloss.cpu.per_row import (
    add_losses,
    gradient_facts,
    nan_if_infinite,
    row_factors,
    row_facts,
    row_labels,
    row_weights,
)
from nbloss.cpu.results import mass_at
from nbloss.cpu.simd import (
    as_line,
    broadcast,
    first,
    fma,
    inline,
    lanes,
    lent_to,
    load,
    load_one,
    maxima,
    maximum,
    prefetch,
    row_of,
    store,
    store_one,
    total,
    totals,
    where,
    write_lines,
)
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES, add_gap, dense_gradient, two_sum
from nbloss.cpu.vecmath import log1p, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF = -np.inf
# Where in a group's memory its facts lie, one for each row. Behind them, at FOLDED: two times a vector for each row, to
# be folded; room for two vectors; the rows' exponentials, one row after the other.
TAKEN, LOWEST, ROUND_TO, MAXIMUM, EXP_MAX, INVERSE, LABEL, OWN = (16 * k for k in range(8))
X_T, R, LOG_NORM, A, SLOPE, FACTOR, AT_TARGET, FOLDED = (16 * k for k in range(8, 16))


@inline
def _row_maximum(x, like):
    """The maximum of a row, by lanes."""
    step = lanes(like)
    last = x.shape[0] - step
    top = broadcast(NEG_INF, like)
    for at in range(0, x.shape[0], step):
        top = maximum(load(x, min(at, last), like), top)
    return top


@inline
def _row_exps(exps, start, x, some_large, scale, other, q, ahead, like):
    """exps[start:] = scaled_exp of a row. Returns the maximum of another row, by lanes.

    Loading that one meanwhile overlaps memory with arithmetic. What lies `ahead` is fetched.
    """
    step = lanes(like)
    last = x.shape[0] - step
    scale = some_large, *scale
    top = broadcast(NEG_INF, like)
    for at in range(0, x.shape[0], step):
        j = min(at, last)
        top = maximum(load(other, j, like), top)
        prefetch(x, j + ahead, like)
        prefetch(q, j + ahead, like)
        store(exps, start + j, scaled_exp(load(x, j, like), scale))
    return top


@inline
def _last_exps(exps, start, classes, like):
    """The last vector of a row's exponentials, 0 where the one before holds them too."""
    e = load(exps, start + classes - lanes(like), like)
    return where(first(-classes % lanes(like), e), 0.0, e)


@inline
def _row_sum(exps, start, classes, like):
    """The sum of a row's exponentials, by lanes."""
    a = _last_exps(exps, start, classes, like)
    b = broadcast(0.0, like)
    for at in range(start, start + classes - lanes(like), lanes(like)):
        a, b = b, a + load(exps, at, like)
    return a + b


@inline
def _row_rest(exps, start, classes, exp_max, like):
    """(the sum of a row's exponentials but for those at the maximum, the number of these), by lanes."""
    e = _last_exps(exps, start, classes, like)
    zero = broadcast(0.0, like)
    rest, ties = where(e == exp_max, zero, e), where(e == exp_max, 1.0, zero)
    for at in range(start, start + classes - lanes(like), lanes(like)):
        e = load(exps, at, like)
        rest, ties = where(e == exp_max, rest, rest + e), where(e == exp_max, ties + 1.0, ties)
    return rest, ties


@inline
def _dense_sums(x, q, weight, mode, m, like):
    """(sum_j q_j (m - x_j), sum_j q_j) over the dense part of a row's target mass, by lanes."""
    classes, step = x.shape[0], lanes(like)
    last = classes - step
    mass = where(first(-classes % step, m), 0.0, mass_at(q, weight, mode, last, step, like))
    gap = add_gap(broadcast(0.0, like), mass, m, load(x, last, like))
    for j in range(0, last, step):
        mass_j = mass_at(q, weight, mode, j, step, like)
        gap = add_gap(gap, mass_j, m, load(x, j, like))
        mass = mass + mass_j
    return gap, mass


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
def _write_row(x, q, weight, out, mode, memory, k, start, like):
    """What is asked for of the row whose facts lie in lane k, but for the gradient at its target."""
    kind, uniform = mode.kind, mode.uniform
    classes, step = out.shape[0], lanes(like)
    last = classes - step
    if mode.form == LOG_SOFTMAX:
        m, log_norm = load_one(memory, MAXIMUM + k, like), load_one(memory, LOG_NORM + k, like)
        y = (load(x, last, like) - m) - log_norm  # before any of it is overwritten, where `out` is x
        for j in range(0, last, step):
            store(out, j, (load(x, j, like) - m) - log_norm)
        store(out, last, y)
        return
    exp_max, at_target = load_one(memory, EXP_MAX + k, like), load_one(memory, AT_TARGET + k, like)
    factor, slope = load_one(memory, FACTOR + k, like), load_one(memory, SLOPE + k, like)
    if kind == NO_TARGET:
        for at in range(0, classes, step):
            j = min(at, last)
            e = load(memory, start + j, like)
            store(out, j, where(e == exp_max, at_target, slope * e))
    elif kind == PROBABILITIES or (uniform != 0.0 and weight.shape[0]):
        a, r = load_one(memory, A + k, like), load_one(memory, R + k, like)
        inverse = load_one(memory, INVERSE + k, like)
        for at in range(0, classes, step):
            j = min(at, last)
            e = load(memory, start + j, like)
            mass = mass_at(q, weight, mode, j, step, like)
            y = slope * e - mass
            if kind == PROBABILITIES:
                y = dense_gradient(e * inverse, e == exp_max, mass, a, r)
            store(out, j, factor * y)
    else:
        # What smoothing takes from every class; -0.0 changes no zero.
        shift = factor * -uniform if uniform != 0.0 else broadcast(-0.0, like)
        for at in range(0, classes, step):
            j = min(at, last)
            store(out, j, fma(factor, slope * load(memory, start + j, like), shift))


@inline
def groups(operands, mode, unit, like, scratch):
    """`per_unit` rows: writes what is asked for, and returns the sum of their losses."""
    x, _, q, weight, _, out, loss = operands
    kind, form, uniform = mode.kind, mode.form, mode.uniform
    memory, per_unit = scratch.memory, scratch.per_unit
    classes, step = x.shape[1], lanes(like)
    per_plane = (x.shape[2] + per_unit - 1) // per_unit
    i = unit // per_plane
    start = (unit - i * per_plane) * per_unit
    stop = min(start + per_unit, x.shape[2])
    other_folded = FOLDED + step * step
    exps = other_folded + (step + 2) * step
    lead = (classes + step - 1) // step * step
    ahead = 2 * step * (x.strides[2] // x.itemsize)
    # By whole lines, see ``tiles``: finished rows lie from two vectors before the exponentials on, where one vector may
    # wait for the rest of its line, and where none is written over an exponential that is still needed.
    by_line = mode.nontemporal and out.strides[2] == classes * out.itemsize
    written = start * classes
    every = kind == NO_TARGET and form == GRADIENT
    zero = broadcast(0.0, like)
    value_sum = broadcast(0.0, np.float64(0.0))
    for k in range(min(step, stop - start)):
        store(memory, FOLDED + k * step, _row_maximum(row_of(x, i, start + k), like))
    m, exp_max, some_large = _scale_of_group(memory, min(step, stop - start), like)
    for low in range(start, stop, step):
        count = min(step, stop - low)
        labels = row_labels(operands, mode, scratch, i, low, count, like)
        inverse = 1.0 / exp_max
        for k in range(count):
            taken, lowest = load_one(memory, TAKEN + k, like), load_one(memory, LOWEST + k, like)
            scale = taken, lowest, load_one(memory, ROUND_TO + k, like)
            row, other = row_of(x, i, low + k), row_of(x, i, min(low + k + step, stop - 1))
            masses, at = row_of(q, i, low + k), exps + k * lead
            # Asked before the loop, 1.05 to 1.1 times faster; by parts of their own, or LLVM merges the calls.
            if some_large:
                top = _row_exps(memory, at, row, True, scale, other, masses, ahead, like)
            else:
                top = _row_exps(memory, at, row, False, scale, other, masses, ahead, like)
            store(memory, FOLDED + k * step, top)
        following = _scale_of_group(memory, count, like)  # here, where nothing waits for it
        store(memory, MAXIMUM, m)
        store(memory, EXP_MAX, exp_max)
        store(memory, LABEL, labels)

        # Sums leave out the target, or else all classes that attain the maximum. A softmax needs all, and has no loss.
        own, x_t, gap, mass = exp_max, m, zero, broadcast(scratch.row_mass, like)
        if kind == CLASS_INDEX:
            for k in range(count):
                label = label_at(memory, LABEL + k)
                label = label if label > 0 else np.int64(0)
                at = exps + k * lead + label
                store_one(memory, OWN + k, load_one(memory, at, like))
                store_one(memory, X_T + k, load_one(row_of(x, i, low + k), label, like))
                store_one(memory, at, zero)
            own, x_t = load(memory, OWN, like), load(memory, X_T, like)
        if every:
            own = zero
        if kind == CLASS_INDEX or every:
            for k in range(count):
                store(memory, FOLDED + k * step, _row_sum(memory, exps + k * lead, classes, like))
            rest = totals(memory, FOLDED, like)
        else:
            for k in range(count):
                found = _row_rest(memory, exps + k * lead, classes, load_one(memory, EXP_MAX + k, like), like)
                store(memory, FOLDED + k * step, found[0])
                store(memory, other_folded + k * step, found[1])
            rest = totals(memory, FOLDED, like) + (totals(memory, other_folded, like) - 1.0) * exp_max
        if kind == PROBABILITIES or uniform != 0.0:
            for k in range(count):
                row, m_k = row_of(x, i, low + k), load_one(memory, MAXIMUM + k, like)
                found = _dense_sums(row, row_of(q, i, low + k), weight, mode, m_k, like)
                store(memory, FOLDED + k * step, found[0])
                store(memory, other_folded + k * step, found[1])
            gap = totals(memory, FOLDED, like)
            if kind == PROBABILITIES:
                mass = totals(memory, other_folded, like)
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
            end = (low + count) * classes
            values = lent_to(out, memory, exps - 2 * step, end - written)
            for k in range(count):
                target = row_of(out, i, low + k)
                if by_line:
                    target = lent_to(out, values, (low + k) * classes - written, classes)
                label = label_at(memory, LABEL + k)
                if kind == CLASS_INDEX and label < 0:
                    for at in range(0, classes, step):
                        store(target, min(at, classes - step), zero)
                else:
                    row, other = row_of(x, i, low + k), row_of(q, i, low + k)
                    _write_row(row, other, weight, target, mode, memory, k, exps + k * lead, like)
                    if kind == CLASS_INDEX:
                        store_one(target, label, load_one(memory, AT_TARGET + k, like))
            if by_line:
                written = write_lines(values, as_line(out[i]), written, end, low + count < stop, like)
        m, exp_max, some_large = following
    return total(value_sum)
