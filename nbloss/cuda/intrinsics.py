"""What kernels need beyond Numba's CUDA Python: memory by address, sixteen bytes at a time, and single instructions.

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

from nbloss.half import decoded, encoded

SIMULATED = bool(config.ENABLE_CUDASIM)
VECTOR_BYTES = 16
STORED = {"f": np.float32(0), "d": np.float64(0), "H": np.uint16(0), "h": np.int16(0)}
REAL = {"f": np.float32, "d": np.float64, "H": np.float32, "h": np.float32}  # what is computed with
TYPE = {np.float32: types.float32, np.float64: types.float64}
# What elements are held in as they lie in memory: a word of one element, or of two of 16 bits.
WORD = {"f": types.float32, "d": types.float64, "H": types.int32, "h": types.int32}
ALL_LANES = 0xFFFFFFFF


# --- what each primitive does, for the simulator --------------------------------------------------------------


def _memory(address, count, dtype):
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def _write(address, values, stored):
    values = np.array(values, REAL[stored.dtype.char])
    _memory(address, len(values), stored.dtype)[:] = encoded(values, stored.dtype)


def load(address, stored):
    """The element at an address, as a float."""
    return decoded(_memory(address, 1, stored.dtype))[0]


def store(address, value, stored):
    """Write one element."""
    _write(address, [value], stored)


def load_vector(address, values, at, stored):
    """Sixteen bytes of elements, from an address that sixteen divides, into values[at], values[at + 1], …"""
    loaded = decoded(_memory(address, VECTOR_BYTES // stored.itemsize, stored.dtype))
    values[at : at + len(loaded)] = loaded


def load_vector_if(condition, address, values, at, stored):
    """`load_vector` where the condition holds, else -inf, but for `unpack`: no branch, so that loads come in a row."""
    if condition:
        load_vector(address, values, at, stored)
    else:
        values[at : at + VECTOR_BYTES // stored.itemsize] = -math.inf


def unpack(values, at, stored):
    """What is left to do of `load_vector_if` once other loads are under way: 16 bits to float32."""


def load_words_if(condition, address, words, at, stored):
    """Sixteen bytes as they are into words[at], words[at + 1], …, or elements of -inf, without a branch."""
    elements = words.view(stored.dtype)
    per_word = words.itemsize // stored.itemsize
    count = VECTOR_BYTES // stored.itemsize
    if condition:
        elements[at * per_word : at * per_word + count] = _memory(address, count, stored.dtype)
    else:
        elements[at * per_word : at * per_word + count] = encoded(
            np.full(count, -math.inf, REAL[stored.dtype.char]), stored.dtype
        )


load_words_past_l1_if = load_words_if  # and without a place in the L1 cache


def store_words(address, words, at, stored):
    """Write sixteen bytes from words[at], words[at + 1], … as they are."""
    count = VECTOR_BYTES // words.itemsize
    _memory(address, count, words.dtype)[:] = words[at : at + count]


def value_of(words, k, zero, stored):
    """Element k of words, as a float.

    `zero` is 0 in a way that the compiler cannot know, another one in each pass over the words: or it would hold on to
    what it has made of words of two elements, which is twice as many registers.
    """
    return decoded(words.view(stored.dtype)[k : k + 1])[0]


def put_values(words, at, low, high, stored):
    """Let words[at] be one element, `low`, or two of 16 bits."""
    per_word = words.itemsize // stored.itemsize
    values = np.array([low, high][:per_word], REAL[stored.dtype.char])
    words.view(stored.dtype)[at * per_word : (at + 1) * per_word] = encoded(values, stored.dtype)


def larger_pairs(a, b):
    """The larger of each of two bfloat16 in a word, and not NaN if one of them is not."""
    pairs = [decoded(np.array([word], np.int32).view(np.int16)) for word in (a, b)]
    return encoded(np.fmax(*pairs), np.dtype(np.int16)).view(np.int32)[0]


def from_second_half(low, high, odd):
    """The upper half of a word and the lower one of the next, or the word itself if not `odd`."""
    if not odd:
        return low
    return np.array([low, high], np.int32).view(np.int16)[1:3].view(np.int32)[0]


def store_vector(address, values, at, stored):
    """Write sixteen bytes of elements."""
    _write(address, values[at : at + VECTOR_BYTES // stored.itemsize], stored)


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


def from_thread(value, source):
    """`value` of the thread of the same warp with this number; all threads take part."""
    thread = threading.current_thread()
    board = thread._manager.__dict__.setdefault("board", {})
    board[thread.thread_id] = value
    thread.syncthreads()
    other = board[source]
    thread.syncthreads()
    return other


def power_of_two(shifted):
    """2^(n - 127) for a float32 in whose lowest bits stands n, 0 for n = 0: n becomes the exponent."""
    return (np.float32(shifted).view(np.int32) << 23).view(np.float32)


def fma(a, b, c):
    """a b + c, rounded once."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def begin_cluster():
    """Tell the other blocks of the cluster that this one has begun; `tell_cluster` waits until all have."""


def tell_cluster(slots, part, m, below, ties):
    """Put three numbers into slots[part] of every block of the cluster, one block for each of the slots."""
    thread = threading.current_thread()
    if cuda.threadIdx.x == 0:
        parts = len(slots)
        board = BOARDS.setdefault(cuda.blockIdx.x // parts, {})
        with POSTED:
            board[part] = m, below, ties
            POSTED.notify_all()
            POSTED.wait_for(lambda: len(board) == parts)
        slots[:] = [board[k] for k in range(parts)]
        if part == cuda.blockIdx.x % parts == parts - 1:
            BOARDS.pop(cuda.blockIdx.x // parts, None)
    thread.syncthreads()


def let_next_begin():
    """Let the kernel that is started next begin, if it may: see Home.launch."""


def wait_for_last():
    """Wait until the kernel that was started before has ended, if this one may begin before that."""


POSTED = threading.Condition()
BOARDS: dict[int, dict[int, tuple[float, float, float]]] = {}  # what the blocks of each cluster tell each other


def _shared_array(shared, shape, dtype):
    frame = sys._getframe(1)
    array = np.empty(shape, as_dtype(dtype))
    block = id(threading.current_thread()._manager)
    return shared._allocations.setdefault((block, frame.f_code, frame.f_lineno), array)


if SIMULATED:
    exp2, estimated_inverse = np.exp2, np.reciprocal
    from numba.cuda.simulator import kernelapi
    from numba.np.numpy_support import as_dtype

    # Numba 0.30's own makes two of one array, where two threads come to it at once, and one for all blocks.
    kernelapi.FakeCUDAShared.array = _shared_array


def sync_warp():
    """Let the threads of a warp see what each other has read and written."""
    threading.current_thread().syncthreads()


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


def _two_of_word(builder, dtype, word):
    """The two elements of 16 bits in a 32-bit word, as float32."""
    halves = (word, builder.lshr(word, I32(16)))
    return [_half_to_float(builder, dtype, builder.trunc(half, I16)) for half in halves]


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
    elements = [builder.extract_element(loaded, I32(k)) for k in range(vector.count)]
    if half:
        elements = [element for word in elements for element in _two_of_word(builder, dtype, word)]
    for k, element in enumerate(elements):
        builder.store(element, _slot(context, builder, signature.args[1], values, at, k))
    return context.get_dummy_value()


def _load_if(builder, condition, address, dtype, cache=""):
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
        f"@p ld.global{cache}.v{count}.{ptx_type} {{{outputs}}}, [${count + 1}]; }}"
    )
    results = ir.LiteralStructType([element] * count)
    constraints = ",".join([f"=&{letter}"] * count + ["r", "l", letter])
    kind = ir.FunctionType(results, [I32, I64, element])
    wanted = builder.zext(condition, I32)
    loaded = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), [wanted, address, fill])
    return [builder.extract_value(loaded, k) for k in range(count)]


def _emit_load_vector_if(context, builder, signature, args):
    condition, address, values, at, _ = args
    dtype = signature.args[4]
    apart = 2 if dtype.bitwidth == 16 else 1  # a word of two elements lies in the place of the first
    for k, value in enumerate(_load_if(builder, condition, address, dtype)):
        value = value if dtype.bitwidth == 64 else builder.bitcast(value, FLOAT[4])
        builder.store(value, _slot(context, builder, signature.args[2], values, at, k * apart))
    return context.get_dummy_value()


def _loading_words(cache):
    def emit(context, builder, signature, args):
        condition, address, words, at, _ = args
        for k, value in enumerate(_load_if(builder, condition, address, signature.args[4], cache)):
            if signature.args[2].dtype == types.float32:
                value = builder.bitcast(value, FLOAT[4])
            builder.store(value, _slot(context, builder, signature.args[2], words, at, k))
        return context.get_dummy_value()

    return emit


def _emit_store_words(context, builder, signature, args):
    address, words, at, _ = args
    count = VECTOR_BYTES * 8 // signature.args[1].dtype.bitwidth
    parts = [builder.load(_slot(context, builder, signature.args[1], words, at, k)) for k in range(count)]
    vector = ir.Constant(ir.VectorType(parts[0].type, count), ir.Undefined)
    for k, part in enumerate(parts):
        vector = builder.insert_element(vector, part, I32(k))
    builder.store(vector, _global(builder, address, vector.type), align=VECTOR_BYTES)
    return context.get_dummy_value()


def _emit_value_of(context, builder, signature, args):
    words, k, zero, _ = args
    dtype = signature.args[3]
    if dtype.bitwidth != 16:
        return builder.load(_slot(context, builder, signature.args[0], words, k, 0))
    word = builder.load(_slot(context, builder, signature.args[0], words, builder.lshr(k, I64(1)), 0))
    word = builder.add(word, zero)
    second = builder.trunc(k, ir.IntType(1))
    if dtype == types.uint16:
        halves = _two_of_word(builder, dtype, word)
    else:  # one instruction each
        halves = [builder.shl(word, I32(16)), builder.and_(word, I32(0xFFFF0000))]
        halves = [builder.bitcast(half, FLOAT[4]) for half in halves]
    return builder.select(second, halves[1], halves[0])


def _emit_put_values(context, builder, signature, args):
    words, at, low, high, _ = args
    dtype = signature.args[4]
    word = low if dtype.bitwidth != 16 else _two_to_word(builder, dtype, low, high)
    builder.store(word, _slot(context, builder, signature.args[0], words, at, 0))
    return context.get_dummy_value()


def _emit_share_with(context, builder, signature, args):
    slots, at, value, block = args
    place = builder.ptrtoint(_slot(context, builder, signature.args[0], slots, at, 0), I64)
    kind, letter = ("f64", "d") if signature.args[2] == types.float64 else ("f32", "f")
    text = f"{{ .reg .u64 a; mapa.u64 a, $0, $1; st.{kind} [a], $2; }}"
    function = ir.FunctionType(ir.VoidType(), [I64, I32, value.type])
    assembly = ir.InlineAsm(function, text, f"l,r,{letter},~{{memory}}", side_effect=True)
    builder.call(assembly, [place, builder.trunc(block, I32), value])
    return context.get_dummy_value()


def _emit_unpack(context, builder, signature, args):
    values, at, _ = args
    dtype = signature.args[2]
    for k in range(0, VECTOR_BYTES // 2 if dtype.bitwidth == 16 else 0, 2):
        places = [_slot(context, builder, signature.args[0], values, at, k + half) for half in (0, 1)]
        word = builder.bitcast(builder.load(places[0]), I32)
        for element, place in zip(_two_of_word(builder, dtype, word), places):
            builder.store(element, place)
    return context.get_dummy_value()


def _emit_power_of_two(context, builder, signature, args):
    return builder.bitcast(builder.shl(builder.bitcast(args[0], I32), I32(23)), FLOAT[4])


def _instruction(name):
    def emit(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT[4], [FLOAT[4]])
        return builder.call(ir.InlineAsm(kind, f"{name}.approx.ftz.f32 $0, $1;", "=f,f"), args)

    return emit


def _instruction_alone(text):
    def emit(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(function, text, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return emit


def _emit_larger_pairs(context, builder, signature, args):
    kind = ir.FunctionType(I32, [I32] * 2)
    return builder.call(ir.InlineAsm(kind, "max.bf16x2 $0, $1, $2;", "=r,r,r"), args)


def _emit_from_second_half(context, builder, signature, args):
    low, high, odd = args
    shift = builder.shl(builder.zext(odd, I32), I32(4))
    kind = ir.FunctionType(I32, [I32] * 3)
    return builder.call(ir.InlineAsm(kind, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r"), [low, high, shift])


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

    fma = libdevice.fmaf_rn

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
    def load_vector_if(typingctx, condition, address, values, at, stored):
        return types.void(types.boolean, types.int64, values, types.int64, stored), _emit_load_vector_if

    @intrinsic
    def unpack(typingctx, values, at, stored):
        return types.void(values, types.int64, stored), _emit_unpack

    @intrinsic
    def power_of_two(typingctx, shifted):
        return types.float32(types.float32), _emit_power_of_two

    @intrinsic
    def load_words_if(typingctx, condition, address, words, at, stored):
        return types.void(types.boolean, types.int64, words, types.int64, stored), _loading_words("")

    @intrinsic
    def load_words_past_l1_if(typingctx, condition, address, words, at, stored):
        return types.void(types.boolean, types.int64, words, types.int64, stored), _loading_words(".L1::no_allocate")

    @intrinsic
    def store_words(typingctx, address, words, at, stored):
        return types.void(types.int64, words, types.int64, stored), _emit_store_words

    @intrinsic
    def value_of(typingctx, words, k, zero, stored):
        return _real(stored)(words, types.int64, types.int32, stored), _emit_value_of

    @intrinsic
    def put_values(typingctx, words, at, low, high, stored):
        return types.void(words, types.int64, _real(stored), _real(stored), stored), _emit_put_values

    @intrinsic
    def larger_pairs(typingctx, a, b):
        return types.int32(types.int32, types.int32), _emit_larger_pairs

    @intrinsic
    def from_second_half(typingctx, low, high, odd):
        return types.int32(types.int32, types.int32, types.boolean), _emit_from_second_half

    @intrinsic
    def share_with(typingctx, slots, at, value, block):
        return types.void(slots, types.int64, slots.dtype, types.int64), _emit_share_with

    @intrinsic
    def let_next_begin(typingctx):
        return types.void(), _instruction_alone("griddepcontrol.launch_dependents;")

    @intrinsic
    def wait_for_last(typingctx):
        return types.void(), _instruction_alone("griddepcontrol.wait;")

    @intrinsic
    def begin_cluster(typingctx):
        return types.void(), _instruction_alone("barrier.cluster.arrive.relaxed.aligned;")

    @intrinsic
    def arrive_in_cluster(typingctx):
        return types.void(), _instruction_alone("barrier.cluster.arrive.release.aligned;")

    @intrinsic
    def wait_for_cluster(typingctx):
        return types.void(), _instruction_alone("barrier.cluster.wait.acquire.aligned;")

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

        def emit(context, builder, signature, args):
            estimate = ir.InlineAsm(ir.FunctionType(FLOAT[4], [FLOAT[4]]), "rcp.approx.ftz.f32 $0, $1;", "=f,f")
            return builder.call(estimate, args)

        return types.float32(types.float32), emit

    @cuda.jit(device=True)
    def sync_warp():
        cuda.syncwarp()

    @cuda.jit(device=True)
    def from_thread(value, source):
        return cuda.shfl_sync(ALL_LANES, value, source)

    @cuda.jit(device=True)
    def tell_cluster(slots, part, m, below, ties):
        wait_for_cluster()  # until all blocks have begun: before, they have no shared memory
        block = np.int64(cuda.threadIdx.x)
        if block < slots.shape[0]:
            share_with(slots, part * 3, m, block)
            share_with(slots, part * 3 + 1, below, block)
            share_with(slots, part * 3 + 2, ties, block)
        arrive_in_cluster()
        wait_for_cluster()

    @cuda.jit(device=True)
    def shuffle_xor(value, distance):
        return cuda.shfl_xor_sync(ALL_LANES, value, distance)


def device_function(function):
    """A function that kernels call."""
    return function if SIMULATED else cuda.jit(device=True)(function)


# Labels of any integer type, by the code that a kernel is given; 0 is for no labels.
LABEL_TYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
LABEL_CODE = {np.dtype(t): code for code, t in enumerate(LABEL_TYPES, 1)}
I1_CODE, U1_CODE, I2_CODE, U2_CODE, I4_CODE, U4_CODE, I8_CODE, U8_CODE = LABEL_CODE.values()
I1, U1, I2, U2, I4, U4, I8, U8 = (t(0) for t in LABEL_TYPES)
ONE_BELOW, TWO_BELOW = np.int64(-1), np.int64(-2)


@device_function
def load_label(address, code, ignore):
    """A class index as int64; one beyond int64 as a negative number that is not `ignore`."""
    if code == I8_CODE:
        return load_integer(address, I8)
    if code == I4_CODE:
        return load_integer(address, I4)
    if code == U1_CODE:
        return load_integer(address, U1)
    if code == I1_CODE:
        return load_integer(address, I1)
    if code == I2_CODE:
        return load_integer(address, I2)
    if code == U2_CODE:
        return load_integer(address, U2)
    if code == U4_CODE:
        return load_integer(address, U4)
    label = load_integer(address, U8)
    return label if label >= 0 else TWO_BELOW if ignore == ONE_BELOW else ONE_BELOW
