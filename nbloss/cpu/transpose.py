"""Blocks of rows whose classes lie side by side, transposed in registers on their way to a tile and back."""

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils

from nbloss.cpu.arithmetic import HAS_AVX512, Vec, compiled_raw, larger, llvm_vector, nothing, opaque, shuffled
from nbloss.cpu.lanes import lanes
from nbloss.cpu.memory import BYTES, Fields, decode, encode, pointer_to, storage
from nbloss.cpu.partial import either, load_some, store_some
from nbloss.half import decoded, encoded

NOTHING_LEFT = -(1 << 62)  # bytes: still less than nothing after as many steps back as there are rows


def load_transposed(tile, at, x, j, k, classes, rows, like):
    """tile[at + c·lanes + r] = x[j + c, k + r]: a block whose classes lie side by side in memory, with one vector for
    each class in the tile. Only `classes` by `rows` of them are read; rows past the last repeat it. Returns the maximum
    of the classes, as `maximum` of vectors has it."""
    n = lanes(like)
    block = np.full((n, n), -np.inf, type(like))
    for r in range(n):
        block[:classes, r] = decoded(np.asarray(x[j : j + classes, k + min(r, rows - 1)]))
    tile[at : at + n * classes] = block[:classes].reshape(-1)
    return np.fmax.reduce(block, axis=0, initial=-np.inf)


def store_transposed(tile, at, x, j, k, classes, rows, like):
    """The way back: x[j + c, k + r] = tile[at + c·lanes + r]."""
    n = lanes(like)
    block = tile[at : at + n * classes].reshape(classes, n)
    for r in range(rows):
        x[j : j + classes, k + r] = encoded(np.ascontiguousarray(block[:, r]), x.dtype)


def _transpose(builder, vectors):
    """The vectors of a square block's columns, from those of its rows, by shuffles that take one operation each."""
    n = len(vectors)
    near = n // 4  # lanes of a register's quarter, which most shuffles do not leave
    quarters = range(0, n, near)

    def rounds(vectors, count, first, second, paired):
        for _ in range(count):
            vectors = paired(vectors, lambda a, b: [shuffled(builder, places, a, b) for places in (first, second)])
        return vectors

    def halves(v, pair):  # of one with the other, results side by side
        return [w for a, b in zip(v[: len(v) // 2], v[len(v) // 2 :]) for w in pair(a, b)]

    def neighbours(v, pair):  # first results before second ones
        return [w for half in zip(*(pair(a, b) for a, b in zip(v[::2], v[1::2]))) for w in half]

    low, high = (
        [k + i // 2 + n * (i % 2) for k in quarters for i in range(start, start + near)] for start in (0, near)
    )
    even, odd = ([k + i for k in (s, s + n // 2, s + n, s + n + n // 2) for i in range(near)] for s in (0, near))
    squares = [rounds(vectors[k : k + near], near.bit_length() - 1, low, high, halves) for k in quarters]
    columns = [rounds(list(group), 2, even, odd, neighbours) for group in zip(*squares)]
    return [vector for group in zip(*columns) for vector in group]


class _Block:
    """Addresses of a block of rows for the two primitives above."""

    def __init__(self, context, builder, sig, args):
        self.context, self.builder, self.sig = context, builder, sig
        self.tile, self.at, self.x, self.j, self.k, self.classes, self.rows, _ = args
        self.vec = Vec(sig.args[7])
        self.vt = llvm_vector(self.vec)
        self.element, self.size = storage(sig.args[2])
        self.stored = ir.VectorType(self.element, self.vt.count)
        self.line = ir.Constant(self.rows.type, self.size * self.vt.count)  # bytes of a vector
        self.array = Fields(context, builder, sig.args[2], self.x)

    def row(self, r):
        """Address of x[j, k + r]."""
        b = self.builder
        of_class, of_row = self.array.strides
        start = self.array.address((self.j, of_class), (b.add(self.k, r), of_row))
        return b.bitcast(start, self.stored.as_pointer())

    def each(self, pointer, step, left):
        """Address of each row, and bytes that are left from there, of as many rows as a vector has lanes."""
        b = self.builder
        for r in range(self.vt.count):
            if r:
                pointer = b.bitcast(b.gep(b.bitcast(pointer, BYTES), [step]), pointer.type)
                left = b.sub(left, step)
            yield pointer, left

    def all_rows(self):
        """Address of the first row, bytes to the next, and bytes to the end of the last if there is no gap between
        them, of as many as a vector has lanes: of copies of the rows that there are, the last repeated, if fewer.

        With a clamp in each row's address instead, few classes took up to 1.14 times as long (10 of float16).
        """
        b, i64 = self.builder, self.rows.type
        count = ir.Constant(i64, self.vt.count)
        first, step = self.row(ir.Constant(i64, 0)), self.array.strides[1]
        left = b.add(b.mul(step, ir.Constant(i64, self.vt.count - 1)), b.mul(self.classes, ir.Constant(i64, self.size)))
        # Rows with a gap between them end where they end: what lies in there may be nobody's.
        row = b.mul(self.array.shape[0], ir.Constant(i64, self.size))
        left = b.select(b.icmp_signed("<=", step, row), left, ir.Constant(i64, 0))
        before = b.block
        # Out of the way: called as likely as not, gradients of 16 classes took 1.09 times as long.
        with b.if_then(b.icmp_signed("<", self.rows, count), likely=False):
            copy = b.bitcast(cgutils.alloca_once(b, ir.ArrayType(self.stored, self.vt.count)), first.type)
            last = b.sub(opaque(b, self.rows), ir.Constant(i64, 1))
            with cgutils.for_range(b, count) as loop:
                r = b.select(b.icmp_signed("<", loop.index, last), loop.index, last)
                row = load_some(self.context, b, self.row(r), self.stored, self.classes)
                b.store(row, b.gep(copy, [loop.index])).align = self.size
            copied = b.block
        found = []
        of_copies = copy, self.line, ir.Constant(i64, self.line.constant * self.vt.count)
        for there, of_copy in zip((first, step, left), of_copies):
            found.append(b.phi(there.type))
            found[-1].add_incoming(there, before)
            found[-1].add_incoming(of_copy, copied)
        return found

    def load_row(self, pointer, left):
        """A row's classes; what lies beyond them, as long as that is `left`, or anything.

        So much faster than a part of a vector is a whole one: 10 classes take 0.96 of the time, 0.86 in float16. Masks
        are as fast where there are any of 64 bits, or of AVX-512.
        """
        b = self.builder
        if HAS_AVX512 or self.size == 8:
            return load_some(self.context, b, pointer, self.stored, self.classes)

        def whole():
            row = b.load(pointer)
            row.align = 1
            return row

        def part():
            return load_some(self.context, b, pointer, self.stored, self.classes)

        return either(b, b.icmp_signed(">=", left, self.line), whole, part)

    def store_row(self, value, pointer, left, r):
        """Write row r, and beyond it as long as that is `left`: rows that are written after it, up to the last."""
        b = self.builder

        def part():
            with b.if_then(b.icmp_signed("<", ir.Constant(left.type, r), self.rows)):
                store_some(self.context, b, value, pointer, self.classes)

        if HAS_AVX512:
            part()
            return
        with b.if_else(b.icmp_signed(">=", left, self.line)) as (then, otherwise):
            with then:
                b.store(value, pointer).align = 1
            with otherwise:
                part()

    def column(self, c):
        """Address of the tile's vector of class c."""
        index = self.builder.add(self.at, ir.Constant(ir.IntType(64), c * self.vt.count))
        return pointer_to(self.context, self.builder, self.sig, (self.tile, index), self.vt)


@compiled_raw(load_transposed, lambda *args: Vec(args[-1]))
def _(context, builder, sig, args):
    block = _Block(context, builder, sig, args)
    i64 = ir.IntType(64)
    lowest = ir.Constant(block.vt, [-np.inf] * block.vt.count)
    dtype = sig.args[2].dtype
    rows = block.each(*block.all_rows())
    vectors = [decode(builder, dtype, block.load_row(*row), block.vt) for row in rows]
    top, other = lowest, lowest  # of every second class: half as many wait for each other
    for c, vector in enumerate(_transpose(builder, vectors)):

        def stored(c=c, vector=vector, other=other):
            builder.store(vector, block.column(c)).align = 4
            return larger(builder, vector, other)

        is_there = builder.icmp_signed("<", ir.Constant(i64, c), block.classes)
        top, other = either(builder, is_there, stored, other), top
    return larger(builder, top, other)


@compiled_raw(store_transposed, nothing)
def _(context, builder, sig, args):
    block = _Block(context, builder, sig, args)
    i64 = ir.IntType(64)
    vectors = []
    for c in range(block.vt.count):  # the vectors of classes past the last are never stored
        vector = builder.load(block.column(c))
        vector.align = 4
        vectors.append(vector)
    pointer, step = block.row(ir.Constant(i64, 0)), block.array.strides[1]
    # Bytes up to the end of the last row, where rows follow each other and are written whole.
    follow = builder.icmp_signed("==", step, builder.mul(block.classes, ir.Constant(i64, block.size)))
    left = builder.select(follow, builder.mul(block.rows, step), ir.Constant(i64, NOTHING_LEFT))
    rows = block.each(pointer, step, left)
    for r, (vector, row) in enumerate(zip(_transpose(builder, vectors), rows)):
        block.store_row(encode(builder, sig.args[2].dtype, vector), *row, r)
    return context.get_dummy_value()
