"""Sums over rows and blocks in float64, in an order that the shape alone decides; labels checked; dtypes converted.

`total` and `scan_labels` add numbers side by side, `each` at a time a thread and `rounds` times that. `parts` blocks, a
cluster, do so together, and `chained` ones may begin before the last kernel has ended. Of several clusters each writes
its own sums, for `total` to add again; a single one ends them. Either way it tells whether there is a fault among the
labels that it has read. What `total` reads, and where they write, are three tuples of integers:

    values    address of numbers side by side; how many; what they are: OF_TYPE, that of the kernel, OF_FLOAT64, or
              OF_CLUSTERS, sums that clusters have written
    sums      address of what clusters write: the sums of all, then those of weights, then how many have seen a fault;
              number of the first cluster of this launch; number of all clusters
    ending    addresses, 0 for none: of whether there is a fault; of the sum, where it is to be kept; of a divisor, or
              BY_WEIGHTS; of the result

The result is the sum over a number, and over the divisor that lies at the address or is the sum of weights beside it;
or numerator / sum where the sum is kept: it is the divisor of a mean then, and the result a factor of its gradient.
"""

import numpy as np
from numba import cuda
from numba.cuda import types

from nbloss.cuda.functions import add
from nbloss.cuda.groups import reduction
from nbloss.cuda.intrinsics import REAL, STORED, device_function, load, load_integer, store, store_integer
from nbloss.cuda.labels import I4_CODE, I8_CODE, U8, U8_CODE, load_label
from nbloss.cuda.threads import begin_cluster, let_next_begin, tell_cluster, wait_for_last

I32, I64, ONE_BIT, BELOW_SIGN = np.int32(0), np.int64(0), np.int64(1), np.int64(2**63 - 1)
WIDE, UNIT = np.float64(0), np.float64(1)
GOOD, BAD = np.int32(0), np.int32(1)
BY_WEIGHTS = np.int64(-1)
OF_TYPE, OF_FLOAT64, OF_CLUSTERS = range(3)  # what `total` adds


def _finish(code, threads, warp, parts):
    """A function that takes the sums of each thread, and whether it has seen a fault, to the end."""
    stored = STORED[code]
    totals = reduction(add, np.float64, threads, warp, 2)

    @cuda.jit(device=True)
    def of_all_parts(value, weights, bad):
        slots = cuda.shared.array((parts, 3), types.float64)
        tell_cluster(slots, np.int64(cuda.blockIdx.x) % parts, value, weights, bad)
        value, weights, bad = WIDE, WIDE, WIDE
        for part in range(parts):
            value += slots[part, 0]
            weights += slots[part, 1]
            bad += slots[part, 2]
        return value, weights, bad

    @device_function
    def finish(value, weights, bad, sums, ending, numerator, divisor):
        faults, kept, divisor_at, result = ending
        value, weights = totals(value, weights)
        faulty = np.float64(cuda.syncthreads_or(bad)) if faults != 0 else WIDE
        if parts > 1:
            value, weights, faulty = of_all_parts(value, weights, faulty)
        if cuda.threadIdx.x == 0 and cuda.blockIdx.x % parts == 0:
            address, first, clusters = sums
            if clusters > 1:
                cluster = first + cuda.blockIdx.x // parts
                store(address + cluster * 8, value, WIDE)
                store(address + (clusters + cluster) * 8, weights, WIDE)
                store(address + (2 * clusters + cluster) * 8, faulty, WIDE)
                return
            if faults != 0:
                store_integer(faults, np.int64(faulty))
            if kept != 0:
                store(kept, value, WIDE)
                store(result, numerator / value, stored)
            else:
                if divisor_at == BY_WEIGHTS:
                    divisor *= weights
                elif divisor_at != 0:
                    divisor *= load(divisor_at, WIDE)
                store(result, value / divisor, stored)

    return finish


def _opening(threads, each, rounds, parts, chained):
    """What a kernel begins with: a function that gives where its block does, where its cluster ends, and its steps."""

    @device_function
    def opened(count):
        if chained:
            let_next_begin()
        if parts > 1:
            begin_cluster()
        cluster, part = np.int64(cuda.blockIdx.x) // parts, np.int64(cuda.blockIdx.x) % parts
        at_once = threads * each
        begin = cluster * (at_once * rounds * parts)
        if chained:
            wait_for_last()
        return begin + part * at_once, min(begin + at_once * rounds * parts, count), at_once * parts

    return opened


def total(code, threads, warp, each, rounds, parts, chained):
    """The kernel that adds numbers side by side: of the kernel's type, or sums of clusters."""
    stored = STORED[code]
    size = stored.itemsize
    finish = _finish(code, threads, warp, parts)
    opened = _opening(threads, each, rounds, parts, chained)

    def kernel(values, sums, ending, numerator, divisor):
        address, count, kind = values
        begin, end, step = opened(count)
        numbers = cuda.local.array(each, np.float64)
        value, weights, bad = WIDE, WIDE, GOOD
        for start in range(begin, end, step):
            for c in range(each):  # all loads before the first sum waits for one
                j = start + c * threads + cuda.threadIdx.x
                numbers[c] = WIDE
                if j < count:
                    numbers[c] = load(address + j * size, stored) if kind == OF_TYPE else load(address + j * 8, WIDE)
                    if kind == OF_CLUSTERS:
                        weights += load(address + (count + j) * 8, WIDE)
                        if load(address + (2 * count + j) * 8, WIDE) > 0:
                            bad = BAD
            for c in range(each):
                value += numbers[c]
        finish(value, weights, bad, sums, ending, numerator, divisor)

    return kernel


def scan_labels(code, threads, warp, each, rounds, parts, chained):
    """The kernel that reads labels: it adds the weights of rows that count, their losses if given, and finds faults."""
    one = STORED[code]
    size = one.itemsize
    finish = _finish(code, threads, warp, parts)

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
    opened = _opening(threads, each, rounds, parts, chained)

    def kernel(target, extent, weight, losses, sums, ending, numerator):
        t, t_outer, t_inner, t_code, ignore = target
        loss, loss_outer, loss_inner = losses
        outer, inner, classes = extent
        count = outer * inner
        begin, end, step = opened(count)
        labels = cuda.local.array(each, np.int64)
        numbers = cuda.local.array(each, np.float64)
        value, weights, bad = WIDE, WIDE, GOOD
        for start in range(begin, end, step):
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
