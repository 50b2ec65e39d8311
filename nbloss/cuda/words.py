"""Elements as they lie in memory, in words of 32 bits, or of 64 bits for float64; of those of 16 bits two in a word.

As in nbloss.cuda.intrinsics, each is a Python function that says what it does, and on a device an intrinsic.
"""

import math

import llvmlite.ir as ir
import numpy as np
from numba.cuda import types

from nbloss.cuda.intrinsics import (
    FLOAT,
    I32,
    I64,
    REAL,
    SIMULATED,
    VECTOR_BYTES,
    computed_in,
    load_if,
    memory_at,
    slot,
    store_parts,
    two_of_word,
    two_to_word,
)
from nbloss.half import decoded, encoded

# What elements are held in.
WORD = {"f": types.float32, "d": types.float64, "H": types.int32, "h": types.int32}
PAST_L1 = "global.L1::no_allocate"
KNOWN = np.int32(0)  # for `value_of`, where the compiler may know


def load_words_if(condition, address, words, at, stored):
    """Sixteen bytes as they are into words[at], words[at + 1], …, or elements of -inf, without a branch."""
    elements = words.view(stored.dtype)
    per_word = words.itemsize // stored.itemsize
    count = VECTOR_BYTES // stored.itemsize
    if condition:
        elements[at * per_word : at * per_word + count] = memory_at(address, count, stored.dtype)
    else:
        elements[at * per_word : at * per_word + count] = encoded(
            np.full(count, -math.inf, REAL[stored.dtype.char]), stored.dtype
        )


load_words_past_l1_if = load_words_if  # and without a place in the L1 cache


def store_words(address, words, at):
    """Write sixteen bytes from words[at], words[at + 1], … as they are."""
    count = VECTOR_BYTES // words.itemsize
    memory_at(address, count, words.dtype)[:] = words[at : at + count]


def value_of(words, k, zero, stored):
    """Element k of words, as a float.

    `zero` is always 0. Where the compiler must not know that, it is the block's y or z in a grid of one dimension,
    another one in each pass over the words: or what it makes of words of two elements would be kept for the next pass,
    in twice as many registers.
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


def emit_loaded_words(context, builder, signature, words, at, loaded):
    """Put what `load_if` gives into words[at], words[at + 1], …"""
    for k, value in enumerate(loaded):
        if signature.args[2].dtype == types.float32:
            value = builder.bitcast(value, FLOAT[4])
        builder.store(value, slot(context, builder, signature.args[2], words, at, k))
    return context.get_dummy_value()


def _loading_words(space):
    def emit(context, builder, signature, args):
        condition, address, words, at, _ = args
        loaded = load_if(builder, condition, address, signature.args[4], space)
        return emit_loaded_words(context, builder, signature, words, at, loaded)

    return emit


def _emit_store_words(context, builder, signature, args):
    address, words, at = args
    count = VECTOR_BYTES * 8 // signature.args[1].dtype.bitwidth
    parts = [builder.load(slot(context, builder, signature.args[1], words, at, k)) for k in range(count)]
    store_parts(builder, address, parts)
    return context.get_dummy_value()


def _emit_value_of(context, builder, signature, args):
    words, k, zero, _ = args
    dtype = signature.args[3]
    if dtype.bitwidth != 16:
        return builder.load(slot(context, builder, signature.args[0], words, k, 0))
    word = builder.load(slot(context, builder, signature.args[0], words, builder.lshr(k, I64(1)), 0))
    word = builder.add(word, zero)
    second = builder.trunc(k, ir.IntType(1))
    low, high = two_of_word(builder, dtype, word)
    return builder.select(second, high, low)


def _emit_put_values(context, builder, signature, args):
    words, at, low, high, _ = args
    dtype = signature.args[4]
    word = low if dtype.bitwidth != 16 else two_to_word(builder, dtype, low, high)
    builder.store(word, slot(context, builder, signature.args[0], words, at, 0))
    return context.get_dummy_value()


def _emit_larger_pairs(context, builder, signature, args):
    kind = ir.FunctionType(I32, [I32] * 2)
    return builder.call(ir.InlineAsm(kind, "max.bf16x2 $0, $1, $2;", "=r,r,r"), args)


def _emit_from_second_half(context, builder, signature, args):
    low, high, odd = args
    shift = builder.shl(builder.zext(odd, I32), I32(4))
    kind = ir.FunctionType(I32, [I32] * 3)
    return builder.call(ir.InlineAsm(kind, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r"), [low, high, shift])


if not SIMULATED:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load_words_if(typingctx, condition, address, words, at, stored):
        return types.void(types.boolean, types.int64, words, types.int64, stored), _loading_words("global")

    @intrinsic
    def load_words_past_l1_if(typingctx, condition, address, words, at, stored):
        return types.void(types.boolean, types.int64, words, types.int64, stored), _loading_words(PAST_L1)

    @intrinsic
    def store_words(typingctx, address, words, at):
        return types.void(types.int64, words, types.int64), _emit_store_words

    @intrinsic
    def value_of(typingctx, words, k, zero, stored):
        return computed_in(stored)(words, types.int64, types.int32, stored), _emit_value_of

    @intrinsic
    def put_values(typingctx, words, at, low, high, stored):
        return types.void(words, types.int64, computed_in(stored), computed_in(stored), stored), _emit_put_values

    @intrinsic
    def larger_pairs(typingctx, a, b):
        return types.int32(types.int32, types.int32), _emit_larger_pairs

    @intrinsic
    def from_second_half(typingctx, low, high, odd):
        return types.int32(types.int32, types.int32, types.boolean), _emit_from_second_half
