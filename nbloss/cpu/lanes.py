"""Vectors made of scalars, scalars of vectors, and masks by the number of a lane."""

import llvmlite.ir as ir
import numpy as np
from numba.core import types

from nbloss.cpu.arithmetic import (
    HAS_AVX512,
    VECTOR_BYTES,
    Mask,
    Vec,
    avx512,
    broadcast_value,
    compiled_raw,
    in_all_lanes,
    larger,
    maximum,
    of_registers,
    registers,
    shuffled,
    vector_of_ints,
)


def lanes(like):
    """Lanes of a vector of like's type."""
    return VECTOR_BYTES // np.dtype(type(like)).itemsize


@compiled_raw(lanes, lambda like: types.intp)
def _(context, builder, sig, args):
    return ir.Constant(ir.IntType(64), VECTOR_BYTES * 8 // sig.args[0].bitwidth)


def broadcast(value, like):
    """value in every lane of a vector of like's type."""
    return np.full(lanes(like), value, type(like))


@compiled_raw(broadcast, lambda value, like: Vec(like))
def _(context, builder, sig, args):
    return broadcast_value(context, builder, args[0], sig.args[0], sig.return_type)


def held(value, x):
    """A constant in every lane, in a register over a whole loop.

    Plain constants LLVM reads from memory at every use: rows of 1000 classes took up to 1.1 times as long.
    """
    return np.full_like(x, value)


@compiled_raw(held, lambda value, x: x)
def _(context, builder, sig, args):
    vec = sig.return_type
    value = context.cast(builder, args[0], sig.args[0], vec.dtype)
    bits = ir.IntType(vec.dtype.bitwidth)
    # No instruction, and nothing that the optimiser knows about its result.
    asm = ir.InlineAsm(ir.FunctionType(bits, [bits]), "", "=r,0")
    opaque = builder.call(asm, [builder.bitcast(value, bits)], attrs=("nounwind", "readnone"))
    return broadcast_value(context, builder, builder.bitcast(opaque, value.type), vec.dtype, vec)


def pair(a, b):
    """Two vectors as one of twice as many lanes.

    Each operation on it is two that do not wait for each other: of the 60 to 100 cycles for which the operations of a
    formula wait for one another, a processor overlaps little where they come one vector after the other.
    """
    return np.concatenate([a, b])


@compiled_raw(pair, lambda a, b: Vec(a.dtype, 2))
def _(context, builder, sig, args):
    return of_registers(builder, args)


def halves(x):
    """The two vectors of a pair."""
    return x[: len(x) // 2], x[len(x) // 2 :]


@compiled_raw(halves, lambda x: types.containers.UniTuple(Vec(x.dtype), 2))
def _(context, builder, sig, args):
    return context.make_tuple(builder, sig.return_type, registers(builder, args[0]))


def only(lane, x):
    """A mask of one lane; of none where `lane` is no lane of x."""
    return np.arange(len(x)) == lane


def lane_mask(sign):
    def lower(context, builder, sig, args):
        n = sig.return_type.lanes
        i32 = ir.IntType(32)
        lane = context.cast(builder, args[0], sig.args[0], types.int32)
        vt = ir.VectorType(i32, n)
        return builder.icmp_signed(sign, ir.Constant(vt, list(range(n))), in_all_lanes(builder, lane, vt))

    return lower


compiled_raw(only, lambda lane, x: Mask(x.lanes))(lane_mask("=="))


def first(count, x):
    """A mask of the first `count` lanes of x."""
    return np.arange(len(x)) < count


compiled_raw(first, lambda count, x: Mask(x.lanes))(lane_mask("<"))


def first_lane(mask):
    """The first lane in which the mask holds; their number where there is none."""
    return int(np.argmax(np.append(mask, True)))


@compiled_raw(first_lane, lambda mask: types.intp)
def _(context, builder, sig, args):
    # A bit more, set above the lanes, stands for none.
    n = sig.args[0].lanes
    bits = builder.zext(builder.bitcast(args[0], ir.IntType(n)), ir.IntType(64))
    bits = builder.or_(bits, ir.Constant(ir.IntType(64), 1 << n))
    return builder.cttz(bits, ir.Constant(ir.IntType(1), 1))


def any_lane(mask):
    """Whether the mask holds in some lane."""
    return bool(np.any(mask))


@compiled_raw(any_lane, lambda mask: types.boolean)
def _(context, builder, sig, args):
    bits = ir.IntType(sig.args[0].lanes)
    return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), ir.Constant(bits, 0))


def joined(a, b, k):
    """The lanes of a from the k-th on, then the first k of b; without AVX-512, k is 0."""
    return np.concatenate([a[k:], b[:k]])


@compiled_raw(joined, lambda a, b, k: a)
def _(context, builder, sig, args):
    a, b, k = args
    if not HAS_AVX512:
        return a
    vt, it = a.type, vector_of_ints(a.type)
    k = builder.trunc(context.cast(builder, k, sig.args[2], types.int64), ir.IntType(32))
    k = builder.zext(k, it.element) if it.element.width > 32 else k
    places = builder.add(in_all_lanes(builder, k, it), ir.Constant(it, list(range(vt.count))))
    return avx512(builder, f"vpermi2var.{'ps' if vt.count == 16 else 'pd'}", vt, a, places, b)


def lane(x, k):
    """The value of lane k."""
    return x[k]


@compiled_raw(lane, lambda x, k: x.dtype)
def _(context, builder, sig, args):
    return builder.extract_element(args[0], context.cast(builder, args[1], sig.args[1], types.int32))


def _fold(builder, x, combine):
    """Halve x onto itself until one lane is left: always the same order."""
    n = x.type.count
    while n > 1:
        n //= 2
        x = combine(*(shuffled(builder, range(k, k + n), x) for k in (0, n)))
    return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))


def _fold_array(x, combine):
    while len(x) > 1:
        x = combine(x[: len(x) // 2], x[len(x) // 2 :])
    return x[0]


def total(x):
    """Sum of the lanes."""
    return _fold_array(x, np.add)


@compiled_raw(total, lambda x: x.dtype)
def _(context, builder, sig, args):
    return _fold(builder, args[0], builder.fadd)


def largest(x):
    """Largest of the lanes (which hold no NaN)."""
    return _fold_array(x, maximum)


@compiled_raw(largest, lambda x: x.dtype)
def _(context, builder, sig, args):
    return _fold(builder, args[0], lambda a, b: larger(builder, a, b))


def add_wide(wide, x):
    """`wide` (float64 lanes) plus the lanes of x, added two by two in float64 where x is float32; of a pair, one vector
    after the other.
    """
    n, parts = len(wide), x.reshape(-1, VECTOR_BYTES // x.itemsize)
    for part in parts if x.dtype == np.float64 else parts[:, :n].astype(np.float64) + parts[:, n:]:
        wide = wide + part
    return wide


@compiled_raw(add_wide, lambda wide, x: wide)
def _(context, builder, sig, args):
    wide, x = args
    n = wide.type.count
    for part in registers(builder, x):
        if part.type != wide.type:
            low, high = (builder.fpext(shuffled(builder, range(k, k + n), part), wide.type) for k in (0, n))
            part = builder.fadd(low, high)
        wide = builder.fadd(wide, part)
    return wide
