"""Vectors to and from memory, side by side: loads and stores aligned or not, past the caches."""

from functools import reduce

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils, types

from nbloss.cpu.arithmetic import (
    FLOAT,
    VECTOR_BYTES,
    Vec,
    call,
    compiled_raw,
    in_all_lanes,
    ints,
    llvm_vector,
    nothing,
    processor_has,
    vector_of_ints,
)
from nbloss.cpu.lanes import lanes
from nbloss.half import decoded, encoded

ROUNDS_TO_BFLOAT16 = processor_has("avx512bf16")


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"


LINE = 64  # bytes of a cache line
BYTES = ir.IntType(8).as_pointer()


def storage(a):
    """(LLVM type of an element, bytes of an element) of a Numba array type."""
    if isinstance(a.dtype, types.Integer):
        return ir.IntType(a.dtype.bitwidth), a.dtype.bitwidth // 8
    return FLOAT[a.dtype.bitwidth], a.dtype.bitwidth // 8


class Fields:
    """What an array is made of in LLVM: its address, lengths and strides, taken out of it where they are asked for.

    Numba's way to them goes through memory, with a dozen instructions for each.
    """

    def __init__(self, context, builder, a_type, a):
        self._builder, model = builder, context.data_model_manager[a_type]
        self._get = lambda name: model.get(builder, a, name)
        self._list = lambda name: cgutils.unpack_tuple(builder, self._get(name))

    @property
    def data(self):
        return self._get("data")

    @property
    def shape(self):
        return self._list("shape")

    @property
    def strides(self):
        return self._list("strides")

    def address(self, *steps):
        """As many strides from the first element as each of (number, stride) says."""
        offset = reduce(self._builder.add, (self._builder.mul(number, stride) for number, stride in steps))
        return self._builder.gep(self._builder.bitcast(self.data, BYTES), [offset])


def pointer_to(context, builder, sig, args, to, n=0):
    """The address of element args[n + 1] of the unit-stride array args[n], as that of a `to`."""
    array = Fields(context, builder, sig.args[n], args[n])
    index = context.cast(builder, args[n + 1], sig.args[n + 1], types.intp)
    return builder.bitcast(builder.gep(array.data, [index]), to.as_pointer())


def decode(builder, dtype, raw, vt):
    """What is stored, in the type that is computed with; other integers than those of 16 bits are numbers."""
    if dtype == types.uint16:  # float16
        half = builder.bitcast(raw, ir.VectorType(ir.HalfType(), vt.count))
        return builder.fpext(half, vt)
    if dtype == types.int16:  # bfloat16: the upper half of a float32
        it = vector_of_ints(vt)
        return builder.bitcast(builder.shl(builder.zext(raw, it), ints(vt, 16)), vt)
    if isinstance(dtype, types.Integer):
        return builder.sitofp(raw, vt) if dtype.signed else builder.uitofp(raw, vt)
    if dtype.bitwidth > 32 and vt.element == FLOAT[32]:
        return builder.fptrunc(raw, vt)
    return raw if vt.element == FLOAT[dtype.bitwidth] else builder.fpext(raw, vt)


def encode(builder, dtype, value):
    """The way back, to arrays of floats and of the 16-bit integers that stand for half precision."""
    vt = value.type
    if dtype == types.uint16:
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), vt.count))
        return builder.bitcast(half, ir.VectorType(ir.IntType(16), vt.count))
    if dtype == types.int16 and ROUNDS_TO_BFLOAT16:
        # One instruction in place of eight (a gradient is written 1.25 times faster); it takes subnormals for 0.
        short = builder.fptrunc(value, ir.VectorType(BFloat(), vt.count))
        return builder.bitcast(short, ir.VectorType(ir.IntType(16), vt.count))
    if dtype == types.int16:
        it = vector_of_ints(vt)
        bits = builder.bitcast(value, it)
        odd = builder.and_(builder.lshr(bits, ints(vt, 16)), ints(vt, 1))
        rounded = builder.add(builder.add(bits, ints(vt, 0x7FFF)), odd)
        quiet = builder.or_(bits, ints(vt, 0x400000))
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, ints(vt, 16)), ir.VectorType(ir.IntType(16), vt.count))
    return value


def load(a, i, like):
    """A vector of like's type from the unit-stride array `a` at i; any alignment."""
    return decoded(np.asarray(a[i : i + lanes(like)])).astype(type(like))


@compiled_raw(load, lambda a, i, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    element, _ = storage(sig.args[0])
    stored = ir.VectorType(element, vt.count)
    raw = builder.load(pointer_to(context, builder, sig, args, stored))
    raw.align = 1
    return decode(builder, sig.args[0].dtype, raw, vt)


def prefetch(a, i, like):
    """Bring the vector from a[i] on into the first-level cache; i may lie outside the array."""


def prefetch_far(a, i, like):
    """Bring the vector from a[i] on into the second-level cache; i may lie outside the array.

    That one waits for three times as many lines at once, which is what reading memory at its full speed takes.
    """


def _emit_prefetch(keep):
    def emit(context, builder, sig, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        pointer = pointer_to(context, builder, sig, args, ir.IntType(8))
        numbers = [ir.Constant(i32, k) for k in (0, keep, 1)]  # to read, how near to keep it, data
        # Of integers and float64 beside float32, a vector takes two lines.
        size = storage(sig.args[0])[1] * VECTOR_BYTES * 8 // sig.args[2].bitwidth
        for start in range(0, size, LINE):
            line = builder.gep(pointer, [ir.Constant(i64, start)])
            call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *numbers)
        return context.get_dummy_value()

    return emit


compiled_raw(prefetch, nothing)(_emit_prefetch(3))
compiled_raw(prefetch_far, nothing)(_emit_prefetch(2))


def load_one(a, i, like):
    """a[i] in every lane."""
    return np.full(lanes(like), decoded(np.asarray(a[i : i + 1]))[0], type(like))


@compiled_raw(load_one, lambda a, i, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    element, _ = storage(sig.args[0])
    item = builder.load(pointer_to(context, builder, sig, args, element))
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
    pointer = pointer_to(context, builder, sig, args, value.type)
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
    builder.store(item, pointer_to(context, builder, sig, args, item.type)).align = 1
    return context.get_dummy_value()


def load_all(a, i, vectors):
    """As many vectors as these, one after the other from a[i] on."""
    step = len(vectors[0])
    return tuple(load(a, i + n * step, vectors[0][0]) for n in range(len(vectors)))


@compiled_raw(load_all, lambda a, i, vectors: vectors)
def _(context, builder, sig, args):
    vectors = sig.args[2]
    vt = llvm_vector(vectors[0])
    first = pointer_to(context, builder, sig, args, vt)
    loaded = [builder.load(builder.gep(first, [ir.Constant(ir.IntType(64), n)])) for n in range(len(vectors))]
    for instruction in loaded:
        instruction.align = 1
    return context.make_tuple(builder, vectors, loaded)


def store_all(a, i, vectors):
    """Store vectors one after the other from a[i] on."""
    for n, vector in enumerate(vectors):
        store(a, i + n * len(vector), vector)


@compiled_raw(store_all, nothing)
def _(context, builder, sig, args):
    vectors = sig.args[2]
    first = pointer_to(context, builder, sig, args, llvm_vector(vectors[0]))
    for n in range(len(vectors)):
        place = builder.gep(first, [ir.Constant(ir.IntType(64), n)])
        builder.store(builder.extract_value(args[2], n), place).align = 1
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


# Results are written past the caches, by non-temporal stores; but not into memory that is new.
NONTEMPORAL, UNLESS_NEW = 4, 8


def is_mapped(a):
    """Whether glibc's malloc has mapped memory for this array alone, so that it is new where the array is.

    Each page is zeroed as it is first written, in a cache: that takes results in 0.55 to 0.95 of the time that it takes
    to drive it out past them. Memory that malloc uses again takes 1.4 times as long through the caches as past them.
    malloc keeps 16 bytes of the first page for itself; what it does not map lies there once in 256 times.
    """
    return a.ctypes.data % 4096 == 16


@compiled_raw(is_mapped, lambda a: types.boolean)
def _(context, builder, sig, args):
    i64 = ir.IntType(64)
    data = builder.ptrtoint(Fields(context, builder, sig.args[0], args[0]).data, i64)
    return builder.icmp_signed("==", builder.and_(data, ir.Constant(i64, 4095)), ir.Constant(i64, 16))


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
    data = builder.ptrtoint(Fields(context, builder, sig.args[0], args[0]).data, i64)
    gap = builder.and_(builder.neg(data), ir.Constant(i64, size - 1))
    ragged = builder.and_(gap, ir.Constant(i64, item - 1))
    fits = builder.icmp_signed("==", ragged, ir.Constant(i64, 0))
    return builder.select(fits, builder.lshr(gap, ir.Constant(i64, item.bit_length() - 1)), ir.Constant(i64, -1))
