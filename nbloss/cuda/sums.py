"""Sums over rows and blocks in float64, in an order that the shape alone decides; labels checked; dtypes converted."""

import numpy as np
from numba import cuda

from nbloss.cuda.intrinsics import (
    REAL,
    STORED,
    add,
    load,
    load_label,
    reduction,
    store,
    store_integer,
)

ZERO, ONE = np.int64(0), np.int64(1)
WIDE = np.float64(0)


def partial_sums(code, threads, warp, each):
    """The kernel that adds elements side by side: `each` a thread, one float64 a block."""
    stored = STORED[code]
    size = stored.itemsize
    total = reduction(add, np.float64(0), np.float64, threads, warp)

    def kernel(values, count, sums):
        block = np.int64(cuda.blockIdx.x)
        begin = block * threads * each + cuda.threadIdx.x
        value = WIDE
        for c in range(each):
            j = begin + c * threads
            if j < count:
                value += np.float64(load(values + j * size, stored))
        value = total(value)
        if cuda.threadIdx.x == 0:
            store(sums + block * 8, value, WIDE)

    return kernel


def quotient(code, threads, warp):
    """The kernel, of one block, that adds float64 numbers and divides.

    It writes numerator / divisor as the kernel's type, with the sum in place of a numerator or a divisor whose address
    is 0 where `of_sum` says so: 1 for the sum over the divisor, 2 for the numerator over the sum, which it writes to
    `kept` as well.
    """
    stored = STORED[code]
    total = reduction(add, np.float64(0), np.float64, threads, warp)

    def kernel(sums, count, divisor_at, numerator, divisor, kept, result):
        value = WIDE
        j = np.int64(cuda.threadIdx.x)
        while j < count:
            value += load(sums + j * 8, WIDE)
            j += threads
        value = total(value)
        if cuda.threadIdx.x == 0:
            if kept != 0:
                store(kept, value, WIDE)
                store(result, numerator / value, stored)
            else:
                if divisor_at != 0:
                    divisor = load(divisor_at, WIDE)
                store(result, value / divisor, stored)

    return kernel


def scan_labels(code, threads, warp, each):
    """The kernel that reads labels ahead: a float64 a block, the weight of rows that count; faults to `report`."""
    one = STORED[code]
    size = one.itemsize
    total = reduction(add, np.float64(0), np.float64, threads, warp)

    def kernel(target, outer, inner, classes, weight, sums, report):
        t, t_outer, t_inner, t_code, ignore = target
        block = np.int64(cuda.blockIdx.x)
        begin = block * threads * each + cuda.threadIdx.x
        value = WIDE
        for c in range(each):
            unit = begin + c * threads
            if unit < outer * inner:
                label = load_label(t + unit // inner * t_outer + unit % inner * t_inner, t_code)
                if label != ignore:
                    if label < 0 or label >= classes:
                        store_integer(report, ONE)
                    else:
                        value += np.float64(load(weight + label * size, one)) if weight != 0 else 1.0
        value = total(value)
        if cuda.threadIdx.x == 0:
            store(sums + block * 8, value, WIDE)

    return kernel


def convert(from_code, to_code):
    """The kernel that copies elements of any strides and changes their type; an address of 0 stands for zeros.

    Both are (address, bytes along outer, bytes along inner); integers are given by the codes of labels.
    """
    integer = isinstance(from_code, int)
    read = ZERO if integer else STORED[from_code]
    written = STORED[to_code]
    real = REAL[to_code]

    def kernel(source, destination, outer, inner):
        unit = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit < outer * inner:
            i, j = unit // inner, unit % inner
            address, outer_step, inner_step = destination
            at = source[0] + i * source[1] + j * source[2]
            value = real(0)
            if integer and source[0] != 0:
                value = real(load_label(at, from_code))
            elif source[0] != 0:
                value = real(load(at, read))
            store(address + i * outer_step + j * inner_step, value, written)

    return kernel
