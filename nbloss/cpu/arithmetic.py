"""The vector type and its masks, how a primitive is registered with Numba, and what is computed with vectors."""

import operator
import struct

import llvmlite.ir as ir
import numpy as np
from numba.core import types
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, register_model

VECTOR_BYTES = 64


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


def llvm_vector(vec):
    return ir.VectorType(FLOAT[vec.dtype.bitwidth], vec.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, llvm_vector(vec))


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


def nothing(*args):
    return types.void


def in_all_lanes(builder, value, vt):
    one = builder.insert_element(ir.Constant(vt, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vt.count), [0] * vt.count)
    return builder.shuffle_vector(one, ir.Constant(vt, ir.Undefined), zeros)


def broadcast_value(context, builder, value, ty, vec):
    if not isinstance(ty, types.Number):
        return value
    return in_all_lanes(builder, context.cast(builder, value, ty, vec.dtype), llvm_vector(vec))


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
            wide = [broadcast_value(context, builder, v, t, vec) for v, t in zip(args, sig.args)]
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


def vector_of_ints(vt):
    return ir.VectorType(ir.IntType(32 if vt.element == FLOAT[32] else 64), vt.count)


def _ints(vt, value):
    it = vector_of_ints(vt)
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
def larger(builder, a, b):
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
    bits = builder.bitcast(x, vector_of_ints(x.type))
    return builder.bitcast(builder.shl(bits, _ints(x.type, _mantissa_bits(x.type))), x.type)


# Bits of sqrt(1/2): taking them away first puts every mantissa into [sqrt(1/2), sqrt(2)).
_ROOT_HALF = {
    23: struct.unpack("<i", struct.pack("<f", 0.5**0.5))[0],
    52: struct.unpack("<q", struct.pack("<d", 0.5**0.5))[0],
}
_BIAS = {23: 127, 52: 1023}


def exponent_of(x, offset):
    """(k - offset, 2^-k), both as floats, with 2^-k·x in [sqrt(1/2), sqrt(2)), for a normal x > 0.

    At 0, k is the one below those of normal numbers.
    """
    shift = _mantissa_bits(x)
    bits = _bits(x) - (_ROOT_HALF[shift] + (offset << shift))
    power = ((_BIAS[shift] - offset) << shift) - (bits & (-1 << shift))
    return (bits >> shift).astype(x.dtype), power.view(x.dtype)


@compiled_raw(exponent_of, lambda x, offset: types.containers.UniTuple(x, 2))
def _(context, builder, sig, args):
    x, offset = args
    shift = _mantissa_bits(x.type)
    vt = vector_of_ints(x.type)
    offset = context.cast(builder, offset, sig.args[1], types.int32 if shift == 23 else types.int64)
    offset = builder.shl(offset, ir.Constant(offset.type, shift))
    root, one = (ir.Constant(offset.type, v) for v in (_ROOT_HALF[shift], _BIAS[shift] << shift))
    bits = builder.sub(builder.bitcast(x, vt), in_all_lanes(builder, builder.add(root, offset), vt))
    one = in_all_lanes(builder, builder.sub(one, offset), vt)
    power = builder.sub(one, builder.and_(bits, _ints(x.type, -1 << shift)))
    k = builder.sitofp(builder.ashr(bits, _ints(x.type, shift)), x.type)
    return context.make_tuple(builder, sig.return_type, [k, builder.bitcast(power, x.type)])


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


def only(lane, x):
    """A mask of one lane; of none where `lane` is no lane of x."""
    return np.arange(len(x)) == lane


def lane_mask(sign):
    def lower(context, builder, sig, args):
        n = sig.return_type.lanes
        i32 = ir.IntType(32)
        lane = context.cast(builder, args[0], sig.args[0], types.int32)
        vt = ir.VectorType(i32, n)
        one = builder.insert_element(ir.Constant(vt, ir.Undefined), lane, ir.Constant(i32, 0))
        wide = builder.shuffle_vector(one, ir.Constant(vt, ir.Undefined), ir.Constant(vt, [0] * n))
        return builder.icmp_signed(sign, ir.Constant(vt, list(range(n))), wide)

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
    return _fold(builder, args[0], lambda a, b: larger(builder, a, b))


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
