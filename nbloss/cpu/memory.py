"""Vectors to and from memory, side by side: loads and stores aligned or not, in part, past the caches."""

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba.core import types
from numba.core.typing.templates import signature

from nbloss.cpu.arithmetic import (
    FLOAT,
    HAS_AVX,
    HAS_AVX512,
    VECTOR_BYTES,
    Mask,
    Vec,
    broadcast_value,
    call,
    compiled_raw,
    in_all_lanes,
    llvm_vector,
    nothing,
    processor_has,
)
from nbloss.cpu.lanes import lane_mask, lanes
from nbloss.half import decoded, encoded

LLVM_BEFORE_22 = llvm.llvm_version_info < (22,)
ROUNDS_TO_BFLOAT16 = processor_has("avx512bf16")


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"


def storage(a):
    """(LLVM type of an element, bytes of an element) of a Numba array type."""
    if a.dtype.bitwidth == 16:
        return ir.IntType(16), 2
    return FLOAT[a.dtype.bitwidth], a.dtype.bitwidth // 8


def pointer_to(context, builder, a_type, a, index, index_type, to):
    array = context.make_array(a_type)(context, builder, a)
    index = context.cast(builder, index, index_type, types.intp)
    return builder.bitcast(builder.gep(array.data, [index]), to.as_pointer())


def _wide_bits(vt):
    return ir.VectorType(ir.IntType(32), vt.count)


def _const(vt, value):
    return ir.Constant(vt, [value] * vt.count)


def decode(builder, dtype, raw, vt):
    if dtype == types.uint16:  # float16
        half = builder.bitcast(raw, ir.VectorType(ir.HalfType(), vt.count))
        return builder.fpext(half, vt)
    if dtype == types.int16:  # bfloat16: the upper half of a float32
        it = _wide_bits(vt)
        return builder.bitcast(builder.shl(builder.zext(raw, it), _const(it, 16)), vt)
    return raw


def encode(builder, dtype, value):
    vt = value.type
    if dtype == types.uint16:
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), vt.count))
        return builder.bitcast(half, ir.VectorType(ir.IntType(16), vt.count))
    if dtype == types.int16 and ROUNDS_TO_BFLOAT16:
        # One instruction in place of eight (a gradient is written 1.25 times faster); it takes subnormals for 0.
        short = builder.fptrunc(value, ir.VectorType(BFloat(), vt.count))
        return builder.bitcast(short, ir.VectorType(ir.IntType(16), vt.count))
    if dtype == types.int16:
        it = _wide_bits(vt)
        bits = builder.bitcast(value, it)
        odd = builder.and_(builder.lshr(bits, _const(it, 16)), _const(it, 1))
        rounded = builder.add(builder.add(bits, _const(it, 0x7FFF)), odd)
        quiet = builder.or_(bits, _const(it, 0x400000))
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, _const(it, 16)), ir.VectorType(ir.IntType(16), vt.count))
    return value


def load(a, i, like):
    """A vector of like's type from the unit-stride array `a` at i; any alignment."""
    return decoded(np.asarray(a[i : i + lanes(like)]))


@compiled_raw(load, lambda a, i, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    element, _ = storage(sig.args[0])
    stored = ir.VectorType(element, vt.count)
    raw = builder.load(pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], stored))
    raw.align = 1
    return decode(builder, sig.args[0].dtype, raw, vt)


def prefetch(a, i):
    """Bring the cache line of a[i] near; i may lie outside the array."""


@compiled_raw(prefetch, nothing)
def _(context, builder, sig, args):
    i8 = ir.IntType(8)
    pointer = pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], i8)
    i32 = ir.IntType(32)
    numbers = (ir.Constant(i32, k) for k in (0, 3, 1))  # to read, to keep, data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *numbers)
    return context.get_dummy_value()


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
    pointer = pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], stored)
    count = context.cast(builder, args[2], sig.args[2], types.int64)
    value = decode(builder, sig.args[0].dtype, load_some(context, builder, pointer, stored, count), vt)
    mask = _first_lanes(context, builder, vec.lanes, count)
    return builder.select(mask, value, broadcast_value(context, builder, args[3], sig.args[3], vec))


def _first_lanes(context, builder, lanes, count):
    return lane_mask("<")(context, builder, signature(Mask(lanes), types.int64, Mask(lanes)), [count, None])


def _masked(builder, kind, stored, args, ret):
    """llvm.masked.load / llvm.masked.store of any alignment."""
    suffix = f"v{stored.count}" + {"float": "f32", "double": "f64", "i16": "i16"}[str(stored.element)]
    if LLVM_BEFORE_22:  # where the alignment is an argument, before the mask
        args = [*args[:-1], ir.Constant(ir.IntType(32), 1), args[-1]]
    if kind == "load":
        args = [*args, ir.Constant(stored, ir.Undefined)]
    return call(builder, f"llvm.masked.{kind}.{suffix}.p0", ret, *args)


def _term(builder, count, size):
    """Whether `size`, a power of two, is a term of `count`, and the sum of the larger terms."""
    shifted = builder.lshr(count, ir.Constant(count.type, size.bit_length() - 1))
    return builder.trunc(shifted, ir.IntType(1)), builder.and_(count, ir.Constant(count.type, -2 * size))


def _lanes(builder, x, y, start, stop):
    """Those of x and y, one after the other."""
    places = ir.Constant(ir.VectorType(ir.IntType(32), stop - start), list(range(start, stop)))
    return builder.shuffle_vector(x, y, places)


def either(builder, condition, value, other):
    """What `value` emits where the condition holds, `other` elsewhere."""
    before = builder.block
    with builder.if_then(condition):
        value = value()
        within = builder.block
    merged = builder.phi(other.type)
    merged.add_incoming(value, within)
    merged.add_incoming(other, before)
    return merged


def load_some(context, builder, pointer, stored, count):
    """The first `count` lanes from there, 0 to all, and anything in the others; nothing else is read."""
    size = stored.count
    if HAS_AVX512 or (HAS_AVX and str(stored.element) != "i16"):
        return _masked(builder, "load", stored, [pointer, _first_lanes(context, builder, size, count)], stored)
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
    half = size // 2
    undefined = ir.Constant(ir.VectorType(element.type.pointee, max(half, 1)), ir.Undefined)
    if size == 1:
        return undefined
    rest = _last_part(builder, element, count, half)
    is_term, start = _term(builder, count, half)
    return either(
        builder,
        is_term,
        lambda: _lanes(builder, _load_lanes(builder, element, start, half), rest, 0, size),
        _lanes(builder, rest, undefined, 0, size),
    )


def store_some(context, builder, value, pointer, count):
    """Store the first `count` lanes there, 0 to all."""
    size = value.type.count
    if HAS_AVX512:
        _masked(
            builder, "store", value.type, [value, pointer, _first_lanes(context, builder, size, count)], ir.VoidType()
        )
        return
    # By a mask, AVX2 takes 14 cycles for half a vector on a Zen 3, and has none for 16 bits: here 16, 8, 4, … lanes.
    element = builder.bitcast(pointer, value.type.element.as_pointer())
    while size:
        is_term, start = _term(builder, count, size)
        undefined = ir.Constant(value.type, ir.Undefined)
        lower = _lanes(builder, value, undefined, 0, size)
        with builder.if_then(is_term):
            builder.store(lower, builder.bitcast(builder.gep(element, [start]), lower.type.as_pointer())).align = 1
        if size < value.type.count:
            value = builder.select(is_term, _lanes(builder, value, undefined, size, 2 * size), lower)
        size //= 2


def load_one(a, i, like):
    """a[i] in every lane."""
    return np.full(lanes(like), decoded(np.asarray(a[i : i + 1]))[0], type(like))


@compiled_raw(load_one, lambda a, i, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    element, _ = storage(sig.args[0])
    item = builder.load(pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], element))
    item.align = 1
    return decode(builder, sig.args[0].dtype, in_all_lanes(builder, item, ir.VectorType(element, vt.count)), vt)


def store(a, i, value):
    """Store a vector into the unit-stride array `a` at i; any alignment."""
    a[i : i + len(value)] = encoded(value, a.dtype)


@compiled_raw(store, nothing)
def _(context, builder, sig, args):
    _emit_store(context, builder, sig, args, align=1)
    return context.get_dummy_value()


def _emit_store(context, builder, sig, args, align):
    value = encode(builder, sig.args[0].dtype, args[2])
    pointer = pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], value.type)
    instruction = builder.store(value, pointer)
    instruction.align = align
    return instruction


def store_one(a, i, value):
    """a[i] = the first lane."""
    a[i] = encoded(value[:1], a.dtype)[0]


@compiled_raw(store_one, nothing)
def _(context, builder, sig, args):
    value = encode(builder, sig.args[0].dtype, args[2])
    item = builder.extract_element(value, ir.Constant(ir.IntType(32), 0))
    builder.store(item, pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], item.type)).align = 1
    return context.get_dummy_value()


def stream(a, i, value):
    """As `store`, past the caches; a[i] is aligned to the vector's stored size (see `aligned_at`)."""
    store(a, i, value)


@compiled_raw(stream, nothing)
def _(context, builder, sig, args):
    size = storage(sig.args[0])[1] * sig.args[2].lanes
    instruction = _emit_store(context, builder, sig, args, align=size)
    one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    instruction.set_metadata("nontemporal", one)
    return context.get_dummy_value()


def store_first(a, i, count, value):
    """Store the first `count` lanes."""
    a[i : i + count] = encoded(value, a.dtype)[:count]


@compiled_raw(store_first, nothing)
def _(context, builder, sig, args):
    value = encode(builder, sig.args[0].dtype, args[3])
    pointer = pointer_to(context, builder, sig.args[0], args[0], args[1], sig.args[1], value.type)
    store_some(context, builder, value, pointer, context.cast(builder, args[2], sig.args[2], types.int64))
    return context.get_dummy_value()


def aligned_at(a, like):
    """First index of `a` (unit stride) at which a vector of like's type may be streamed; -1 where none is."""
    size = a.itemsize * lanes(like)
    gap = -a.ctypes.data % size
    return gap // a.itemsize if gap % a.itemsize == 0 else -1


@compiled_raw(aligned_at, lambda a, like: types.intp)
def _(context, builder, sig, args):
    i64 = ir.IntType(64)
    item = storage(sig.args[0])[1]
    size = item * (VECTOR_BYTES * 8 // sig.args[1].bitwidth)
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    gap = builder.and_(builder.neg(builder.ptrtoint(data, i64)), ir.Constant(i64, size - 1))
    ragged = builder.and_(gap, ir.Constant(i64, item - 1))
    fits = builder.icmp_signed("==", ragged, ir.Constant(i64, 0))
    return builder.select(fits, builder.lshr(gap, ir.Constant(i64, item.bit_length() - 1)), ir.Constant(i64, -1))
