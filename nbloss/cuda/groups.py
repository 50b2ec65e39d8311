"""Sums and maxima over the threads of a warp or a block, always in one order."""

from numba import cuda

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
