"""Rows, vectors along the classes, for rows of any length.

The row is read from memory once: what its second look needs is still in the cache.
"""

import numpy as np

from nbloss.cpu.results import dense_gap, fill_row, write_row
from nbloss.cpu.simd import (
    add_wide,
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
    store,
    take,
    total,
    where,
)
from nbloss.cpu.targets import (
    CLASS_INDEX,
    NO_TARGET,
    PROBABILITIES,
    add_gap,
    row_loss,
    target_gradient,
)
from nbloss.cpu.vecmath import exp, log1p, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF, NAN = -np.inf, np.nan
LOWEST_32, LOWEST_64 = float(np.finfo(np.float32).min), float(np.finfo(np.float64).min)
CHUNK = 32  # vectors of a row that are summed while the maximum of the next ones is found


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
def _sum_chunk(x, start, stop, left_out, scale, other, offset, q, ahead, exps, keep, like):
    """The sum, by lanes, of scaled_exp over x[start:stop] without x[left_out]; its terms are kept in `exps`.

    Beside it the maximum, by lanes, of as many elements of `other` at `offset` from there: loading what is summed next
    overlaps memory with arithmetic, 1.2 times faster than a pass of its own. Of class probabilities what lies `ahead`
    is fetched (1.05 to 1.2 times faster than where they are read). So is the fourth short row from here, 1.2 times
    faster than the second; of long rows, where `ahead` is 0, the processor fetches better by itself (1.1 to 1.2 times
    faster for 32768 to 128256 classes).
    """
    step = lanes(like)
    s = broadcast(0.0, like)
    top = broadcast(NEG_INF, like)
    whole = start + (stop - start) // step * step
    split = start + (left_out - start) // step * step if start <= left_out < whole else whole
    begin, end = start, split
    for _ in range(2):  # before and after the vector of x[left_out]: no other pays for it
        for j in range(begin, end, step):
            e = scaled_exp(load(x, j, like), scale)
            if keep:
                store(exps, j, e)
            s = s + e
            top = maximum(load(other, j + offset, like), top)
            if ahead:
                prefetch(x, j + 4 * ahead)
                prefetch(q, j + ahead)
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
def _row_sum(x, q, top, target, following, exps, kind, form, like):
    """(m, index left out, scale, sum without it) of a row, and the maximum of the row that follows a short one.

    The maximum of a short row, `top`, was found with the row before, or is NaN. A long one has one for each chunk:
    online log-sum-exp, which reads memory once. Left out is the target, or else one class that attains m; a
    softmax needs the sum of `every` class.
    """
    n = x.shape[0]
    step = lanes(like)
    size = CHUNK * step
    short = exps.shape[0] > 0
    every = kind == NO_TARGET and form == GRADIENT
    keep = short and form == GRADIENT
    left_out = target
    found = False
    m = broadcast(LOWEST_32 if is_single(broadcast(0.0, like)) else LOWEST_64, like)
    scale = scale_of(m)
    exp_max = type(like)(1)  # scaled_exp(m)
    rest = broadcast(0.0, np.float64(0.0))
    beyond = broadcast(NEG_INF, like)
    for start in range(0, n, size):
        stop = min(start + size, n)
        end = n if short else stop
        if top != top:
            top = _maximum(x, start, end, like)
        former = lane(m, 0)  # at first the lowest finite number, which a row may hold too: hence `found`
        if top > former or (top == former and not found):
            if target < 0 and not every:
                if found:  # the class left out so far is no longer the largest: its term, exp(0), joins the sum
                    rest = where(only(0, rest), rest + np.float64(exp_max), rest)
                left_out = _place(x, start, end, top, like)
            m = broadcast(top, like)
            scale = scale_of(m)
            former_exp_max, exp_max = exp_max, lane(scaled_exp(m, scale), 0)
            if found:
                shrink = exp(broadcast(np.float64(former) - np.float64(top), np.float64(0.0)))
                rest = rest * (shrink / np.float64(former_exp_max)) * np.float64(exp_max)
            found = True
        other, offset, ahead = following, np.int64(0), n
        if not short:
            other, offset, ahead = x, size if stop + size <= n else offset, np.int64(0)
        s, t = _sum_chunk(x, start, stop, left_out, scale, other, offset, q, ahead, exps, keep, like)
        rest = add_wide(rest, s)
        beyond = maximum(t, beyond)
        if not short:
            top = largest(t) if offset else type(like)(NAN)
    if not found:  # -inf and NaN only
        m = broadcast(NAN, like)
    return m, left_out, scale, np.float64(exp_max), total(rest), largest(beyond)


@inline
def _row(operands, mode, i, top, following, scratch, like):
    """One row: writes what is asked for. Returns what its loss is made of, and the maximum of the row that follows.

    Maxima, for short rows only, are NaN where they are not known.
    """
    x, t, q, weight, upstream, out, _ = operands
    kind, form, nontemporal, ignore, share, uniform = mode
    exps, _, _, _, _, row_mass, own_factor = scratch
    row = x[i, :, 0]
    n = row.shape[0]
    target = np.int64(-1)
    w_t = type(like)(1)
    x_t = type(like)(0)
    kept = type(like)(1 if kind == NO_TARGET else 0)
    if kind == CLASS_INDEX:
        target = np.int64(t[i, 0])
        if target == ignore or target < 0 or target >= n:
            if form != LOSS_ONLY:
                fill_row(out[i, :, 0], 0.0, like)
            return 0.0, 0.0, 0.0, 0.0, 0.0 if target == ignore else NAN, 0.0, type(like)(NAN)
        x_t = lane(load_one(row, target, like), 0)
        if weight.shape[0]:
            w_t = weight[target]
        kept = share * w_t
    if form != LOSS_ONLY and nontemporal and aligned_at(out[i, n:, 0], like) != 0:
        # Stores past the caches would wait until the line that two rows share is there: 1.2 times as long at 1000.
        prefetch(out[i, :, 0], n - 1)
    m, left_out, scale, exp_max, rest, top = _row_sum(row, q[i, :, 0], top, target, following, exps, kind, form, like)
    norm, own = rest, 0.0
    if left_out >= 0:
        v = load_one(row, left_out, like)
        own = np.float64(lane(scaled_exp(v, scale), 0))
        norm = rest + own
        r = (rest if lane(v, 0) == lane(m, 0) else norm - exp_max) / exp_max
    else:
        r = (norm - exp_max) / exp_max
    gap, mass = 0.0, row_mass
    if kind == PROBABILITIES or uniform != 0.0:
        gap, own_mass = dense_gap(row, q[i, :, 0], weight, mode, m, like)
        if kind == PROBABILITIES:
            mass = own_mass
    if form != LOSS_ONLY:
        log_norm = broadcast(0.0, like)
        if form == LOG_SOFTMAX:
            log_norm = broadcast(lane(log1p(broadcast(r, np.float64(0.0))), 0), like)
        factor = broadcast(upstream[i, 0] if upstream.shape[0] else own_factor, like)
        a = broadcast(kept + mass, like)
        whole = broadcast(norm, like)
        spread = uniform * w_t  # what smoothing leaves on the target
        q_t, slack = broadcast(kept + spread, like), broadcast(mass - spread, like)
        at_target = factor * target_gradient(broadcast(rest, like), broadcast(own, like), whole, a, q_t, slack)
        of_max = broadcast(exp_max, like)
        if kind == NO_TARGET and form == GRADIENT and lane(of_max / whole, 0) == 1.0:  # products with the slope miss it
            target, at_target = _place(row, 0, n, lane(m, 0), like), broadcast(1.0, like)
        # What smoothing takes from every class, if it takes the same; -0.0 changes no zero.
        shift = factor * -uniform if uniform != 0.0 else broadcast(-0.0, like)
        numbers = (m, broadcast(r, like), log_norm, scale, factor, a, a / whole, shift, of_max, 1.0 / of_max)
        write_row(row, q[i, :, 0], weight, out[i, :, 0], mode, numbers, exps, target, at_target, like)
    return np.float64(lane(m, 0)), np.float64(x_t), r, np.float64(kept), gap, np.float64(mass), top


@inline
def rows(operands, mode, unit, like, scratch):
    """`per_unit` rows, one after the other: writes what is asked for, and returns the sum of their losses."""
    x, _, _, _, _, _, loss = operands
    _, _, _, per_unit, _, _, _ = scratch
    start = unit * per_unit
    stop = min(start + per_unit, x.shape[0])
    m = broadcast(0.0, np.float64(0.0))
    x_t = r = kept = gap = mass = m
    top = type(like)(NAN)
    for i in range(start, stop):
        found = _row(operands, mode, i, top, x[min(i + 1, stop - 1), :, 0], scratch, like)
        here = only(i - start, m)
        m, x_t, r = where(here, found[0], m), where(here, found[1], x_t), where(here, found[2], r)
        kept, gap, mass = where(here, found[3], kept), where(here, found[4], gap), where(here, found[5], mass)
        top = found[6]
    # The losses of all rows in float64, rounded once.
    value = row_loss(add_gap(gap, kept, m, x_t), kept + mass, log1p(r))
    if loss.shape[1]:
        for i in range(start, stop):
            loss[i, 0] = lane(value, i - start)
    return total(value)
