"""One row, vectors along the classes, for rows of any length.

The row is read from memory once: what its second look needs is still in the cache.
"""

import numpy as np

from nbloss.cpu.simd import (
    add_wide,
    aligned_at,
    broadcast,
    first,
    fma,
    gather,
    inline,
    lane,
    lanes,
    largest,
    load,
    load_first,
    maximum,
    only,
    prefetch,
    put,
    store,
    stream,
    take,
    total,
    where,
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
from nbloss.cpu.vecmath import exp_difference, exp_flush, log1p
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

NEG_INF = -np.inf
SHORT = 8  # chunks of a row that is short
# Below this r, a row's loss and gradient are of the size of r, whose terms are then exp of large differences: float32
# rounds x - m = -20 by 8 ulp of its exp. Such rows are summed once more, without that rounding.
CONFIDENT = 1.0 / 16.0
FETCH = 256  # vectors from a load to the one that is fetched meanwhile
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
def _sum_around_maximum(x, start, stop, ahead, m, like):
    """(sum of exp(x - m) over all x < m, number of x = m) of a chunk, by lanes; fetches what lies `ahead` of it."""
    step = lanes(like)
    even = broadcast(0.0, like)
    odd = ties = even
    whole = start + (stop - start) // step * step
    for j in range(start, whole, step):
        d = load(x, j, like) - m
        prefetch(x, j + ahead)
        top = d == 0.0
        even, odd = odd, where(top, even, even + exp_flush(d))
        ties = where(top, ties + 1.0, ties)
    if whole < stop:
        d = load_first(x, whole, stop - whole, NEG_INF, like) - m
        top = d == 0.0
        even = where(top, even, even + exp_flush(d))
        ties = where(top, ties + 1.0, ties)
    return even + odd, ties


@inline
def _sum_below_maximum(x, start, ahead, m, like):
    """Sum of exp(x - m) over a chunk that does not attain m, by lanes, and the maximum of the chunk at `ahead`."""
    step = lanes(like)
    a = broadcast(0.0, like)
    b = a
    top = broadcast(NEG_INF, like)
    offset = ahead - start
    for j in range(start, start + CHUNK * step, 2 * step):
        a = a + exp_flush(load(x, j, like) - m)
        b = b + exp_flush(load(x, j + step, like) - m)
        # Loading the next chunk here overlaps memory with arithmetic: 1.2 times faster than a pass of its own.
        top = maximum(load(x, j + offset, like), top)
        top = maximum(load(x, j + offset + step, like), top)
        prefetch(x, j + FETCH * step)
        prefetch(x, j + FETCH * step + step)
    return a + b, largest(top)


@inline
def _online_sum(x, size, like):
    """(m, sum of exp(x - m) over all x < m, number of x = m): online log-sum-exp, which reads memory once."""
    n = x.shape[0]
    m = broadcast(NEG_INF, like)
    below = broadcast(0.0, np.float64(0.0))
    ties = broadcast(0.0, like)
    top = _maximum(x, np.int64(0), min(size, n), like)
    for start in range(0, n, size):
        stop = min(start + size, n)
        if top > lane(m, 0):
            shrink = lane(exp_flush(m - top), 0)
            below = add_wide(below, ties) * np.float64(shrink)
            ties = broadcast(0.0, like)
            m = broadcast(top, like)
        if top == lane(m, 0) or stop - start < size:
            s, k = _sum_around_maximum(x, start, stop, size, m, like)
            ties = ties + k
            top = _maximum(x, stop, min(stop + size, n), like)
        elif stop + size <= n:
            s, top = _sum_below_maximum(x, start, stop, m, like)
        else:
            s, _ = _sum_below_maximum(x, start, start, m, like)
            top = _maximum(x, stop, n, like)
        below = add_wide(below, s)
    return lane(m, 0), total(below), np.float64(total(ties))


@inline
def _sum_exactly(x, m, like):
    """The sum of exp(x - m) over all x < m, with every digit: see CONFIDENT."""
    n = x.shape[0]
    step = lanes(like)
    zero = broadcast(0.0, np.float64(0.0))
    below = zero
    for start in range(0, n, 16 * step):
        chunk = zero
        for j in range(start, min(start + 16 * step, n), step):
            v = take(x, j, min(step, n - j), NEG_INF, like)
            chunk = add_wide(chunk, where(v == m, 0.0, exp_difference(v, m)))
        below = below + chunk
    return total(below)


@inline
def _row_statistics(x, like):
    """(m, r) of one row, r in float64."""
    n = x.shape[0]
    size = CHUNK * lanes(like)
    if n <= SHORT * size:  # the first-level cache holds it: two passes are faster than an online one
        top = _maximum(x, np.int64(0), n, like)
        wide = broadcast(0.0, np.float64(0.0))
        count = broadcast(0.0, like)
        for start in range(0, n, size):  # fetching the row after the next: 1.13 times faster than the next
            s, k = _sum_around_maximum(x, start, min(start + size, n), 2 * n, broadcast(top, like), like)
            wide = add_wide(wide, s)
            count = count + k
        below, ties = total(wide), np.float64(total(count))
    else:
        top, below, ties = _online_sum(x, size, like)
    r = below + (ties - 1.0)
    if r < CONFIDENT:
        r = _sum_exactly(x, broadcast(top, like), like)
    return top, r


@inline
def _mass_at(q, weight, mode, j, count, like):
    """Dense target mass of classes j, …: w_j (share q_j + uniform), and nothing past the row."""
    kind, _, _, _, share, uniform = mode
    mass = broadcast(uniform, like)
    if kind == PROBABILITIES:
        mass = mass + share * take(q, j, count, 0.0, like)
    if weight.shape[0]:
        mass = mass * take(weight, j, count, 0.0, like)
    return where(first(count, mass), mass, 0.0)


@inline
def dense_mass(q, weight, mode, classes, like):
    """sum_j q_j over the dense part of a row's target mass."""
    mass = broadcast(0.0, np.float64(0.0))
    for j in range(0, classes, lanes(like)):
        mass = add_wide(mass, _mass_at(q, weight, mode, j, min(lanes(like), classes - j), like))
    return total(mass)


@inline
def _dense_gap(x, q, weight, mode, m, like):
    """(sum_j q_j (m - x_j), sum_j q_j) over the dense part; the latter for probabilities only."""
    n, step = x.shape[0], lanes(like)
    gap = broadcast(0.0, np.float64(0.0))
    mass = gap
    for start in range(0, n, 8 * step):  # to widen one vector of eight is a third faster, and costs half an ulp
        stop = min(start + 8 * step, n)
        whole = start + (stop - start) // step * step
        narrow_gap = broadcast(0.0, like)
        narrow_mass = narrow_gap
        for j in range(start, whole, step):
            mass_j = _mass_at(q, weight, mode, j, step, like)
            narrow_gap = narrow_gap + mass_gap(mass_j, m, load(x, j, like))
            narrow_mass = narrow_mass + mass_j
        if whole < stop:
            mass_j = _mass_at(q, weight, mode, whole, stop - whole, like)
            narrow_gap = narrow_gap + mass_gap(mass_j, m, load_first(x, whole, stop - whole, 0.0, like))
            narrow_mass = narrow_mass + mass_j
        gap = add_wide(gap, narrow_gap)
        mass = add_wide(mass, narrow_mass)
    return total(gap), total(mass)


@inline
def _write_row(x, q, weight, out, mode, m, r, scale, a, target, at_target, like):
    """scale (a p - q), or the log-softmax, of one row."""
    _, _, past, _, _, _ = mode
    n = x.shape[0]
    step = lanes(like)
    numbers = (m, r, scale, a, scale * a / (1.0 + r), log1p(r), lane(r, 0) < CONFIDENT)
    aligned = aligned_at(out, like) if past else 0
    if aligned < 0:
        aligned = n
    j = np.int64(0)  # of a literal 0, Numba compiles what it is given to twice
    while j < n:
        if j >= aligned or not past:
            stop = j + (n - j) // step * step
            if j <= target < stop:
                stop = j + (target - j) // step * step
            _write_vectors(x, q, weight, out, mode, numbers, j, stop, like)
            j = stop
            if j == n:
                break
        count = min(step, n - j)
        if j < aligned:
            count = min(count, aligned - j)
        y = _result_at(x, q, weight, mode, numbers, j, count, like)
        y = where(only(target - j, y), at_target, y)
        if past and j >= aligned and count == step:
            stream(out, j, y)
        else:
            put(out, j, count, y, like)
        j += count


@inline
def _result_at(x, q, weight, mode, numbers, j, count, like):
    """What belongs at j, … of a row, but for the mass on its target."""
    kind, form, _, _, _, uniform = mode
    m, r, scale, a, slope, log_norm, confident = numbers
    v = take(x, j, count, 0.0, like)
    if form == LOG_SOFTMAX:
        return (v - m) - log_norm
    e = exp_difference(v, m) if confident else exp_flush(v - m)
    if kind == PROBABILITIES:
        return scale * dense_gradient(e, _mass_at(q, weight, mode, j, count, like), a, r)
    if uniform != 0.0:
        return slope * e - scale * _mass_at(q, weight, mode, j, count, like)
    return slope * e


@inline
def _write_vectors(x, q, weight, out, mode, numbers, start, stop, like):
    """As many whole vectors of a row's result."""
    kind, form, past, _, _, uniform = mode
    m, _, scale, _, slope, _, confident = numbers
    step = lanes(like)
    if form == GRADIENT and kind != PROBABILITIES and not confident and (uniform == 0.0 or weight.shape[0] == 0):
        shift = scale * -uniform if uniform != 0.0 else broadcast(-0.0, like)
        if past:
            for j in range(start, stop, step):
                stream(out, j, fma(slope, exp_flush(load(x, j, like) - m), shift))
        else:
            for j in range(start, stop, step):
                store(out, j, fma(slope, exp_flush(load(x, j, like) - m), shift))
    else:
        for j in range(start, stop, step):
            y = _result_at(x, q, weight, mode, numbers, j, step, like)
            if past:
                stream(out, j, y)
            else:
                store(out, j, y)


@inline
def _fill_row(out, value, like):
    n = out.shape[0]
    for j in range(0, n, lanes(like)):
        put(out, j, min(lanes(like), n - j), broadcast(value, like), like)


@inline
def _row(operands, mode, unit, like, scratch):
    """One row: writes what is asked for, and returns its loss."""
    x, t, q, weight, upstream, out, _ = operands
    kind, form, _, ignore, share, uniform = mode
    row_mass, factor = scratch[5:]
    row = x[unit, :, 0]
    target = np.int64(-1)
    w_t = type(like)(1)
    x_t = type(like)(0)
    kept = type(like)(1 if kind == NO_TARGET else 0)
    if kind == CLASS_INDEX:
        target = np.int64(t[unit, 0])
        if target == ignore or target < 0 or target >= row.shape[0]:
            if form != LOSS_ONLY:
                _fill_row(out[unit, :, 0], 0.0, like)
            return 0.0 if target == ignore else np.nan
        x_t = lane(gather(row, target, 1, like), 0)
        if weight.shape[0]:
            w_t = weight[target]
        kept = share * w_t
    top, r = _row_statistics(row, like)
    m = broadcast(top, like)
    gap, mass = 0.0, row_mass
    if kind == PROBABILITIES or uniform != 0.0:
        gap, own_mass = _dense_gap(row, q[unit, :, 0], weight, mode, m, like)
        if kind == PROBABILITIES:
            mass = own_mass
    if form != LOSS_ONLY:
        rest = broadcast(r, like)
        scale = broadcast(upstream[unit, 0] if upstream.shape[0] else factor, like)
        a = broadcast(kept + mass, like)
        at_target = scale * target_gradient(broadcast(x_t, like), m, rest, a, mass - uniform * w_t)
        _write_row(row, q[unit, :, 0], weight, out[unit, :, 0], mode, m, rest, scale, a, target, at_target, like)
    # The loss of a row in float64, rounded once.
    log_norm = log1p(broadcast(r, np.float64(0.0)))
    if kind == NO_TARGET:
        return lane(log_norm + top, 0)
    return lane(row_loss(broadcast(kept, np.float64(0.0)), np.float64(top), np.float64(x_t), gap, mass, log_norm), 0)


@inline
def rows(operands, mode, unit, like, scratch):
    value = _row(operands, mode, unit, like, scratch)
    loss = operands[6]
    if loss.shape[1]:
        loss[unit, 0] = value
    return value
