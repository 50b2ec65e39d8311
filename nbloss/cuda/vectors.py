"""Rows in registers: how the threads of a row read and write it, sixteen bytes at a time, wherever it begins.

Which thread holds a class depends on the class alone, so that no result depends on alignment: a vector is sixteen
bytes' worth of neighbouring classes, and the next thread holds the next vector. Where the rows do not begin on
sixteen bytes, threads read and write the vectors of memory all the same, which lie `past` elements before their own,
and hand each other the elements that differ.
"""

import numpy as np
from numba import cuda

from nbloss.cuda.intrinsics import (
    REAL,
    STORED,
    TYPE,
    VECTOR_BYTES,
    device_function,
    from_neighbour,
    load,
    load_vector_if,
    store,
    store_vector,
    unpack,
)


def row_access(code, threads, values, even, lowest, warp):
    """(fetch, put) for rows that `threads` threads share, each holding `values` classes of a span.

    Both take the values v of a thread, the address of the row, the thread's first class in this span and the number of
    classes; fetch gives -inf for what lies past the row. `even`: all rows begin and end on sixteen bytes. All threads
    of a warp call them together.
    """
    stored, dtype = STORED[code], TYPE[REAL[code]]
    size = stored.itemsize
    lanes = VECTOR_BYTES // size
    vectors, apart = values // lanes, threads * lanes
    width = min(threads, warp)
    others = lanes - 1
    both = lanes + others

    def turner(step):
        @device_function
        def turn(line, by):
            if by & step:
                for k in range(both - step):
                    line[k] = line[k + step]

        return turn

    turn_4, turn_2, turn_1 = turner(4), turner(2), turner(1)

    @device_function
    def turned(line, by):
        """Move line[by], line[by + 1], … to the front."""
        if lanes > 4:
            turn_4(line, by)
        if lanes > 2:
            turn_2(line, by)
        turn_1(line, by)

    @device_function
    def room_from(first, end):
        """How many classes lie from `first` to `end`, in 32 bits: no more than make a difference."""
        return np.int32(min(max(end - first, -lanes), vectors * apart))

    @device_function
    def fetch(v, address, first, reach):
        past = np.int32(0) if even else np.int32(address % VECTOR_BYTES // size)
        at = address + (first - past) * size
        left = room_from(first, reach)
        inside = past == 0 or first >= past
        for u in range(vectors):
            wide = u * apart + lanes - past <= left and (inside or u > 0)
            load_vector_if(wide, at + u * apart * size, v, u * lanes, stored)
        for u in range(vectors):
            unpack(v, u * lanes, stored)
        # The ends of a row apart, so that nothing stands between the loads above.
        for u in range(0 if even else vectors):
            end = left + past - u * apart
            if (end > 0 and end < lanes) or (u == 0 and not inside):
                for k in range(lanes):
                    if k < end and (inside or u > 0 or k >= past):
                        v[u * lanes + k] = load(at + (u * apart + k) * size, stored)
        if not even:
            turn_back(v, past, at, left)

    @cuda.jit(device=True)
    def turn_back(v, past, at, left):
        """From the vectors of memory to those of the threads."""
        line = cuda.local.array(both, dtype)
        rest = cuda.local.array(others, dtype)
        last = (cuda.threadIdx.x & (width - 1)) == width - 1  # whose neighbour holds something else
        for u in range(vectors):
            from_neighbour(v, u * lanes, others, rest, 1)
            for k in range(lanes):
                line[k] = v[u * lanes + k]
            for k in range(others):
                line[lanes + k] = rest[k]
            if last:
                for k in range(others):
                    if k < past:
                        there = u * apart + lanes - past + k < left
                        line[lanes + k] = load(at + (u * apart + lanes + k) * size, stored) if there else lowest
            turned(line, past)
            for k in range(lanes):
                v[u * lanes + k] = line[k]

    @cuda.jit(device=True)
    def turn(v, past, address, left):
        """From the vectors of the threads to those of memory; what belongs to no thread's vector is written."""
        line = cuda.local.array(both, dtype)
        rest = cuda.local.array(others, dtype)
        last = (cuda.threadIdx.x & (width - 1)) == width - 1
        for u in range(vectors):
            if last:
                for k in range(1, lanes):
                    if k >= lanes - past and u * apart + k < left:
                        store(address + (u * apart + k) * size, v[u * lanes + k], stored)
            from_neighbour(v, u * lanes + 1, others, rest, -1)
            for k in range(others):
                line[k] = rest[k]
            for k in range(lanes):
                line[others + k] = v[u * lanes + k]
            turned(line, others - past)
            for k in range(lanes):
                v[u * lanes + k] = line[k]

    @cuda.jit(device=True)
    def put(v, address, first, room):
        past = np.int32(0) if even else np.int32(address % VECTOR_BYTES // size)
        left = room_from(first, room)
        if not even:
            turn(v, past, address + first * size, left)
        at = address + (first - past) * size
        # The first thread of a warp has no neighbour before it, and leaves out what would be that one's.
        low = past if not even and (cuda.threadIdx.x & (width - 1)) == 0 else np.int32(0)
        for u in range(vectors):
            if low == 0 and u * apart + lanes - past <= left:
                store_vector(at + u * apart * size, v, u * lanes, stored)
        for u in range(0 if even else vectors):
            end = left + past - u * apart
            if end > 0 and (low > 0 or end < lanes):
                for k in range(lanes):
                    if k >= low and k < end:
                        store(at + (u * apart + k) * size, v[u * lanes + k], stored)

    return fetch, put
