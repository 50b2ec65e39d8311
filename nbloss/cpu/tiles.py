"""A tile of rows, vectors across rows, for few classes or for a class axis that is not last.

A tile (classes, vectors of rows, lanes) is copied next to the core, where strides cost nothing.
"""

import numpy as np

from nbloss.cpu.labels import labelled, without_class
from nbloss.cpu.per_row import gradient_facts, row_factors, row_facts, row_labels, row_weights, scale_of_rows
from nbloss.cpu.simd import (
    add_wide,
    as_line,
    as_rows,
    broadcast,
    first,
    fma,
    inline,
    lanes,
    lent_to,
    line_before,
    load,
    load_transposed,
    maximum,
    prefetch,
    prefetch_far,
    read,
    read_into,
    store,
    store_transposed,
    total,
    where,
    write,
    write_from,
    write_lines,
)
from nbloss.cpu.targets import (
    CLASS_INDEX,
    NO_TARGET,
    PROBABILITIES,
    add_gap,
    dense_gradient,
    row_loss,
    two_sum,
)
from nbloss.cpu.vecmath import log1p, scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF = -np.inf
FACTS = 3  # numbers a row that its loss is made of


@inline
def _tile_mass_at(q, weight, mode, i, j, k, count, like):
    """Dense target mass of class j for the rows of a tile."""
    mass = broadcast(mode.uniform, like)
    if mode.kind == PROBABILITIES:
        mass = fma(mode.share, read(q[i, j], k, count, 0.0, like), mass)
    return mass * weight[j] if weight.shape[0] else mass


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
    high = start
    while high < stop:
        low, high = high, high + breadth * step
        if nontemporal and breadth > 1:  # tiles begin where lines of `out` do: 0.9 of the time
            high = line_before(out[i, 0], high, like)
        high = min(high, stop)
        if lined_up:
            m = broadcast(NEG_INF, like)
            for j in range(0, classes, step):
                top = load_transposed(tile, j * step, x[i], j, low, min(step, classes - j), high - low, like)
                m = maximum(top, m)
        else:
            for j in range(classes):
                read_into(tile, j * lead + before, x[i, j], low, high, like)
            m = broadcast(NEG_INF, like)
            for j in range(classes):
                m = maximum(load(tile, j * lead + before, like), m)
        for k in range(low, high, step):
            count, at = min(step, high - k), before + k - low
            fetched = _next_tile(x, low, k, breadth, lined_up, like)
            known = _tile_column(operands, mode, m, like, scratch, i, k, count, at, lead, fetched)
            m = known[3]
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
            else:
                for j in range(classes):
                    _write(tile, j * lead, before, out[i, j], low, high, low > start, high < stop, nontemporal, like)
    return _losses(operands.loss, tile, facts_at, facts_step, i, start, stop, like)


@inline
def _write(tile, at, before, out, low, high, is_later, more, nontemporal, like):
    """out[low:high], which lies in `tile` a vector behind `at`.

    Past the caches by whole lines: what is left of the last one is written with the next tile. Where two tiles wrote a
    part each, the line was read first, and all that is written later waited for it (16 x 21 x 256 x 256: 1.2 times).
    """
    begin, end = low, high
    if nontemporal and before:
        begin = line_before(out, low, like) if is_later else low
        end = line_before(out, high, like) if more else high
    write_from(tile, at + before + begin - low, out, begin, end, nontemporal, like)
    if end < high:
        store(tile, at, load(tile, at + high - low, like))


@inline
def _losses(loss, tile, facts_at, facts_step, i, start, stop, like):
    """The losses of a unit's rows, and their sum. Apart from all else, the logarithms of several vectors overlap."""
    step = lanes(like)
    value_sum = broadcast(0.0, np.float64(0.0))
    for k in range(start, stop, step):
        at = facts_at + k - start
        whole, a = load(tile, at, like), load(tile, at + facts_step, like)
        value = row_loss(whole, a, log1p(load(tile, at + 2 * facts_step, like)))
        if loss.shape[1]:
            write(loss[i], k, min(step, stop - k), value, like)
        value_sum = add_wide(value_sum, where(first(stop - k, value), value, 0.0))
    return total(value_sum)


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
    before = (k - low) // step * classes
    row = before // breadth
    column = before - row * breadth
    at = low + (breadth + 1 + column) * step
    return at + row * (x.strides[1] // x.itemsize), breadth - column


@inline
def _add(to, x):
    """(a sum, what rounding took from it) with x added."""
    total, lost = two_sum(to[0], x)
    return total, to[1] + lost


@inline
def _sum(parts):
    total, lost = parts
    return total + where(lost == lost, lost, 0.0)  # NaN where the sum is infinite


@inline
def _tile_column(operands, mode, m, like, scratch, i, k, count, at, lead, fetched):
    """One vector of rows with maxima m: its classes lie at tile[at], tile[at + lead], …, where the result is left.

    For what is `fetched` see `_next_tile`. Returns what `row_loss` is made of, with r in place of log1p(r), and the
    maxima of the vector beside it in the tile, or anything for the last one: found in a loop of their own,
    16 x 21 x 256 x 256 took 1.1 times as long.
    """
    x, q, weight = operands.x, operands.q, operands.weight
    kind, form, uniform = mode.kind, mode.form, mode.uniform
    tile = scratch.memory
    classes = x.shape[1]
    zero = broadcast(0.0, like)
    labels = row_labels(operands, mode, scratch, i, k, count, like)
    m, scale, exp_max = scale_of_rows(m)
    inverse = 1.0 / exp_max  # here, where nothing waits for it
    ahead, left = fetched
    breadth, next_class = scratch.breadth, x.strides[1] // x.itemsize - (scratch.breadth - 1) * lanes(like)
    # Sums leave out the target, or else all classes that attain the maximum.
    rest = gap = mass = ties = zero, zero
    x_t = zero
    beside = broadcast(NEG_INF, like)
    for block in range(0, classes, 64):  # sums of 64 classes, and of these with what rounding takes from it
        rest_block = gap_block = mass_block = ties_block = zero
        for j in range(block, min(block + 64, classes)):
            v = load(tile, j * lead + at, like)
            beside = maximum(load(tile, j * lead + at + lanes(like), like), beside)
            prefetch(x[i, 0], ahead, like)
            if kind == PROBABILITIES:
                prefetch_far(q[i, 0], ahead, like)
            left -= 1
            ahead += lanes(like) if left else next_class
            left = left if left else breadth
            e = scaled_exp(v, scale)
            if form == GRADIENT:
                store(tile, j * lead + at, e)
            if kind == CLASS_INDEX:
                left_out = labelled(labels, j)
                x_t = where(left_out, v, x_t)
            else:
                left_out = v == m
                ties_block = where(left_out, ties_block + 1.0, ties_block)
            rest_block = where(left_out, rest_block, rest_block + e)
            if kind == PROBABILITIES or uniform != 0.0:
                mass_j = _tile_mass_at(q, weight, mode, i, j, k, count, like)
                gap_block = add_gap(gap_block, mass_j, m, v)
                mass_block = mass_block + mass_j
        rest = _add(rest, rest_block)
        if kind != CLASS_INDEX:
            ties = _add(ties, ties_block)
        if kind == PROBABILITIES or uniform != 0.0:
            gap, mass = _add(gap, gap_block), _add(mass, mass_block)
    rest, ties, gap, mass = _sum(rest), _sum(ties), _sum(gap), _sum(mass)
    own = exp_max
    if kind == CLASS_INDEX:
        if uniform != 0.0:  # known in float64: summed here, it was off by 90 ulp for 128256 classes
            mass = broadcast(scratch.row_mass, like)
        own = scaled_exp(x_t, scale)
    else:
        rest = rest + (ties - 1.0) * exp_max
        x_t = m
    w_t = row_weights(operands, mode, scratch, labels, count, like)
    facts = row_facts(mode, labels, w_t, m, exp_max, inverse, x_t, rest, own, gap, mass, like)
    norm, r, kept, whole, a_of_loss, r_of_loss = facts

    if form == LOG_SOFTMAX:
        log_norm = log1p(r)
        for j in range(classes):
            store(tile, j * lead + at, (load(tile, j * lead + at, like) - m) - log_norm)
    elif form == GRADIENT:
        factor = row_factors(operands, scratch, i, k, count, like)
        a, slope, at_target = gradient_facts(mode, factor, w_t, exp_max, rest, own, norm, kept, mass)
        idle = without_class(labels)
        for j in range(classes):
            e = load(tile, j * lead + at, like)
            y = slope * e
            if kind == PROBABILITIES:
                mass_j = _tile_mass_at(q, weight, mode, i, j, k, count, like)
                y = dense_gradient(e * inverse, e == exp_max, mass_j, a, r)
            elif uniform != 0.0:
                y = y - _tile_mass_at(q, weight, mode, i, j, k, count, like)
            y = factor * y
            if kind == CLASS_INDEX:
                y = where(idle, 0.0, where(labelled(labels, j), at_target, y))
            elif kind == NO_TARGET:
                y = where(e == exp_max, at_target, y)
            store(tile, j * lead + at, y)

    return whole, a_of_loss, r_of_loss, beside
