"""The row-wise kernels: cross-entropy with every kind of target, softmax, log-softmax, log-sum-exp.

Both find, for each row, the maximum m and r = sum exp(x - m) over all classes but one at the maximum, and take it
from there with nbloss.formulas. ``_rows`` has its vectors along the classes and reads a row of any length from
memory once: what its second look needs is still in the cache. ``_tiles`` has its vectors across rows, for few
classes or for a class axis that is not last: it copies a tile (classes, lanes) next to the core, where strides
cost nothing, and works there.
"""

import numpy as np
from numba import from_dtype, prange
from numba.core import types

from nbloss import formulas
from nbloss.cpu import vecmath
from nbloss.cpu.compile import LIKE, Kernel, array_type, compute_type
from nbloss.cpu.launch import launch
from nbloss.cpu.simd import (
    VECTOR_BYTES,
    add_wide,
    aligned_at,
    borrowed,
    broadcast,
    first,
    gather,
    inline,
    lane,
    lanes,
    largest,
    load,
    load_transposed,
    maximum,
    only,
    prefetch,
    put,
    read,
    scatter,
    store,
    store_transposed,
    stream,
    take,
    total,
    where,
    write,
    write_from,
)
from nbloss.cpu.vecmath import exp_difference, exp_flush, log1p
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY, Array

NO_TARGET, CLASS_INDEX, PROBABILITIES = 0, 1, 2  # kind of target

NEG_INF = -np.inf
SHORT = 8  # chunks of a row that is short
# Below this r, a row's loss and gradient are of the size of r, whose terms are then exp of large differences: float32
# rounds x - m = -20 by 8 ulp of its exp. Such rows are summed once more, with the rounded part put back.
CONFIDENT = 1.0 / 16.0
WIDTH = 8  # vectors of rows in a tile
NEAR = 1 << 18  # bytes of a tile
FETCH = 256  # vectors from a load to the one that is fetched meanwhile
CHUNK = 32  # vectors of a row that are summed while the maximum of the next ones is found


def _bound(formula, **primitives):
    return inline(formulas.bind(formula, **primitives))


mass_gap = _bound(formulas.mass_gap, where=where)
row_loss = _bound(formulas.row_loss, mass_gap=mass_gap)
target_gradient = _bound(formulas.target_gradient, exp=vecmath.exp, where=where)
dense_gradient = _bound(formulas.dense_gradient, where=where)


# --- one row, vectors along the classes ---------------------------------------------------------------------


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
    for j in range(start, stop, step):
        d = take(x, j, min(step, stop - j), NEG_INF, like) - m
        prefetch(x, j + ahead)
        top = d == 0.0
        even, odd = odd, even + where(top, 0.0, exp_flush(d))
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
    top = _maximum(x, 0, min(size, n), like)
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
            e = exp_difference(take(x, j, min(step, n - j), NEG_INF, like), m)
            chunk = add_wide(chunk, where(e == 1.0, 0.0, e))
        below = below + chunk
    return total(below)


@inline
def _row_statistics(x, like):
    """(m, r) of one row, r in float64."""
    n = x.shape[0]
    size = CHUNK * lanes(like)
    if n <= SHORT * size:  # the first-level cache holds it: two passes are faster than an online one
        top = _maximum(x, 0, n, like)
        wide = broadcast(0.0, np.float64(0.0))
        count = broadcast(0.0, like)
        for start in range(0, n, size):
            s, k = _sum_around_maximum(x, start, min(start + size, n), n, broadcast(top, like), like)
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
def _dense_mass(x, q, weight, mode, m, like):
    """(sum_j q_j (m - x_j), sum_j q_j) over the dense part of a row's target mass."""
    gap = broadcast(0.0, np.float64(0.0))
    mass = gap
    n = x.shape[0]
    for j in range(0, n, lanes(like)):
        count = min(lanes(like), n - j)
        mass_j = _mass_at(q, weight, mode, j, count, like)
        gap = add_wide(gap, mass_gap(mass_j, m, take(x, j, count, 0.0, like)))
        mass = add_wide(mass, mass_j)
    return total(gap), total(mass)


@inline
def _write_row(x, q, weight, out, mode, m, r, scale, a, target, at_target, like):
    """scale (a p - q), or the log-softmax, of one row."""
    kind, form, past, _, _, uniform = mode
    n = x.shape[0]
    step = lanes(like)
    log_norm = log1p(r)
    slope = scale * a / (1.0 + r)
    confident = lane(r, 0) < CONFIDENT
    plain = form == GRADIENT and kind != PROBABILITIES and uniform == 0.0 and not confident
    aligned = aligned_at(out, like) if past else n
    if aligned < 0:
        aligned = n
    j = 0
    while j < n:
        if plain and (not past or j >= aligned):
            stop = j + (n - j) // step * step
            if j <= target < stop:
                stop = j + (target - j) // step * step
            _write_softmax(x, out, m, slope, j, stop, past, like)
            j = stop
            if j == n:
                break
        count = min(step, n - j)
        if j < aligned:
            count = min(count, aligned - j)
        v = take(x, j, count, 0.0, like)
        if form == LOG_SOFTMAX:
            y = (v - m) - log_norm
        else:
            e = exp_difference(v, m) if confident else exp_flush(v - m)
            y = slope * e
            if kind == PROBABILITIES:
                y = scale * dense_gradient(e, _mass_at(q, weight, mode, j, count, like), a, r)
            elif uniform != 0.0:
                y = y - scale * _mass_at(q, weight, mode, j, count, like)
            y = where(only(target - j, y), at_target, y)
        if j >= aligned and count == step:
            stream(out, j, y)
        else:
            put(out, j, count, y, like)
        j += count


@inline
def _write_softmax(x, out, m, slope, start, stop, past, like):
    """slope exp(x - m) over whole vectors."""
    if past:
        for j in range(start, stop, lanes(like)):
            stream(out, j, slope * exp_flush(load(x, j, like) - m))
    else:
        for j in range(start, stop, lanes(like)):
            store(out, j, slope * exp_flush(load(x, j, like) - m))


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
    gap = mass = 0.0
    if kind == PROBABILITIES or uniform != 0.0:
        gap, mass = _dense_mass(row, q[unit, :, 0], weight, mode, m, like)
    if form != LOSS_ONLY:
        rest = broadcast(r, like)
        scale = broadcast(upstream[unit, 0], like)
        a = broadcast(kept + mass, like)
        at_target = scale * target_gradient(broadcast(x_t, like), m, rest, a, mass - uniform * w_t)
        _write_row(row, q[unit, :, 0], weight, out[unit, :, 0], mode, m, rest, scale, a, target, at_target, like)
    # The loss of a row in float64, rounded once.
    log_norm = log1p(broadcast(r, np.float64(0.0)))
    if kind == NO_TARGET:
        return lane(log_norm + top, 0)
    return lane(row_loss(broadcast(kept, np.float64(0.0)), np.float64(top), np.float64(x_t), gap, mass, log_norm), 0)


@inline
def _rows(operands, mode, unit, like, scratch):
    value = _row(operands, mode, unit, like, scratch)
    loss = operands[6]
    if loss.shape[1]:
        loss[unit, 0] = value
    return value


# --- a tile of rows, vectors across rows --------------------------------------------------------------------

X_T, W_T, KEPT, SCALE, ACTIVE, FIXED, ROW_FACTS = range(7)  # what a tile keeps for each of its rows


@inline
def _tile_targets(operands, mode, tile, facts, labels, i, k, count, at, lead, like):
    """Look up what each row needs of its own target. FIXED is the loss of a row that is not ACTIVE."""
    x, t, _, weight, upstream, _, _ = operands
    kind, _, _, ignore, share, _ = mode
    one = broadcast(1.0, like)
    store(facts, ACTIVE * lanes(like), one)
    store(facts, W_T * lanes(like), one)
    store(facts, SCALE * lanes(like), broadcast(upstream[i, k], like))
    if upstream.strides[0] != 0 or upstream.strides[1] != 0:
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
def _tiles(operands, mode, unit, like, scratch):
    """A tile of `width` vectors of rows: writes what is asked for, and returns the sum of their losses."""
    x, _, _, _, _, out, _ = operands
    _, form, past, _, _, _ = mode
    tile, _, _, width = scratch
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
    tile, facts, labels, _ = scratch
    classes = x.shape[1]
    zero = broadcast(0.0, like)

    m = broadcast(NEG_INF, like)
    for j in range(classes):
        m = maximum(load(tile, j * lead + at, like), m)
    _tile_targets(operands, mode, tile, facts, labels, i, k, count, at, lead, like)
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


# --- log-probabilities given: no sum over the classes ---------------------------------------------------------


@inline
def _picks(operands, mode, unit, like, scratch):
    """One row of the negative log-likelihood; the gradient is written into an array of zeros."""
    x, t, _, weight, upstream, out, loss = operands
    _, form, _, ignore, _, _ = mode
    i = unit // x.shape[2]
    k = unit - i * x.shape[2]
    label = np.int64(t[i, k])
    value = type(like)(0)
    if label < 0 or label >= x.shape[1]:
        if label != ignore:
            value = type(like)(np.nan)
    elif label != ignore:
        w_t = weight[label] if weight.shape[0] else type(like)(1)
        if form == GRADIENT:
            scatter(out[i, :, k], label, 1, broadcast(-w_t * upstream[i, k], like))
        else:
            x_t = gather(x[i, :, k], label, 1, like)
            value = lane(mass_gap(broadcast(w_t, like), 0.0, x_t), 0)
    if loss.shape[1]:
        loss[i, k] = value
    return np.float64(value)


# --- drivers ------------------------------------------------------------------------------------------------


def _driver(chunk):
    # x, q, out: (outer, classes, inner); t, upstream, loss: (outer, inner); weight: (classes,). Upstream is the
    # factor of each row's gradient. Absent: q is x, weight has no element, loss no column.
    def driver(
        x, t, q, weight, upstream, out, loss,
        kind, form, past, ignore, share, uniform, width, like,
        units, step, first_block, stop_block, part,
    ):  # fmt: skip
        mode = (kind, form, past, ignore, share, uniform)
        for block in prange(first_block, stop_block):
            logits, masses, written = borrowed(x), borrowed(q), borrowed(out)
            operands = (logits, borrowed(t), masses, borrowed(weight), borrowed(upstream), written, borrowed(loss))
            # Room for blocks of (lanes, lanes), whatever the number of classes.
            tile = np.empty((x.shape[1] + lanes(like)) * width * lanes(like) if width else 0, weight.dtype)
            facts = np.zeros(ROW_FACTS * lanes(like), weight.dtype)
            labels = np.empty(lanes(like), np.int64)
            scratch = (borrowed(tile), borrowed(facts), borrowed(labels), width)
            value_sum = 0.0
            for unit in range(block * step, min(units, block * step + step)):
                value_sum += chunk(operands, mode, unit, like, scratch)
            part[block, 0] = value_sum
            part[block, 1] = 0 * (tile.size + facts.size + labels.size)  # whose last use frees them

    return driver


def _signature(x, t, q):
    compute = compute_type(x)
    name = compute.name
    return (
        array_type(x, 3), array_type(t, 2), array_type(q, 3),
        types.Array(compute, 1, "C", readonly=True), array_type("f8", 2),
        array_type(x, 3, writable=True), array_type(name, 2, writable=True),
        types.intp, types.intp, types.intp, types.int64, compute, compute, types.intp, compute,
        *[types.intp] * 4, types.Array(types.float64, 2, "C"),
    )  # fmt: skip


KERNELS = {
    name: Kernel(name, _driver(chunk), _signature)
    for name, chunk in (("rows", _rows), ("tiles", _tiles), ("picks", _picks))
}


def run(
    along: bool,
    normalized: bool,
    x: Array,
    t: Array,
    q: Array,
    weight: Array,
    upstream: Array,
    out: Array,
    loss: Array,
    kind: int,
    form: int,
    past: bool,
    ignore: int,
    smoothing: float,
) -> float:
    """Run one piece of a row-wise problem; the sum of its losses."""
    outer, classes, inner = x.shape
    like = LIKE[weight.dtype.char]
    step = VECTOR_BYTES // weight.itemsize
    share, uniform = 1.0 - smoothing, smoothing / classes
    if normalized:
        kernel, units, unit_elements, width = KERNELS["picks"], outer * inner, 1, 0
    elif along:
        kernel, units, unit_elements, width = KERNELS["rows"], outer, classes, 0
    else:
        # Rows side by side in memory are done several vectors at a time, if that many fit near the core.
        side_by_side = x.strides[2] == x.itemsize and inner > step and classes * WIDTH * VECTOR_BYTES <= NEAR
        width = WIDTH if side_by_side else 1
        lead = width * step
        kernel, units, unit_elements = KERNELS["tiles"], outer * -(-inner // lead), classes * lead
    args = (x, t, q, weight, upstream, out, loss, kind, form, past, ignore, share, uniform, width, like)
    return float(launch(kernel, (x.dtype.char, t.dtype.char, q.dtype.char), args, units, unit_elements)[0])


# --- labels -------------------------------------------------------------------------------------------------


def _scan_driver(labels, weight, classes, ignore):
    """(labels out of range, weight of the labels that count)."""
    bad = 0
    kept = 0
    for i in range(labels.shape[0]):
        label = np.int64(labels[i])
        bad += (label != ignore) & ((label < 0) | (label >= classes))
        kept += label != ignore
    weight_sum = float(kept)
    if weight.shape[0] and not bad:
        weight_sum = 0.0
        for i in range(labels.shape[0]):
            label = np.int64(labels[i])
            if label != ignore:
                weight_sum += weight[label]
    return bad, weight_sum


SCAN = Kernel(
    "scan",
    _scan_driver,
    lambda t, weight: (
        types.Array(from_dtype(np.dtype(t)), 1, "C", readonly=True),
        types.Array(from_dtype(np.dtype(weight)), 1, "C", readonly=True),
        types.int64,
        types.int64,
    ),
)


def scan_labels(labels: Array, weight: Array, classes: int, ignore: int) -> tuple[int, float]:
    """What must be known of the labels before anything is written: (how many are out of range, weight of the rest)."""
    flat = np.ascontiguousarray(labels).reshape(-1)
    found: tuple[int, float] = SCAN.variant(False, flat.dtype.char, weight.dtype.char)(flat, weight, classes, ignore)
    return found
