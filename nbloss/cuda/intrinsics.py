"""What kernels need beyond Numba's CUDA Python: memory by address, sixteen bytes at a time, and single instructions.

Kernels are given addresses, not arrays: an array costs 1.65 µs a launch and one compilation for each kind of layout, an
integer neither. Each primitive is a Python function that says what it does, which is what the simulator runs; on a
device an intrinsic of the same name takes its place.

Storage types, by an example of each: float32 and float64 as they are; uint16 holds float16 and int16 holds bfloat16,
both computed in float32 and rounded to nearest even where they are stored.
"""

import ctypes
import math

import llvmlite.ir as ir
import numpy as np
from numba import cuda
from numba.core import config
from numba.cuda import libdevice, types

from nbloss.cuda import choices
from nbloss.half import decoded, encoded

SIMULATED = bool(config.ENABLE_CUDASIM)
VECTOR_BYTES = choices.VECTOR_BYTES
STORED = {"f": np.float32(0), "d": np.float64(0), "H": np.uint16(0), "h": np.int16(0)}
REAL = {"f": np.float32, "d": np.float64, "H": np.float32, "h": np.float32}  # what is computed with
TYPE = {np.float32: types.float32, np.float64: types.float64}


# --- what each primitive does, for the simulator --------------------------------------------------------------


def memory_at(address, count, dtype):
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def _write(address, values, stored):
    values = np.array(values, REAL[stored.dtype.char])
    memory_at(address, len(values), stored.dtype)[:] = encoded(values, stored.dtype)


def load(address, stored):
    """The element at an address, as a float."""
    return decoded(memory_at(address, 1, stored.dtype))[0]


def store(address, value, stored):
    """Write one element."""
    _write(address, [value], stored)


def load_vector(address, values, at, stored):
    """Sixteen bytes of elements, from an address that sixteen divides, into values[at], values[at + 1], …"""
    loaded = decoded(memory_at(address, VECTOR_BYTES // stored.itemsize, stored.dtype))
    values[at : at + len(loaded)] = loaded


def load_vector_if(condition, address, values, at, stored):
    """`load_vector` where the condition holds, else -inf, but for `unpack`: no branch, so that loads come in a row."""
    if condition:
        load_vector(address, values, at, stored)
    else:
        values[at : at + VECTOR_BYTES // stored.itemsize] = -math.inf


def unpack(values, at, stored):
    """What is left to do of `load_vector_if` once other loads are under way: 16 bits to float32."""


def store_vector(address, values, at, stored):
    """Write sixteen bytes of elements."""
    _write(address, values[at : at + VECTOR_BYTES // stored.itemsize], stored)


def load_integer(address, example):
    """The integer at an address, as int64."""
    return memory_at(address, 1, example.dtype).astype(np.int64)[0]


def store_integer(address, value):
    """Write an int64."""
    memory_at(address, 1, np.int64)[:] = value


def power_of_two(shifted):
    """2^(n - 127) for a float32 in whose lowest bits stands n, 0 for n = 0: n becomes the exponent."""
    return (np.float32(shifted).view(np.int32) << 23).view(np.float32)


def fma(a, b, c):
    """a b + c, rounded once."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


if SIMULATED:
    exp2, estimated_inverse = np.exp2, np.reciprocal


# --- what a device runs instead -------------------------------------------------------------------------------

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT = {4: ir.FloatType(), 8: ir.DoubleType()}


def pointer_to(builder, address, pointee):
    return builder.inttoptr(address, ir.PointerType(pointee, 1))


def computed_in(stored):
    return stored if isinstance(stored, types.Float) else types.float32


def _half_to_float(builder, dtype, bits):
    """One element of 16 bits as float32; `bits` is an i16."""
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), FLOAT[4])
    return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), FLOAT[4])


def two_of_word(builder, dtype, word):
    """The two elements of 16 bits in a 32-bit word, as float32."""
    halves = (word, builder.lshr(word, I32(16)))
    return [_half_to_float(builder, dtype, builder.trunc(half, I16)) for half in halves]


def two_to_word(builder, dtype, low, high):
    """Two float32 as one 32-bit word of 16-bit elements."""
    if dtype == types.int16:
        # sm_80 and later: one instruction, rounding to nearest even, NaN kept.
        pack = ir.InlineAsm(ir.FunctionType(I32, [FLOAT[4]] * 2), "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
        return builder.call(pack, [high, low])
    low, high = (builder.zext(builder.bitcast(builder.fptrunc(v, ir.HalfType()), I16), I32) for v in (low, high))
    return builder.or_(low, builder.shl(high, I32(16)))


def _emit_load(context, builder, signature, args):
    dtype = signature.args[1]
    if dtype.bitwidth == 16:
        return _half_to_float(builder, dtype, builder.load(pointer_to(builder, args[0], I16), align=2))
    size = dtype.bitwidth // 8
    return builder.load(pointer_to(builder, args[0], FLOAT[size]), align=size)


def _emit_store(context, builder, signature, args):
    dtype = signature.args[2]
    value, size = args[1], dtype.bitwidth // 8
    if size == 2:
        value = builder.trunc(two_to_word(builder, dtype, value, value), I16)
    builder.store(value, pointer_to(builder, args[0], value.type), align=size)
    return context.get_dummy_value()


def slot(context, builder, array_type, array, at, k):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [builder.add(at, I64(k))])


def _emit_load_vector(context, builder, signature, args):
    address, values, at, _ = args
    dtype = signature.args[3]
    lanes = VECTOR_BYTES * 8 // dtype.bitwidth
    half = dtype.bitwidth == 16
    vector = ir.VectorType(I32, 4) if half else ir.VectorType(FLOAT[dtype.bitwidth // 8], lanes)
    loaded = builder.load(pointer_to(builder, address, vector), align=VECTOR_BYTES)
    elements = [builder.extract_element(loaded, I32(k)) for k in range(vector.count)]
    if half:
        elements = [element for word in elements for element in two_of_word(builder, dtype, word)]
    for k, element in enumerate(elements):
        builder.store(element, slot(context, builder, signature.args[1], values, at, k))
    return context.get_dummy_value()


def load_if(builder, condition, address, dtype, space="global"):
    """Sixteen bytes, as two float64 or four words of 32 bits."""
    wide = dtype.bitwidth == 64
    element, letter, count = (FLOAT[8], "d", 2) if wide else (I32, "r", 4)
    ptx_type = "f64" if wide else "b32"
    outputs = ", ".join(f"${k}" for k in range(count))
    fills = {types.uint16: 0xFC00FC00, types.int16: 0xFF80FF80, types.float32: 0xFF800000}
    fill = ir.Constant(FLOAT[8], -math.inf) if wide else I32(fills[dtype])
    moves = "".join(f"mov.{ptx_type} ${k}, ${count + 2}; " for k in range(count))
    text = (
        f"{{ .reg .pred p; setp.ne.u32 p, ${count}, 0; {moves}"
        f"@p ld.{space}.v{count}.{ptx_type} {{{outputs}}}, [${count + 1}]; }}"
    )
    results = ir.LiteralStructType([element] * count)
    constraints = ",".join([f"=&{letter}"] * count + ["r", "l" if address.type == I64 else "r", letter])
    kind = ir.FunctionType(results, [I32, address.type, element])
    wanted = builder.zext(condition, I32)
    loaded = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), [wanted, address, fill])
    return [builder.extract_value(loaded, k) for k in range(count)]


def _emit_load_vector_if(context, builder, signature, args):
    condition, address, values, at, _ = args
    dtype = signature.args[4]
    apart = 2 if dtype.bitwidth == 16 else 1  # a word of two elements lies in the place of the first
    for k, value in enumerate(load_if(builder, condition, address, dtype)):
        value = value if dtype.bitwidth == 64 else builder.bitcast(value, FLOAT[4])
        builder.store(value, slot(context, builder, signature.args[2], values, at, k * apart))
    return context.get_dummy_value()


def _emit_unpack(context, builder, signature, args):
    values, at, _ = args
    dtype = signature.args[2]
    for k in range(0, VECTOR_BYTES // 2 if dtype.bitwidth == 16 else 0, 2):
        places = [slot(context, builder, signature.args[0], values, at, k + half) for half in (0, 1)]
        word = builder.bitcast(builder.load(places[0]), I32)
        for element, place in zip(two_of_word(builder, dtype, word), places):
            builder.store(element, place)
    return context.get_dummy_value()


def _emit_power_of_two(context, builder, signature, args):
    return builder.bitcast(builder.shl(builder.bitcast(args[0], I32), I32(23)), FLOAT[4])


def _instruction(name):
    def emit(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT[4], [FLOAT[4]])
        return builder.call(ir.InlineAsm(kind, f"{name}.approx.ftz.f32 $0, $1;", "=f,f"), args)

    return emit


def _emit_store_vector(context, builder, signature, args):
    address, values, at, _ = args
    dtype = signature.args[3]
    lanes = VECTOR_BYTES * 8 // dtype.bitwidth
    parts = [builder.load(slot(context, builder, signature.args[1], values, at, k)) for k in range(lanes)]
    if dtype.bitwidth == 16:
        parts = [two_to_word(builder, dtype, *parts[k : k + 2]) for k in range(0, lanes, 2)]
    store_parts(builder, address, parts)
    return context.get_dummy_value()


def store_parts(builder, address, parts):
    """Write sixteen bytes of equal parts."""
    vector = ir.Constant(ir.VectorType(parts[0].type, len(parts)), ir.Undefined)
    for k, part in enumerate(parts):
        vector = builder.insert_element(vector, part, I32(k))
    builder.store(vector, pointer_to(builder, address, vector.type), align=VECTOR_BYTES)


def _emit_load_integer(context, builder, signature, args):
    example = signature.args[1]
    bits = ir.IntType(example.bitwidth)
    value = builder.load(pointer_to(builder, args[0], bits), align=example.bitwidth // 8)
    return context.cast(builder, value, example, types.int64)


def _emit_store_integer(context, builder, signature, args):
    builder.store(args[1], pointer_to(builder, args[0], I64), align=8)
    return context.get_dummy_value()


if not SIMULATED:
    from numba.cuda.extending import intrinsic

    fma = libdevice.fmaf_rn

    @intrinsic
    def load(typingctx, address, stored):
        return computed_in(stored)(types.int64, stored), _emit_load

    @intrinsic
    def store(typingctx, address, value, stored):
        return types.void(types.int64, computed_in(stored), stored), _emit_store

    @intrinsic
    def load_vector(typingctx, address, values, at, stored):
        return types.void(types.int64, values, types.int64, stored), _emit_load_vector

    @intrinsic
    def load_vector_if(typingctx, condition, address, values, at, stored):
        return types.void(types.boolean, types.int64, values, types.int64, stored), _emit_load_vector_if

    @intrinsic
    def unpack(typingctx, values, at, stored):
        return types.void(values, types.int64, stored), _emit_unpack

    @intrinsic
    def power_of_two(typingctx, shifted):
        return types.float32(types.float32), _emit_power_of_two

    @intrinsic
    def exp2(typingctx, x):
        """2^x as the device's own instruction has it: relative error 2^-22, results below 2^-126 are 0."""
        return types.float32(types.float32), _instruction("ex2")

    @intrinsic
    def store_vector(typingctx, address, values, at, stored):
        return types.void(types.int64, values, types.int64, stored), _emit_store_vector

    @intrinsic
    def load_integer(typingctx, address, example):
        return types.int64(types.int64, example), _emit_load_integer

    @intrinsic
    def store_integer(typingctx, address, value):
        return types.void(types.int64, types.int64), _emit_store_integer

    @intrinsic
    def estimated_inverse(typingctx, x):
        """1 / x in float32 to 1 ulp, which is enough for results of 16 bits."""
        return types.float32(types.float32), _instruction("rcp")


def device_function(function):
    """A function that kernels call."""
    return function if SIMULATED else cuda.jit(device=True)(function)
