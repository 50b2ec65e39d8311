"""The row kernel: softmax cross-entropy and its kin over classes that lie side by side."""

import numpy as np
from numba import cuda
from numba.cuda import types

from nbloss.cuda.functions import Functions, add
from nbloss.cuda.groups import reduction
from nbloss.cuda.intrinsics import (
    REAL,
    STORED,
    VECTOR_BYTES,
    device_function,
    is_published,
    load,
    load_integer,
    load_label,
    publish,
    store,
    sync_warp,
    take_number,
)
from nbloss.cuda.rowwise import NAN, ZERO, Row
from nbloss.cuda.vectors import row_access
from nbloss.problem import LOG_SOFTMAX, LOSS_ONLY

RECORD = 32  # bytes in which a part of a row tells the others its (m, below, ties), each in eight, and that it has


def rows(code, mass_code, form, dense, threads, height, values, parts, even, warp):
    """The kernel for classes side by side: `threads` threads a row, `values` a thread, `height` rows a block.

    A row lies in the registers of `parts` blocks, which tell each other its maximum and sum; of one block that goes
    over it span by span for parts = 0. `dense` says whether targets may have mass on every class, `even` whether all
    rows begin and end on sixteen bytes.
    """
    stored, real = STORED[code], REAL[code]
    f, row = Functions(code), Row(code, mass_code, form, dense)
    lowest, nothing, one, dtype = row.lowest, row.nothing, row.one, row.type
    around, scaled_exp, larger = f.around, f.scaled_exp, f.larger
    add_gap, mass_at, weight_at = row.add_gap, row.mass_at, row.weight_at
    moved, others, loss_of, at_target, entry = row.moved, row.others, row.loss_of, row.at_target, row.entry
    log1p = f.log1p
    size = stored.itemsize
    lanes = VECTOR_BYTES // size
    vectors, apart, span = values // lanes, threads * lanes, threads * values
    whole, pieces, bits = parts > 0, max(parts, 1), threads.bit_length() - 1
    keeps = whole and not dense and form != LOG_SOFTMAX  # exponentials in place of logits
    fetch, put = row_access(code, threads, values, even, lowest, warp)
    largest = reduction(larger, real, threads, warp)
    totals = reduction(add, real, threads, warp, 2)
    masses = reduction(add, real, threads, warp, 2)
    largest_part = reduction(larger, real, warp, warp)
    total_parts = reduction(add, real, warp, warp, 2)

    @device_function
    def maximum_of(v):
        top = lowest
        for k in range(values):
            top = larger(v[k], top)
        return top

    @device_function
    def sums_of(v, state, tied):
        """The sum of exp(x - m) over values below m, and the number of those at it: none if not `tied`."""
        below, ties = nothing, nothing
        for k in range(values):
            e = scaled_exp(v[k], state)
            if keeps:
                v[k] = e
                below += e
            elif e == state[2]:
                ties += one
            else:
                below += e
        if keeps and tied:  # few threads hold a maximum
            below = nothing
            for k in range(values):
                if v[k] == state[2]:
                    ties += one
                else:
                    below += v[k]
        return below * state[3], ties

    @cuda.jit(device=True)
    def block_number(exchange):
        """In the order in which blocks begin, so that a row's parts run at the same time."""
        if pieces == 1:
            return np.int64(cuda.blockIdx.x)
        slot = cuda.shared.array(1, types.int64)
        if cuda.threadIdx.x == 0:
            slot[0] = take_number(exchange)
        cuda.syncthreads()
        return slot[0]

    @cuda.jit(device=True)
    def of_all_parts(m, below, ties, exchange, number):
        """(m, below, ties) of the row from those of its parts, the same in each."""
        records = exchange + RECORD
        mine = records + number * RECORD
        if cuda.threadIdx.x == 0:
            store(mine, m, one)
            store(mine + 8, below, one)
            store(mine + 16, ties, one)
            publish(mine + 24)
        lane = cuda.threadIdx.x & (warp - 1)
        theirs = records + (number // pieces * pieces + lane) * RECORD
        if cuda.threadIdx.x < pieces:
            while not is_published(theirs + 24):
                pass
        cuda.syncthreads()
        m, below, ties = lowest, nothing, nothing
        if lane < pieces:
            m, below, ties = load(theirs, one), load(theirs + 8, one), load(theirs + 16, one)
        top = largest_part(m)
        if m < top:
            state = around(top)
            below = moved(below, ties, m, state)
            ties = nothing
        below, ties = total_parts(below, ties)
        return top, below, ties

    def kernel(logits, target, mass, result, upstream, share, uniform, scale):
        x, x_outer, _, _, outer, classes, _ = logits
        t, t_outer, _, t_code, ignore = target
        q, q_outer, q_class, _, weight = mass
        out, out_outer, _, _, loss, loss_outer, _ = result
        grad_output, grad_output_outer, _, factor, faults, exchange = upstream
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        number = block_number(exchange)
        thread = cuda.threadIdx.x & (threads - 1)
        i = number // pieces * height + (cuda.threadIdx.x >> bits)
        exists = i < outer
        # No branch around a row: the threads of a warp stay together. A row that is left out has no classes.
        active, label, ignored = exists, np.int64(-1), False
        if exists and t != 0:
            label = load_label(t + i * t_outer, t_code, ignore)
            ignored = label == ignore
            active = not ignored and label >= 0 and label < classes
        reach = classes if active else 0
        address = x + i * x_outer
        begin = number % pieces * span + thread * lanes
        spans = 1 if whole else (classes + span - 1) // span
        # below: the sum of exp(x - m) over classes below m, ties: the number of those at it. The threads of a row that
        # lies in registers find m first; those of another go by their own until the end.
        v = cuda.local.array(values, dtype)
        m, below, ties = lowest, nothing, nothing
        if whole:
            fetch(v, address, begin, reach)
            top = maximum_of(v)
            m = largest(top)
            state = around(m if m > lowest else nothing)
            below, ties = sums_of(v, state, top == m)
        else:
            state = around(nothing)
            for s in range(spans):
                fetch(v, address, begin + s * span, reach)
                top = maximum_of(v)
                if top > m:
                    state = around(top)
                    below = moved(below, ties, m, state)
                    m, ties = top, nothing
                more, tied = sums_of(v, state, top == m)
                below += more
                ties += tied
        unit = state[3]

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
            m, below, ties = of_all_parts(m, below, ties, exchange, number)
            state = around(m if m > lowest else nothing)
            unit *= scaled_exp(of_part, state) * state[3]
        r = others(below, ties, m)

        gap, mass_sum = nothing, nothing
        if dense:
            q_row = q + i * q_outer if q != 0 else q
            for back in range(spans):
                start = begin + (spans - 1 - back) * span
                if back > 0:
                    fetch(v, address, start, reach)
                for k in range(values):
                    j = start + k // lanes * apart + k % lanes
                    if j < reach:
                        mass_j = mass_at(j, q_row, q_class, weight, share, uniform)
                        gap = add_gap(gap, mass_j, m, v[k])
                        mass_sum += mass_j
            gap, mass_sum = masses(gap, mass_sum)

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
            out_row = out + i * out_outer
            room = classes if exists else 0
            if threads <= warp:
                sync_warp()  # in place, every thread has read x_t before one writes it; larger groups have met already
            for back in range(spans):
                # The span that was read last is still held; with a dense target that is the first one.
                s = back if dense else spans - 1 - back
                start = begin + s * span
                if back > 0:
                    fetch(v, address, start, reach)
                if keeps:
                    for k in range(values):
                        v[k] = v[k] * unit * slope  # slope * unit may be subnormal
                else:
                    for k in range(values):
                        j = start + k // lanes * apart + k % lanes
                        if not dense or j < reach:
                            v[k] = entry(
                                v[k], j, m, r, log_norm, state, slope, scale, a, q_row if dense else q, q_class, weight,
                                share, uniform,
                            )  # fmt: skip
                        else:
                            v[k] = nothing
                if form != LOG_SOFTMAX:
                    for u in range(vectors):
                        at = label - (start + u * apart)
                        if at >= 0 and at < lanes:  # one thread
                            for k in range(lanes):
                                v[u * lanes + k] = y_t if at == k else v[u * lanes + k]
                put(v, out_row, start, room)

    return kernel
