"""Rows, vectors along the classes, for rows of any length.

Exponentials of a row are kept, so that it is read once (for 32768 classes 1.3 times faster than to compute them twice).
A long row is written while the next one is summed: a chunk of it, and then the same chunk of the next one is summed,
whose exponentials take the place of those. So memory is busy all the time (1.15 times faster).
"""

import numpy as np

from nbloss.cpu.per_row import gradient_facts
from nbloss.cpu.results import clear_row, dense_gap
from nbloss.cpu.simd import (
    aligned_at,
    broadcast,
    first_lane,
    inline,
    is_single,
    lane,
    lanes,
    largest,
    load,
    load_first,
    load_one,
    maximum,
    only,
    prefetch,
    prefetch_far,
    store,
    take,
    total,
    where,
)
from nbloss.cpu.sums import add_to, add_wide_to, no_sum, sum_of
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES, add_gap, row_loss
from nbloss.cpu.unwritten import CHUNK, SHORT, TERMS, classes_of, put_off, write_chunk
from nbloss.cpu.vecmath import log1p, scale_change, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF, NAN = -np.inf, np.nan
LOWEST_32, LOWEST_64 = float(np.finfo(np.float32).min), float(np.finfo(np.float64).min)
# How far above a long row's maximum its reference is set. Until the maximum passes it, nothing is scaled anew (without
# it, half of a row of normal numbers would be: 1.06 times as long). It costs e^-4 of the range, which `scaled_exp` has
# to spare.
MARGIN = 4.0
NEAR, FAR = 1024, 8192  # elements ahead of which a long row is fetched, into the first-level and second-level cache


@inline
def _maximum(x, start, stop, like):
    step = lanes(like)
    a = broadcast(NEG_INF, like)
    b = a
    j = start
    while j + 2 * step <= stop:
        a = maximum(load(x, j, like), a)
        b = maximum(load(x, j + step, like), b)
        j += 2 * step
    while j < stop:
        a = maximum(take(x, j, min(step, stop - j), NEG_INF, like), a)
        j += step
    return largest(maximum(a, b))


@inline
def _place(x, start, stop, value, like):
    """The first index from `start` on at which x holds `value`; any from there on if none does, or if x holds NaN."""
    step = lanes(like)
    j = start
    while j + 4 * step < stop:
        low = maximum(load(x, j, like), load(x, j + step, like))
        high = maximum(load(x, j + 2 * step, like), load(x, j + 3 * step, like))
        if first_lane(maximum(low, high) == value) < step:
            break
        j += 4 * step
    while j < stop:
        k = first_lane(take(x, j, min(step, stop - j), NAN, like) == value)
        if k < step:
            return j + k
        j += step
    return start


@inline
def _distances(classes, short, dense):
    """How many elements ahead x is fetched into the first-level cache, and q, which is x if there are no probabilities,
    into the second-level one; 0 is not at all.

    The fourth short row from here is 1.2 times faster than the second, and for losses alone the eighth besides up to
    1.05 times; the next row of probabilities 1.05 to 1.2 times faster than where they are read. A long row takes 0.85
    to 0.9 of the time it does when it is fetched as far ahead, but into the first-level cache alone.
    """
    if short:
        return 4 * classes, classes if dense else 8 * classes
    return np.int64(FAR if dense else NEAR), np.int64(0 if dense else FAR)


@inline
def _sum_vectors(x, start, stop, some_large, scale, other, offset, q, distances, exps, keep, s, top, like):
    """Whole vectors of a chunk: what `_sum_chunk` gives, added to s and top."""
    near, far = distances
    scale = some_large, *scale
    for j in range(start, stop, lanes(like)):
        top = maximum(load(other, j + offset, like), top)
        prefetch(x, j + near, like)
        prefetch_far(q, j + far, like)
        e = scaled_exp(load(x, j, like), scale)
        if keep:
            store(exps, j, e)
        s = s + e
    return s, top


@inline
def _sum_chunk(x, start, stop, left_out, scale, other, offset, q, distances, exps, keep, like):
    """The sum, by lanes, of scaled_exp over x[start:stop] without x[left_out]; `exps` gets its terms if `keep`.

    Beside it the maximum, by lanes, of as many elements of `other` at `offset` from there: loading what is summed next
    overlaps memory with arithmetic, 1.2 times faster than a pass of its own. What comes later is fetched.
    """
    step = lanes(like)
    some_large, c, lowest, round_to = scale
    # One value in every lane: told so, LLVM holds each in one of 16 registers instead of two.
    c, lowest, round_to = lane(c, 0), lane(lowest, 0), lane(round_to, 0)
    fixed = broadcast(c, like), broadcast(lowest, like), broadcast(round_to, like)
    scale = some_large, *fixed
    s = broadcast(0.0, like)
    top = broadcast(NEG_INF, like)
    whole = start + (stop - start) // step * step
    split = start + (left_out - start) // step * step if start <= left_out < whole else whole
    begin, end = start, split
    for _ in range(2):  # before and after the vector of x[left_out]: no other pays for it
        if some_large:  # asked before the loop, 1.03 times faster; see ``groups``
            s, top = _sum_vectors(x, begin, end, True, fixed, other, offset, q, distances, exps, keep, s, top, like)
        else:
            s, top = _sum_vectors(x, begin, end, False, fixed, other, offset, q, distances, exps, keep, s, top, like)
        if end < whole:
            e = scaled_exp(load(x, end, like), scale)
            if keep:
                store(exps, end, e)
            s = where(only(left_out - end, e), s, s + e)
            top = maximum(load(other, end + offset, like), top)
        begin, end = split + step, whole
    if whole < stop:
        e = scaled_exp(load_first(x, whole, stop - whole, NEG_INF, like), scale)
        if keep:
            store(exps, whole, e)
        s = where(only(left_out - whole, e), s, s + e)
        top = maximum(load_first(other, whole + offset, stop - whole, NEG_INF, like), top)
    return s, top


@inline
def _row_sum(x, q, operands, mode, target, top, following, unwritten, scratch, like):
    """(m, index left out, reference, scale, whether exponentials are kept, sum without it) of a row, and the maximum of
    the row after a short one.

    The maximum of a short row, `top`, was found with the row before, or is NaN. A long one has one for each chunk:
    online log-sum-exp, which reads memory once. Exponentials are relative to a `reference`, which is the maximum, or up
    to MARGIN more in a long row. Left out is the target, or else one class that attains m; a softmax needs the sum of
    every class. Before a chunk is summed, the same chunk of the row `unwritten` is written, if there is one.
    """
    kind, form, exps = mode.kind, mode.form, scratch.memory
    n = x.shape[0]
    step = lanes(like)
    size = CHUNK * step
    short = n <= SHORT * step
    every = kind == NO_TARGET and form == GRADIENT
    distances = _distances(n, short, kind == PROBABILITIES)
    keep = form == GRADIENT and exps.shape[0] > n + TERMS
    left_out = target
    found = False
    m = broadcast(LOWEST_32 if is_single(broadcast(0.0, like)) else LOWEST_64, like)
    reference = lane(m, 0)
    scale = scale_of(m)
    none = broadcast(0.0, np.float64(0.0))
    rest = no_sum()
    beyond = broadcast(NEG_INF, like)
    written = np.int64(0)
    for start in range(0, n, size):
        stop = min(start + size, n)
        end = n if short else stop
        if top != top:
            top = _maximum(x, start, end, like)
        if top > lane(m, 0) or (top == lane(m, 0) and not found):  # LOWEST, at first, a row may hold too
            if target < 0 and not every:
                if found:  # the class left out so far is no longer the largest: its term joins the sum
                    rest = add_to(rest, where(only(0, none), np.float64(lane(scaled_exp(m, scale), 0)), none))
                left_out = _place(x, start, end, top, like)
            m = broadcast(top, like)
            if top > reference or not found:
                reference = top if short else top + type(like)(MARGIN)
                former, scale = scale, scale_of(broadcast(reference, like))
                if found:
                    change = scale_change(former, scale)
                    rest = rest[0] * change * 2.0**-64, rest[1] * change * 2.0**-64
                    # No power of two: what was kept would be rounded once more, and is computed anew instead.
                    keep = keep and not (former[0] or scale[0])
            found = True
        other, offset = following, np.int64(0)
        if not short:
            other, offset = x, size if stop + size <= n else offset
        written = write_chunk(operands, mode, unwritten, written, stop, scratch, like)
        s, t = _sum_chunk(x, start, stop, left_out, scale, other, offset, q, distances, exps, keep, like)
        rest = add_wide_to(rest, s)
        beyond = maximum(t, beyond)
        if not short:
            top = largest(t) if offset else type(like)(NAN)
            if keep:
                exps[n + step + start // size] = reference
    if not found:  # -inf and NaN only
        m = broadcast(NAN, like)
    return m, left_out, reference, scale, keep, total(sum_of(rest)), largest(beyond) if short else type(like)(NAN)


@inline
def _row(operands, mode, i, top, following, unwritten, scratch, like):
    """Sum row i, and write the row `unwritten` meanwhile.

    Returns what the loss of row i is made of, the maximum of the row that follows, and the row that is to be written
    next. Maxima, for short rows only, are NaN where they are not known; no row is -1.
    """
    x, t, q, weight, upstream, out, _ = operands
    kind, _, form, nontemporal, ignore, share, uniform = mode
    row, masses = classes_of(x, i), classes_of(q, i)
    n = row.shape[0]
    target = np.int64(-1)
    w_t = type(like)(1)
    x_t = type(like)(0)
    kept = type(like)(1 if kind == NO_TARGET else 0)
    if kind == CLASS_INDEX:
        target = np.int64(t[i, 0])
        if target == ignore or target < 0 or target >= n:
            if form != LOSS_ONLY:
                clear_row(classes_of(out, i), nontemporal, like)
            return (0.0, 0.0, 0.0, 0.0, 0.0 if target == ignore else NAN, 0.0), type(like)(NAN), unwritten
        x_t = lane(load_one(row, target, like), 0)
        if weight.shape[0]:
            w_t = weight[target]
        kept = share * w_t
    if form != LOSS_ONLY and nontemporal and aligned_at(out[i, n:, 0], like) != 0:
        # Stores past the caches would wait until the line that two rows share is there: 1.2 times as long at 1000.
        prefetch(classes_of(out, i), n - 1, like)
    m, left_out, reference, scale, keep, rest, top = _row_sum(
        row, masses, operands, mode, target, top, following, unwritten, scratch, like
    )
    exp_max = np.float64(lane(scaled_exp(m, scale), 0))
    norm, own = rest, 0.0
    if left_out >= 0:
        v = load_one(row, left_out, like)
        own = np.float64(lane(scaled_exp(v, scale), 0))
        norm = rest + own
        r = (rest if lane(v, 0) == lane(m, 0) else norm - exp_max) / exp_max
    else:
        r = (norm - exp_max) / exp_max
    gap, mass = 0.0, scratch.row_mass
    if kind == PROBABILITIES or uniform != 0.0:
        gap, own_mass = dense_gap(row, masses, weight, mode, m, like)
        if kind == PROBABILITIES:
            mass = own_mass
    if form != LOSS_ONLY:
        log_norm = broadcast(0.0, like)
        if form == LOG_SOFTMAX:
            log_norm = broadcast(lane(log1p(broadcast(r, np.float64(0.0))), 0), like)
        factor = broadcast(upstream[i, 0] if upstream.shape[0] else scratch.own_factor, like)
        of_max, others, of_target = broadcast(exp_max, like), broadcast(rest, like), broadcast(own, like)
        a, slope, at_target = gradient_facts(
            mode, factor, w_t, of_max, others, of_target, broadcast(norm, like), kept, broadcast(mass, like)
        )
        if kind == NO_TARGET and form == GRADIENT and lane(at_target, 0) == 1.0:  # products with the slope miss it
            target = _place(row, np.int64(0), n, lane(m, 0), like)
        # What smoothing takes from every class, if it takes the same; -0.0 changes no zero.
        shift = factor * -uniform if uniform != 0.0 else broadcast(-0.0, like)
        put_off(scratch, m, r, log_norm, factor, a, slope, shift, of_max, at_target, reference, target, keep)
        unwritten = i
    return (np.float64(lane(m, 0)), np.float64(x_t), r, np.float64(kept), gap, np.float64(mass)), top, unwritten


@inline
def rows(operands, mode, unit, like, scratch):
    """`per_unit` rows, one after the other: writes what is asked for, and returns the sum of their losses."""
    x, loss = operands.x, operands.loss
    start = unit * scratch.per_unit
    stop = min(start + scratch.per_unit, x.shape[0])
    m = broadcast(0.0, np.float64(0.0))
    x_t = r = kept = gap = mass = m
    top = type(like)(NAN)
    n = x.shape[1]
    size = CHUNK * lanes(like)
    short = n <= SHORT * lanes(like)
    unwritten = np.int64(-1)
    for i in range(start, stop):
        following = classes_of(x, min(i + 1, stop - 1))
        found, top, unwritten = _row(operands, mode, i, top, following, unwritten, scratch, like)
        its_m, its_x_t, its_r, its_kept, its_gap, its_mass = found
        here = only(i - start, m)
        m, x_t, r = where(here, its_m, m), where(here, its_x_t, x_t), where(here, its_r, r)
        kept, gap, mass = where(here, its_kept, kept), where(here, its_gap, gap), where(here, its_mass, mass)
        if short or i == stop - 1:  # a short row is in the first-level cache now; the last one has no next
            written = np.int64(0)
            for first in range(0, n, n if short else size):
                end = n if short else min(first + size, n)
                written = write_chunk(operands, mode, unwritten, written, end, scratch, like)
            unwritten = np.int64(-1)
    # The losses of all rows in float64, rounded once.
    value = row_loss(add_gap(gap, kept, m, x_t), kept + mass, log1p(r))
    if loss.shape[1]:
        for i in range(start, stop):
            loss[i, 0] = lane(value, i - start)
    return total(value)
