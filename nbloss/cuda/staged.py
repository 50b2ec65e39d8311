"""Rows in shared memory: how the threads of a block copy their part of a row there, read it from there, and write it.

The copy keeps the alignment of the row in memory, so that sixteen bytes are copied at a time, but for the ends of rows
that begin or end off sixteen bytes. From there, a row is read from any class on as often as is needed. Which thread
adds up which class depends on the class alone, and no result on alignment; what is written goes by the vectors of the
array that it is written to.
"""

import numpy as np
from numba import cuda

from nbloss.cuda.intrinsics import STORED, VECTOR_BYTES, device_function, store
from nbloss.cuda.shared import copy_element_if, copy_vector, load_shared_if, wait_for_copies
from nbloss.cuda.vectors import counter, turner
from nbloss.cuda.words import KNOWN, WORD, store_words, value_of


def staged_access(code, threads, values, even):
    """(stage, fetch, put, words) for parts of rows that a block of `threads` threads shares, `values` classes a thread
    at a time.

    stage(room, address, low, high) copies the classes from `low` to `high` of the row at `address` to shared memory at
    `room`, waits until the threads that are to read them can, and gives the address there that class 0 of the row would
    have. fetch(v, place, first, high) reads the thread's vectors from class `first` on, with -inf for those that begin
    at `high` or later and what lies past the row, and anything for what lies before `low`. put(v, u, address, first,
    low, high) writes vector u of them, but for classes not from `low` to `high`; `first` is where a vector of memory
    begins. `even`: all rows begin and end on sixteen bytes.
    """
    stored = STORED[code]
    size = stored.itemsize
    lanes = VECTOR_BYTES // size
    words = lanes // (2 if size == 2 else 1)
    vectors, apart, both = values // lanes, threads * lanes, 2 * words
    word = WORD[code]
    turned, room_from = turner(stored), counter(lanes, (vectors + 1) * apart)

    @device_function
    def stage_even(room, address, low, high):
        source = address + low * size
        for u in range(cuda.threadIdx.x, np.int32((high - low) // lanes), threads):
            copy_vector(room + u * VECTOR_BYTES, source + u * VECTOR_BYTES)
        wait_for_copies()  # each thread reads what it has copied itself
        return room - low * size

    @cuda.jit(device=True)
    def stage_odd(room, address, low, high):
        source = address + low * size
        past = np.int32(source % VECTOR_BYTES // size)
        source -= past * size
        to = room + VECTOR_BYTES
        end = past + np.int32(max(high - low, 0))
        for u in range(cuda.threadIdx.x, end // lanes + 2, threads):
            if (u > 0 or past == 0) and (u + 1) * lanes <= end:
                copy_vector(to + u * VECTOR_BYTES, source + u * VECTOR_BYTES)
            else:
                for k in range(lanes):
                    j = u * lanes + k
                    copy_element_if(j >= past and j < end, to + j * size, source + j * size, stored)
        wait_for_copies()
        cuda.syncthreads()
        return to + past * size - low * size

    @device_function
    def fetch_even(v, place, first, high):
        left = room_from(first, high)
        at = place + first * size
        for u in range(vectors):
            load_shared_if(u * apart < left, at + u * apart * size, v, u * words, stored)

    @cuda.jit(device=True)
    def fetch_odd(v, place, first, high):
        left = room_from(first, high)
        at = place + first * size
        by = np.int32(at % VECTOR_BYTES // size)
        at -= by * size
        line = cuda.local.array(both, word)
        for u in range(vectors):
            there = u * apart < left
            load_shared_if(there, at + u * apart * size, line, 0, stored)
            load_shared_if(there, at + u * apart * size + VECTOR_BYTES, line, words, stored)
            turned(line, by)
            for k in range(words):
                v[u * words + k] = line[k]

    @device_function
    def put_even(v, u, address, first, _, high):
        if u * apart < room_from(first, high):
            store_words(address + (first + u * apart) * size, v, u * words)

    @device_function
    def put_odd(v, u, address, first, low, high):
        end = room_from(first, high) - u * apart
        skip = room_from(first, low) if u == 0 else np.int32(0)  # elements of the first vector, if any
        at = address + (first + u * apart) * size
        if skip <= 0 and end >= lanes:
            store_words(at, v, u * words)
        else:
            for k in range(lanes):
                if k >= skip and k < end:
                    store(at + k * size, value_of(v, u * lanes + k, KNOWN, stored), stored)

    if even:
        return stage_even, fetch_even, put_even, vectors * words
    return stage_odd, fetch_odd, put_odd, vectors * words
