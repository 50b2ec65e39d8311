"""What is read from the bits of floats, and made of them."""

import struct
from decimal import Context, Decimal, localcontext

import llvmlite.ir as ir
import numpy as np
from numba.core import types

from nbloss.cpu.arithmetic import FLOAT, compiled, compiled_raw, in_all_lanes, ints, vector_of_ints


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
    return builder.bitcast(builder.shl(bits, ints(x.type, _mantissa_bits(x.type))), x.type)


def _roots(count, dtype):
    """2^(k / count) for each k below count, and what rounding them has left out, relative to them."""
    with localcontext(Context(prec=40)):
        exact = [Decimal(2) ** (Decimal(k) / count) for k in range(count)]
        rounded = [Decimal(float(dtype(v))) for v in exact]
        return np.array(rounded, dtype), np.array([(v - r) / r for v, r in zip(exact, rounded)], dtype)


_ROOTS = {23: _roots(16, np.float32), 52: _roots(8, np.float64)}


def root_of_two(x):
    """2^(k / n) and, relative to it, what rounding left out: for an x of n lanes with k + n·bias in its low bits."""
    roots, left_out = _ROOTS[_mantissa_bits(x)]
    bits = _bits(x)
    place = bits & (len(roots) - 1)
    power = (bits // len(roots)) << _mantissa_bits(x)
    return (_bits(roots)[place] - _bits(roots)[0] + power).view(x.dtype), left_out[place]


@compiled_raw(root_of_two, lambda x: types.containers.UniTuple(x, 2))
def _(context, builder, sig, args):
    (x,) = args
    vt = vector_of_ints(x.type)
    roots, left_out = _ROOTS[_mantissa_bits(x.type)]
    shift = _mantissa_bits(x.type) - (vt.count.bit_length() - 1)
    places = builder.bitcast(x, vt)
    name = f"llvm.x86.avx512.permvar.{'si' if vt.count == 16 else 'di'}.512"  # shuffles a register, by AVX-512 alone
    permute = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(vt, [vt, vt]), name)
    # Of a root, its mantissa less its place, which comes back with the exponent.
    mantissas = _bits(roots) - _bits(roots)[0] - (np.arange(vt.count) << shift)
    mantissa, rest = (
        builder.call(permute, [ir.Constant(vt, table.tolist()), places]) for table in (mantissas, _bits(left_out))
    )
    power = builder.add(mantissa, builder.shl(places, ints(x.type, shift)))
    return context.make_tuple(builder, sig.return_type, [builder.bitcast(v, x.type) for v in (power, rest)])


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
    power = builder.sub(one, builder.and_(bits, ints(x.type, -1 << shift)))
    k = builder.sitofp(builder.ashr(bits, ints(x.type, shift)), x.type)
    return context.make_tuple(builder, sig.return_type, [k, builder.bitcast(power, x.type)])
