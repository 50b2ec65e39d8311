"""The pointwise kernel: one text for all losses, each a formula of nbloss.formulas."""

import math

import numpy as np
from numba import cuda

from nbloss import formulas
from nbloss.cuda.functions import Functions, add
from nbloss.cuda.groups import reduction
from nbloss.cuda.intrinsics import (
    REAL,
    STORED,
    VECTOR_BYTES,
    device_function,
    load,
    load_integer,
    load_vector,
    store,
    store_integer,
    store_vector,
)
from nbloss.problem import WANT_GRADIENT, WANT_VALUE

ZERO, ONE = np.int64(0), np.int64(1)
WIDE = np.float64(0)


def pointwise(name, code, target_code, want, given, flat, threads, warp):
    """The kernel of one loss. Elements are counted row by row; a block does `chunks` · `threads` vectors of them.

    Operands are tuples (address, bytes along outer, bytes along inner); `given` names those of weight, pos_weight,
    grad_output and loss that there are, the others are not looked at, and `flat` says that there is one row. The extent
    is (outer, inner, chunks, whether the vectors of all operands lie side by side, aligned, and each in one row), the
    status three addresses, 0 for none: of a factor of the gradient, of a fault to heed, and of where to report one. The
    losses are written one by one, or else summed, in float64: to convert and to add are two instructions, and those of
    float32 that would do without take seven, and overflow.
    """
    stored, target_stored, real = STORED[code], STORED[target_code], REAL[code]
    f = Functions(code)
    formula = f.bound(formulas.POINTWISE[name])
    dtype, nothing, one, nan = f.type, real(0), real(1), real(math.nan)
    lanes = VECTOR_BYTES // stored.itemsize
    value_wanted, gradient_wanted = bool(want & WANT_VALUE), bool(want & WANT_GRADIENT)
    weighted, positive = "weight" in given, "pos_weight" in given
    kept, upstream = value_wanted and "loss" in given, gradient_wanted and "grad_output" in given
    summed = value_wanted and not kept
    total = reduction(add, np.float64, threads, warp)

    @device_function
    def place(operand, i, j):
        return operand[0] + j * operand[2] if flat else operand[0] + i * operand[1] + j * operand[2]

    @device_function
    def after(i, j, inner):
        """The element after element j of row i."""
        return (i + ONE, ZERO) if not flat and j + ONE == inner else (i, j + ONE)

    def reader(example):
        size = example.itemsize
        steps = VECTOR_BYTES // size

        @device_function
        def read(v, operand, i, j, straight, count, inner):
            """The vector from element j of row i on, of which `count` elements there are."""
            if straight and operand[2] != 0:
                at = place((operand[0], operand[1], size), i, j)
                for k in range(0, lanes, steps):
                    load_vector(at + k * size, v, k, example)
            else:
                for k in range(lanes):
                    if k < count:
                        v[k] = load(place(operand, i, j), example)
                    i, j = after(i, j, inner)

        return read

    def writer(example):
        size = example.itemsize
        steps = VECTOR_BYTES // size

        @device_function
        def write(v, operand, i, j, straight, count, inner):
            if straight:
                at = place((operand[0], operand[1], size), i, j)
                for k in range(0, lanes, steps):
                    store_vector(at + k * size, v, k, example)
            else:
                for k in range(lanes):
                    if k < count:
                        store(place(operand, i, j), v[k], example)
                    i, j = after(i, j, inner)

        return write

    read_x, read_t, read_real = reader(stored), reader(target_stored), reader(one)
    write_x, write_real = writer(stored), writer(one)

    def kernel(x, target, weight, pos_weight, grad_output, out, loss, extent, status, scale, sums):
        factor, faults, report = status
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        outer, inner, chunks, wide = extent
        block = np.int64(cuda.blockIdx.x)
        first = block * chunks * threads * lanes
        straight = wide != 0 and first + chunks * threads * lanes <= outer * inner
        if gradient_wanted and factor != 0:
            scale *= load(factor, one)
        xs = cuda.local.array(lanes, dtype)
        ts = cuda.local.array(lanes, dtype)
        ws = cuda.local.array(lanes, dtype)
        ps = cuda.local.array(lanes, dtype)
        us = cuda.local.array(lanes, dtype)
        for k in range(lanes):
            xs[k] = ts[k] = ws[k] = ps[k] = us[k] = nothing
        value_sum, bad = WIDE, False
        unit = first + cuda.threadIdx.x * lanes
        for _ in range(chunks):
            i = ZERO if flat else unit // inner
            j = unit if flat else unit - i * inner
            count = lanes if straight else outer * inner - unit
            read_x(xs, x, i, j, straight, count, inner)
            read_t(ts, target, i, j, straight, count, inner)
            if weighted:
                read_real(ws, weight, i, j, straight, count, inner)
            if positive:
                read_real(ps, pos_weight, i, j, straight, count, inner)
            if upstream:
                read_real(us, grad_output, i, j, straight, count, inner)
            for k in range(lanes):
                value, slope, outside = formula(xs[k], ts[k], ps[k] if positive else one)
                bad = bad or (outside and k < count)
                if value_wanted:
                    ts[k] = nan if outside else value * ws[k] if weighted else value
                if gradient_wanted:
                    share = scale * us[k] if upstream else scale
                    xs[k] = nothing if outside else slope * (ws[k] * share if weighted else share)
            if gradient_wanted:
                write_x(xs, out, i, j, straight, count, inner)
            if kept:
                write_real(ts, loss, i, j, straight, count, inner)
            if summed:
                if not straight:
                    for k in range(lanes):
                        ts[k] = ts[k] if k < count else nothing
                for k in range(lanes):
                    value_sum += np.float64(ts[k])
            unit += threads * lanes
        if bad and report != 0:
            store_integer(report, ONE)
        if summed:
            value_sum = total(value_sum)
            if cuda.threadIdx.x == 0:
                store(sums + 8 * block, value_sum, WIDE)

    return kernel
