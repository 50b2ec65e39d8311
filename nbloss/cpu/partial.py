"""Parts of vectors to and from memory, side by side: their first lanes."""

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba.core import types
from numba.core.typing.templates import signature

from nbloss.cpu.arithmetic import (
    HAS_AVX,
    HAS_AVX512,
    Mask,
    Vec,
    broadcast_value,
    call,
    compiled_raw,
    llvm_vector,
    nothing,
    shuffled,
)
from nbloss.cpu.lanes import lane_mask, lanes
from nbloss.cpu.memory import decode, encode, pointer_to, storage
from nbloss.half import decoded, encoded

LLVM_BEFORE_22 = llvm.llvm_version_info < (22,)


def load_first(a, i, count, fill, like):
    """As `load`, but only the first `count` lanes are read; `fill` stands in the others."""
    out = np.full(lanes(like), fill, type(like))
    out[:count] = decoded(np.asarray(a[i : i + count]))
    return out


@compiled_raw(load_first, lambda a, i, count, fill, like: Vec(like))
def _(context, builder, sig, args):
    vec = sig.return_type
    vt = llvm_vector(vec)
    element, _ = storage(sig.args[0])
    stored = ir.VectorType(element, vt.count)
    pointer = pointer_to(context, builder, sig, args, stored)
    count = context.cast(builder, args[2], sig.args[2], types.int64)
    value = decode(builder, sig.args[0].dtype, load_some(context, builder, pointer, stored, count), vt)
    mask = first_lanes(context, builder, vec.lanes, count)
    return builder.select(mask, value, broadcast_value(context, builder, args[3], sig.args[3], vec))


def store_first(a, i, count, value):
    """Store the first `count` lanes."""
    a[i : i + count] = encoded(value, a.dtype)[:count]


@compiled_raw(store_first, nothing)
def _(context, builder, sig, args):
    value = encode(builder, sig.args[0].dtype, args[3])
    pointer = pointer_to(context, builder, sig, args, value.type)
    store_some(context, builder, value, pointer, context.cast(builder, args[2], sig.args[2], types.int64))
    return context.get_dummy_value()


def first_lanes(context, builder, lanes, count):
    return lane_mask("<")(context, builder, signature(Mask(lanes), types.int64, Mask(lanes)), [count, None])


def masked(builder, kind, stored, args, ret):
    """llvm.masked.load, store, gather or scatter, of any alignment: args are what is stored, where, and what remains.

    What remains is the mask, after which comes, but for stores, what other lanes hold: anything, if it is not given.
    """
    element = str(stored.element)
    suffix = f"v{stored.count}" + {"float": "f32", "double": "f64"}.get(element, element)
    before = 2 if kind in ("store", "scatter") else 1
    place = f".v{stored.count}p0" if kind in ("gather", "scatter") else ".p0"
    if LLVM_BEFORE_22:  # where the alignment is an argument, before the mask
        args = [*args[:before], ir.Constant(ir.IntType(32), 1), *args[before:]]
    if kind == "load":
        args = [*args, ir.Constant(stored, ir.Undefined)]
    return call(builder, f"llvm.masked.{kind}.{suffix}{place}", ret, *args)


def _term(builder, count, size):
    """Whether `size`, a power of two, is a term of `count`, and the sum of the larger terms."""
    shifted = builder.lshr(count, ir.Constant(count.type, size.bit_length() - 1))
    return builder.trunc(shifted, ir.IntType(1)), builder.and_(count, ir.Constant(count.type, -2 * size))


def either(builder, condition, value, other):
    """What `value` emits where the condition holds, elsewhere `other`, or what that emits."""
    with builder.if_else(condition) as (then, otherwise):
        with then:
            value = value()
            within = builder.block
        with otherwise:
            other = other() if callable(other) else other
            beside = builder.block
    merged = builder.phi(other.type)
    merged.add_incoming(value, within)
    merged.add_incoming(other, beside)
    return merged


def load_some(context, builder, pointer, stored, count):
    """The first `count` lanes from there, 0 to all, and anything in the others; nothing else is read."""
    size = stored.count
    if HAS_AVX512 or (HAS_AVX and str(stored.element) not in ("i8", "i16")):
        return masked(builder, "load", stored, [pointer, first_lanes(context, builder, size, count)], stored)
    # No mask is there for them, and LLVM takes lane by lane: here 16, 8, 4, … of them are read.
    element = builder.bitcast(pointer, stored.element.as_pointer())
    is_whole, start = _term(builder, count, size)
    part = _last_part(builder, element, count, size)
    return either(builder, is_whole, lambda: _load_lanes(builder, element, start, size), part)


def _load_lanes(builder, element, start, size):
    vt = ir.VectorType(element.type.pointee, size)
    part = builder.load(builder.bitcast(builder.gep(element, [start]), vt.as_pointer()))
    part.align = 1
    return part


def _last_part(builder, element, count, size):
    """In `size` lanes, the last ones of `count` that are no whole `size`."""
    if size == 1:
        return ir.Constant(ir.VectorType(element.type.pointee, 1), ir.Undefined)
    half = size // 2
    rest = _last_part(builder, element, count, half)
    is_term, start = _term(builder, count, half)
    return either(
        builder,
        is_term,
        lambda: shuffled(builder, range(size), _load_lanes(builder, element, start, half), rest),
        shuffled(builder, range(size), rest),
    )


def store_some(context, builder, value, pointer, count):
    """Store the first `count` lanes there, 0 to all."""
    size = value.type.count
    if HAS_AVX512:
        mask = first_lanes(context, builder, size, count)
        masked(builder, "store", value.type, [value, pointer, mask], ir.VoidType())
        return
    # By a mask, AVX2 takes 14 cycles for half a vector on a Zen 3, and has none for 16 bits: here 16, 8, 4, … lanes.
    element = builder.bitcast(pointer, value.type.element.as_pointer())
    while size:
        is_term, start = _term(builder, count, size)
        lower = shuffled(builder, range(size), value)
        with builder.if_then(is_term):
            builder.store(lower, builder.bitcast(builder.gep(element, [start]), lower.type.as_pointer())).align = 1
        if size < value.type.count:
            value = builder.select(is_term, shuffled(builder, range(size, 2 * size), value), lower)
        size //= 2
