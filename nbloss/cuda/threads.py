"""What the threads of a warp, the blocks of a cluster and kernels after one another tell each other.

As in nbloss.cuda.intrinsics, each is a Python function that says what it does, and on a device an intrinsic.
"""

import sys
import threading

import llvmlite.ir as ir
import numpy as np
from numba import cuda
from numba.cuda import types

from nbloss.cuda.intrinsics import I32, I64, SIMULATED, slot

ALL_LANES = 0xFFFFFFFF


def _exchanged(given, source):
    """What the thread with this number gives, where all threads of a block give something."""
    thread = threading.current_thread()
    board = thread._manager.__dict__.setdefault("board", {})
    board[thread.thread_id] = given
    thread.syncthreads()
    other = board[source]
    thread.syncthreads()
    return other


def shuffle_xor(value, distance):
    """`value` of the thread of the same warp whose number differs by this bit; all threads take part."""
    return _exchanged(value, threading.current_thread().thread_id ^ distance)


def from_thread(values, to, at, count, source):
    """`count` values of the thread of the same warp with this number into to[at], to[at + 1], …; all take part."""
    to[at : at + count] = _exchanged(values[:count].copy(), source)


def sync_warp():
    """Let the threads of a warp see what each other has read and written."""
    threading.current_thread().syncthreads()


def begin_cluster():
    """Tell the other blocks of the cluster that this one has come here; `tell_cluster` waits until all have."""


def tell_cluster(slots, part, m, below, ties):
    """Put three numbers into slots[part] of every block of the cluster, one block for each of the slots."""
    thread = threading.current_thread()
    if cuda.threadIdx.x == 0:
        parts = len(slots)
        told = thread._manager.told = getattr(thread._manager, "told", 0) + 1
        board = BOARDS.setdefault((cuda.blockIdx.x // parts, told), {})
        with POSTED:
            board[part] = m, below, ties
            POSTED.notify_all()
            POSTED.wait_for(lambda: len(board) == parts)
        slots[:] = [board[k] for k in range(parts)]
        if part == cuda.blockIdx.x % parts == parts - 1:
            BOARDS.pop((cuda.blockIdx.x // parts, told), None)
    thread.syncthreads()


def let_next_begin():
    """Let the kernel that is started next begin, if it may: see Home.launch."""


def wait_for_last():
    """Wait until the kernel that was started before has ended, if this one may begin before that."""


POSTED = threading.Condition()
# What the blocks of each cluster tell each other, the first time and the next.
BOARDS: dict[tuple[int, int], dict[int, tuple[float, float, float]]] = {}


def _shared_array(shared, shape, dtype):
    frame = sys._getframe(1)
    array = np.empty(shape, as_dtype(dtype))
    block = id(threading.current_thread()._manager)
    return shared._allocations.setdefault((block, frame.f_code, frame.f_lineno), array)


if SIMULATED:
    from numba.cuda.simulator import kernelapi
    from numba.np.numpy_support import as_dtype

    # Numba 0.30's own makes two of one array, where two threads come to it at once, and one for all blocks.
    kernelapi.FakeCUDAShared.array = _shared_array


def _emit_share_with(context, builder, signature, args):
    slots, at, value, block = args
    place = builder.ptrtoint(slot(context, builder, signature.args[0], slots, at, 0), I64)
    kind, letter = ("f64", "d") if signature.args[2] == types.float64 else ("f32", "f")
    text = f"{{ .reg .u64 a; mapa.u64 a, $0, $1; st.{kind} [a], $2; }}"
    function = ir.FunctionType(ir.VoidType(), [I64, I32, value.type])
    assembly = ir.InlineAsm(function, text, f"l,r,{letter},~{{memory}}", side_effect=True)
    builder.call(assembly, [place, builder.trunc(block, I32), value])
    return context.get_dummy_value()


def _instruction_alone(text):
    def emit(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(function, text, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return emit


if not SIMULATED:
    from numba.cuda.extending import intrinsic

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

    @cuda.jit(device=True)
    def sync_warp():
        cuda.syncwarp()

    @cuda.jit(device=True)
    def from_thread(values, to, at, count, source):
        for k in range(count):
            to[at + k] = cuda.shfl_sync(ALL_LANES, values[k], source)

    @cuda.jit(device=True)
    def tell_cluster(slots, part, m, below, ties):
        wait_for_cluster()  # until all blocks have begun: before, they have no shared memory to put anything into
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
