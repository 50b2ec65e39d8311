"""The row-wise kernels: cross-entropy with every kind of target, softmax, log-softmax, log-sum-exp, and nll_loss.

As on the CPU, both large ones find for each row its maximum m and r = sum exp(x - m) over all classes but one at the
maximum, and take it from there with nbloss.formulas. ``rows`` gives a row to a group of threads, which hold as much of
it in registers as fits (a span): a row of one span is read once and written once, a longer one is read again from its
end, where the cache still has it. ``planes`` gives a row to a thread, for a class axis that is not last, or any
strides. Losses are written row by row and summed apart (nbloss.cuda.sums).

What these kernels are given, besides a few numbers, is five tuples of integers:

    logits    address; bytes along (outer, classes, inner); lengths (outer, classes, inner)
    target    address, 0 for none; bytes along (outer, inner); code of the dtype; ignore_index
    mass      address of class probabilities, 0 for none; bytes along (outer, classes, inner); address of class weights
    result    address of the gradient; bytes along (outer, classes, inner); address of losses; along (outer, inner)
    upstream  address of grad_output; bytes along (outer, inner); address of one more factor; address of a count of
              faults, on which nothing is written
"""

import math

import numpy as np
from numba import cuda

from nbloss.cuda.intrinsics import (
    REAL,
    STORED,
    VECTOR_BYTES,
    Functions,
    add,
    device_function,
    load,
    load_integer,
    load_label,
    load_vector,
    maximum,
    reduction,
    store,
    store_vector,
    sync_warp,
    two_sum,
)
from nbloss.problem import LOG_SOFTMAX, LOSS_ONLY

FOLD = 32  # classes that `planes` sums before it adds to the row's sum: float32 loses less


class _Row:
    """What both kernels do with one row, compiled for one dtype."""

    def __init__(self, code, mass_code, form, dense):
        real, f = REAL[code], Functions(code)
        lowest, highest, nothing, one, nan = (real(v) for v in (-math.inf, math.inf, 0, 1, math.nan))
        self.lowest, self.nothing, self.one, self.type = lowest, nothing, one, f.type
        self.exp_difference, self.mass_gap = f.exp_difference, f.mass_gap
        exp_difference, log1p = f.exp_difference, f.log1p
        row_loss, target_gradient, dense_gradient = f.row_loss, f.target_gradient, f.dense_gradient
        stored_mass, weight_size = STORED[mass_code], one.itemsize

        @device_function
        def weight_at(weight, j):
            return load(weight + j * weight_size, one) if weight != 0 else one

        @device_function
        def mass_at(j, q, q_class, weight, share, uniform):
            """Mass of class j apart from that on the target itself: w_j (share q_j + uniform)."""
            spread = uniform + share * load(q + j * q_class, stored_mass) if q != 0 else uniform
            return spread * weight_at(weight, j)

        @device_function
        def others(below, ties, m):
            """r, from the sum over entries below the maximum and the number at it; NaN where m is infinite."""
            return below + (ties - one) if m > lowest and m < highest else nan

        @device_function
        def loss_of(labelled, q, kept, m, x_t, gap, mass, r):
            log_norm = log1p(r)
            if labelled and not dense:
                d, lost = two_sum(m, -x_t)
                if d < highest:
                    log_norm += lost  # with it the loss is rounded twice, not three times
            if labelled or q != 0:
                return row_loss(kept, m, x_t, gap, mass, log_norm)
            return m + log_norm

        @device_function
        def at_target(scale, x_t, m, r, kept, mass, uniform, weight_t):
            return scale * target_gradient(x_t, m, r, kept + mass, mass - uniform * weight_t)

        @device_function
        def entry(x, j, m, r, log_norm, slope, scale, a, q, q_class, weight, share, uniform):
            """What is written for class j, if it is not the target."""
            if form == LOG_SOFTMAX:
                return (x - m) - log_norm
            e = exp_difference(x, m)
            if not dense:
                return slope * e
            mass = mass_at(j, q, q_class, weight, share, uniform)
            if q != 0:
                return scale * dense_gradient(e, mass, a, r)
            return slope * e - scale * mass

        self.weight_at, self.mass_at, self.others = weight_at, mass_at, others
        self.loss_of, self.at_target, self.entry = loss_of, at_target, entry


def rows(code, mass_code, form, dense, threads, height, values, warp):
    """The kernel for classes side by side: `threads` a row, `values` a thread in a span, `height` rows a block.

    `dense` says whether targets may have mass on every class.
    """
    stored, real = STORED[code], REAL[code]
    row = _Row(code, mass_code, form, dense)
    lowest, nothing, one, dtype = row.lowest, row.nothing, row.one, row.type
    exp_difference, mass_gap, mass_at, weight_at = row.exp_difference, row.mass_gap, row.mass_at, row.weight_at
    others, loss_of, at_target, entry = row.others, row.loss_of, row.at_target, row.entry
    log1p = Functions(code).log1p
    size = stored.itemsize
    lanes = VECTOR_BYTES // size
    vectors, apart, span = values // lanes, threads * lanes, threads * values
    largest = reduction(maximum, lowest, real, threads, warp)
    total = reduction(add, nothing, real, threads, warp)

    # Which thread holds a class depends on the class alone, never on alignment, and so does the order of every sum.
    @device_function
    def fetch(v, address, first, reach):
        """The vectors of a thread, from class `first` on; -inf for what lies past the row."""
        aligned = address % VECTOR_BYTES == 0
        for u in range(vectors):
            j = first + u * apart
            if aligned and j + lanes <= reach:
                load_vector(address + j * size, v, u * lanes, stored)
            else:
                for k in range(lanes):
                    v[u * lanes + k] = lowest
        # The end of a row and rows that are not aligned apart, so that nothing stands between the loads above.
        for u in range(vectors):
            j = first + u * apart
            if j < reach and not (aligned and j + lanes <= reach):
                for k in range(lanes):
                    if j + k < reach:
                        v[u * lanes + k] = load(address + (j + k) * size, stored)

    @device_function
    def put(v, address, first, reach):
        aligned = address % VECTOR_BYTES == 0
        for u in range(vectors):
            j = first + u * apart
            if aligned and j + lanes <= reach:
                store_vector(address + j * size, v, u * lanes, stored)
            else:
                for k in range(lanes):
                    if j + k < reach:
                        store(address + (j + k) * size, v[u * lanes + k], stored)

    def kernel(logits, target, mass, result, upstream, share, uniform, scale):
        x, x_outer, _, _, outer, classes, _ = logits
        t, t_outer, _, t_code, ignore = target
        q, q_outer, q_class, _, weight = mass
        out, out_outer, _, _, loss, loss_outer, _ = result
        grad_output, grad_output_outer, _, factor, faults = upstream
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        thread = cuda.threadIdx.x % threads
        i = np.int64(cuda.blockIdx.x) * height + cuda.threadIdx.x // threads
        exists = i < outer
        # No branch around a row: the threads of a warp stay together. A row that is left out has no classes.
        active, label, ignored = exists, np.int64(-1), False
        if exists and t != 0:
            label = load_label(t + i * t_outer, t_code)
            ignored = label == ignore
            active = not ignored and label >= 0 and label < classes
        reach = classes if active else 0
        address = x + i * x_outer
        begin = thread * lanes
        spans = (classes + span - 1) // span
        x_t, weight_t, kept = nothing, one, nothing
        if active and t != 0:
            x_t = load(address + label * size, stored)
            weight_t = weight_at(weight, label)
            kept = share * weight_t
        elif q == 0:
            kept = one

        v = cuda.local.array(values, dtype)
        m, below, ties = lowest, nothing, nothing
        for s in range(spans):
            fetch(v, address, begin + s * span, reach)
            top = lowest
            for k in range(values):
                top = maximum(v[k], top)
            if top > m:
                below = (below + ties) * exp_difference(m, top)
                ties, m = nothing, top
            shift = m if m > lowest else nothing
            for k in range(values):
                e = exp_difference(v[k], shift)
                if v[k] - shift == nothing:
                    ties += one
                else:
                    below += e
        top = largest(m)
        if m < top:
            below = (below + ties) * exp_difference(m, top)
            ties = nothing
        m = top
        below = total(below)
        r = others(below, total(ties), m)

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
                        gap += mass_gap(mass_j, m, v[k])
                        mass_sum += mass_j
            gap = total(gap)
            mass_sum = total(mass_sum)

        if thread == 0 and exists and loss != 0:
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
            slope = scale * a / (one + r)
            log_norm = log1p(r)
            y_t = at_target(scale, x_t, m, r, kept, mass_sum, uniform, weight_t)
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
                for k in range(values):
                    j = start + k // lanes * apart + k % lanes
                    if active:
                        if j == label:
                            v[k] = y_t
                        elif not dense or j < reach:
                            v[k] = entry(
                                v[k], j, m, r, log_norm, slope, scale, a, q_row if dense else q, q_class, weight,
                                share, uniform,
                            )  # fmt: skip
                    else:
                        v[k] = nothing
                put(v, out_row, start, room)

    return kernel


ZERO = np.int64(0)
NAN = np.float32(math.nan)


def planes(code, mass_code, form, dense, wide):
    """The kernel for a row a thread: sixteen bytes of neighbouring rows a thread if `wide`, else one of any strides."""
    stored = STORED[code]
    row = _Row(code, mass_code, form, dense)
    lowest, nothing, one, dtype = row.lowest, row.nothing, row.one, row.type
    exp_difference, mass_gap, mass_at, weight_at = row.exp_difference, row.mass_gap, row.mass_at, row.weight_at
    others, loss_of, at_target, entry = row.others, row.loss_of, row.at_target, row.entry
    log1p = Functions(code).log1p
    lanes = VECTOR_BYTES // stored.itemsize if wide else 1

    @device_function
    def fetch(v, address):
        if wide:
            load_vector(address, v, 0, stored)
        else:
            v[0] = load(address, stored)

    @device_function
    def put(v, address):
        if wide:
            store_vector(address, v, 0, stored)
        else:
            store(address, v[0], stored)

    def kernel(logits, target, mass, result, upstream, share, uniform, scale):
        x, x_outer, x_class, x_inner, outer, classes, inner = logits
        t, t_outer, t_inner, t_code, ignore = target
        q, q_outer, q_class, q_inner, weight = mass
        out, out_outer, out_class, out_inner, loss, loss_outer, loss_inner = result
        grad_output, grad_output_outer, grad_output_inner, factor, faults = upstream
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        unit = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        per_outer = inner // lanes
        i = unit // per_outer
        first = unit % per_outer * lanes
        if i >= outer:
            return
        address = x + i * x_outer + first * x_inner
        q_row = q + i * q_outer + first * q_inner if q != 0 else q

        v = cuda.local.array(lanes, dtype)
        m = cuda.local.array(lanes, dtype)
        below = cuda.local.array(lanes, dtype)
        chunk = cuda.local.array(lanes, dtype)
        ties = cuda.local.array(lanes, dtype)
        for k in range(lanes):
            m[k], below[k], chunk[k], ties[k] = lowest, nothing, nothing, nothing
        # An ignored row may be read beside its neighbours, never used.
        for j in range(classes):
            fetch(v, address + j * x_class)
            for k in range(lanes):
                if v[k] > m[k]:
                    below[k] = (below[k] + chunk[k] + ties[k]) * exp_difference(m[k], v[k])
                    m[k], chunk[k], ties[k] = v[k], nothing, one
                else:
                    shift = m[k] if m[k] > lowest else nothing
                    if v[k] - shift == nothing:
                        ties[k] += one
                    else:
                        chunk[k] += exp_difference(v[k], shift)
                if j % FOLD == FOLD - 1:
                    below[k] += chunk[k]
                    chunk[k] = nothing

        r = below
        label = cuda.local.array(lanes, np.int64)
        gap = cuda.local.array(lanes, dtype)
        mass_sum = cuda.local.array(lanes, dtype)
        for k in range(lanes):
            r[k] = others(below[k] + chunk[k], ties[k], m[k])
            label[k], gap[k], mass_sum[k] = -1, nothing, nothing
            if t != 0:
                label[k] = load_label(t + i * t_outer + (first + k) * t_inner, t_code)
        if dense:
            for j in range(classes):
                fetch(v, address + j * x_class)
                for k in range(lanes):
                    mass_j = mass_at(j, q_row + k * q_inner if q != 0 else q, q_class, weight, share, uniform)
                    gap[k] += mass_gap(mass_j, m[k], v[k])
                    mass_sum[k] += mass_j

        y_t = cuda.local.array(lanes, dtype)
        slope = cuda.local.array(lanes, dtype)
        scales = cuda.local.array(lanes, dtype)
        masses = cuda.local.array(lanes, dtype)
        if factor != 0:
            scale *= load(factor, one)
        for k in range(lanes):
            active, x_t, weight_t = True, nothing, one
            kept = one if q == 0 else nothing
            if t != 0:
                active = label[k] != ignore and label[k] >= 0 and label[k] < classes
                if active:
                    x_t = load(address + label[k] * x_class + k * x_inner, stored)
                    weight_t = weight_at(weight, label[k])
                    kept = share * weight_t
            if loss != 0:
                value = loss_of(t != 0, q, kept, m[k], x_t, gap[k], mass_sum[k], r[k])
                if not active:
                    value = nothing if label[k] == ignore else NAN
                store(loss + i * loss_outer + (first + k) * loss_inner, value, one)
            if form != LOSS_ONLY:
                scales[k] = scale
                if grad_output != 0:
                    scales[k] *= load(grad_output + i * grad_output_outer + (first + k) * grad_output_inner, one)
                masses[k] = kept + mass_sum[k]
                slope[k] = scales[k] * masses[k] / (one + r[k])
                y_t[k] = at_target(scales[k], x_t, m[k], r[k], kept, mass_sum[k], uniform, weight_t)
                if not active:
                    label[k] = INACTIVE

        if form != LOSS_ONLY:
            log_norm = cuda.local.array(lanes, dtype)
            for k in range(lanes):
                log_norm[k] = log1p(r[k])
            out_row = out + i * out_outer + first * out_inner
            for j in range(classes):
                fetch(v, address + j * x_class)
                for k in range(lanes):
                    if label[k] == j:
                        v[k] = y_t[k]
                    elif label[k] == INACTIVE:
                        v[k] = nothing
                    else:
                        v[k] = entry(
                            v[k], j, m[k], r[k], log_norm[k], slope[k], scales[k], masses[k],
                            q_row + k * q_inner if q != 0 else q, q_class, weight, share, uniform,
                        )  # fmt: skip
                put(v, out_row + j * out_class)

    return kernel


INACTIVE = np.int64(-2)


def picks(code, form):
    """The kernel of nll_loss, a row a thread: its loss, or its gradient at the target (the rest of which is 0)."""
    stored, real = STORED[code], REAL[code]
    nothing, one = real(0), real(1)
    mass_gap = Functions(code).mass_gap
    weight_size = one.itemsize

    def kernel(logits, target, mass, result, upstream, scale):
        x, x_outer, x_class, x_inner, outer, classes, inner = logits
        t, t_outer, t_inner, t_code, ignore = target
        _, _, _, _, weight = mass
        out, out_outer, out_class, out_inner, loss, loss_outer, loss_inner = result
        grad_output, grad_output_outer, grad_output_inner, factor, faults = upstream
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        unit = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        i, k = unit // inner, unit % inner
        if i >= outer:
            return
        label = load_label(t + i * t_outer + k * t_inner, t_code)
        active = label != ignore and label >= 0 and label < classes
        weight_t = load(weight + label * weight_size, one) if active and weight != 0 else one
        if form == LOSS_ONLY:
            value = nothing if label == ignore else NAN
            if active:
                value = mass_gap(weight_t, nothing, load(x + i * x_outer + label * x_class + k * x_inner, stored))
            store(loss + i * loss_outer + k * loss_inner, value, one)
        elif active:
            if factor != 0:
                scale *= load(factor, one)
            if grad_output != 0:
                scale *= load(grad_output + i * grad_output_outer + k * grad_output_inner, one)
            store(out + i * out_outer + label * out_class + k * out_inner, -(scale * weight_t), stored)

    return kernel
