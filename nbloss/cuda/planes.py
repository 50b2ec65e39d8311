"""The kernel for a row a thread: a class axis that is not last, or rows of any strides."""

import numpy as np
from numba import cuda

from nbloss.cuda.functions import PER_UNIT, UNIT, Functions, two_sum
from nbloss.cuda.intrinsics import (
    STORED,
    VECTOR_BYTES,
    device_function,
    load,
    load_integer,
    load_vector_if,
    store,
    store_vector,
    unpack,
)
from nbloss.cuda.labels import load_label
from nbloss.cuda.rowwise import NAN, ZERO, Row
from nbloss.problem import LOSS_ONLY

INACTIVE = np.int64(-2)
BLOCK = 64  # classes a sum of masses, of which there are two levels: errors grow with 64 + classes / 64
AT_ONCE = 32  # values in registers; half as many of float64 and of rows that are not wide, a quarter of them if dense


def planes(code, mass_code, form, dense, wide):
    """The kernel: a thread takes sixteen bytes of neighbouring rows if `wide`, else one row of any strides."""
    stored = STORED[code]
    f, row = Functions(code), Row(code, mass_code, form, dense)
    lowest, nothing, one, dtype = row.lowest, row.nothing, row.one, row.type
    around, scaled_exp, larger, log1p = f.around, f.scaled_exp, f.larger, f.log1p
    add_gap, mass_at, weight_at, row_mass = row.add_gap, row.mass_at, row.weight_at, row.row_mass
    moved, others, loss_of, at_target, entry = row.moved, row.others, row.loss_of, row.at_target, row.entry
    lanes = VECTOR_BYTES // stored.itemsize if wide else 1
    values = max((AT_ONCE // 2 if code == "d" or not wide else AT_ONCE) // (4 if dense else 1), lanes)
    depth = values // lanes

    @device_function
    def fetch(v, address, x_class, j, classes):
        """Classes j, j + 1, … of the thread's rows; -inf for what lies past the last."""
        for d in range(depth):
            if wide:
                load_vector_if(j + d < classes, address + (j + d) * x_class, v, d * lanes, stored)
            else:
                v[d] = load(address + (j + d) * x_class, stored) if j + d < classes else lowest
        for d in range(depth if wide else 0):
            unpack(v, d * lanes, stored)

    def kernel(logits, target, mass, result, upstream, share, uniform, scale):
        x, x_outer, x_class, x_inner, outer, classes, inner = logits
        t, t_outer, t_inner, t_code, ignore = target
        q, q_outer, q_class, q_inner, weight = mass
        out, out_outer, out_class, out_inner, loss, loss_outer, loss_inner = result
        grad_output, grad_output_outer, grad_output_inner, factor, faults = upstream
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        number = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        per_outer = inner // lanes
        i = number // per_outer
        first = number % per_outer * lanes
        if i >= outer:
            return
        address = x + i * x_outer + first * x_inner
        q_row = q + i * q_outer + first * q_inner if q != 0 else q

        # Of each row: below, the sum of exp(x - m) over classes below m, what was rounded away of it (1e-4 of a sum of
        # 130000 equal terms), and ties, the number of those at m: as a float32, it would end at 2^24.
        v = cuda.local.array(values, dtype)
        m = cuda.local.array(lanes, dtype)
        below = cuda.local.array(lanes, dtype)
        below_lost = cuda.local.array(lanes, dtype)
        ties = cuda.local.array(lanes, np.uint32)
        centre = cuda.local.array(lanes, dtype)
        shift = cuda.local.array(lanes, dtype)
        unit = cuda.local.array(lanes, dtype)
        per_unit = cuda.local.array(lanes, dtype)
        for k in range(lanes):
            m[k], below[k], below_lost[k], ties[k] = lowest, nothing, nothing, 0
            centre[k], shift[k], unit[k], per_unit[k] = around(nothing)
        # An ignored row may be read beside its neighbours, never used.
        for j in range(0, classes, depth):
            fetch(v, address, x_class, j, classes)
            for k in range(lanes):
                top = lowest
                for d in range(depth):
                    top = larger(v[d * lanes + k], top)
                state = centre[k], shift[k], unit[k], per_unit[k]
                if top > m[k]:
                    state = around(top)
                    below[k] = moved(below[k] + below_lost[k], dtype(ties[k]), m[k], state)
                    m[k], below_lost[k], ties[k] = top, nothing, 0
                    centre[k], shift[k], unit[k], per_unit[k] = state
                plain = nothing
                for d in range(depth):
                    e = scaled_exp(v[d * lanes + k], state)
                    if e == state[UNIT]:
                        ties[k] += 1
                    else:
                        plain += e
                below[k], lost = two_sum(below[k], plain * state[PER_UNIT])
                below_lost[k] += lost

        r = cuda.local.array(lanes, dtype)
        label = cuda.local.array(lanes, np.int64)
        gap = cuda.local.array(lanes, dtype)
        mass_sum = cuda.local.array(lanes, dtype)
        for k in range(lanes):
            r[k] = others(below[k] + below_lost[k], dtype(ties[k]), m[k])
            label[k], gap[k], mass_sum[k] = -1, nothing, nothing
            if t != 0:
                label[k] = load_label(t + i * t_outer + (first + k) * t_inner, t_code, ignore)
        if dense:
            gap_block, mass_block = cuda.local.array(lanes, dtype), cuda.local.array(lanes, dtype)
            for block in range(0, classes, BLOCK):
                for k in range(lanes):
                    gap_block[k], mass_block[k] = nothing, nothing
                for j in range(block, min(block + BLOCK, classes), depth):
                    fetch(v, address, x_class, j, classes)
                    for d in range(depth):
                        if j + d < classes:
                            for k in range(lanes):
                                at = q_row + k * q_inner if q != 0 else q
                                mass_j = mass_at(j + d, at, q_class, weight, share, uniform)
                                gap_block[k] = add_gap(gap_block[k], mass_j, m[k], v[d * lanes + k])
                                mass_block[k] += mass_j
                for k in range(lanes):
                    gap[k] += gap_block[k]
                    mass_sum[k] += mass_block[k]
            for k in range(lanes):
                mass_sum[k] = row_mass(mass_sum[k], q, weight, uniform, classes)

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
            for j in range(0, classes, depth):
                fetch(v, address, x_class, j, classes)
                for d in range(depth):
                    if j + d < classes:
                        for k in range(lanes):
                            state = centre[k], shift[k], unit[k], per_unit[k]
                            at = d * lanes + k
                            if label[k] == j + d:
                                v[at] = y_t[k]
                            elif label[k] == INACTIVE:
                                v[at] = nothing
                            else:
                                v[at] = entry(
                                    v[at], j + d, m[k], r[k], log_norm[k], state, slope[k], scales[k], masses[k],
                                    q_row + k * q_inner if q != 0 else q, q_class, weight, share, uniform,
                                )  # fmt: skip
                        if wide:
                            store_vector(out_row + (j + d) * out_class, v, d * lanes, stored)
                        else:
                            store(out_row + (j + d) * out_class, v[d], stored)

    return kernel
