"""The lanes of as many vectors as a vector has lanes, folded at once: one result for each."""

import llvmlite.ir as ir
import numpy as np

from nbloss.cpu.arithmetic import Vec, compiled_raw, larger, llvm_vector, shuffled
from nbloss.cpu.lanes import lanes, largest, total
from nbloss.cpu.memory import pointer_to


def totals(values, at, like):
    """The sum of the lanes of each vector that lies at values[at], values[at + lanes], …"""
    n = lanes(like)
    return np.asarray([total(values[at + k * n : at + k * n + n]) for k in range(n)], type(like))


def maxima(values, at, like):
    """As `totals`, the largest lane (of those that hold no NaN)."""
    n = lanes(like)
    return np.asarray([largest(values[at + k * n : at + k * n + n]) for k in range(n)], type(like))


def _levels(n):
    """How two vectors become one, level by level: the lanes of both that are combined with those of a second list.

    Halves, quarters, then what lies within a quarter of a register: shuffles that take one operation each.
    """
    near = n // 4
    for whole in (((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))):
        yield [[q * near + k for q in quarters for k in range(near)] for quarters in whole]
    for within in [((0, 1), (2, 3)), ((0, 2), (1, 3))] if near == 4 else [((0,), (1,))]:
        yield [[q * near + k + n * b for q in range(4) for b in (0, 1) for k in part] for part in within]


def _folded(vectors, pair):
    for first, second in _levels(len(vectors)):
        half = len(vectors) // 2
        vectors = [pair(a, b, first, second) for a, b in zip(vectors[:half], vectors[half:])]
    return vectors[0]


def _lowered(combine):
    """45 operations for sixteen vectors of sixteen lanes; one by one, they would be 128."""

    def lower(context, builder, sig, args):
        vt = llvm_vector(sig.return_type)
        n = vt.count
        start = pointer_to(context, builder, sig, args, vt)
        vectors = []
        # In the order that leaves the result of each vector in the lane of its number.
        order = _folded([[k] * n for k in range(n)], lambda a, b, first, _: [(a + b)[k] for k in first])
        for k in range(n):
            vectors.append(builder.load(builder.gep(start, [ir.Constant(ir.IntType(64), order.index(k))])))
            vectors[-1].align = 4

        def pair(a, b, *parts):
            return combine(builder, *(shuffled(builder, part, a, b) for part in parts))

        return _folded(vectors, pair)

    return lower


compiled_raw(totals, lambda values, at, like: Vec(like))(_lowered(lambda builder, a, b: builder.fadd(a, b)))
compiled_raw(maxima, lambda values, at, like: Vec(like))(_lowered(larger))
