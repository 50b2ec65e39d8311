"""What kernels need beyond Numba's CUDA Python: memory by address, sixteen bytes at a time, and the functions of
nbloss.formulas in one type.

Kernels are given addresses, not arrays: an array costs 1.65 µs a launch and one compilation for each kind of layout, an
integer neither. Each primitive is a Python function that says what it does, which is what the simulator runs; on a
device an intrinsic of the same name takes its place.

Storage types, by an example of each: float32 and float64 as they are; uint16 holds float16 and int16 holds bfloat16,
both computed in float32 and rounded to nearest even where they are stored.
"""

import ctypes
import math
import sys
import threading

import llvmlite.ir as ir
import numpy as np
from numba import cuda
from numba.core import config
from numba.cuda import libdevice, types

from nbloss import formulas

SIMULATED = bool(config.ENABLE_CUDASIM)
VECTOR_BYTES = 16
STORED = {"f": np.float32(0), "d": np.float64(0), "H": np.uint16(0), "h": np.int16(0)}
REAL = {"f": np.float32, "d": np.float64, "H": np.float32, "h": np.float32}  # what is computed with
TYPE = {np.float32: types.float32, np.float64: types.float64}
ALL_LANES = 0xFFFFFFFF


# --- what each primitive does, for the simulator --------------------------------------------------------------


def _memory(address, count, dtype):
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def _decoded(raw):
    if raw.dtype == np.uint16:
        return raw.view(np.float16).astype(np.float32)
    if raw.dtype == np.int16:
        return (raw.astype(np.int32) << 16).view(np.float32)
    return raw.copy()


def _encoded(values, stored):
    values = np.asarray(values, REAL[stored.dtype.char])
    if stored.dtype == np.uint16:
        return values.astype(np.float16).view(np.uint16)
    if stored.dtype == np.int16:
        bits = values.view(np.int32).astype(np.int64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16).view(np.int16)
    return values


def load(address, stored):
    """The element at an address, as a float."""
    return _decoded(_memory(address, 1, stored.dtype))[0]


def store(address, value, stored):
    """Write one element."""
    _memory(address, 1, stored.dtype)[:] = _encoded([value], stored)


def load_vector(address, values, at, stored):
    """Sixteen bytes of elements, from an address that sixteen divides, into values[at], values[at + 1], …"""
    decoded = _decoded(_memory(address, VECTOR_BYTES // stored.itemsize, stored.dtype))
    values[at : at + len(decoded)] = decoded


def store_vector(address, values, at, stored):
    """Write sixteen bytes of elements."""
    lanes = VECTOR_BYTES // stored.itemsize
    _memory(address, lanes, stored.dtype)[:] = _encoded(values[at : at + lanes], stored)


def load_integer(address, example):
    """The integer at an address, as int64."""
    return _memory(address, 1, example.dtype).astype(np.int64)[0]


def store_integer(address, value):
    """Write an int64."""
    _memory(address, 1, np.int64)[:] = value


def shuffle_xor(value, distance):
    """`value` of the thread of the same warp whose number differs by this bit; all threads take part."""
    thread = threading.current_thread()
    board = thread._manager.__dict__.setdefault("board", {})
    board[thread.thread_id] = value
    thread.syncthreads()
    other = board[thread.thread_id ^ distance]
    thread.syncthreads()
    return other


def _shared_array(shared, shape, dtype):
    frame = sys._getframe(1)
    array = np.empty(shape, as_dtype(dtype))
    return shared._allocations.setdefault((frame.f_code, frame.f_lineno), array)


if SIMULATED:
    from numba.cuda.simulator import kernelapi
    from numba.np.numpy_support import as_dtype

    # Numba 0.30's own makes two of one array, where two threads come to it at once.
    kernelapi.FakeCUDAShared.array = _shared_array


def sync_warp():
    """Let the threads of a warp see what each other has read and written; simulated ones take turns anyway."""


# --- what a device runs instead -------------------------------------------------------------------------------

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT = {4: ir.FloatType(), 8: ir.DoubleType()}


def _global(builder, address, pointee):
    return builder.inttoptr(address, ir.PointerType(pointee, 1))


def _real(stored):
    return stored if isinstance(stored, types.Float) else types.float32


def _half_to_float(builder, dtype, bits):
    """One element of 16 bits as float32; `bits` is an i16."""
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), FLOAT[4])
    return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), FLOAT[4])


def _two_to_word(builder, dtype, low, high):
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
        return _half_to_float(builder, dtype, builder.load(_global(builder, args[0], I16), align=2))
    size = dtype.bitwidth // 8
    return builder.load(_global(builder, args[0], FLOAT[size]), align=size)


def _emit_store(context, builder, signature, args):
    dtype = signature.args[2]
    value, size = args[1], dtype.bitwidth // 8
    if size == 2:
        value = builder.trunc(_two_to_word(builder, dtype, value, value), I16)
    builder.store(value, _global(builder, args[0], value.type), align=size)
    return context.get_dummy_value()


def _slot(context, builder, array_type, array, at, k):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [builder.add(at, I64(k))])


def _emit_load_vector(context, builder, signature, args):
    address, values, at, _ = args
    dtype = signature.args[3]
    lanes = VECTOR_BYTES * 8 // dtype.bitwidth
    half = dtype.bitwidth == 16
    vector = ir.VectorType(I32, 4) if half else ir.VectorType(FLOAT[dtype.bitwidth // 8], lanes)
    loaded = builder.load(_global(builder, address, vector), align=VECTOR_BYTES)
    for k in range(lanes):
        if half:
            word = builder.extract_element(loaded, I32(k // 2))
            value = _half_to_float(builder, dtype, builder.trunc(builder.lshr(word, I32(16 * (k % 2))), I16))
        else:
            value = builder.extract_element(loaded, I32(k))
        builder.store(value, _slot(context, builder, signature.args[1], values, at, k))
    return context.get_dummy_value()


def _emit_store_vector(context, builder, signature, args):
    address, values, at, _ = args
    dtype = signature.args[3]
    lanes = VECTOR_BYTES * 8 // dtype.bitwidth
    parts = [builder.load(_slot(context, builder, signature.args[1], values, at, k)) for k in range(lanes)]
    if dtype.bitwidth == 16:
        parts = [_two_to_word(builder, dtype, *parts[k : k + 2]) for k in range(0, lanes, 2)]
    vector = ir.Constant(ir.VectorType(parts[0].type, len(parts)), ir.Undefined)
    for k, part in enumerate(parts):
        vector = builder.insert_element(vector, part, I32(k))
    builder.store(vector, _global(builder, address, vector.type), align=VECTOR_BYTES)
    return context.get_dummy_value()


def _emit_load_integer(context, builder, signature, args):
    example = signature.args[1]
    bits = ir.IntType(example.bitwidth)
    value = builder.load(_global(builder, args[0], bits), align=example.bitwidth // 8)
    return context.cast(builder, value, example, types.int64)


def _emit_store_integer(context, builder, signature, args):
    builder.store(args[1], _global(builder, args[0], I64), align=8)
    return context.get_dummy_value()


if not SIMULATED:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load(typingctx, address, stored):
        return _real(stored)(types.int64, stored), _emit_load

    @intrinsic
    def store(typingctx, address, value, stored):
        return types.void(types.int64, _real(stored), stored), _emit_store

    @intrinsic
    def load_vector(typingctx, address, values, at, stored):
        return types.void(types.int64, values, types.int64, stored), _emit_load_vector

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

        def emit(context, builder, signature, args):
            estimate = ir.InlineAsm(ir.FunctionType(FLOAT[4], [FLOAT[4]]), "rcp.approx.ftz.f32 $0, $1;", "=f,f")
            return builder.call(estimate, args)

        return types.float32(types.float32), emit

    @cuda.jit(device=True)
    def sync_warp():
        cuda.syncwarp()

    @cuda.jit(device=True)
    def shuffle_xor(value, distance):
        return cuda.shfl_xor_sync(ALL_LANES, value, distance)


# --- the functions of nbloss.formulas, in one type ------------------------------------------------------------


def device_function(function):
    """A function that kernels call."""
    return function if SIMULATED else cuda.jit(device=True)(function)


@device_function
def where(condition, a, b):
    return a if condition else b


@device_function
def maximum(a, b):
    """The larger of a and b; b where either is NaN."""
    return a if a > b else b


LIBRARY = {
    np.float32: (libdevice.expf, libdevice.logf, libdevice.log1pf, libdevice.fabsf),
    np.float64: (libdevice.exp, libdevice.log, libdevice.log1p, libdevice.fabs),
}


# Minimax of (log(1 + x) - x) / x² on [0, 1] for the relative error of log(1 + x): 0.09 · 2^-24. Rounded, 1.1 ulp.
A0, A1, A2 = np.float32(-0.4999993145465851), np.float32(0.33330512046813965), np.float32(-0.24958598613739014)
A3, A4, A5 = np.float32(0.19695454835891724), np.float32(-0.15355542302131653), np.float32(0.10680769383907318)
A6, A7, A8 = np.float32(-0.05766618624329567), np.float32(0.02020532824099064), np.float32(-0.0033186005894094706)


@device_function
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1 in float32: 10 instructions without a branch, where libdevice's takes 30."""
    q = ((((((((A8 * x + A7) * x + A6) * x + A5) * x + A4) * x + A3) * x + A2) * x + A1) * x) + A0
    return x * x * q + x


@device_function
def inverse(x):
    return 1 / x


if SIMULATED:
    estimated_inverse = inverse_unit = inverse
else:

    @cuda.jit(device=True)
    def inverse_unit(x):
        """1 / x for 1 <= x <= 2 in float32: an estimate and a step of Newton's, without a branch."""
        y = estimated_inverse(x)
        return libdevice.fmaf(y, libdevice.fmaf(-x, y, np.float32(1)), y)


class Functions:
    """The formulas and what they are made of, for scalars of the type that a storage type is computed in."""

    def __init__(self, code):
        real = REAL[code]
        self.real, self.type, self._half = real, TYPE[real], code in "Hh"
        exp, log, log1p, absolute = (np.exp, np.log, np.log1p, np.abs) if SIMULATED else LIBRARY[real]
        self.exp, self.log1p = exp, log1p
        constants = {n: real(v) for n, v in vars(formulas).items() if isinstance(v, float)}
        self._primitives = {
            "exp": exp,
            "log": log,
            "log1p": log1p,
            "log1p_unit": log1p_unit if real is np.float32 else log1p,
            "inverse_unit": inverse if real is np.float64 else estimated_inverse if self._half else inverse_unit,
            "absolute": absolute,
            "where": where,
            "maximum": maximum,
            **constants,
        }
        self.mass_gap = self.bound(formulas.mass_gap)
        self._primitives["mass_gap"] = self.mass_gap
        self.row_loss = self.bound(formulas.row_loss)
        self.target_gradient = self.bound(formulas.target_gradient)
        self.dense_gradient = self.bound(formulas.dense_gradient)
        self.exp_difference = self._exp_difference()

    def bound(self, formula):
        return device_function(formulas.bind(formula, **self._primitives))

    def _exp_difference(self):
        exp, lowest, nothing, half = self.exp, self.real(-math.inf), self.real(0), self._half

        def exp_difference(x, m):
            """exp(x - m) for x <= m, with what the subtraction rounds away put back: 8 ulp of exp(-20) in float32."""
            d = x - m
            if half:  # nothing that the input's own digits could show is rounded away
                return exp(d)
            rounded_m = d - x
            lost = (x - (d - rounded_m)) - (m + rounded_m)
            e = exp(d)
            return e + e * (lost if d > lowest else nothing)

        return device_function(exp_difference)


@device_function
def two_sum(a, b):
    """a + b as the rounded sum and what it rounds away (Knuth)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


# --- whole warps and blocks -----------------------------------------------------------------------------------


def reduction(combine, first, real, threads, warp):
    """A function that combines one value of each of `threads` neighbouring threads, always in one order.

    Up to a warp, groups of threads lie side by side in a block; more threads are a block of their own.
    """
    width = min(threads, warp)
    warps = threads // width
    dtype = TYPE[real]

    def within_warp(value):
        distance = width // 2
        while distance:
            value = combine(value, shuffle_xor(value, distance))
            distance //= 2
        return value

    if warps == 1:
        return device_function(within_warp)
    within_warp = device_function(within_warp)

    def within_block(value):
        value = within_warp(value)
        slots = cuda.shared.array(warps, dtype)
        cuda.syncthreads()  # an earlier reduction has been read
        if cuda.threadIdx.x % width == 0:
            slots[cuda.threadIdx.x // width] = value
        cuda.syncthreads()
        value = first
        for k in range(warps):
            value = combine(value, slots[k])
        return value

    return cuda.jit(device=True)(within_block)


def pair_total(real, threads, warp):
    """A function that adds the pairs (rounded sum, what was rounded away) of all threads of a block."""
    width = min(threads, warp)
    warps = threads // width
    dtype = TYPE[real]

    @device_function
    def within_warp(high, low):
        distance = width // 2
        while distance:
            other_low = shuffle_xor(low, distance)
            high, lost = two_sum(high, shuffle_xor(high, distance))
            low = (low + other_low) + lost
            distance //= 2
        return high, low

    def within_block(high, low):
        high, low = within_warp(high, low)
        highs = cuda.shared.array(warps, dtype)
        lows = cuda.shared.array(warps, dtype)
        if cuda.threadIdx.x % width == 0:
            highs[cuda.threadIdx.x // width] = high
            lows[cuda.threadIdx.x // width] = low
        cuda.syncthreads()
        high, low = highs[0], lows[0]
        for k in range(1, warps):
            high, lost = two_sum(high, highs[k])
            low = (low + lows[k]) + lost
        return high, low

    return cuda.jit(device=True)(within_block)


@device_function
def add(a, b):
    return a + b


# Labels of any integer type, by the code that a kernel is given; 0 is for no labels.
LABEL_TYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
LABEL_CODE = {np.dtype(t).char: code for code, t in enumerate(LABEL_TYPES, 1)}
I1, U1, I2, U2, I4, U4, I8, U8 = (t(0) for t in LABEL_TYPES)
HIGHEST = np.int64(2**63 - 1)


@device_function
def load_label(address, code):
    """A class index as int64; one beyond int64 as the highest, which is no class."""
    if code == 7:
        return load_integer(address, I8)
    if code == 5:
        return load_integer(address, I4)
    if code == 2:
        return load_integer(address, U1)
    if code == 1:
        return load_integer(address, I1)
    if code == 3:
        return load_integer(address, I2)
    if code == 4:
        return load_integer(address, U2)
    if code == 6:
        return load_integer(address, U4)
    label = load_integer(address, U8)
    return label if label >= 0 else HIGHEST
