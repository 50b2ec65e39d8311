"""The pointwise kernel: one text for all losses, each a formula of nbloss.formulas."""

import numpy as np
from numba import cuda

from nbloss import formulas
from nbloss.cuda.intrinsics import (
    REAL,
    STORED,
    VECTOR_BYTES,
    Functions,
    device_function,
    load,
    load_integer,
    load_vector,
    pair_total,
    store,
    store_integer,
    store_vector,
    two_sum,
)

VALUE, GRADIENT = 1, 2  # what a kernel computes, added up
CHUNKS = 4  # vectors of a thread
ZERO = np.int64(0)


def pointwise(name, code, target_code, want, threads, warp):
    """The kernel of one loss. Each block does `threads` · CHUNKS vectors of one of the outer rows.

    Operands are tuples (address, bytes along outer, bytes along inner); an address of 0 stands for ones (weight,
    pos_weight, grad_output), for no array (out, loss), for nothing to heed (factor) or nowhere to report (faults).
    The sum of the losses of a block is two numbers of the kernel's type, the rounded sum and what was rounded away.
    """
    stored, real = STORED[code], REAL[code]
    target_stored = STORED[target_code]
    f = Functions(code)
    formula = f.bound(formulas.POINTWISE[name])
    dtype, nothing, one = f.type, real(0), real(1)
    size = one.itemsize
    lanes = VECTOR_BYTES // stored.itemsize
    value_wanted, gradient_wanted = bool(want & VALUE), bool(want & GRADIENT)
    total = pair_total(real, threads, warp)
    largest = real(np.finfo(real).max)

    def reader(example):
        size = example.itemsize
        steps = VECTOR_BYTES // size

        @device_function
        def read(v, operand, i, j, count, absent):
            """Elements j, … of row i of an operand."""
            address, outer_step, inner_step = operand
            at = address + i * outer_step + j * inner_step
            if address == 0 or inner_step == 0:
                same = absent if address == 0 else load(at, example)
                for k in range(lanes):
                    v[k] = same
            elif count == lanes and inner_step == size and at % VECTOR_BYTES == 0 and steps <= lanes:
                for k in range(0, lanes, steps):
                    load_vector(at + k * size, v, k, example)
            else:
                for k in range(lanes):
                    v[k] = load(at + k * inner_step, example) if k < count else absent

        return read

    def writer(example):
        size = example.itemsize
        steps = VECTOR_BYTES // size

        @device_function
        def write(v, operand, i, j, count):
            address, outer_step, inner_step = operand
            at = address + i * outer_step + j * inner_step
            if count == lanes and inner_step == size and at % VECTOR_BYTES == 0 and steps <= lanes:
                for k in range(0, lanes, steps):
                    store_vector(at + k * size, v, k, example)
            else:
                for k in range(lanes):
                    if k < count:
                        store(at + k * inner_step, v[k], example)

        return write

    read_x, read_t, read_real = reader(stored), reader(target_stored), reader(one)
    write_x, write_real = writer(stored), writer(one)

    def kernel(x, target, weight, pos_weight, grad_output, out, loss, extent, status, scale, sums):
        inner, per_row = extent
        factor, faults, report = status
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        block = np.int64(cuda.blockIdx.x)
        i = block // per_row
        begin = (block % per_row * CHUNKS * threads + cuda.threadIdx.x) * lanes
        if gradient_wanted and factor != 0:
            scale *= load(factor, one)
        xs = cuda.local.array(lanes, dtype)
        ts = cuda.local.array(lanes, dtype)
        ws = cuda.local.array(lanes, dtype)
        ps = cuda.local.array(lanes, dtype)
        us = cuda.local.array(lanes, dtype)
        high, low = nothing, nothing
        for c in range(CHUNKS):
            j = begin + c * threads * lanes
            count = min(inner - j, lanes)
            if count > 0:
                read_x(xs, x, i, j, count, nothing)
                read_t(ts, target, i, j, count, nothing)
                read_real(ws, weight, i, j, count, one)
                read_real(ps, pos_weight, i, j, count, one)
                if gradient_wanted:
                    read_real(us, grad_output, i, j, count, one)
                bad = False
                for k in range(lanes):
                    value, slope, outside = formula(xs[k], ts[k], ps[k])
                    bad = bad or (outside and k < count)
                    if value_wanted:
                        value *= ws[k]
                        if k < count:
                            high, lost = two_sum(high, value)
                            low += lost
                        ts[k] = value
                    if gradient_wanted:
                        xs[k] = slope * (ws[k] * (scale * us[k]))
                if bad and report != 0:
                    store_integer(report, np.int64(1))
                if value_wanted and loss[0] != 0:
                    write_real(ts, loss, i, j, count)
                if gradient_wanted:
                    write_x(xs, out, i, j, count)
        if value_wanted and sums != 0:
            high, low = total(high, low)
            if cuda.threadIdx.x == 0:
                finite = high <= largest and high >= -largest
                store(sums + 2 * block * size, high, one)
                store(sums + (2 * block + 1) * size, low if finite else nothing, one)

    return kernel
