"""What is read from the bits of floats, and made of them."""

from decimal import Context, Decimal, localcontext

import llvmlite.ir as ir
import numpy as np
from numba.core import types

from nbloss.cpu.arithmetic import (
    FLOAT,
    HAS_AVX,
    HAS_AVX512,
    avx512,
    call,
    compiled,
    compiled_raw,
    in_all_lanes,
    ints,
    of_registers,
    registers,
    shuffled,
    vector_of_ints,
)


def _bits(x):
    x = np.asarray(x)
    return x.view(np.int32 if x.dtype == np.float32 else np.int64)


def _mantissa_bits(vt_or_array):
    single = (
        vt_or_array.element == FLOAT[32] if isinstance(vt_or_array, ir.VectorType) else vt_or_array.dtype == np.float32
    )
    return 23 if single else 52


def _roots(count, dtype, factor=1.0):
    """factor 2^(k / count) for each k below count, and what rounding them has left out, relative to them."""
    with localcontext(Context(prec=40)):
        exact = [Decimal(factor) * Decimal(2) ** (Decimal(k) / count) for k in range(count)]
        rounded = [Decimal(float(dtype(v))) for v in exact]
        return np.array(rounded, dtype), np.array([(v - r) / r for v, r in zip(exact, rounded)], dtype)


# Parts of a binade, whose powers of two are looked up: as many as one instruction finds in registers, or the whole.
PARTS_32, PARTS_64 = (16, 8) if HAS_AVX512 else (4, 1) if HAS_AVX else (1, 1)
_ROOTS = {23: _roots(PARTS_32, np.float32), 52: _roots(PARTS_64, np.float64)}
# Times this number, four roots of two are within 2^-28 of numbers of float32, so that no look-up of what rounding left
# out is needed (after Gal's accurate tables). Of its bits there are 11, and it times its inverse is 1: equal terms add
# up without an error, and shares are halves or quarters, where powers of two would.
FACTOR = 1697 / 1024
_MULTIPLES = _roots(4, np.float32, FACTOR)[0]
_BIAS = {23: 127, 52: 1023}


def root_of_two(x):
    """2^(k / n) and, relative to it, what rounding left out: for x with k + n·bias in its low bits and n parts."""
    root, left_out = root_alone(x)
    power = (_bits(x) // len(_ROOTS[_mantissa_bits(x)][0])) << _mantissa_bits(x)
    return (_bits(root) - _bits(np.ones_like(x)) + power).view(x.dtype), left_out


def root_alone(x):
    """The same for k modulo n, whatever the bits above it."""
    roots, left_out = _ROOTS[_mantissa_bits(x)]
    place = _bits(x) & (len(roots) - 1)
    return roots[place], left_out[place]


def _looked_up(builder, table, places):
    """The integers of a table at the low bits of `places`."""
    return of_registers(builder, [_in_register(builder, table, part) for part in registers(builder, places)])


def _in_register(builder, table, places):
    vt = places.type
    if HAS_AVX512:
        permute = f"permvar.{'si' if vt.count == 16 else 'di'}"
        return avx512(builder, permute, vt, ir.Constant(vt, table.tolist()), places)
    half, floats = (ir.VectorType(element, 8) for element in (vt.element, FLOAT[32]))
    entries = builder.bitcast(ir.Constant(half, table.tolist() * 2), floats)
    found = (
        call(builder, "llvm.x86.avx.vpermilvar.ps.256", floats, entries, shuffled(builder, range(k, k + 8), places))
        for k in (0, 8)
    )
    return builder.bitcast(shuffled(builder, range(16), *found), vt)


def multiple_of_root(x):
    """FACTOR 2^(k / 4) for a float32 x with k + 4·bias in its low bits; 0 where its exponent is below that of 0."""
    bits = _bits(x)
    found = _bits(_MULTIPLES)[bits & 3] - (_BIAS[23] << 23) + (bits >> 2 << 23)
    return np.maximum(found, 0).view(x.dtype)


def _with_exponent(builder, roots, x):
    """The bits of the roots at the low bits of x, times the power of two above these bits."""
    mantissa = _mantissa_bits(x.type)
    shift = mantissa - (len(roots).bit_length() - 1)
    places = builder.bitcast(x, vector_of_ints(x.type))
    power = builder.shl(places, ints(x.type, shift))
    if len(roots) == 1:
        return power
    # Of a root, what it has beyond 1 less its place, which comes back with the exponent.
    beyond = _bits(roots) - (_BIAS[mantissa] << mantissa) - (np.arange(len(roots)) << shift)
    return builder.add(_looked_up(builder, beyond, places), power)


@compiled(multiple_of_root)
def _(builder, x):
    if x.type.element != FLOAT[32] or PARTS_32 != 4:  # lowered, and dropped, where other roots are taken
        return x
    bits, zero = _with_exponent(builder, _MULTIPLES, x), ints(x.type, 0)
    return builder.bitcast(builder.select(builder.icmp_signed(">", bits, zero), bits, zero), x.type)


@compiled_raw(root_of_two, lambda x: types.containers.UniTuple(x, 2))
def _(context, builder, sig, args):
    (x,) = args
    roots, left_out = _ROOTS[_mantissa_bits(x.type)]
    rest = ints(x.type, 0)
    if len(roots) > 1:
        rest = _looked_up(builder, _bits(left_out), builder.bitcast(x, vector_of_ints(x.type)))
    power = _with_exponent(builder, roots, x)
    return context.make_tuple(builder, sig.return_type, [builder.bitcast(v, x.type) for v in (power, rest)])


@compiled_raw(root_alone, lambda x: types.containers.UniTuple(x, 2))
def _(context, builder, sig, args):
    (x,) = args
    places = builder.bitcast(x, vector_of_ints(x.type))
    found = (_looked_up(builder, _bits(table), places) for table in _ROOTS[_mantissa_bits(x.type)])
    return context.make_tuple(builder, sig.return_type, [builder.bitcast(v, x.type) for v in found])


# Bits of sqrt(1/2): taking them away first puts every mantissa into [sqrt(1/2), sqrt(2)).
_ROOT_HALF = {23: int(_bits(np.float32(0.5**0.5))), 52: int(_bits(np.float64(0.5**0.5)))}


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
    power = builder.sub(one, builder.and_(bits, ints(x.type, -1 << shift)))
    k = builder.sitofp(builder.ashr(bits, ints(x.type, shift)), x.type)
    return context.make_tuple(builder, sig.return_type, [k, builder.bitcast(power, x.type)])


# By sixteenths of the mantissa, from 1 to 3/2 and on from 3/4 to 1: a number near its inverse, 1 on both sides of 1, so
# chosen that float32 holds its logarithm to 36 bits (Gal's accurate tables).
_NEAR_INVERSE = np.array(
    [0x3F800000, 0x3F6B3A22, 0x3F5D6F7F, 0x3F5216D8, 0x3F47CB84, 0x3F3E78DB, 0x3F3609C0, 0x3F2E575C,
     0x3FA73BD7, 0x3FA0A92D, 0x3F9A924B, 0x3F94F1B4, 0x3F8FC0F7, 0x3F8ACCF1, 0x3F8656E6, 0x3F800000], np.int32
).view(np.float32)  # fmt: skip
_OF_INVERSE = -np.log(_NEAR_INVERSE.astype(np.float64)).astype(np.float32)
# The exponent of 4/3 x is that of x, and one more from a mantissa of 3/2 on; rounded at both neighbours of 3/2 too.
FOUR_THIRDS = np.float32(4 / 3)


def log_parts(x):
    """(k, m, c, log(1 / c)) with x = 2^k m, m in [3/4, 3/2) and c m in [31/32, 17/16], for a float32 x > 0.

    At 0, k is -inf; from 2^127 on, it may be inf.
    """
    m, k = np.frexp(x)
    low = m < 0.75
    m, k = np.where(low, m + m, m), np.where(x == 0, -np.inf, k - low)
    place = (_bits(m) >> 19) & 15
    return k.astype(x.dtype), m, _NEAR_INVERSE[place], _OF_INVERSE[place]


@compiled_raw(log_parts, lambda x: types.containers.UniTuple(x, 4))
def _(context, builder, sig, args):
    (x,) = args
    if x.type.element != FLOAT[32]:  # Numba lowers branches on the type of x before LLVM drops them
        return ir.Constant(context.get_value_type(sig.return_type), ir.Undefined)
    parts = zip(*(_log_parts(builder, part) for part in registers(builder, x)))
    return context.make_tuple(builder, sig.return_type, [of_registers(builder, part) for part in parts])


def _log_parts(builder, x):
    vt, it = x.type, vector_of_ints(x.type)
    i16, i32 = ir.IntType(16), ir.IntType(32)
    unused, all_lanes, rounding = ir.Constant(vt, [0.0] * vt.count), ir.Constant(i16, -1), ir.Constant(i32, 4)
    larger = builder.fmul(x, ir.Constant(vt, [float(FOUR_THIRDS)] * vt.count))
    k = avx512(builder, "mask.getexp.ps", vt, larger, unused, all_lanes, rounding)
    m = avx512(builder, "mask.getmant.ps", vt, x, ir.Constant(i32, 3), unused, all_lanes, rounding)  # of [3/4, 3/2)
    place = builder.lshr(builder.bitcast(m, it), ints(vt, 19))
    c, log_of_inverse = (
        builder.bitcast(avx512(builder, "permvar.si", it, ir.Constant(it, _bits(t).tolist()), place), vt)
        for t in (_NEAR_INVERSE, _OF_INVERSE)
    )
    return k, m, c, log_of_inverse


def scaled(x, k):
    """x 2^floor(k), rounded once where that is subnormal."""
    half = np.floor(k / 2)
    return x * np.exp2(half) * np.exp2(np.floor(k) - half)


@compiled(scaled)
def _(builder, x, k):
    kind, lanes = ("ps", 16) if x.type.element == FLOAT[32] else ("pd", 8)
    all_lanes, rounding = ir.Constant(ir.IntType(lanes), -1), ir.Constant(ir.IntType(32), 4)
    parts = zip(registers(builder, x), registers(builder, k))
    return of_registers(
        builder, [avx512(builder, f"mask.scalef.{kind}", x.type, x, k, x, all_lanes, rounding) for x, k in parts]
    )
