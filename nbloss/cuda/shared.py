"""A block's shared memory, by address: copied to from the device's memory, and read sixteen bytes at a time.

As in nbloss.cuda.intrinsics, each primitive is a Python function that says what it does, and on a device an intrinsic.
"""

import math

import llvmlite.ir as ir
import numpy as np
from numba import cuda
from numba.cuda import types

from nbloss.cuda.intrinsics import I32, I64, REAL, SIMULATED, VECTOR_BYTES, load_if, memory_at, pointer_to
from nbloss.cuda.words import emit_loaded_words, load_words_if
from nbloss.half import encoded

SHARED = 3  # the address space


def shared_room(size):
    """An address that sixteen divides, of the `size` bytes of shared memory that the launch asked for."""
    return np.int64(cuda.shared.array(size, types.uint8).ctypes.data)


def copy_vector(to, address):
    """Have sixteen bytes copied to shared memory; `wait_for_copies` waits until this thread's are there."""
    memory_at(to, VECTOR_BYTES, np.uint8)[:] = memory_at(address, VECTOR_BYTES, np.uint8)


def wait_for_copies():
    """Wait until what this thread had copied is there, for itself; for others, after `cuda.syncthreads`."""


def copy_element_if(there, to, address, stored):
    """Copy one element to shared memory; -inf, if it is not `there`."""
    lowest = np.full(1, -math.inf, REAL[stored.dtype.char])
    memory_at(to, 1, stored.dtype)[:] = memory_at(address, 1, stored.dtype) if there else encoded(lowest, stored.dtype)


load_shared_if = load_words_if


def _emit_shared_room(context, builder, signature, args):
    room = builder.module.globals.get("nbloss_shared_room")
    if room is None:
        kind = ir.ArrayType(ir.IntType(8), 0)
        room = ir.GlobalVariable(builder.module, kind, "nbloss_shared_room", addrspace=SHARED)
        room.linkage, room.align = "external", VECTOR_BYTES
    return builder.ptrtoint(room, I64)


def _emit_copy_vector(context, builder, signature, args):
    to, address = args
    kind = ir.FunctionType(ir.VoidType(), [I32, I64])
    text = "cp.async.cg.shared.global [$0], [$1], 16;"
    builder.call(ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True), [builder.trunc(to, I32), address])
    return context.get_dummy_value()


def _emit_wait_for_copies(context, builder, signature, args):
    kind = ir.FunctionType(ir.VoidType(), [])
    builder.call(ir.InlineAsm(kind, "cp.async.wait_all;", "~{memory}", side_effect=True), [])
    return context.get_dummy_value()


LOWEST_BITS = {types.uint16: 0xFC00, types.int16: 0xFF80, types.float32: 0xFF800000, types.float64: 0xFFF0 << 48}


def _emit_copy_element_if(context, builder, signature, args):
    there, to, address, _ = args
    dtype = signature.args[3]
    bits, size = ir.IntType(dtype.bitwidth), dtype.bitwidth // 8
    place = builder.inttoptr(to, ir.PointerType(bits, SHARED))
    builder.store(bits(LOWEST_BITS[dtype]), place, align=size)
    with builder.if_then(there):
        builder.store(builder.load(pointer_to(builder, address, bits), align=size), place, align=size)
    return context.get_dummy_value()


def _emit_load_shared_if(context, builder, signature, args):
    there, address, words, at, _ = args
    loaded = load_if(builder, there, builder.trunc(address, I32), signature.args[4], "shared")
    return emit_loaded_words(context, builder, signature, words, at, loaded)


if not SIMULATED:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def shared_room(typingctx, size):
        return types.int64(types.int64), _emit_shared_room

    @intrinsic
    def copy_vector(typingctx, to, address):
        return types.void(types.int64, types.int64), _emit_copy_vector

    @intrinsic
    def wait_for_copies(typingctx):
        return types.void(), _emit_wait_for_copies

    @intrinsic
    def copy_element_if(typingctx, there, to, address, stored):
        return types.void(types.boolean, types.int64, types.int64, stored), _emit_copy_element_if

    @intrinsic
    def load_shared_if(typingctx, there, address, words, at, stored):
        return types.void(types.boolean, types.int64, words, types.int64, stored), _emit_load_shared_if
