"""A vector of rows, one lane for each, and its classes one after the other: its sums, and its results in their place.

Class j of the vector lies at tile[at + j * lead], with another vector of the tile, or anything, after it.
"""

import numpy as np

from nbloss.cpu.given import Column
from nbloss.cpu.labels import labelled, without_class
from nbloss.cpu.per_row import gradient_facts, row_factors, row_facts, row_weights
from nbloss.cpu.simd import (
    broadcast,
    fma,
    inline,
    lanes,
    load,
    maximum,
    prefetch,
    prefetch_far,
    read,
    store,
    stream,
    where,
)
from nbloss.cpu.sums import add_to, sum_of
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES, add_gap, dense_gradient
from nbloss.cpu.vecmath import log1p, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX

# Classes that are summed before what rounding takes from their sum is known. Beside a class with nearly all mass, those
# that smoothing gives the same to lose the same: by blocks of 64, up to 25 ulp.
BLOCK, DENSE_BLOCK = 64, 16
SUMS = 9  # numbers that make the sums of a row, see `parts_of`


@inline
def _mass_at(q, weight, mode, i, j, k, count, like):
    """Dense target mass of class j for the vector of rows at k."""
    mass = broadcast(mode.uniform, like)
    if mode.kind == PROBABILITIES:
        mass = fma(mode.share, read(q[i, j], k, count, 0.0, like), mass)
    return mass * weight[j] if weight.shape[0] else mass


@inline
def column_of(i, k, count, labels, m, reference):
    """The vector of rows at k, whose maxima are m; its exponentials are relative to a reference that is no lower."""
    scale = scale_of(reference)
    exp_max = scaled_exp(m, scale)
    return Column(i, k, count, labels, m, scale, exp_max, 1.0 / exp_max)  # here, where nothing waits for the division


@inline
def parts_of(sums):
    """(sum of exponentials, gap, mass, how many attain the maximum), each with what rounding took; the target's x."""
    return sums[0:2], sums[2:4], sums[4:6], sums[6:8], sums[8]


@inline
def no_sums(like):
    """What `sum_classes` adds to, before the first class."""
    zero = broadcast(0.0, like)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero


@inline
def _exp_of_class(tile, place, scale, form, beside, like):
    """(x, its exponential, which for a gradient takes its place, the larger of `beside` and the vector after it)."""
    v = load(tile, place, like)
    beside = maximum(load(tile, place + lanes(like), like), beside)
    e = scaled_exp(v, scale)
    if form == GRADIENT:
        store(tile, place, e)
    return v, e, beside


@inline
def to_next_class(x, breadth, like):
    """From the last of `breadth` vectors of a class to the first one of the next."""
    return x.strides[1] // x.itemsize - (breadth - 1) * lanes(like)


@inline
def next_vector(ahead, left, breadth, next_class, like):
    """Where the vector after the one at `ahead` is, in the next class if none is `left`, and how many are left."""
    left -= 1
    ahead += lanes(like) if left else next_class
    return ahead, left if left else breadth


@inline
def _add_unless_target(labels, j, v, e, rest, x_t):
    """(rest + e, x_t), and of rows whose target is class j (rest, v)."""
    left_out = labelled(labels, j)
    return where(left_out, rest, rest + e), where(left_out, v, x_t)


@inline
def _add_unless_tied(v, m, e, rest, ties):
    """(rest + e, ties), and of rows whose maximum is v (rest, ties + 1)."""
    left_out = v == m
    return where(left_out, rest, rest + e), where(left_out, ties + 1.0, ties)


@inline
def sum_classes(operands, mode, column, tile, begin, end, at, lead, sums, fetched, breadth, like):
    """Add classes begin, …, end - 1 to the sums; for a gradient, their exponentials take their place.

    Beside it, x and q are fetched from `fetched` on: where, and the vectors to the end of `breadth` ones, after which
    the next class follows. Returns the sums, and the maxima of the vector after it in the tile: found in a loop of
    their own, 16 x 21 x 256 x 256 took 1.1 times as long. Targets without dense mass have loops of their own: with what
    the others need besides, AVX2's 16 registers did not suffice, and these took 1.07 to 1.1 times as long.
    """
    i, k, count, labels, m, scale, _, _ = column
    x, q, weight = operands.x, operands.q, operands.weight
    kind, form, uniform = mode.kind, mode.form, mode.uniform
    ahead, left = fetched
    next_class = to_next_class(x, breadth, like)
    # Sums leave out the target, or else all classes that attain the maximum.
    rest, gap, mass, ties, x_t = parts_of(sums)
    zero = broadcast(0.0, like)
    beside = broadcast(-np.inf, like)
    size = np.int64(BLOCK if kind == NO_TARGET or (kind == CLASS_INDEX and uniform == 0.0) else DENSE_BLOCK)
    for block in range(begin, end, size):  # sums of a block, and of these with what rounding takes from it
        rest_block = gap_block = mass_block = ties_block = zero
        last = min(block + size, end)
        if kind == CLASS_INDEX and uniform == 0.0:
            for j in range(block, last):
                v, e, beside = _exp_of_class(tile, j * lead + at, scale, form, beside, like)
                prefetch(x[i, 0], ahead, like)
                ahead, left = next_vector(ahead, left, breadth, next_class, like)
                rest_block, x_t = _add_unless_target(labels, j, v, e, rest_block, x_t)
        elif kind == NO_TARGET:
            for j in range(block, last):
                v, e, beside = _exp_of_class(tile, j * lead + at, scale, form, beside, like)
                prefetch(x[i, 0], ahead, like)
                ahead, left = next_vector(ahead, left, breadth, next_class, like)
                rest_block, ties_block = _add_unless_tied(v, m, e, rest_block, ties_block)
        else:
            for j in range(block, last):
                v, e, beside = _exp_of_class(tile, j * lead + at, scale, form, beside, like)
                prefetch(x[i, 0], ahead, like)
                if kind == PROBABILITIES:
                    prefetch_far(q[i, 0], ahead, like)
                ahead, left = next_vector(ahead, left, breadth, next_class, like)
                if kind == CLASS_INDEX:
                    rest_block, x_t = _add_unless_target(labels, j, v, e, rest_block, x_t)
                else:
                    rest_block, ties_block = _add_unless_tied(v, m, e, rest_block, ties_block)
                mass_j = _mass_at(q, weight, mode, i, j, k, count, like)
                gap_block = add_gap(gap_block, mass_j, m, v)
                mass_block = mass_block + mass_j
        rest = add_to(rest, rest_block)
        if kind != CLASS_INDEX:
            ties = add_to(ties, ties_block)
        if kind == PROBABILITIES or uniform != 0.0:
            gap, mass = add_to(gap, gap_block), add_to(mass, mass_block)
    return (*rest, *gap, *mass, *ties, x_t), beside


@inline
def sum_beside_turn(operands, mode, column, tile, classes, at, lead, ahead, turn, like):
    """As `sum_classes` of all classes, at most BLOCK, where none has dense mass; beside each, a vector is moved in
    `turn`, and one fetched from `ahead` on.
    """
    x = operands.x
    i, _, _, labels, m, scale, _, _ = column
    zero = broadcast(0.0, like)
    beside = broadcast(-np.inf, like)
    rest = ties = x_t = zero
    for j in range(classes):
        v, e, beside = _exp_of_class(tile, j * lead + at, scale, mode.form, beside, like)
        place = j * lanes(like)
        prefetch(x[i, 0], ahead + place, like)
        if turn.writes:
            stream(turn.out, turn.place + place, load(tile, turn.to + place, like))
        store(tile, turn.to + place, load(turn.x, turn.source + place, like))
        if mode.kind == CLASS_INDEX:
            rest, x_t = _add_unless_target(labels, j, v, e, rest, x_t)
        else:
            rest, ties = _add_unless_tied(v, m, e, rest, ties)
    return (rest, zero, zero, zero, zero, zero, ties, zero, x_t), beside


@inline
def facts_of(operands, mode, column, scratch, sums, like):
    """Of all sums: what `row_loss` is made of, with r in place of log1p(r), and what `finish_classes` needs."""
    i, k, count, labels, m, scale, exp_max, inverse = column
    kind, form = mode.kind, mode.form
    rest, gap, mass, ties, x_t = parts_of(sums)
    rest, ties, gap, mass = sum_of(rest), sum_of(ties), sum_of(gap), sum_of(mass)
    own = exp_max
    if kind == CLASS_INDEX:
        if mode.uniform != 0.0:  # known in float64: summed here, it was off by 90 ulp for 128256 classes
            mass = broadcast(scratch.row_mass, like)
        own = scaled_exp(x_t, scale)
    else:
        rest = rest + (ties - 1.0) * exp_max
        x_t = m
    w_t = row_weights(operands, mode, scratch, labels, count, like)
    norm, r, kept, whole, a_of_loss, r_of_loss = row_facts(
        mode, labels, w_t, m, exp_max, inverse, x_t, rest, own, gap, mass, like
    )
    log_norm = factor = a = slope = at_target = broadcast(0.0, like)
    if form == LOG_SOFTMAX:
        log_norm = log1p(r)
    elif form == GRADIENT:
        factor = row_factors(operands, scratch, i, k, count, like)
        a, slope, at_target = gradient_facts(mode, factor, w_t, exp_max, rest, own, norm, kept, mass)
    return (whole, a_of_loss, r_of_loss), (r, log_norm, factor, a, slope, at_target)


@inline
def finish_classes(operands, mode, column, tile, begin, end, at, lead, facts, like):
    """Make results of exponentials, or for log-softmax of the logits, of classes begin, …, end - 1, where they lie."""
    i, k, count, labels, m, _, exp_max, inverse = column
    q, weight, kind, uniform = operands.q, operands.weight, mode.kind, mode.uniform
    r, log_norm, factor, a, slope, at_target = facts
    if mode.form == LOG_SOFTMAX:
        for j in range(begin, end):
            store(tile, j * lead + at, (load(tile, j * lead + at, like) - m) - log_norm)
    elif mode.form == GRADIENT:
        idle = without_class(labels)
        for j in range(begin, end):
            e = load(tile, j * lead + at, like)
            y = slope * e
            if kind == PROBABILITIES:
                mass_j = _mass_at(q, weight, mode, i, j, k, count, like)
                y = dense_gradient(e * inverse, e == exp_max, mass_j, a, r)
            elif uniform != 0.0:
                y = y - _mass_at(q, weight, mode, i, j, k, count, like)
            y = factor * y
            if kind == CLASS_INDEX:
                y = where(idle, 0.0, where(labelled(labels, j), at_target, y))
            elif kind == NO_TARGET:
                y = where(e == exp_max, at_target, y)
            store(tile, j * lead + at, y)
