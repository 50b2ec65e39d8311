"""Device memory where Numba simulates the device (NUMBA_ENABLE_CUDASIM=1): memory of the host.

The same functions as nbloss.cuda.driver; `number` and `stream` mean nothing here.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from nbloss.cuda import choices
from nbloss.cuda.arrays import Layout, parameters


def device_names() -> list[str]:
    return ["simulator"]


def current_device() -> int:
    return 0


def layout_of(value: Any, stream: int) -> Layout:
    """How an array lies in memory."""
    interface = value.__cuda_array_interface__
    address, read_only = interface["data"]
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    return Layout(address, shape, interface.get("strides"), dtype, read_only, getattr(value, "device", 0), value)


def stream_of(value: Any) -> int | None:
    """The stream that its library works on."""
    return None


def on(number: int) -> Any:
    """Work on a device."""
    return contextlib.nullcontext()


def check_stream(number: int, stream: int) -> None:
    """Raise if the stream is not one of this device."""


def allocate(number: int, size: int, stream: int) -> tuple[int, object]:
    """(address, owner) of new memory, aligned as device memory is."""
    raw = np.empty(size + 256, np.uint8)
    return -(-raw.ctypes.data // 256) * 256, raw


def copy_to_host(destination: int, address: int, size: int, number: int, stream: int) -> None:
    ctypes.memmove(destination, address, size)


def copy_to_device(address: int, source: int, size: int, number: int, stream: int) -> None:
    ctypes.memmove(address, source, size)


def wait(number: int, stream: int) -> None:
    """Everything is done when its function returns."""


def clear(address: int, size: int, number: int, stream: int) -> None:
    ctypes.memset(address, 0, size)


def launch(kernel: Any, blocks: int, threads: int, number: int, stream: int, arguments: tuple[Any, ...]) -> None:
    kernel[blocks, threads](*arguments)


class Launch:
    """A kernel and its parameters, to be started again with other addresses."""

    def __init__(
        self,
        kernel: Any,
        blocks: int,
        threads: int,
        number: int,
        arguments: tuple[Any, ...],
        cluster: int = 1,
        early: bool = False,
        shared: int = 0,
        moved: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self._kernel, self._grid, self._number = kernel, (blocks, threads), number
        self._arguments, self._moved = arguments, moved

    def start(self, stream: int, bases: Sequence[int] = ()) -> None:
        numbers = parameters(self._arguments)
        for parameter, base, offset in self._moved:
            numbers[parameter] = bases[base] + offset
        rest = iter(numbers)
        arguments = tuple(tuple(islice(rest, len(a))) if type(a) is tuple else next(rest) for a in self._arguments)
        launch(self._kernel, *self._grid, self._number, stream, arguments)


def order(number: int, first: int, then: int) -> None:
    """Everything is done in the order of the program."""


def capability(number: int) -> tuple[int, int]:
    """The device's compute capability: one without clusters, whose blocks Numba's simulator does not run at once."""
    return 8, 9


def shared_bytes(number: int) -> int:
    """How many bytes of shared memory a block may have."""
    return choices.MOST_SHARED


def dlpack(view: Any, **options: Any) -> object:
    raise BufferError("the simulator has no device memory to share")
