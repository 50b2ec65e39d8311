"""A tile of rows, vectors across rows, for few classes or for a class axis that is not last.

A tile (classes, lanes) is copied next to the core, where strides cost nothing.
"""

import numpy as np

from nbloss.cpu.simd import (
    add_wide,
    broadcast,
    first,
    inline,
    lanes,
    load,
    load_transposed,
    maximum,
    read,
    store,
    store_transposed,
    total,
    where,
    write,
    write_from,
)
from nbloss.cpu.targets import (
    CLASS_INDEX,
    NO_TARGET,
    PROBABILITIES,
    dense_gradient,
    mass_gap,
    row_loss,
    target_gradient,
)
from nbloss.cpu.vecmath import exp_difference, log1p
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF = -np.inf
X_T, W_T, KEPT, SCALE, ACTIVE, FIXED, ROW_FACTS = range(7)  # what a tile keeps for each of its rows


@inline
def _tile_targets(operands, mode, scratch, i, k, count, at, lead, like):
    """Look up what each row needs of its own target. FIXED is the loss of a row that is not ACTIVE."""
    x, t, _, weight, upstream, _, _ = operands
    kind, _, _, ignore, share, _ = mode
    tile, facts, labels, _, _, factor = scratch
    one = broadcast(1.0, like)
    store(facts, ACTIVE * lanes(like), one)
    store(facts, X_T * lanes(like), one)
    store(facts, FIXED * lanes(like), one)
    store(facts, W_T * lanes(like), one)
    store(facts, SCALE * lanes(like), broadcast(factor, like))
    if upstream.shape[0]:
        for c in range(count):
            facts[SCALE * lanes(like) + c] = upstream[i, k + c]
    store(facts, KEPT * lanes(like), one * (1.0 if kind == NO_TARGET else share if kind == CLASS_INDEX else 0.0))
    if kind == CLASS_INDEX:
        for c in range(count):
            label = np.int64(t[i, k + c])
            if label == ignore or label < 0 or label >= x.shape[1]:
                facts[ACTIVE * lanes(like) + c] = 0
                facts[FIXED * lanes(like) + c] = 0.0 if label == ignore else np.nan
                label = -1
            else:
                facts[X_T * lanes(like) + c] = tile[label * lead + at + c]
                if weight.shape[0]:
                    facts[W_T * lanes(like) + c] = weight[label]
                    facts[KEPT * lanes(like) + c] = share * weight[label]
            labels[c] = label


@inline
def _tile_mass_at(q, weight, mode, i, j, k, count, like):
    """Dense target mass of class j for the rows of a tile."""
    kind, _, _, _, share, uniform = mode
    mass = broadcast(uniform, like)
    if kind == PROBABILITIES:
        mass = mass + share * read(q[i, j], k, count, 0.0, like)
    return mass * weight[j] if weight.shape[0] else mass


@inline
def tiles(operands, mode, unit, like, scratch):
    """A tile of `width` vectors of rows: writes what is asked for, and returns the sum of their losses."""
    x, _, _, _, _, out, _ = operands
    _, form, past, _, _, _ = mode
    tile, _, _, width, _, _ = scratch
    classes = x.shape[1]
    step = lanes(like)
    lead = width * step  # the tile is (classes, width, lanes)
    per_plane = (x.shape[2] + lead - 1) // lead
    i = unit // per_plane
    start = (unit - i * per_plane) * lead
    stop = min(start + lead, x.shape[2])
    if x.strides[1] == x.itemsize and width == 1:
        for j in range(0, classes, step):
            load_transposed(tile, j * step, x[i], j, start, min(step, classes - j), stop - start, like)
    else:
        for j in range(classes):
            for k in range(start, stop, step):
                store(tile, j * lead + k - start, read(x[i, j], k, min(step, stop - k), 0.0, like))
    value_sum = 0.0
    for k in range(start, stop, step):
        value_sum += _tile_column(operands, mode, like, scratch, i, k, min(step, stop - k), k - start, lead)
    if form != LOSS_ONLY:
        if out.strides[1] == out.itemsize and width == 1:
            for j in range(0, classes, step):
                store_transposed(tile, j * step, out[i], j, start, min(step, classes - j), stop - start, like)
        else:
            for j in range(classes):
                write_from(tile, j * lead, out[i, j], start, stop, past, like)
    return value_sum


@inline
def _tile_column(operands, mode, like, scratch, i, k, count, at, lead):
    """One vector of rows: its classes lie at tile[at], tile[at + lead], …, where the result is left."""
    x, _, q, weight, _, _, loss = operands
    kind, form, _, _, _, uniform = mode
    tile, facts, labels, _, _, _ = scratch
    classes = x.shape[1]
    zero = broadcast(0.0, like)

    m = broadcast(NEG_INF, like)
    for j in range(classes):
        m = maximum(load(tile, j * lead + at, like), m)
    _tile_targets(operands, mode, scratch, i, k, count, at, lead, like)
    below = ties = gap = mass = zero
    for block in range(0, classes, 64):  # two levels of sums: the error grows with 64 + classes / 64
        below_block = gap_block = mass_block = zero
        for j in range(block, min(block + 64, classes)):
            v = load(tile, j * lead + at, like)
            e = exp_difference(v, m)
            if form == GRADIENT:
                store(tile, j * lead + at, e)
            top = e == 1.0
            below_block = below_block + where(top, 0.0, e)
            ties = where(top, ties + 1.0, ties)
            if kind == PROBABILITIES or uniform != 0.0:
                mass_j = _tile_mass_at(q, weight, mode, i, j, k, count, like)
                gap_block = gap_block + mass_gap(mass_j, m, v)
                mass_block = mass_block + mass_j
        below = below + below_block
        gap = gap + gap_block
        mass = mass + mass_block
    r = below + (ties - 1.0)
    log_norm = log1p(r)
    kept = load(facts, KEPT * lanes(like), like)
    x_t = load(facts, X_T * lanes(like), like)
    active = load(facts, ACTIVE * lanes(like), like) > 0.0

    if form == LOG_SOFTMAX:
        for j in range(classes):
            store(tile, j * lead + at, (load(tile, j * lead + at, like) - m) - log_norm)
    elif form == GRADIENT:
        scale = load(facts, SCALE * lanes(like), like)
        a = kept + mass
        slope = scale * a / (r + 1.0)
        for j in range(classes):
            e = load(tile, j * lead + at, like)
            y = slope * e
            if kind == PROBABILITIES:
                y = scale * dense_gradient(e, _tile_mass_at(q, weight, mode, i, j, k, count, like), a, r)
            elif uniform != 0.0:
                y = y - scale * _tile_mass_at(q, weight, mode, i, j, k, count, like)
            store(tile, j * lead + at, where(active, y, 0.0))
        if kind == CLASS_INDEX:
            slack = mass - uniform * load(facts, W_T * lanes(like), like)
            store(facts, SCALE * lanes(like), scale * target_gradient(x_t, m, r, a, slack))
            for c in range(count):
                if labels[c] >= 0:
                    tile[labels[c] * lead + at + c] = facts[SCALE * lanes(like) + c]

    if kind == NO_TARGET:
        value = m + log_norm
    else:
        value = where(active, row_loss(kept, m, x_t, gap, mass, log_norm), load(facts, FIXED * lanes(like), like))
    if loss.shape[1]:
        write(loss[i], k, count, value, like)
    return total(add_wide(broadcast(0.0, np.float64(0.0)), where(first(count, value), value, 0.0)))
