"""Rows in registers: how the threads of a row read and write it, sixteen bytes at a time, wherever it begins.

Which thread holds a class depends on the class alone, so that no result depends on alignment: a vector is sixteen
bytes' worth of neighbouring classes, the threads of a warp hold vectors side by side, each of them several that lie a
warp's vectors apart, and the next warp goes on where that ends. Where the rows do not begin on sixteen bytes, threads
read and write the vectors of memory all the same, which lie `past` elements before their own, and hand each other the
elements that differ: the last thread of a warp gets them from the first one's next vector.

Elements stay as they lie in memory, in words of 32 bits, or of 64 bits for float64; of those of 16 bits two in a word.
"""

import numpy as np
from numba import cuda

from nbloss.cuda.intrinsics import STORED, VECTOR_BYTES, device_function, load, store
from nbloss.cuda.threads import from_thread
from nbloss.cuda.words import (
    KNOWN,
    WORD,
    from_second_half,
    load_words_if,
    load_words_past_l1_if,
    put_values,
    store_words,
    value_of,
)


def turner(stored):
    """A function that moves what begins at element `by` of two vectors side by side to the front."""
    pair = 2 if stored.itemsize == 2 else 1
    words = VECTOR_BYTES // stored.itemsize // pair
    both = 2 * words

    def turning(step):
        @device_function
        def turn(line, by):
            if by & step:
                for k in range(both - step):
                    line[k] = line[k + step]

        return turn

    turn_2, turn_1 = turning(2), turning(1)

    @device_function
    def turned(line, by):
        if words > 2:
            turn_2(line, by // pair)
        turn_1(line, by // pair)
        for k in range(words if pair == 2 else 0):
            line[k] = from_second_half(line[k], line[k + 1], by & 1 != 0)

    return turned


def counter(lanes, most):
    """A function that says how many classes lie from `first` to `end`, in 32 bits: no more than make a difference."""

    @device_function
    def room_from(first, end):
        return np.int32(min(max(end - first, -lanes), most))

    return room_from


def row_access(code, threads, values, even, lowest, warp, once):
    """(fetch, put, words) for rows that `threads` threads share, each holding `values` classes of a span.

    Both functions take the words v of a thread, the address of the row, the thread's first class in this span and the
    number of classes, before which put is given 0; fetch gives -inf for what lies past the row. `even`: all rows begin
    and end on sixteen bytes, and put, which writes one vector at a time then, takes its number after v. `once`: nothing
    is read again. `words` is how many v has: for odd rows one vector more than the thread holds. All threads of a warp
    call them together.
    """
    stored, word = STORED[code], WORD[code]
    size = stored.itemsize
    lanes = VECTOR_BYTES // size
    pair = 2 if size == 2 else 1
    words = lanes // pair
    width = min(threads, warp)
    vectors, apart = values // lanes, width * lanes
    both = 2 * words
    # Short rows that come and go gain 5 to 10 % so; longer ones, and those that are written too, lose as much.
    load_if = load_words_past_l1_if if once and threads <= warp else load_words_if
    turned, room_from = turner(stored), counter(lanes, (vectors + 1) * apart)

    @device_function
    def element_if(there, address):
        return load(address, stored) if there else lowest

    @device_function
    def fetch_ends(v, u, at, low, high):
        """The elements from `low` to `high` of vector u, one by one."""
        for w in range(words):
            k = w * pair
            first = element_if(k >= low and k < high, at + k * size)
            second = element_if(k + 1 >= low and k + 1 < high, at + (k + 1) * size) if pair == 2 else first
            put_values(v, u * words + w, first, second, stored)

    @device_function
    def fetch_even(v, address, first, reach):
        left = room_from(first, reach)
        for u in range(vectors):
            load_if(u * apart + lanes <= left, address + (first + u * apart) * size, v, u * words, stored)

    @cuda.jit(device=True)
    def fetch_odd(v, address, first, reach):
        past = np.int32(address % VECTOR_BYTES // size)
        at = address + (first - past) * size
        left = room_from(first, reach) + past
        leader = (cuda.threadIdx.x & (width - 1)) == 0
        low = past if first == 0 else np.int32(0)  # the vector in which the row begins has others before it
        line = cuda.local.array(both, word)
        given = cuda.local.array(words, word)
        for u in range(vectors + 1):
            wide = u * apart + lanes <= left and (low == 0 or u > 0) and (leader or u < vectors)
            load_if(wide, at + u * apart * size, v, u * words, stored)
        # The ends of a row apart, so that nothing stands between the loads above.
        for u in range(vectors + 1):
            end = left - u * apart
            if (leader or u < vectors) and ((end > 0 and end < lanes) or (u == 0 and low > 0)):
                fetch_ends(v, u, at + u * apart * size, low if u == 0 else np.int32(0), end)
        # From the vectors of memory to those of the threads.
        following = (cuda.threadIdx.x & ~(width - 1)) | ((cuda.threadIdx.x + 1) & (width - 1))
        for u in range(vectors):
            for k in range(words):
                own, next_one = v[u * words + k], v[(u + 1) * words + k]
                line[k] = own
                given[k] = next_one if leader else own
            from_thread(given, line, words, words, following)
            turned(line, past)
            for k in range(words):
                v[u * words + k] = line[k]

    @device_function
    def put_even(v, u, address, first, _, high):
        left = room_from(first, high)
        if u * apart + lanes <= left:
            store_words(address + (first + u * apart) * size, v, u * words)

    @cuda.jit(device=True)
    def put_odd(v, address, first, _, high):
        past = np.int32(address % VECTOR_BYTES // size)
        at = address + (first - past) * size
        left = room_from(first, high) + past
        lane = cuda.threadIdx.x & (width - 1)
        line = cuda.local.array(both, word)
        given = cuda.local.array(words, word)
        preceding = (cuda.threadIdx.x & ~(width - 1)) | ((cuda.threadIdx.x - 1) & (width - 1))
        last = lane == width - 1
        if last:  # its last elements belong to a vector of memory that is no thread's of this warp
            for k in range(1, lanes):
                u = vectors - 1
                if k >= lanes - past and u * apart + k < left - past:
                    store(at + (u * apart + k + past) * size, value_of(v, u * lanes + k, KNOWN, stored), stored)
        for back in range(vectors):
            u = vectors - 1 - back  # the last first: what is handed on must still be there
            for k in range(words):
                own = v[u * words + k]
                before = v[(u - 1) * words + k] if u > 0 else own
                given[k] = before if last else own
                line[words + k] = own
            from_thread(given, line, 0, words, preceding)
            if past > 0:
                turned(line, lanes - past)
                for k in range(words):
                    v[u * words + k] = line[k]
        low = past if lane == 0 else np.int32(0)  # before the first one's begins the vector of another warp
        for u in range(vectors):
            if u * apart + lanes <= left and (low == 0 or u > 0):
                store_words(at + u * apart * size, v, u * words)
        for u in range(vectors):
            end = left - u * apart
            if (end > 0 and end < lanes) or (u == 0 and low > 0 and end > 0):
                for k in range(lanes):
                    if k < end and (k >= low or u > 0):
                        store(at + (u * apart + k) * size, value_of(v, u * lanes + k, KNOWN, stored), stored)

    if even:
        return fetch_even, put_even, vectors * words
    return fetch_odd, put_odd, (vectors + 1) * words
