"""One 64-byte vector type for Numba, and the loads, stores and arithmetic that the kernels are written in.

Numba has no SIMD type, and its loops vectorise only when LLVM agrees; what it then chooses (width, order of a
sum, fused operations) changes with the machine and the call site. Here a ``Vec`` is 64 bytes of float32 or
float64 whatever the machine: LLVM splits it where registers are shorter. The order of every sum is therefore
written in the kernel, and results have the same bits serial, parallel, aligned or not.

Each primitive below is a plain Python function that says, on NumPy arrays, what it does (this is what runs
with the JIT off), followed by the LLVM that compiled kernels get for it.

Storage types: float32 and float64 as they are; uint16 holds float16 and int16 holds bfloat16 (Numba's CPU
target has neither), both decoded to float32 by ``load`` and rounded to nearest even by ``store``.
"""

import operator
import struct

import llvmlite.ir as ir
import numpy as np
from numba import njit
from numba.core import types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, register_model

VECTOR_BYTES = 64

inline = njit(error_model="numpy", forceinline=True)


class Vec(types.Type):
    """A vector of float32 or float64 lanes."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vec({dtype} x {self.lanes})")


class Mask(types.Type):
    """One truth value a lane."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"Mask({lanes})")


FLOAT = {32: ir.FloatType(), 64: ir.DoubleType()}


def _llvm_vector(vec):
    return ir.VectorType(FLOAT[vec.dtype.bitwidth], vec.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, _llvm_vector(vec))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask):
        super().__init__(manager, mask, ir.VectorType(ir.IntType(1), mask.lanes))


# --- registration -------------------------------------------------------------------------------------------


def _vector_of(*args):
    """The Vec among the argument types (scalars are broadcast to it); None where there is none."""
    vecs = {a for a in args if isinstance(a, Vec)}
    fits = all(isinstance(a, (Vec, Mask, types.Number)) for a in args)
    return vecs.pop() if len(vecs) == 1 and fits else None


def _mask_of(*args):
    vec = _vector_of(*args)
    return vec and Mask(vec.lanes)


def _like(*args):
    return Vec(args[-1])


def _nothing(*args):
    return types.void


def _broadcast(context, builder, value, ty, vec):
    if not isinstance(ty, types.Number):
        return value
    value = context.cast(builder, value, ty, vec.dtype)
    vt = _llvm_vector(vec)
    one = builder.insert_element(ir.Constant(vt, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vec.lanes), [0] * vec.lanes)
    return builder.shuffle_vector(one, ir.Constant(vt, ir.Undefined), zeros)


def _register(fn, result, lower, *overloads):
    class Template(AbstractTemplate):
        key = fn

        def generic(self, args, kws):
            ty = None if kws else result(*args)
            return None if ty is None else signature(ty, *args)

    infer_global(fn)(Template)
    for types_of_args in overloads or [(types.VarArg(types.Any),)]:
        lower_builtin(fn, *types_of_args)(lower)


def compiled(fn, result=_vector_of, *overloads):
    """Decorator: the LLVM of the elementwise primitive `fn`, all arguments broadcast to one vector type."""

    def register(emit):
        def lower(context, builder, sig, args):
            vec = _vector_of(*sig.args)
            wide = [_broadcast(context, builder, v, t, vec) for v, t in zip(args, sig.args)]
            return emit(builder, *wide)

        _register(fn, result, lower, *overloads)
        return emit

    return register


def compiled_raw(fn, result):
    """Decorator: the LLVM of a primitive that wants the Numba types of its arguments (loads, stores)."""

    def register(lower):
        _register(fn, result, lower)
        return lower

    return register


def _call(builder, name, vt, *args, ret=None):
    suffix = f"v{vt.count}" + {"float": "f32", "double": "f64"}[str(vt.element)]
    name = f"{name}.{suffix}"
    module = builder.module
    fn = module.globals.get(name)
    if fn is None:
        fn = ir.Function(module, ir.FunctionType(ret or vt, [a.type for a in args]), name)
    return builder.call(fn, args)


def _int_type(vt):
    return ir.VectorType(ir.IntType(32 if vt.element == FLOAT[32] else 64), vt.count)


def _ints(vt, value):
    it = _int_type(vt)
    return ir.Constant(it, [value] * it.count)


# --- arithmetic ---------------------------------------------------------------------------------------------

_BINARY = [(Vec, Vec), (Vec, types.Number), (types.Number, Vec)]

for _op, _emit in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    compiled(_op, _vector_of, *_BINARY)(lambda b, x, y, _emit=_emit: getattr(b, _emit)(x, y))
for _op, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    compiled(_op, _mask_of, *_BINARY)(lambda b, x, y, _sign=_sign: b.fcmp_ordered(_sign, x, y))
compiled(operator.neg, _vector_of, (Vec,))(lambda b, x: b.fneg(x))


def fma(a, b, c):
    """a·b + c, rounded once where the machine can."""
    return a * b + c


@compiled(fma)
def _(builder, a, b, c):
    return _call(builder, "llvm.fmuladd", a.type, a, b, c)


def where(mask, a, b):
    """a in the lanes where `mask` holds, b in the others."""
    return np.where(mask, a, b)


@compiled(where)
def _(builder, mask, a, b):
    return builder.select(mask, a, b)


def maximum(a, b):
    """The larger of a and b; b where either is NaN. One instruction, unlike a maximum that keeps every NaN."""
    return np.where(a > b, a, b)


@compiled(maximum)
def _(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def absolute(x):
    return np.abs(x)


@compiled(absolute)
def _(builder, x):
    return _call(builder, "llvm.fabs", x.type, x)


# --- bits ---------------------------------------------------------------------------------------------------


def _bits(x):
    x = np.asarray(x)
    return x.view(np.int32 if x.dtype == np.float32 else np.int64)


def _mantissa_bits(vt_or_array):
    single = (
        vt_or_array.element == FLOAT[32] if isinstance(vt_or_array, ir.VectorType) else vt_or_array.dtype == np.float32
    )
    return 23 if single else 52


def shifted_to_exponent(x):
    """The low bits of x moved to the exponent field: 2^n for an x whose low bits hold n + bias."""
    return (_bits(x) << _mantissa_bits(x)).view(x.dtype)


@compiled(shifted_to_exponent)
def _(builder, x):
    bits = builder.bitcast(x, _int_type(x.type))
    return builder.bitcast(builder.shl(bits, _ints(x.type, _mantissa_bits(x.type))), x.type)


# Bits of sqrt(1/2): taking them away first puts every mantissa into [sqrt(1/2), sqrt(2)).
_ROOT_HALF = {
    23: struct.unpack("<i", struct.pack("<f", 0.5**0.5))[0],
    52: struct.unpack("<q", struct.pack("<d", 0.5**0.5))[0],
}


def exponent_of(x):
    """k, as a float, with x = 2^k·f and f in [sqrt(1/2), sqrt(2)), for a normal x > 0."""
    shift = _mantissa_bits(x)
    return ((_bits(x) - _ROOT_HALF[shift]) >> shift).astype(x.dtype)


@compiled(exponent_of)
def _(builder, x):
    shift = _mantissa_bits(x.type)
    bits = builder.sub(builder.bitcast(x, _int_type(x.type)), _ints(x.type, _ROOT_HALF[shift]))
    return builder.sitofp(builder.ashr(bits, _ints(x.type, shift)), x.type)


def fraction_of(x):
    """f in [sqrt(1/2), sqrt(2)) with x = 2^k·f, for a normal x > 0."""
    shift = _mantissa_bits(x)
    bits = _bits(x) - _ROOT_HALF[shift]
    return ((bits & ((1 << shift) - 1)) + _ROOT_HALF[shift]).view(x.dtype)


@compiled(fraction_of)
def _(builder, x):
    shift = _mantissa_bits(x.type)
    bits = builder.sub(builder.bitcast(x, _int_type(x.type)), _ints(x.type, _ROOT_HALF[shift]))
    bits = builder.and_(bits, _ints(x.type, (1 << shift) - 1))
    return builder.bitcast(builder.add(bits, _ints(x.type, _ROOT_HALF[shift])), x.type)


def is_single(x):
    """Whether x holds float32 (known when a kernel is compiled: the other branch is dropped)."""
    return x.dtype == np.float32


@compiled_raw(is_single, lambda x: types.boolean)
def _(context, builder, sig, args):
    return ir.Constant(ir.IntType(1), sig.args[0].dtype.bitwidth == 32)


# --- lanes --------------------------------------------------------------------------------------------------


def lanes(like):
    """Lanes of a vector of like's type."""
    return VECTOR_BYTES // np.dtype(type(like)).itemsize


@compiled_raw(lanes, lambda like: types.intp)
def _(context, builder, sig, args):
    return ir.Constant(ir.IntType(64), VECTOR_BYTES * 8 // sig.args[0].bitwidth)


def broadcast(value, like):
    """value in every lane of a vector of like's type."""
    return np.full(lanes(like), value, type(like))


@compiled_raw(broadcast, _like)
def _(context, builder, sig, args):
    return _broadcast(context, builder, args[0], sig.args[0], sig.return_type)


def only(lane, x):
    """A mask of one lane; of none where `lane` is no lane of x."""
    return np.arange(len(x)) == lane


def _lane_mask(sign):
    def lower(context, builder, sig, args):
        n = sig.return_type.lanes
        i32 = ir.IntType(32)
        lane = context.cast(builder, args[0], sig.args[0], types.int32)
        vt = ir.VectorType(i32, n)
        one = builder.insert_element(ir.Constant(vt, ir.Undefined), lane, ir.Constant(i32, 0))
        wide = builder.shuffle_vector(one, ir.Constant(vt, ir.Undefined), ir.Constant(vt, [0] * n))
        return builder.icmp_signed(sign, ir.Constant(vt, list(range(n))), wide)

    return lower


compiled_raw(only, lambda lane, x: Mask(x.lanes))(_lane_mask("=="))


def first(count, x):
    """A mask of the first `count` lanes of x."""
    return np.arange(len(x)) < count


compiled_raw(first, lambda count, x: Mask(x.lanes))(_lane_mask("<"))


def lane(x, k):
    """The value of lane k."""
    return x[k]


@compiled_raw(lane, lambda x, k: x.dtype)
def _(context, builder, sig, args):
    return builder.extract_element(args[0], context.cast(builder, args[1], sig.args[1], types.int32))


def _fold(builder, x, combine):
    """Halve x onto itself until one lane is left: always the same order."""
    i32, n = ir.IntType(32), x.type.count
    while n > 1:
        n //= 2
        half = [ir.Constant(ir.VectorType(i32, n), list(range(k, k + n))) for k in (0, n)]
        undef = ir.Constant(x.type, ir.Undefined)
        x = combine(*(builder.shuffle_vector(x, undef, h) for h in half))
    return builder.extract_element(x, ir.Constant(i32, 0))


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
    return _fold(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def borrowed(a):
    """The same array without a reference count: views of it cost no atomic operation. Its owner must outlive it."""
    return a


@compiled_raw(borrowed, lambda a: a)
def _(context, builder, sig, args):
    array = context.make_array(sig.args[0])(context, builder, args[0])
    array.meminfo = ir.Constant(array.meminfo.type, None)
    array.parent = ir.Constant(array.parent.type, None)
    return array._getvalue()


# --- memory -------------------------------------------------------------------------------------------------


def _storage(a):
    """(LLVM type of an element, bytes of an element) of a Numba array type."""
    if a.dtype.bitwidth == 16:
        return ir.IntType(16), 2
    return FLOAT[a.dtype.bitwidth], a.dtype.bitwidth // 8


def _pointer(context, builder, a_type, a, index, index_type, to):
    array = context.make_array(a_type)(context, builder, a)
    index = context.cast(builder, index, index_type, types.intp)
    return builder.bitcast(builder.gep(array.data, [index]), to.as_pointer())


def _wide_bits(vt):
    return ir.VectorType(ir.IntType(32), vt.count)


def _const(vt, value):
    return ir.Constant(vt, [value] * vt.count)


def _decode(builder, dtype, raw, vt):
    if dtype == types.uint16:  # float16
        half = builder.bitcast(raw, ir.VectorType(ir.HalfType(), vt.count))
        return builder.fpext(half, vt)
    if dtype == types.int16:  # bfloat16: the upper half of a float32
        it = _wide_bits(vt)
        return builder.bitcast(builder.shl(builder.zext(raw, it), _const(it, 16)), vt)
    return raw


def _encode(builder, dtype, value):
    vt = value.type
    if dtype == types.uint16:
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), vt.count))
        return builder.bitcast(half, ir.VectorType(ir.IntType(16), vt.count))
    if dtype == types.int16:
        it = _wide_bits(vt)
        bits = builder.bitcast(value, it)
        odd = builder.and_(builder.lshr(bits, _const(it, 16)), _const(it, 1))
        rounded = builder.add(builder.add(bits, _const(it, 0x7FFF)), odd)
        quiet = builder.or_(bits, _const(it, 0x400000))
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(builder.lshr(bits, _const(it, 16)), ir.VectorType(ir.IntType(16), vt.count))
    return value


def decoded(raw):
    """Stored values as floats (NumPy meaning of what `load` does)."""
    if raw.dtype == np.uint16:
        return raw.view(np.float16).astype(np.float32)
    if raw.dtype == np.int16:
        return (raw.astype(np.int32) << 16).view(np.float32)
    return raw.copy()


def encoded(value, dtype):
    """Floats as they are stored (NumPy meaning of what `store` does)."""
    if dtype == np.uint16:
        return value.astype(np.float16).view(np.uint16)
    if dtype == np.int16:
        bits = value.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(value), (bits | 0x400000) >> 16, rounded).astype(np.uint16).view(np.int16)
    return value


def load(a, i, like):
    """A vector of like's type from the unit-stride array `a` at i; any alignment."""
    return decoded(np.asarray(a[i : i + lanes(like)]))


@compiled_raw(load, lambda a, i, like: Vec(like))
def _(context, builder, sig, args):
    vt = _llvm_vector(sig.return_type)
    element, _ = _storage(sig.args[0])
    stored = ir.VectorType(element, vt.count)
    raw = builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1], stored))
    raw.align = 1
    return _decode(builder, sig.args[0].dtype, raw, vt)


def prefetch(a, i):
    """Bring the cache line of a[i] near; i may lie outside the array."""


@compiled_raw(prefetch, _nothing)
def _(context, builder, sig, args):
    i8 = ir.IntType(8)
    pointer = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1], i8)
    i32 = ir.IntType(32)
    fn = builder.module.globals.get("llvm.prefetch.p0")
    if fn is None:
        fn = ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32]), "llvm.prefetch.p0"
        )
    builder.call(fn, [pointer, *(ir.Constant(i32, k) for k in (0, 3, 1))])  # to read, to keep, data
    return context.get_dummy_value()


def load_first(a, i, count, fill, like):
    """As `load`, but only the first `count` lanes are read; `fill` stands in the others."""
    out = np.full(lanes(like), fill, type(like))
    out[:count] = decoded(np.asarray(a[i : i + count]))
    return out


@compiled_raw(load_first, lambda a, i, count, fill, like: Vec(like))
def _(context, builder, sig, args):
    vec = sig.return_type
    vt = _llvm_vector(vec)
    element, _ = _storage(sig.args[0])
    stored = ir.VectorType(element, vt.count)
    pointer = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1], stored)
    mask_sig = signature(Mask(vec.lanes), sig.args[2], vec)
    mask = _lane_mask("<")(context, builder, mask_sig, [args[2], None])
    raw = _masked(builder, "load", stored, [pointer, mask], stored)
    value = _decode(builder, sig.args[0].dtype, raw, vt)
    return builder.select(mask, value, _broadcast(context, builder, args[3], sig.args[3], vec))


def _masked(builder, kind, stored, args, ret):
    """llvm.masked.load / llvm.masked.store of any alignment."""
    suffix = f"v{stored.count}" + {"float": "f32", "double": "f64", "i16": "i16"}[str(stored.element)]
    if kind == "load":
        args = [*args, ir.Constant(stored, ir.Undefined)]
    name = f"llvm.masked.{kind}.{suffix}.p0"
    fn = builder.module.globals.get(name)
    if fn is None:
        fn = ir.Function(builder.module, ir.FunctionType(ret, [a.type for a in args]), name)
    return builder.call(fn, args)


def gather(a, i, count, like):
    """a[i], a[i + 1], …, of any stride; lanes from `count` on repeat the last one read."""
    return decoded(np.asarray(a[np.minimum(np.arange(i, i + lanes(like)), i + count - 1)]))


@compiled_raw(gather, lambda a, i, count, like: Vec(like))
def _(context, builder, sig, args):
    vt = _llvm_vector(sig.return_type)
    element, _ = _storage(sig.args[0])
    raw = ir.Constant(ir.VectorType(element, vt.count), ir.Undefined)
    last = builder.sub(context.cast(builder, args[2], sig.args[2], types.intp), ir.Constant(ir.IntType(64), 1))
    for k in range(vt.count):
        k = ir.Constant(ir.IntType(64), k)
        clipped = builder.select(builder.icmp_signed("<", k, last), k, last)
        item = builder.load(_strided_pointer(context, builder, sig, args, clipped))
        item.align = 1
        raw = builder.insert_element(raw, item, builder.trunc(k, ir.IntType(32)))
    return _decode(builder, sig.args[0].dtype, raw, vt)


def _strided_pointer(context, builder, sig, args, k):
    """Address of element args[1] + k of the strided array args[0]."""
    array = context.make_array(sig.args[0])(context, builder, args[0])
    i = builder.add(context.cast(builder, args[1], sig.args[1], types.intp), k)
    offset = builder.mul(i, builder.extract_value(array.strides, 0))
    base = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(base, [offset]), _storage(sig.args[0])[0].as_pointer())


def scatter(a, i, count, value):
    """Store the first `count` lanes into a[i], a[i + 1], …, of any stride."""
    a[i : i + count] = encoded(value, a.dtype)[:count]


@compiled_raw(scatter, _nothing)
def _(context, builder, sig, args):
    value = _encode(builder, sig.args[0].dtype, args[3])
    last = builder.sub(context.cast(builder, args[2], sig.args[2], types.intp), ir.Constant(ir.IntType(64), 1))
    # Downwards: lanes past `count` land on the last element before its own value does.
    for k in reversed(range(value.type.count)):
        k = ir.Constant(ir.IntType(64), k)
        clipped = builder.select(builder.icmp_signed("<", k, last), k, last)
        item = builder.extract_element(value, builder.trunc(k, ir.IntType(32)))
        builder.store(item, _strided_pointer(context, builder, sig, args, clipped)).align = 1
    return context.get_dummy_value()


def add_wide(wide, x):
    """`wide` (float64 lanes) plus the lanes of x, added two by two in float64 where x is float32."""
    return wide + (x if len(x) == len(wide) else x[: len(wide)].astype(np.float64) + x[len(wide) :])


@compiled_raw(add_wide, lambda wide, x: wide)
def _(context, builder, sig, args):
    wide, x = args
    if x.type.count != wide.type.count:
        n = wide.type.count
        undef = ir.Constant(x.type, ir.Undefined)
        low, high = (
            builder.fpext(
                builder.shuffle_vector(x, undef, ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(k, k + n)))),
                wide.type,
            )
            for k in (0, n)
        )
        x = builder.fadd(low, high)
    return builder.fadd(wide, x)


def store(a, i, value):
    """Store a vector into the unit-stride array `a` at i; any alignment."""
    a[i : i + len(value)] = encoded(value, a.dtype)


@compiled_raw(store, _nothing)
def _(context, builder, sig, args):
    _emit_store(context, builder, sig, args, align=1)
    return context.get_dummy_value()


def _emit_store(context, builder, sig, args, align):
    value = _encode(builder, sig.args[0].dtype, args[2])
    pointer = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1], value.type)
    instruction = builder.store(value, pointer)
    instruction.align = align
    return instruction


def stream(a, i, value):
    """As `store`, past the caches; a[i] is aligned to the vector's stored size (see `aligned_at`)."""
    store(a, i, value)


@compiled_raw(stream, _nothing)
def _(context, builder, sig, args):
    size = _storage(sig.args[0])[1] * sig.args[2].lanes
    instruction = _emit_store(context, builder, sig, args, align=size)
    one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    instruction.set_metadata("nontemporal", one)
    return context.get_dummy_value()


def store_first(a, i, count, value):
    """Store the first `count` lanes."""
    a[i : i + count] = encoded(value, a.dtype)[:count]


@compiled_raw(store_first, _nothing)
def _(context, builder, sig, args):
    value = _encode(builder, sig.args[0].dtype, args[3])
    pointer = _pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1], value.type)
    mask_sig = signature(Mask(sig.args[3].lanes), sig.args[2], sig.args[3])
    mask = _lane_mask("<")(context, builder, mask_sig, [args[2], None])
    _masked(builder, "store", value.type, [value, pointer, mask], ir.VoidType())
    return context.get_dummy_value()


@inline
def take(a, i, count, fill, like):
    """The first `count` lanes at i of a unit-stride array, `fill` in the others."""
    if count == lanes(like):
        return load(a, i, like)
    return load_first(a, i, count, fill, like)


@inline
def put(a, i, count, value, like):
    """Store the first `count` lanes into a unit-stride array."""
    if count == lanes(like):
        store(a, i, value)
    else:
        store_first(a, i, count, value)


@inline
def read(a, i, count, fill, like):
    """As `take`, for any stride; the lanes past `count` hold `fill` or the last one read."""
    return take(a, i, count, fill, like) if a.strides[0] == a.itemsize else gather(a, i, count, like)


@inline
def write(a, i, count, value, like):
    """As `put`, for any stride."""
    if a.strides[0] == a.itemsize:
        put(a, i, count, value, like)
    else:
        scatter(a, i, count, value)


@inline
def write_from(values, at, out, start, stop, past, like):
    """out[start:stop] = values[at:], past the caches where whole vectors of `out` are aligned for it."""
    step = lanes(like)
    aligned = stop
    if past and out.strides[0] == out.itemsize:
        first_aligned = aligned_at(out, like)
        if first_aligned >= 0:
            aligned = start + (first_aligned - start) % step
    i = start
    while i < stop:
        count = min(step, stop - i)
        if i < aligned:
            count = min(count, aligned - i)
        value = take(values, at + i - start, count, 0.0, like)
        if i >= aligned and count == step:
            stream(out, i, value)
        else:
            write(out, i, count, value, like)
        i += count


def load_transposed(tile, at, x, j, k, classes, rows, like):
    """tile[at + c·lanes + r] = x[j + c, k + r]: a block whose classes lie side by side in memory, with one vector for
    each class in the tile. Only `classes` by `rows` of them are read; rows past the last repeat it."""
    n = lanes(like)
    block = np.zeros((n, n), type(like))
    for r in range(n):
        block[:classes, r] = decoded(np.asarray(x[j : j + classes, k + min(r, rows - 1)]))
    tile[at : at + n * classes] = block[:classes].reshape(-1)


def store_transposed(tile, at, x, j, k, classes, rows, like):
    """The way back: x[j + c, k + r] = tile[at + c·lanes + r]."""
    n = lanes(like)
    block = tile[at : at + n * classes].reshape(classes, n)
    for r in range(rows):
        x[j : j + classes, k + r] = encoded(np.ascontiguousarray(block[:, r]), x.dtype)


def _transpose(builder, vectors):
    """Swap blocks of half the size, a quarter, … between vectors: log2(n) shuffles each."""
    n = len(vectors)
    i32 = ir.IntType(32)
    size = n // 2
    while size:
        low = [lane if not lane & size else lane - size + n for lane in range(n)]
        high = [lane + size if not lane & size else lane + n for lane in range(n)]
        for i in range(n):
            if not i & size:
                a, b = vectors[i], vectors[i + size]
                for index, lanes_of in ((i, low), (i + size, high)):
                    mask = ir.Constant(ir.VectorType(i32, n), lanes_of)
                    vectors[index] = builder.shuffle_vector(a, b, mask)
        size //= 2
    return vectors


class _Block:
    """Addresses and masks of a block of rows for the two primitives above."""

    def __init__(self, context, builder, sig, args):
        self.context, self.builder, self.sig = context, builder, sig
        self.tile, self.at, self.x, self.j, self.k, self.classes, self.rows, _ = args
        self.vec = Vec(sig.args[7])
        self.vt = _llvm_vector(self.vec)
        self.element, self.size = _storage(sig.args[2])
        self.stored = ir.VectorType(self.element, self.vt.count)
        self.array = context.make_array(sig.args[2])(context, builder, self.x)
        like_count = signature(Mask(self.vec.lanes), sig.args[5], self.vec)
        self.mask = _lane_mask("<")(context, builder, like_count, [self.classes, None])

    def row(self, r):
        """Address of x[j, k + r]."""
        b, strides = self.builder, self.array.strides
        offset = b.add(b.mul(self.j, b.extract_value(strides, 0)), b.mul(b.add(self.k, r), b.extract_value(strides, 1)))
        data = b.bitcast(self.array.data, ir.IntType(8).as_pointer())
        return b.bitcast(b.gep(data, [offset]), self.stored.as_pointer())

    def column(self, c):
        """Address of the tile's vector of class c."""
        index = self.builder.add(self.at, ir.Constant(ir.IntType(64), c * self.vt.count))
        return _pointer(self.context, self.builder, self.sig.args[0], self.tile, index, self.sig.args[1], self.vt)


@compiled_raw(load_transposed, _nothing)
def _(context, builder, sig, args):
    block = _Block(context, builder, sig, args)
    i64 = ir.IntType(64)
    last = builder.sub(block.rows, ir.Constant(i64, 1))
    vectors = []
    for r in range(block.vt.count):
        r = ir.Constant(i64, r)
        pointer = block.row(builder.select(builder.icmp_signed("<", r, last), r, last))
        raw = _masked(builder, "load", block.stored, [pointer, block.mask], block.stored)
        vectors.append(_decode(builder, sig.args[2].dtype, raw, block.vt))
    for c, vector in enumerate(_transpose(builder, vectors)):
        with builder.if_then(builder.icmp_signed("<", ir.Constant(i64, c), block.classes)):
            builder.store(vector, block.column(c)).align = 4
    return context.get_dummy_value()


@compiled_raw(store_transposed, _nothing)
def _(context, builder, sig, args):
    block = _Block(context, builder, sig, args)
    i64 = ir.IntType(64)
    vectors = []
    for c in range(block.vt.count):  # the vectors of classes past the last are never stored
        vector = builder.load(block.column(c))
        vector.align = 4
        vectors.append(vector)
    for r, vector in enumerate(_transpose(builder, vectors)):
        with builder.if_then(builder.icmp_signed("<", ir.Constant(i64, r), block.rows)):
            value = _encode(builder, sig.args[2].dtype, vector)
            _masked(builder, "store", value.type, [value, block.row(ir.Constant(i64, r)), block.mask], ir.VoidType())
    return context.get_dummy_value()


def aligned_at(a, like):
    """First index of `a` (unit stride) at which a vector of like's type may be streamed; -1 where none is."""
    size = a.itemsize * lanes(like)
    gap = -a.ctypes.data % size
    return gap // a.itemsize if gap % a.itemsize == 0 else -1


@compiled_raw(aligned_at, lambda a, like: types.intp)
def _(context, builder, sig, args):
    i64 = ir.IntType(64)
    item = _storage(sig.args[0])[1]
    size = item * (VECTOR_BYTES * 8 // sig.args[1].bitwidth)
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    gap = builder.and_(builder.neg(builder.ptrtoint(data, i64)), ir.Constant(i64, size - 1))
    ragged = builder.and_(gap, ir.Constant(i64, item - 1))
    fits = builder.icmp_signed("==", ragged, ir.Constant(i64, 0))
    return builder.select(fits, builder.lshr(gap, ir.Constant(i64, item.bit_length() - 1)), ir.Constant(i64, -1))
