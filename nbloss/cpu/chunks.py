"""A chunk of a row, vectors along the classes: its maximum, its sum, and what is done beside it."""

import numpy as np

from nbloss.cpu.results import write_vector
from nbloss.cpu.simd import (
    broadcast,
    first_lane,
    inline,
    lane,
    lanes,
    largest,
    load,
    load_first,
    maximum,
    only,
    prefetch,
    prefetch_far,
    store,
    take,
    where,
)
from nbloss.cpu.vecmath import scaled_exp

NEG_INF, NAN = -np.inf, np.nan
NEAR, FAR = 1024, 8192  # elements ahead of which a long row is fetched, into the first-level and second-level cache


@inline
def maximum_of(x, start, stop, like):
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
def place_of(x, start, stop, value, like):
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
def distances_of(classes, short, dense):
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
def _sum_vectors(x, start, stop, some_large, scale, exps, keep, beside, writes, written, s, s2, top, like):
    """Whole vectors of a chunk: what `sum_chunk` gives, added to s and s2, in turns, and top."""
    other, offset, q, near, far, _, _, _ = beside
    scale = some_large, *scale
    for j in range(start, stop, lanes(like)):
        if writes:
            written = write_vector(beside, written, like)
        top = maximum(load(other, j + offset, like), top)
        prefetch(x, j + near, like)
        prefetch_far(q, j + far, like)
        e = scaled_exp(load(x, j, like), scale)
        if keep:
            store(exps, j, e)
        s, s2 = s2, s + e
    return written, s, s2, top


@inline
def sum_chunk(x, start, stop, left_out, scale, exps, keep, beside, writes, written, like):
    """(how far the earlier row is written, the sum, by lanes, of scaled_exp over x[start:stop] without x[left_out], the
    maximum, by lanes, of as many elements of the other row); `exps` gets the terms of the sum if `keep`.

    Loading what is summed next overlaps memory with arithmetic, 1.2 times faster than a pass of its own. If it `writes`
    the earlier row, each vector of it is written before one is summed, whose exponentials may take its place.
    """
    step = lanes(like)
    other, offset = beside.other, beside.offset
    some_large, c, lowest, round_to = scale
    # One value in every lane: told so, LLVM holds each in one of 16 registers instead of two.
    c, lowest, round_to = lane(c, 0), lane(lowest, 0), lane(round_to, 0)
    fixed = broadcast(c, like), broadcast(lowest, like), broadcast(round_to, like)
    scale = some_large, *fixed
    s = s2 = broadcast(0.0, like)  # in turns: one sum of a whole chunk would lose more
    top = broadcast(NEG_INF, like)
    whole = start + (stop - start) // step * step
    split = start + (left_out - start) // step * step if start <= left_out < whole else whole
    begin, end = start, split
    for _ in range(2):  # before and after the vector of x[left_out]: no other pays for it
        if writes:
            written, s, s2, top = _sum_vectors(
                x, begin, end, False, fixed, exps, True, beside, True, written, s, s2, top, like
            )
        elif some_large:  # asked before the loop, 1.03 times faster; see ``groups``
            written, s, s2, top = _sum_vectors(
                x, begin, end, True, fixed, exps, keep, beside, False, written, s, s2, top, like
            )
        else:
            written, s, s2, top = _sum_vectors(
                x, begin, end, False, fixed, exps, keep, beside, False, written, s, s2, top, like
            )
        if end < whole:
            if writes:
                written = write_vector(beside, written, like)
            e = scaled_exp(load(x, end, like), scale)
            if keep:
                store(exps, end, e)
            s = where(only(left_out - end, e), s, s + e)
            top = maximum(load(other, end + offset, like), top)
        begin, end = split + step, whole
    if whole < stop:
        if writes:
            written = write_vector(beside, written, like)
        e = scaled_exp(load_first(x, whole, stop - whole, NEG_INF, like), scale)
        if keep:
            store(exps, whole, e)
        s = where(only(left_out - whole, e), s, s + e)
        top = maximum(load_first(other, whole + offset, stop - whole, NEG_INF, like), top)
    return written, s + s2, top
