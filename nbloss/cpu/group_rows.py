"""What is done with one row of a group (see ``groups``), vectors along its classes.

The last vector of a row ends with it, over a part of the one before where need be: no vector is partial.
"""

import numpy as np

from nbloss.cpu.results import mass_at
from nbloss.cpu.simd import broadcast, first, fma, inline, lanes, load, load_one, maximum, prefetch, store, where
from nbloss.cpu.targets import NO_TARGET, PROBABILITIES, add_gap, dense_gradient
from nbloss.cpu.vecmath import scaled_exp
from nbloss.problem import LOG_SOFTMAX

NEG_INF = -np.inf
# Where in a group's memory its facts lie, one for each row. Behind them: from FOLDED on two times a vector for each
# row, to be folded, and room for two vectors; from EXPS on the rows' exponentials, one row after the other.
TAKEN, LOWEST, ROUND_TO, MAXIMUM, EXP_MAX, INVERSE, LABEL, OWN = (16 * k for k in range(8))
X_T, R, LOG_NORM, A, SLOPE, FACTOR, AT_TARGET, FOLDED = (16 * k for k in range(8, 16))
EXPS = FOLDED + (2 * 16 + 2) * 16


def room_of_group(classes, step):
    """Elements of memory for a group; exponentials of a row take whole vectors."""
    return EXPS + (classes + step) * step


@inline
def row_maximum(x, like):
    """The maximum of a row, by lanes."""
    step = lanes(like)
    last = x.shape[0] - step
    top = broadcast(NEG_INF, like)
    for at in range(0, x.shape[0], step):
        top = maximum(load(x, min(at, last), like), top)
    return top


@inline
def row_exps(exps, start, x, some_large, scale, other, q, ahead, like):
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
def row_sum(exps, start, classes, like):
    """The sum of a row's exponentials, by lanes."""
    a = _last_exps(exps, start, classes, like)
    b = broadcast(0.0, like)
    for at in range(start, start + classes - lanes(like), lanes(like)):
        a, b = b, a + load(exps, at, like)
    return a + b


@inline
def row_rest(exps, start, classes, exp_max, like):
    """(the sum of a row's exponentials but for those at the maximum, the number of these), by lanes."""
    e = _last_exps(exps, start, classes, like)
    zero = broadcast(0.0, like)
    rest, ties = where(e == exp_max, zero, e), where(e == exp_max, 1.0, zero)
    for at in range(start, start + classes - lanes(like), lanes(like)):
        e = load(exps, at, like)
        rest, ties = where(e == exp_max, rest, rest + e), where(e == exp_max, ties + 1.0, ties)
    return rest, ties


@inline
def dense_sums(x, q, weight, mode, m, like):
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
def write_row(x, q, weight, out, mode, memory, k, start, like):
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
