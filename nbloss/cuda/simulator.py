"""Device memory where Numba simulates the device (NUMBA_ENABLE_CUDASIM=1): memory of the host.

The same functions as nbloss.cuda.driver; `number` and `stream` mean nothing here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from nbloss.cuda.arrays import Layout, parameters


def device_names() -> list[str]:
    return ["simulator"]


def current_device() -> int:
    return 0


def layout_of(value: Any, stream: int) -> Layout:
    """(address, shape, strides in bytes, dtype, whether it is read-only, device, owner) of an array."""
    interface = value.__cuda_array_interface__
    address, read_only = interface["data"]
    number = getattr(value, "device", 0)
    dtype = np.dtype(interface["typestr"])
    return address, interface["shape"], interface.get("strides"), dtype, read_only, number, value


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


def clear(address: int, size: int, number: int, stream: int) -> None:
    ctypes.memset(address, 0, size)


def launch(
    kernel: Any, blocks: int, threads: int, number: int, stream: int, arguments: tuple[Any, ...], cluster: int = 1
) -> None:
    kernel[blocks, threads](*arguments)


class Launch:
    """A kernel with its parameters, to be started on any stream, with other numbers in some of their places."""

    def __init__(
        self, kernel: Any, blocks: int, threads: int, number: int, arguments: tuple[Any, ...], cluster: int = 1
    ) -> None:
        self._kernel, self._grid, self._number, self._cluster = kernel, (blocks, threads), number, cluster
        self._arguments = arguments

    def start(self, stream: int, moved: Iterable[tuple[int, int]] = ()) -> None:
        numbers = dict(enumerate(parameters(self._arguments))) | dict(moved)
        rest = iter(numbers.values())
        arguments = tuple(tuple(islice(rest, len(a))) if type(a) is tuple else next(rest) for a in self._arguments)
        launch(self._kernel, *self._grid, self._number, stream, arguments, self._cluster)


def order(number: int, first: int, then: int) -> None:
    """Everything is done in the order of the program."""


def capability(number: int) -> tuple[int, int]:
    """The device's compute capability."""
    return 9, 0


def dlpack(view: Any, **options: Any) -> object:
    raise BufferError("the simulator has no device memory to share")
