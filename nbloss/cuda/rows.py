"""The row kernel: softmax cross-entropy and its kin over classes that lie side by side."""

import numpy as np
from numba import cuda

from nbloss.cuda.choices import BESIDE
from nbloss.cuda.functions import PER_UNIT, UNIT, Functions, add
from nbloss.cuda.groups import reduction
from nbloss.cuda.intrinsics import REAL, STORED, VECTOR_BYTES, device_function, load, load_integer, store
from nbloss.cuda.labels import load_label
from nbloss.cuda.rowwise import NAN, ZERO, Row
from nbloss.cuda.shared import shared_room
from nbloss.cuda.staged import staged_access
from nbloss.cuda.threads import begin_cluster, let_next_begin, sync_warp, tell_cluster, wait_for_last
from nbloss.cuda.vectors import row_access
from nbloss.cuda.words import KNOWN, WORD, larger_pairs, put_values, value_of
from nbloss.problem import LOG_SOFTMAX, LOSS_ONLY


def rows(code, mass_code, form, dense, threads, height, values, parts, staged, even, warp, chained):
    """The kernel for classes side by side: `threads` threads a row, `values` a thread, `height` rows a block.

    A row lies in the registers of `parts` blocks, a cluster, which tell each other its maximum and sum; if `staged`, in
    their shared memory, which they go over span by span; for parts = 0, one block goes over it so where it is. `dense`
    says whether targets may have mass on every class, `even` whether all rows begin and end on sixteen bytes, `chained`
    whether the kernel may begin before the last has ended.
    """
    stored, real = STORED[code], REAL[code]
    f, row = Functions(code), Row(code, mass_code, form, dense)
    lowest, nothing, one, dtype = row.lowest, row.nothing, row.one, row.type
    around, scaled_exp, larger = f.around, f.scaled_exp, f.larger
    add_gap, mass_at, weight_at, row_mass = row.add_gap, row.mass_at, row.weight_at, row.row_mass
    moved, others, loss_of, at_target, entry = row.moved, row.others, row.loss_of, row.at_target, row.entry
    log1p = f.log1p
    size = stored.itemsize
    lanes = VECTOR_BYTES // size
    width, pair = min(threads, warp), 2 if size == 2 else 1
    vectors, apart, span = values // lanes, (threads if staged else width) * lanes, threads * values
    whole, pieces, bits = parts > 0 and not staged, max(parts, 1), threads.bit_length() - 1
    # Exponentials in place of logits, where they take more than the three instructions of 16 bits.
    keeps = whole and not dense and form != LOG_SOFTMAX and pair == 1
    # Threads that hold the maximum of a whole row, which are few, look at their exponentials once more.
    twice = keeps or (whole and pair == 2)
    if staged:
        stage, fetch, put, words = staged_access(code, threads, values, even)
    else:
        fetch, put, words = row_access(code, threads, values, even, lowest, warp, form == LOSS_ONLY)
    word = WORD[code]
    largest = reduction(larger, real, threads, warp)
    totals = reduction(add, real, threads, warp, 2)
    masses = reduction(add, real, threads, warp, 2)
    largest_part = reduction(larger, real, warp, warp)
    total_parts = reduction(add, real, warp, warp, 2)

    # The y and z of a block are 0, which the compiler does not know: see `value_of`.
    @cuda.jit(device=True)
    def maximum_of(v):
        top = lowest
        if code == "h":
            pairs = cuda.local.array(1, word)
            pairs[0] = v[0]
            for w in range(1, values // pair):
                pairs[0] = larger_pairs(v[w], pairs[0])
            for k in range(pair):
                top = larger(value_of(pairs, k, KNOWN, stored), top)
        else:
            for k in range(values):
                top = larger(value_of(v, k, cuda.blockIdx.y, stored), top)
        return top

    @device_function
    def sums_of(v, state, tied):
        """The sum of exp(x - m) over values below m, and the number of those at it: none if not `tied`."""
        below, ties = nothing, nothing
        if twice:
            for k in range(values):
                e = scaled_exp(value_of(v, k, KNOWN, stored), state)
                if keeps:
                    v[k] = e
                below += e
        if tied or not twice:
            below = nothing
            for k in range(values):
                e = value_of(v, k, cuda.blockIdx.z, stored)
                if not keeps:
                    e = scaled_exp(e, state)
                if e == state[UNIT]:
                    ties += one
                else:
                    below += e
        return below * state[PER_UNIT], ties

    @cuda.jit(device=True)
    def of_all_parts(m, below, ties, part):
        """(m, below, ties) of the row from those of its parts, the same in each."""
        slots = cuda.shared.array((pieces, 3), dtype)
        tell_cluster(slots, part, m, below, ties)
        lane = cuda.threadIdx.x & (warp - 1)
        m, below, ties = lowest, nothing, nothing
        if lane < pieces:
            m, below, ties = slots[lane, 0], slots[lane, 1], slots[lane, 2]
        top = largest_part(m)
        if m < top:
            state = around(top)
            below = moved(below, ties, m, state)
            ties = nothing
        below, ties = total_parts(below, ties)
        return top, below, ties

    @device_function
    def result_of(
        v, k, zero, start, reach, m, r, log_norm, state, slope, per_unit, scale, a, q, q_class, weight, share, uniform
    ):
        """What is written for element k of a thread, if it is not the target."""
        if keeps:
            return v[k] * per_unit * slope  # slope * per_unit may be subnormal
        j = start + k // lanes * apart + k % lanes
        if dense and j >= reach:  # a mass is read for none but the row's own
            return nothing
        x = value_of(v, k, zero, stored)
        return entry(x, j, m, r, log_norm, state, slope, scale, a, q, q_class, weight, share, uniform)

    def kernel(logits, target, mass, result, upstream, share, uniform, scale):
        x, x_outer, _, _, outer, classes, _ = logits
        t, t_outer, _, t_code, ignore = target
        q, q_outer, q_class, _, weight = mass
        out, out_outer, _, _, loss, loss_outer, _ = result
        grad_output, grad_output_outer, _, factor, faults = upstream
        if chained:
            let_next_begin()
        number, part = np.int64(cuda.blockIdx.x), np.int64(0)
        if pieces > 1:
            begin_cluster()
            number, part = number // pieces, number % pieces
        thread = cuda.threadIdx.x & (threads - 1)
        i = number * height + (cuda.threadIdx.x >> bits)
        exists = i < outer
        # No branch around a row: the threads of a warp stay together. A row that is left out has no classes.
        active, label, ignored = exists, np.int64(-1), False
        if exists and t != 0:
            label = load_label(t + i * t_outer, t_code, ignore)
            ignored = label == ignore
            active = not ignored and label >= 0 and label < classes
        # The classes of a row, of the block's part of it if staged, and up to which of them there is something to add.
        low, high = ZERO, classes if exists else ZERO
        reach = classes if active else 0
        address = x + i * x_outer
        if staged:
            each = ((classes + lanes - 1) // lanes + pieces - 1) // pieces  # vectors
            low = min(part * each * lanes, classes)
            high = min(low + each * lanes, classes)
            reach = high if active else low - lanes
            place = stage(shared_room((each + BESIDE) * VECTOR_BYTES), address, low, reach)
            begin = low + thread * lanes
        else:
            place = address
            begin = part * span + (thread // width) * (width * values) + thread % width * lanes
        spans = 1 if whole else (high - low + span - 1) // span
        # below: the sum of exp(x - m) over classes below m, ties: the number of those at it. The threads of a row that
        # lies in registers find m first; those of another go by their own until the end.
        v = cuda.local.array(words, word)
        m, below, ties = lowest, nothing, nothing
        if whole:
            fetch(v, place, begin, reach)
            top = maximum_of(v)
            m = largest(top)
            state = around(m if m > lowest else nothing)
            below, ties = sums_of(v, state, top == m)
        else:
            state = around(nothing)
            for s in range(spans):
                fetch(v, place, begin + s * span, reach)
                top = maximum_of(v)
                if top > m:
                    state = around(top)
                    below = moved(below, ties, m, state)
                    m, ties = top, nothing
                more, tied = sums_of(v, state, top == m)
                below += more
                ties += tied
        per_unit = state[PER_UNIT]

        # Read this late, for registers are scarce before, and before anyone may write in place: threads of a row meet
        # once more.
        x_t, weight_t, kept = nothing, one, nothing
        if active and t != 0:
            x_t = load(address + label * size, stored)
            weight_t = weight_at(weight, label)
            kept = share * weight_t
        elif q == 0:
            kept = one
        if not whole:
            top = largest(m)
            if m < top:
                state = around(top)
                below = moved(below, ties, m, state)
                ties = nothing
            m = top
        below, ties = totals(below, ties)
        if pieces > 1:
            of_part = m
            m, below, ties = of_all_parts(m, below, ties, part)
            state = around(m if m > lowest else nothing)
            per_unit *= scaled_exp(of_part, state) * state[PER_UNIT]
        r = others(below, ties, m)

        gap, mass_sum = nothing, nothing
        if dense:
            q_row = q + i * q_outer if q != 0 else q
            for back in range(spans):
                start = begin + (spans - 1 - back) * span
                if back > 0:
                    fetch(v, place, start, reach)
                for k in range(values):
                    j = start + k // lanes * apart + k % lanes
                    if j < reach:
                        mass_j = mass_at(j, q_row, q_class, weight, share, uniform)
                        gap = add_gap(gap, mass_j, m, value_of(v, k, cuda.blockIdx.y, stored))
                        mass_sum += mass_j
            gap, mass_sum = masses(gap, mass_sum)
            if active:
                mass_sum = row_mass(mass_sum, q, weight, uniform, classes)

        if chained:
            wait_for_last()
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        if begin == 0 and exists and loss != 0:
            value = loss_of(t != 0, q, kept, m, x_t, gap, mass_sum, r)
            if not active:
                value = nothing if ignored else NAN
            store(loss + i * loss_outer, value, one)

        if form != LOSS_ONLY:
            if factor != 0:
                scale *= load(factor, one)
            if exists and grad_output != 0:
                scale *= load(grad_output + i * grad_output_outer, one)
            a = kept + mass_sum
            # A row left out has exponentials of -inf, which are 0 and stay 0.
            slope = scale * a / (one + r) if active else nothing
            log_norm = log1p(r)
            y_t = at_target(scale, x_t, m, r, kept, mass_sum, uniform, weight_t) if active else nothing
            of_word = cuda.local.array(pair, dtype)
            out_row = out + i * out_outer
            zero = cuda.blockIdx.y if r > nothing else cuda.blockIdx.z  # not known before the threads have met
            if staged and not even:  # what is written goes by the vectors of memory there
                begin -= (out_row + low * size) % VECTOR_BYTES // size
                spans = (high - begin + span - 1) // span
            spot, at = ZERO, label - begin
            if staged:
                mine = label >= low and label < high
            else:
                mine = at >= 0 and (at < span or not whole)
            if active and mine:
                at &= span - 1
                if at & (apart - 1) < lanes and at < vectors * apart:
                    spot = out_row + label * size  # the target's place, for the thread that holds it
            if threads <= warp:
                sync_warp()  # in place, every thread has read x_t before one writes it; larger groups have met already
            for back in range(spans):
                # The span that was read last is still held; with a dense target that is the first one.
                s = back if dense else spans - 1 - back
                start = begin + s * span
                if back > 0 or staged:
                    fetch(v, place, start, reach)
                for u in range(vectors):
                    for c in range(lanes // pair):
                        w = u * (lanes // pair) + c
                        for h in range(pair):
                            of_word[h] = result_of(
                                v, w * pair + h, zero, start, reach, m, r, log_norm, state, slope, per_unit, scale, a,
                                q_row if dense else q, q_class, weight, share, uniform,
                            )  # fmt: skip
                        put_values(v, w, of_word[0], of_word[pair - 1], stored)
                    if even or staged:
                        put(v, u, out_row, start, low, high)
                if not (even or staged):
                    put(v, out_row, start, low, high)
            if not (even or staged):
                sync_warp()  # the target's place may be one that another thread of the warp has written
            if spot != 0:
                store(spot, y_t, stored)

    return kernel
