"""What is written of a row, vectors along the classes; and the dense part of its target."""

from nbloss.cpu.simd import (
    HAS_AVX512,
    aligned_at,
    broadcast,
    first,
    fma,
    inline,
    is_single,
    lanes,
    load,
    load_first,
    only,
    put,
    store,
    stream,
    take,
    total,
    where,
)
from nbloss.cpu.sums import add_wide_to, no_sum, sum_of
from nbloss.cpu.targets import PROBABILITIES, add_gap, dense_gradient
from nbloss.cpu.vecmath import scaled_exp
from nbloss.problem import GRADIENT, LOG_SOFTMAX


@inline
def classes_of(a, i):
    return a[i, :, 0]


@inline
def mass_at(q, weight, mode, j, count, like):
    """Dense target mass of classes j, …: w_j (share pi_j + uniform) with pi in q, and nothing past the row."""
    mass = broadcast(mode.uniform, like)
    if mode.kind == PROBABILITIES:
        mass = fma(mode.share, take(q, j, count, 0.0, like), mass)
    if weight.shape[0]:
        mass = mass * take(weight, j, count, 0.0, like)
    return where(first(count, mass), mass, 0.0)


@inline
def dense_gap(x, q, weight, mode, m, like):
    """(sum_j q_j (m - x_j), sum_j q_j) over the dense part."""
    n, step = x.shape[0], lanes(like)
    gap = mass = no_sum()
    # Two sums of eight vectors are widened as one: a third faster than to widen each vector, for half an ulp.
    for start in range(0, n, 16 * step):
        stop = min(start + 16 * step, n)
        whole = start + (stop - start) // step * step
        narrow_gap = broadcast(0.0, like)
        narrow_mass = other_gap = other_mass = narrow_gap
        for j in range(start, whole, step):
            mass_j = mass_at(q, weight, mode, j, step, like)
            narrow_gap, other_gap = other_gap, add_gap(narrow_gap, mass_j, m, load(x, j, like))
            narrow_mass, other_mass = other_mass, narrow_mass + mass_j
        if whole < stop:
            mass_j = mass_at(q, weight, mode, whole, stop - whole, like)
            narrow_gap = add_gap(narrow_gap, mass_j, m, load_first(x, whole, stop - whole, 0.0, like))
            narrow_mass = narrow_mass + mass_j
        gap = add_wide_to(gap, narrow_gap + other_gap)
        mass = add_wide_to(mass, narrow_mass + other_mass)
    return total(sum_of(gap)), total(sum_of(mass))


@inline
def _exp_at(x, j, count, row, like):
    """scaled_exp of classes j, … of a row."""
    if row.kept:
        return load(row.exps, j, like)
    return scaled_exp(take(x, j, count, 0.0, like), row.scale)


@inline
def write_row(operands, mode, i, row, j, end, like):
    """factor (a p - q), or the log-softmax, of row i's elements from j to `end`, or to the end of the vector there.

    Gives where it ended. Whole vectors up to that of the target, it alone, whole vectors again, and what is left of the
    row; non-temporal stores begin at `aligned`.
    """
    x, q, out = classes_of(operands.x, i), classes_of(operands.q, i), classes_of(operands.out, i)
    weight, nontemporal, target = operands.weight, mode.nontemporal, row.target
    n = x.shape[0]
    step = lanes(like)
    aligned = aligned_at(out, like) if nontemporal else 0
    if aligned < 0:
        aligned = n
    while j < end:
        if j >= aligned or not nontemporal:
            stop = j + min((end - j + step - 1) // step, (n - j) // step) * step
            if j <= target < stop:
                stop = j + (target - j) // step * step
            _write_vectors(x, q, weight, out, mode, row, j, stop, like)
            j = stop
            if j >= end:
                break
        count = min(step, n - j)
        if j < aligned:
            count = min(count, aligned - j)
        y = _result_at(x, q, weight, mode, row, j, count, like)
        y = where(only(target - j, y), row.at_target, y)
        if nontemporal and j >= aligned and count == step:
            stream(out, j, y)
        else:
            put(out, j, count, y, like)
        j += count
    return j


@inline
def _are_plain(mode, weight):
    """Whether results are gradients that take the same from every class."""
    return mode.form == GRADIENT and mode.kind != PROBABILITIES and (mode.uniform == 0.0 or weight.shape[0] == 0)


@inline
def _plain(row, e):
    """Such gradients, of exponentials."""
    return fma(row.factor, row.slope * e, row.shift)


@inline
def _result_at(x, q, weight, mode, row, j, count, like):
    """What belongs at j, … of a row, but for the mass on its target."""
    if mode.form == LOG_SOFTMAX:
        return (take(x, j, count, 0.0, like) - row.m) - row.log_norm
    e = _exp_at(x, j, count, row, like)
    if mode.kind == PROBABILITIES:
        mass = mass_at(q, weight, mode, j, count, like)
        return row.factor * dense_gradient(e * row.inverse, e == row.exp_max, mass, row.a, row.r)
    if mode.uniform != 0.0 and weight.shape[0]:
        return row.factor * (row.slope * e - mass_at(q, weight, mode, j, count, like))
    return _plain(row, e)


@inline
def _write_vectors(x, q, weight, out, mode, row, start, stop, like):
    """As many whole vectors of a row's result."""
    step = lanes(like)
    if _are_plain(mode, weight):
        if mode.nontemporal:
            for j in range(start, stop, step):
                stream(out, j, _plain(row, _exp_at(x, j, step, row, like)))
        else:
            for j in range(start, stop, step):
                store(out, j, _plain(row, _exp_at(x, j, step, row, like)))
    else:
        for j in range(start, stop, step):
            y = _result_at(x, q, weight, mode, row, j, step, like)
            if mode.nontemporal:
                stream(out, j, y)
            else:
                store(out, j, y)


@inline
def is_written_beside(row, weight, out, mode, like):
    """Whether `write_vector` writes what is asked for of a row.

    For float64 AVX2 has too few registers: 8192 x 1000 took 1.06 times as long.
    """
    suited = mode.nontemporal and (HAS_AVX512 or is_single(row.m))
    return suited and _are_plain(mode, weight) and row.kept and aligned_at(out, like) >= 0


@inline
def write_vector(beside, j, like):
    """Write the earlier row's vector of results at j past the caches, or what it has of that. Gives where it ended."""
    row, out = beside.earlier, classes_of(beside.out, beside.place)
    n, step = out.shape[0], lanes(like)
    if j < n:
        y = _plain(row, load(row.exps, j, like))
        if 0 <= row.target - j < step:
            y = where(only(row.target - j, y), row.at_target, y)
        if n - j < step:
            put(out, j, n - j, y, like)
        else:
            stream(out, j, y)
    return j + step


@inline
def clear_row(out, nontemporal, like):
    """Write zeros to a row."""
    n, step, zero = out.shape[0], lanes(like), broadcast(0.0, like)
    head = 0
    if nontemporal:
        aligned = aligned_at(out, like)
        head = min(aligned, n) if aligned >= 0 else n
    whole = head + (n - head) // step * step
    for j in range(0, head, step):
        put(out, j, min(step, head - j), zero, like)
    if nontemporal:
        for j in range(head, whole, step):
            stream(out, j, zero)
    else:
        for j in range(head, whole, step):
            store(out, j, zero)
    if whole < n:
        put(out, whole, n - whole, zero, like)
