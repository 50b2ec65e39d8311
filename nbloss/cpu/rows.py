"""Rows, vectors along the classes, for rows of any length.

Exponentials of a row are kept, so that it is read once (for 32768 classes 1.3 times faster than to compute them twice).
A row is written while the next one is summed, whose exponentials take the place of those that are written: past the
caches a vector for each that is summed (1.05 to 1.12 times faster than by chunks), else a chunk before the same chunk
(up to 1.05 times faster than one row after the other). So memory is busy all the time.
"""

import numpy as np

from nbloss.cpu.chunks import distances_of, maximum_of, place_of, sum_chunk
from nbloss.cpu.given import Beside
from nbloss.cpu.per_row import gradient_facts
from nbloss.cpu.results import classes_of, clear_row, dense_gap, is_written_beside, write_row
from nbloss.cpu.simd import (
    aligned_at,
    broadcast,
    inline,
    is_single,
    lane,
    lanes,
    largest,
    load_one,
    maximum,
    only,
    prefetch,
    total,
    where,
)
from nbloss.cpu.sums import add_to, add_wide_to, no_sum, number_of, sum_of
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES, add_gap, row_loss
from nbloss.cpu.unwritten import CHUNK, SHORT, TERMS, no_row, put_off, unwritten_row
from nbloss.cpu.vecmath import log1p, scale_change, scale_of, scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF, NAN = -np.inf, np.nan
LOWEST_32, LOWEST_64 = float(np.finfo(np.float32).min), float(np.finfo(np.float64).min)
# How far above a long row's maximum its reference is set. Until the maximum passes it, nothing is scaled anew (without
# it, half of a row of normal numbers would be: 1.06 times as long). It costs e^-4 of the range, which `scaled_exp` has
# to spare.
MARGIN = 4.0


@inline
def _row_sum(x, q, operands, mode, target, top, following, unwritten, scratch, like):
    """(m, index left out, reference, scale, whether exponentials are kept, sum without it) of a row, and the maximum of
    the row after a short one.

    The maximum of a short row, `top`, was found with the row before, or is NaN. A long one has one for each chunk:
    online log-sum-exp, which reads memory once. Exponentials are relative to a `reference`, which is the maximum, or up
    to MARGIN more in a long row. Left out is the target, or else one class that attains m; a softmax needs the sum of
    every class. Beside it, the row `unwritten` is written, if there is one.
    """
    kind, form, exps = mode.kind, mode.form, scratch.memory
    n = x.shape[0]
    step = lanes(like)
    size = CHUNK * step
    short = n <= SHORT * step
    every = kind == NO_TARGET and form == GRADIENT
    near, far = distances_of(n, short, kind == PROBABILITIES)
    keep = form == GRADIENT and exps.shape[0] > n + TERMS
    left_out = target
    found = False
    m = broadcast(LOWEST_32 if is_single(broadcast(0.0, like)) else LOWEST_64, like)
    reference = lane(m, 0)
    scale = scale_of(m)
    none = broadcast(0.0, np.float64(0.0))
    rest = no_sum()
    beyond = broadcast(NEG_INF, like)
    earlier, written = no_row(exps, like), np.int64(0)
    for start in range(0, n, size):
        stop = min(start + size, n)
        end = n if short else stop
        if top != top:
            top = maximum_of(x, start, end, like)
        if top > lane(m, 0) or (top == lane(m, 0) and not found):  # LOWEST, at first, a row may hold too
            if target < 0 and not every:
                if found:  # the class left out so far is no longer the largest: its term joins the sum
                    rest = add_to(rest, where(only(0, none), np.float64(lane(scaled_exp(m, scale), 0)), none))
                left_out = place_of(x, start, end, top, like)
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
        writes = False
        if unwritten >= 0:
            earlier, out = unwritten_row(operands, stop, scratch, like), classes_of(operands.out, unwritten)
            writes = keep and not scale[0] and is_written_beside(earlier, operands.weight, out, mode, like)
            until = np.int64(start == 0) if writes else stop  # what lies before whole lines, or all
            written = write_row(operands, mode, unwritten, earlier, written, until, like)
        beside = Beside(other, offset, q, near, far, earlier, operands.out, unwritten)
        written, s, t = sum_chunk(x, start, stop, left_out, scale, exps, keep, beside, writes, written, like)
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
            target = place_of(row, np.int64(0), n, lane(m, 0), like)
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
    value_sum = 0.0, 0.0
    top = type(like)(NAN)
    unwritten = np.int64(-1)
    height = lanes(np.float64(0.0))  # rows whose losses are a vector
    for first in range(start, stop, height):
        end = min(first + height, stop)
        m = broadcast(0.0, np.float64(0.0))
        x_t = r = kept = gap = mass = m
        for i in range(first, end):
            following = classes_of(x, min(i + 1, stop - 1))
            found, top, unwritten = _row(operands, mode, i, top, following, unwritten, scratch, like)
            its_m, its_x_t, its_r, its_kept, its_gap, its_mass = found
            here = only(i - first, m)
            m, x_t, r = where(here, its_m, m), where(here, its_x_t, x_t), where(here, its_r, r)
            kept, gap, mass = where(here, its_kept, kept), where(here, its_gap, gap), where(here, its_mass, mass)
        # In float64, rounded once.
        value = row_loss(add_gap(gap, kept, m, x_t), kept + mass, log1p(r))
        if loss.shape[1]:
            for i in range(first, end):
                loss[i, 0] = lane(value, i - first)
        value_sum = add_to(value_sum, total(value))
    if unwritten >= 0:  # the last one has no next
        n, written = x.shape[1], np.int64(0)
        short, size = n <= SHORT * lanes(like), CHUNK * lanes(like)
        for first in range(0, n, n if short else size):
            end = n if short else min(first + size, n)
            row = unwritten_row(operands, end, scratch, like)
            written = write_row(operands, mode, unwritten, row, written, end, like)
    return number_of(value_sum)
