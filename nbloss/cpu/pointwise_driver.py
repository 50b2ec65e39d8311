"""The text of the pointwise kernel, one for all losses."""

import numpy as np
from numba import prange

from nbloss import formulas
from nbloss.cpu import simd, vecmath
from nbloss.cpu.operands import arrays_at, numbers_at
from nbloss.cpu.simd import (
    HAS_AVX512,
    NONTEMPORAL,
    UNLESS_NEW,
    add_wide,
    aligned_at,
    allocated,
    broadcast,
    first,
    halves,
    inline,
    is_mapped,
    is_single,
    joined,
    lane,
    lanes,
    load,
    load_one,
    pair,
    prefetch_far,
    put,
    read,
    store,
    store_first,
    stream,
    total,
    where,
    write,
)
from nbloss.cpu.sums import add_to, add_wide_to, no_sum, number_of, sum_of, sums_of_pairs
from nbloss.problem import WANT_GRADIENT, WANT_VALUE

PRIMITIVES = {
    "exp": vecmath.exp,
    "log_unit": vecmath.log_unit,
    "log_complement": vecmath.log_complement,
    "log1p_unit": vecmath.log1p_unit,
    "over_unit": inline(formulas.over_unit),
    "fma": simd.fma,
    "absolute": simd.absolute,
    "maximum": simd.maximum,
    "where": simd.where,
}
NUMBERS = (0,) * 3  # as many as follow the layout of the operands
AHEAD = 16  # beside WANT_VALUE, WANT_GRADIENT, NONTEMPORAL and UNLESS_NEW: `sums` fetches, as `pairs` always does
# How many elements ahead. Memory needs it: 2^24 losses of BCE take 0.48 of the time and gradients 0.7, losses of MSE
# 0.65 and gradients 0.8.
FAR = 2048
NAN = np.nan
# Of other formulas, AVX2 has too few registers to sum pairs of vectors: one vector at a time takes 0.7 to 0.9 of the
# time (2^24 losses of BCE and BCE with logits). Of these, it takes 1.1 times as long.
SHORT_FORMULAS = (formulas.mse_loss, formulas.l1_loss, formulas.summand)


@inline
def _side_by_side(a):
    return a.shape[0] == 0 or a.strides[0] == a.itemsize


@inline
def _plain(a):
    return a.strides[0] == 0 or a.strides[0] == a.itemsize


@inline
def _fetch(a, j, like):
    """Fetch the vector FAR ahead."""
    prefetch_far(a, j + FAR, like)


@inline
def _fetch_pair(a, j, like):
    _fetch(a, j, like)
    _fetch(a, j + lanes(like), like)


@inline
def _load_pair(a, j, like):
    return pair(load(a, j, like), load(a, j + lanes(like), like))


@inline
def _pair_of(a, same, j, like):
    """A pair of an operand from j on; `same` where it holds one value only (stride 0)."""
    if a.strides[0] == 0:
        return pair(same, same)
    _fetch_pair(a, j, like)
    return _load_pair(a, j, like)


@inline
def _alone(a, b):
    return a


@inline
def _all_one(a, same):
    return a.strides[0] == 0 and lane(same, 0) == 1.0


@inline
def _operand(a, same, j, count, like):
    """Elements j, … of an operand, beyond them 1/2, which lies in every loss's domain; `same` where it holds one value
    only (stride 0).
    """
    return same if a.strides[0] == 0 else read(a, j, count, 0.5, like)


@inline
def _is_full(count, like):
    """Whether the sum of a group of float64 is complete after so many elements: every 16 vectors. Never for float32."""
    return not is_single(broadcast(0.0, like)) and count % (16 * lanes(like)) == 0


@inline
def _is_new(addresses, layout):
    _, _, _, _, _, gradient, _ = arrays_at(addresses, layout)
    return is_mapped(gradient)


def driver_of(formula, memory_for, unit_of):
    """The driver of a loss, given what allocates the memory of a block, and what of a line or several a unit is."""
    loss_and_gradient = inline(formulas.bind(formula, **PRIMITIVES))
    # What `sums` takes at once.
    by_pairs = HAS_AVX512 or formula in SHORT_FORMULAS
    fetch, load_at_once, at_once = (_fetch_pair, _load_pair, pair) if by_pairs else (_fetch, load, _alone)

    @inline
    def pairs(arrays, want, kept, aligned, start, stop, like):
        """Pairs of vectors that lie side by side: (sum of losses, faults). `kept` losses are stored."""
        x, t, weight, pos_weight, upstream, gradient, loss = arrays
        step = lanes(like)
        same_w, same_p = load_one(weight, 0, like), load_one(pos_weight, 0, like)
        same_u = load_one(upstream, 0, like)
        same_factor = same_w * same_u
        is_same, unweighted = weight.strides[0] == 0 and upstream.strides[0] == 0, _all_one(weight, same_w)
        none = broadcast(0.0, np.float64(0.0))
        value_sum, whole = none, no_sum()
        late = broadcast(0.0, like)
        faults = pair(late, late)
        for j in range(start, stop, 2 * step):
            _fetch_pair(x, j, like)
            _fetch_pair(t, j, like)
            p = _pair_of(pos_weight, same_p, j, like)
            value, slope, outside = loss_and_gradient(_load_pair(x, j, like), _load_pair(t, j, like), p)
            faults = where(outside, 1.0, faults)
            if want & WANT_VALUE:
                if not unweighted:
                    value = value * _pair_of(weight, same_w, j, like)
                if kept:
                    one, other = halves(where(outside, NAN, value))
                    store(loss, j, one)
                    store(loss, j + step, other)
                value_sum = add_wide(value_sum, value)
            if want & WANT_GRADIENT:
                factor = pair(same_factor, same_factor)
                if not is_same:
                    factor = _pair_of(weight, same_w, j, like) * _pair_of(upstream, same_u, j, like)
                one, other = halves(where(outside, 0.0, slope * factor))
                if aligned < 0:
                    store(gradient, j, one)
                    store(gradient, j + step, other)
                else:
                    if j > start:  # a vector late, so that what is written past the caches is aligned
                        stream(gradient, j - step + aligned, joined(late, one, aligned))
                    elif aligned:
                        store_first(gradient, j, aligned, one)
                    stream(gradient, j + aligned, joined(one, other, aligned))
                late = other
            if _is_full(j + 2 * step - start, like):
                whole, value_sum = add_to(whole, value_sum), none
        whole = add_to(whole, value_sum)
        if aligned >= 0:
            put(gradient, stop - step + aligned, step - aligned, joined(late, late, aligned), like)
        return total(sum_of(whole)), total(faults)

    @inline
    def sums(arrays, fetched, start, stop, like):
        """The same of losses that are neither stored nor differentiated nor weighted, with one `pos_weight` for all.

        What is taken at once is loaded with the one before and added with the one behind it: fewer operations wait for
        each other, 1.09 times faster for BCE with logits.
        """
        x, t, _, pos_weight, _, _, _ = arrays
        step = 2 * lanes(like) if by_pairs else lanes(like)
        one_p, zero = load_one(pos_weight, 0, like), broadcast(0.0, like)
        same_p, nothing = at_once(one_p, one_p), at_once(zero, zero)
        none = broadcast(0.0, np.float64(0.0))
        value_sum, whole = none, no_sum()
        faults = behind = ahead_x = ahead_t = nothing
        if start < stop:
            ahead_x, ahead_t = load_at_once(x, start, like), load_at_once(t, start, like)
        for j in range(start, stop, step):
            here_x, here_t, following = ahead_x, ahead_t, min(j + step, stop - step)
            ahead_x, ahead_t = load_at_once(x, following, like), load_at_once(t, following, like)
            if fetched:
                fetch(x, j, like)
                fetch(t, j, like)
            value_sum = add_wide(value_sum, behind)
            if _is_full(j - start, like):
                whole, value_sum = add_to(whole, value_sum), none
            behind, _, outside = loss_and_gradient(here_x, here_t, same_p)
            faults = where(outside, 1.0, faults)
        whole = add_to(whole, add_wide(value_sum, behind))
        return total(sum_of(whole)), total(faults)

    @inline
    def segment(arrays, want, start, stop, like):
        """Elements of one line: (sum of losses, more than 0 if some lie outside the domain)."""
        x, t, weight, pos_weight, upstream, gradient, loss = arrays
        step = lanes(like)
        same_w, same_p = load_one(weight, 0, like), load_one(pos_weight, 0, like)
        same_u = load_one(upstream, 0, like)
        # Pairs of vectors side by side in memory first, then what is left before and behind, and arrays of any stride:
        # the same text twice, because masks and strided access in the first loop would make it 3 times slower.
        head = whole = start
        side_by_side = _side_by_side(x) and _side_by_side(t) and _side_by_side(gradient) and _side_by_side(loss)
        if side_by_side and _plain(weight) and _plain(pos_weight) and _plain(upstream):
            whole = start + (stop - start) // (2 * step) * (2 * step)
        aligned = aligned_at(gradient[start:], like) if want & NONTEMPORAL and whole > start else -1
        if aligned > 0 and not HAS_AVX512:
            if want & WANT_VALUE:
                aligned = -1
            else:  # there is no sum, whose bits would depend on where pairs begin
                head = start + aligned
                whole = head + (stop - head) // (2 * step) * (2 * step)
                aligned = 0 if whole > head else -1
        kept = loss.shape[0]
        unweighted = _all_one(weight, same_w) and pos_weight.strides[0] == 0
        if kept or not unweighted or want & (WANT_VALUE | WANT_GRADIENT) != WANT_VALUE:
            value_sum, faults_within = pairs(arrays, want, kept, np.int64(aligned), head, whole, like)
        elif want & AHEAD:
            value_sum, faults_within = sums(arrays, True, head, whole, like)
        else:  # a loop of its own, for what is in a cache is 1.1 times as fast without prefetches
            value_sum, faults_within = sums(arrays, False, head, whole, like)
        faults = broadcast(0.0, like)
        others = no_sum()
        begin, end = start, head
        for _ in range(2):  # what lies before pairs, and behind
            for j in range(begin, end, step):
                count = min(step, end - j)
                w = _operand(weight, same_w, j, count, like)
                p = _operand(pos_weight, same_p, j, count, like)
                value, slope, outside = loss_and_gradient(read(x, j, count, 0.5, like), read(t, j, count, 0.5, like), p)
                inside = first(count, value)
                faults = where(inside, where(outside, 1.0, faults), faults)
                if want & WANT_VALUE:
                    value = value * w
                    if kept:
                        write(loss, j, count, where(outside, NAN, value), like)
                    others = add_wide_to(others, where(inside, value, 0.0))
                if want & WANT_GRADIENT:
                    slope = slope * (w * _operand(upstream, same_u, j, count, like))
                    write(gradient, j, count, where(outside, 0.0, slope), like)
            begin, end = whole, stop
        return value_sum + total(sum_of(others)), np.float64(faults_within + total(faults))

    @inline
    def block_at(addresses, layout, memory, want, per_unit, like, start, stop):
        """Units from `start` to `stop`: (sum of losses, faults)."""
        arrays = arrays_at(addresses, layout)
        value_sum, faults = (0.0, 0.0), 0.0
        for unit in range(start, stop):
            line, begin, end = unit_of(arrays, unit, per_unit, unit == start, memory, like)
            v, f = segment(line, want, begin, end, like)
            value_sum = add_to(value_sum, v)
            faults += f
        return number_of(value_sum), faults

    # x, t, weight, pos_weight, upstream, gradient, loss: (far, outer, inner), upstream being the factor of the
    # gradient. Only parts make arrays of their addresses: here Numba would count references to them.
    def driver(units, step, first_block, stop_block, layout, like, x, t, weight, pos_weight, upstream, gradient, loss):
        addresses = (x, t, weight, pos_weight, upstream, gradient, loss)
        want, per_unit, room = numbers_at(addresses, layout, NUMBERS)
        if want & UNLESS_NEW and _is_new(addresses, layout):
            want = want & ~NONTEMPORAL
        part = allocated(2 * (stop_block - first_block))
        for block in prange(first_block, stop_block):
            start, stop = block * step, min(units, block * step + step)
            v, f = block_at(addresses, layout, memory_for(room), want, per_unit, like, start, stop)
            part[2 * (block - first_block)] = v
            part[2 * (block - first_block) + 1] = f
        value_sum, faults = sums_of_pairs(part)
        return float(NAN if faults > 0.0 else value_sum), float(faults)  # no NumPy scalars where this runs as Python

    return driver
