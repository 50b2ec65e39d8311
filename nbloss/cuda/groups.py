"""Sums and maxima over the threads of a warp or a block, always in one order."""

from numba import cuda

from nbloss.cuda.functions import two_sum
from nbloss.cuda.intrinsics import TYPE, device_function
from nbloss.cuda.threads import shuffle_xor


def reduction(combine, real, threads, warp, count=1):
    """A function that combines `count` values of each of `threads` neighbouring threads, always in one order.

    Up to a warp, groups of threads lie side by side in a block; more threads are a block of their own. Such a function
    may be called at one place of a kernel only: its shared memory is not guarded against being written again.
    """
    width = min(threads, warp)
    warps, bits = threads // width, width.bit_length() - 1
    dtype = TYPE[real]

    def folder(lanes):
        @device_function
        def fold(value):
            distance = lanes // 2
            while distance:
                value = combine(value, shuffle_xor(value, distance))
                distance //= 2
            return value

        return fold

    within_warp = folder(width)
    if warps == 1 and count == 1:
        return within_warp
    if warps == 1:
        return device_function(lambda a, b: (within_warp(a), within_warp(b)))
    across = folder(warps)

    def one(value):
        slots = cuda.shared.array(warps, dtype)
        value = within_warp(value)
        if (cuda.threadIdx.x & (width - 1)) == 0:
            slots[cuda.threadIdx.x >> bits] = value
        cuda.syncthreads()
        return across(slots[cuda.threadIdx.x & (warps - 1)])

    def two(a, b):
        slots = cuda.shared.array((2, warps), dtype)
        a, b = within_warp(a), within_warp(b)
        if (cuda.threadIdx.x & (width - 1)) == 0:
            slots[0, cuda.threadIdx.x >> bits] = a
            slots[1, cuda.threadIdx.x >> bits] = b
        cuda.syncthreads()
        return across(slots[0, cuda.threadIdx.x & (warps - 1)]), across(slots[1, cuda.threadIdx.x & (warps - 1)])

    return cuda.jit(device=True)(one if count == 1 else two)


def pair_total(real, threads, warp):
    """A function that adds the pairs (rounded sum, what was rounded away) of all threads of a block."""
    width = min(threads, warp)
    warps = threads // width
    dtype = TYPE[real]

    @device_function
    def within_warp(high, low):
        distance = width // 2
        while distance:
            other_low = shuffle_xor(low, distance)
            high, lost = two_sum(high, shuffle_xor(high, distance))
            low = (low + other_low) + lost
            distance //= 2
        return high, low

    def within_block(high, low):
        high, low = within_warp(high, low)
        highs = cuda.shared.array(warps, dtype)
        lows = cuda.shared.array(warps, dtype)
        if cuda.threadIdx.x % width == 0:
            highs[cuda.threadIdx.x // width] = high
            lows[cuda.threadIdx.x // width] = low
        cuda.syncthreads()
        high, low = highs[0], lows[0]
        for k in range(1, warps):
            high, lost = two_sum(high, highs[k])
            low = (low + lows[k]) + lost
        return high, low

    return cuda.jit(device=True)(within_block)
