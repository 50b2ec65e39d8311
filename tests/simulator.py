"""What makes Numba's CUDA simulator fast enough and strict enough for tests.

Simulated threads wait for each other without polling: several times faster. And device memory can be touched by kernels
and copies only: anything else that reads it from the host, as no host can with a real device, ends in a segmentation
fault whose traceback names the line.
"""

import ctypes
import sys
import threading
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel

from nbloss.cuda import simulator as memory


class Thread(kernel.BlockThread):
    def syncthreads(self):
        self._manager.wait()

    def run(self):
        super().run()
        self._manager.leave()


class Block(kernel.BlockManager):
    AT_ONCE = 4  # blocks, as some of them wait for each other
    under_way: ClassVar = []  # threads of the blocks that have begun

    def run(self, grid_point, *args):
        points = list(np.ndindex(*self._block_dim))
        self.condition, self.live, self.waiting, self.phase = threading.Condition(), len(points), 0, 0
        threads = [Thread(lambda: self._f(*args), self, grid_point, p, self._debug) for p in points]
        self.under_way.append(threads)
        for thread in threads:
            thread.start()
        last = all(at == count - 1 for at, count in zip(grid_point, self._grid_dim))
        while self.under_way and (last or len(self.under_way) == self.AT_ONCE):
            for thread in self.under_way.pop(0):
                thread.join()
                if thread.exception:
                    raise thread.exception[0].with_traceback(thread.exception[1])

    def wait(self):
        """Wait until all threads that have not ended wait."""
        with self.condition:
            phase = self.phase
            self.waiting += 1
            self._go_on()
            self.condition.wait_for(lambda: self.phase != phase)

    def leave(self):
        with self.condition:
            self.live -= 1
            self._go_on()

    def _go_on(self):
        if self.waiting and self.waiting == self.live:
            self.waiting = 0
            self.phase += 1
            self.condition.notify_all()


class Arena:
    """Memory that no one may touch while it is closed."""

    SIZE = 1 << 30
    NOTHING, READ_AND_WRITE = 0, 3
    PRIVATE_ANONYMOUS_UNRESERVED = 0x4022  # Linux

    def __init__(self):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._base = self._libc.mmap(None, self.SIZE, self.NOTHING, self.PRIVATE_ANONYMOUS_UNRESERVED, -1, 0)
        assert self._base not in (None, ctypes.c_void_p(-1).value)
        self._used, self._free, self._live = 0, {}, {}

    @contextmanager
    def opened(self):
        assert self._libc.mprotect(self._base, self.SIZE, self.READ_AND_WRITE) == 0
        try:
            yield
        finally:
            assert self._libc.mprotect(self._base, self.SIZE, self.NOTHING) == 0

    def allocate(self, number, size, stream):
        room = -(-max(size, 1) // 256) * 256
        again = self._free.get(room)
        if again:
            address = again.pop()
        else:
            address, self._used = self._base + self._used, self._used + room
            assert self._used <= self.SIZE
        self._live[address] = room
        return address, Piece(self, room, address)

    def holds(self, address):
        """Whether an address that lies in here is one of memory that somebody holds."""
        return any(start <= address < start + room for start, room in self._live.items())

    def __contains__(self, address):
        return self._base <= address < self._base + self.SIZE


class Piece:
    """Gives its memory back when nobody holds it."""

    def __init__(self, arena, room, address):
        self._arena, self._room, self._address = arena, room, address

    def __del__(self):
        del self._arena._live[self._address]
        self._arena._free.setdefault(self._room, []).append(self._address)


@contextmanager
def swapped(function, simulated):
    """Let all of nbloss's kernels and device functions see the simulated module, until the launch is over.

    Numba's own does so function by function, and back again when the first of several threads leaves one.
    """
    modules = [m for name, m in sys.modules.items() if name.startswith("nbloss.cuda.")]
    modules = [m for m in modules if getattr(m, "cuda", None) is cuda]
    for module in modules:
        module.cuda = simulated
    try:
        yield
    finally:
        for module in modules:
            module.cuda = cuda


def numbers(arguments):
    """The integers among the arguments of a launch or a copy."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from numbers(argument)
        elif isinstance(argument, int):
            yield argument


def install():
    kernel.BlockManager, kernel.swapped_cuda_module = Block, swapped
    arena = Arena()
    memory.allocate = arena.allocate
    memory.capability = lambda number: (9, 0)  # blocks do run at once here

    def opening(function):
        def opened(*args):
            for number in numbers(args):
                assert number not in arena or arena.holds(number), "memory is used that was given back"
            with arena.opened():
                return function(*args)

        return opened

    for name in ("copy_to_host", "copy_to_device", "clear", "launch"):
        setattr(memory, name, opening(getattr(memory, name)))
