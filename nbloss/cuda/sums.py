"""Sums over rows and blocks in float64, in an order that the shape alone decides; labels checked; dtypes converted.

`total` and `scan_labels` add numbers side by side, `each` at a time a thread and `rounds` times that a block. Of several
blocks each writes its own sums, for `total` to add again; a single one ends them. Either way it tells whether there is
a fault among the labels that it has read. Where they write are two tuples of integers:

    sums      address of what blocks write: the sums of all, then those of weights, then whether each has seen a fault;
              number of the first block of this launch; number of all blocks
    ending    addresses, 0 for none: of whether there is a fault; of the sum, where it is to be kept; of a divisor, or
              BY_WEIGHTS; of the result

The result is the sum over the divisor, which is a number, or lies at its address, or is the sum of weights beside it;
or numerator / sum where the sum is kept: it is the divisor of a mean then, and the result a factor of its gradient.
"""

import numpy as np
from numba import cuda

from nbloss.cuda.functions import add
from nbloss.cuda.groups import reduction
from nbloss.cuda.intrinsics import (
    I4_CODE,
    I8_CODE,
    REAL,
    STORED,
    U8,
    U8_CODE,
    device_function,
    load,
    load_integer,
    load_label,
    store,
    store_integer,
)

I32, I64, ONE_BIT, BELOW_SIGN = np.int32(0), np.int64(0), np.int64(1), np.int64(2**63 - 1)
WIDE, UNIT = np.float64(0), np.float64(1)
GOOD, BAD = np.int32(0), np.int32(1)
BY_WEIGHTS = np.int64(-1)


def _finish(code, threads, warp):
    """A function that takes the sums of each thread, and whether it has seen a fault, to the end."""
    stored = STORED[code]
    totals = reduction(add, np.float64, threads, warp, 2)

    @device_function
    def finish(value, weights, bad, sums, ending, numerator, divisor):
        faults, kept, divisor_at, result = ending
        value, weights = totals(value, weights)
        if faults != 0:
            bad = cuda.syncthreads_or(bad)
        if cuda.threadIdx.x == 0:
            address, first, blocks = sums
            if blocks > 1:
                block = first + cuda.blockIdx.x
                store(address + block * 8, value, WIDE)
                store(address + (blocks + block) * 8, weights, WIDE)
                if faults != 0:
                    store_integer(address + (2 * blocks + block) * 8, np.int64(bad))
                return
            if faults != 0:
                store_integer(faults, np.int64(bad))
            if kept != 0:
                store(kept, value, WIDE)
                store(result, numerator / value, stored)
            else:
                if divisor_at == BY_WEIGHTS:
                    divisor = weights
                elif divisor_at != 0:
                    divisor = load(divisor_at, WIDE)
                store(result, value / divisor, stored)

    return finish


def total(code, threads, warp, each, rounds):
    """The kernel that adds numbers side by side: of the kernel's type, or sums of blocks."""
    stored = STORED[code]
    size = stored.itemsize
    finish = _finish(code, threads, warp)

    def kernel(values, sums, ending, numerator, divisor):
        address, count, of_blocks = values
        begin = np.int64(cuda.blockIdx.x) * threads * each * rounds
        numbers = cuda.local.array(each, np.float64)
        value, weights, bad = WIDE, WIDE, GOOD
        for start in range(begin, min(begin + threads * each * rounds, count), threads * each):
            for c in range(each):  # all loads before the first sum waits for one
                j = start + c * threads + cuda.threadIdx.x
                numbers[c] = WIDE
                if j < count:
                    numbers[c] = load(address + j * 8, WIDE) if of_blocks != 0 else load(address + j * size, stored)
                    if of_blocks != 0:
                        weights += load(address + (count + j) * 8, WIDE)
                        if ending[0] != 0 and load_integer(address + (2 * count + j) * 8, I64) != 0:
                            bad = BAD
            for c in range(each):
                value += numbers[c]
        finish(value, weights, bad, sums, ending, numerator, divisor)

    return kernel


def scan_labels(code, threads, warp, each, rounds):
    """The kernel that reads labels: it adds the weights of rows that count, and if given their losses, and finds faults."""
    one = STORED[code]
    size = one.itemsize
    finish = _finish(code, threads, warp)

    @device_function
    def counted(label, ignore, classes, weight):
        """What a row adds to the divisor of the mean, and whether its label is one."""
        if label == ignore:
            return WIDE, GOOD
        if label < 0 or label >= classes:
            return UNIT if weight == 0 else WIDE, BAD
        return np.float64(load(weight + label * size, one)) if weight != 0 else UNIT, GOOD

    def fetcher(example):
        @device_function
        def fetch(labels, address, step, begin, count, ignore):
            for c in range(each):
                unit = begin + c * threads
                labels[c] = load_integer(address + unit * step, example) if unit < count else ignore

        return fetch

    fetch_int64, fetch_int32 = fetcher(I64), fetcher(I32)

    def kernel(target, extent, weight, losses, sums, ending, numerator):
        t, t_outer, t_inner, t_code, ignore = target
        loss, loss_outer, loss_inner = losses
        outer, inner, classes = extent
        count = outer * inner
        begin = np.int64(cuda.blockIdx.x) * threads * each * rounds
        labels = cuda.local.array(each, np.int64)
        numbers = cuda.local.array(each, np.float64)
        value, weights, bad = WIDE, WIDE, GOOD
        for start in range(begin, min(begin + threads * each * rounds, count), threads * each):
            first = start + cuda.threadIdx.x
            if outer == 1 and t_code in (I8_CODE, I4_CODE):
                # The usual case: all loads before the first label is looked at.
                if t_code == I8_CODE:
                    fetch_int64(labels, t, t_inner, first, count, ignore)
                else:
                    fetch_int32(labels, t, t_inner, first, count, ignore)
                for c in range(each):
                    unit = first + c * threads
                    numbers[c] = load(loss + unit * loss_inner, one) if loss != 0 and unit < count else WIDE
                for c in range(each):
                    share, fault = counted(labels[c], ignore, classes, weight)
                    weights += share
                    value += numbers[c]
                    bad |= fault
            else:
                for unit in range(first, min(start + threads * each, count), threads):
                    i, k = unit // inner, unit % inner
                    label = load_label(t + i * t_outer + k * t_inner, t_code, ignore)
                    share, fault = counted(label, ignore, classes, weight)
                    weights += share
                    if loss != 0:
                        value += load(loss + i * loss_outer + k * loss_inner, one)
                    bad |= fault
        if loss == 0:
            value = weights
        finish(value, weights, bad, sums, ending, numerator, UNIT)

    return kernel


def convert(from_code, to_code):
    """The kernel that copies elements of any strides and changes their type; an address of 0 stands for zeros.

    Both are (address, bytes along outer, bytes along inner); integers are given by the codes of labels.
    """
    integer = isinstance(from_code, int)
    read = None if integer else STORED[from_code]
    written = STORED[to_code]
    real = REAL[to_code]

    def kernel(source, destination, outer, inner):
        unit = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit < outer * inner:
            i, j = unit // inner, unit % inner
            address, outer_step, inner_step = destination
            at = source[0] + i * source[1] + j * source[2]
            value = real(0)
            if source[0] != 0:
                if not integer:
                    value = real(load(at, read))
                elif from_code == U8_CODE:
                    # Read as int64: of those from 2^63 on, half, rounded to odd so that it is rounded once, twice.
                    number = load_integer(at, U8)
                    half = ((number >> ONE_BIT) & BELOW_SIGN) | (number & ONE_BIT)
                    value = real(number) if number >= 0 else real(2) * real(half)
                else:
                    value = real(load_label(at, from_code, I64))
            store(address + i * outer_step + j * inner_step, value, written)

    return kernel
