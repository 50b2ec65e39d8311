"""What is read from the bits of floats, and made of them."""

import struct

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
