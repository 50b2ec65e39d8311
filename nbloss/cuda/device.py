"""Homes: a device and the stream on it where a call's arrays live, are made, and are worked on."""

from __future__ import annotations

import importlib
import importlib.util
import math
import operator
import os
from functools import cache
from typing import Any

import numpy as np

from nbloss.cuda.arrays import DeviceArray, DeviceView, Layout, extent, view_at
from nbloss.problem import Array, bfloat16, is_bfloat16
from nbloss.processes import undivided

INSTALL = "pip install 'nbloss[cu13]', or 'nbloss[cu12]' for a CUDA 12 driver"


@cache
def memory() -> Any:
    """What stands for the device: the driver, or the simulator's memory."""
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
    return importlib.import_module("nbloss.cuda.simulator" if simulated else "nbloss.cuda.driver")


@cache
def why_not() -> str | None:
    """Why no device can be used, or None."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1":
        return None
    for module in ("numba_cuda", "cuda"):
        if importlib.util.find_spec(module) is None:
            return f"numba-cuda is not installed: {INSTALL}"
    try:
        with undivided():
            import cuda.core  # noqa: F401
            from numba import cuda as numba_cuda
    except ImportError as error:
        return f"{_line(error)}: {INSTALL}"
    if getattr(numba_cuda, "implementation", None) != "NVIDIA":
        return f"Numba's built-in CUDA target is deprecated, and numba-cuda did not take its place: {INSTALL}"
    try:
        numba_cuda.current_context()  # the caller's own, if there is one
    except Exception as error:  # whatever the driver, its absence or its version raises
        return f"no usable CUDA device or driver ({_line(error)})"
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def require(what: str) -> None:
    """RuntimeError with the reason, if no device can be used."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"{what} cannot be used: {reason}")


def description() -> str:
    """Whether the backend can be used, and with what."""
    reason = why_not()
    return f"not usable: {reason}" if reason else f"usable: {', '.join(memory().device_names())}"


class Home:
    """A device and a stream."""

    def __init__(self, number: int, stream: object) -> None:
        self.number, self.stream, self._memory = number, stream_pointer(stream), memory()
        self._stream = stream  # it must live as long as anything is done on it
        self._memory.check_stream(number, self.stream)

    @property
    def capability(self) -> tuple[int, int]:
        """The device's compute capability."""
        capability: tuple[int, int] = self._memory.capability(self.number)
        return capability

    @property
    def shared(self) -> int:
        """How many bytes of shared memory a block may have."""
        shared: int = self._memory.shared_bytes(self.number)
        return shared

    def check_dtype(self, name: str, dtype: np.dtype[Any]) -> None:
        """An error for a device that cannot run the kernels, and a TypeError for a dtype that it cannot compute."""
        if self.capability < (7, 0):  # its loads know of no cache policy
            raise RuntimeError(
                f"a device must be of compute capability 7.0 or above, got {'.'.join(map(str, self.capability))}"
            )
        if is_bfloat16(dtype) and not self.capability >= (8, 0):
            raise TypeError(f"{name} must not be bfloat16 on a device below compute capability 8.0")

    def precede(self, stream: int) -> None:
        """Let what is started on another stream from now on wait for what is under way on this one."""
        self._memory.order(self.number, self.stream, stream)

    def wait(self) -> None:
        """Wait until all that was started is done."""
        self._memory.wait(self.number, self.stream)

    def allocate(self, size: int) -> tuple[int, object]:
        """(address, owner) of new memory."""
        address, owner = self._memory.allocate(self.number, size, self.stream)
        return address, owner

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceView:
        """New memory, as a view."""
        address, keeper = self.allocate(math.prod(shape) * dtype.itemsize)
        return view_at(address, shape, None, dtype, False, self, keeper)

    def zeros(self, size: int) -> DeviceView:
        """New memory of this many bytes, all 0."""
        view = self.empty((size,), np.dtype(np.uint8))
        self.clear(view.address, size)
        return view

    def clear(self, address: int, size: int) -> None:
        """Fill memory with zeros."""
        self._memory.clear(address, size, self.number, self.stream)

    def upload(self, array: Array) -> DeviceView:
        """A contiguous copy on the device."""
        source = np.ascontiguousarray(array).reshape(array.shape)
        view = self.empty(array.shape, source.dtype)
        if source.size:
            self.fill(view.address, source)
        return view

    def fill(self, address: int, source: Array) -> None:
        """Copy a contiguous array to an address."""
        self._memory.copy_to_device(address, source.ctypes.data, source.nbytes, self.number, self.stream)

    def download(self, view: DeviceView) -> Array:
        """A copy on the host, once the device has computed it."""
        if not view.size:
            return np.empty(view.shape, view.dtype)
        low, high = extent(view.address, view.shape, view.strides, view.itemsize)
        raw = np.empty(high - low, np.uint8)
        self._memory.copy_to_host(raw.ctypes.data, low, raw.nbytes, self.number, self.stream)
        host: Array = np.ndarray(view.shape, view.dtype, raw, view.address - low, view.strides)
        return host

    def has_fault(self, address: int) -> bool:
        """Whether the count at an address is not 0: waits for the device."""
        found = np.zeros(1, np.int64)
        self._memory.copy_to_host(found.ctypes.data, address, 8, self.number, self.stream)
        return bool(found[0])

    def launch(
        self,
        kernel: Any,
        blocks: int,
        threads: int,
        *arguments: Any,
        cluster: int = 1,
        early: bool = False,
        shared: int = 0,
    ) -> None:
        """Start a kernel, of whose blocks so many at a time form a cluster, with so many bytes of shared memory each.

        One that is `early` may begin before the kernel that was started before it has ended, and waits for that itself
        (nbloss.cuda.threads.wait_for_last) before it reads what that writes, or writes anything.
        """
        with self._memory.on(self.number):
            launch = self._memory.Launch(kernel, blocks, threads, self.number, arguments, cluster, early, shared)
            launch.start(self.stream)

    def converted(self, view: DeviceView, dtype: np.dtype[Any]) -> DeviceView:
        """A contiguous copy of another dtype."""
        from nbloss.cuda import auxiliary  # not above: only conversions need its kernels

        result: DeviceView = auxiliary.converted(view, dtype)
        return result

    def dlpack(self, view: DeviceView, **options: Any) -> object:
        return self._memory.dlpack(view, **options)


def stream_pointer(stream: object) -> int:
    """The address of a CUDA stream: an int, or a stream of Numba, CuPy, PyTorch, cuda.core or ``__cuda_stream__``."""
    if stream is None:
        return 0
    if hasattr(stream, "__index__") and not isinstance(stream, bool):
        pointer = operator.index(stream)
        if pointer < 0:
            raise ValueError(f"stream must be the address of a CUDA stream, got {pointer}")
        return pointer
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr", "handle"):
        found: Any = getattr(stream, name, None)
        if found is not None:
            return int(getattr(found, "value", found) or 0)
    raise TypeError(f"stream must be an integer or a CUDA stream, got {type(stream).__name__}")


def layout_of(name: str, value: Any, stream: int) -> Layout:
    """How a user's device array lies in memory; `stream` waits for what is under way there."""
    if isinstance(value, DeviceArray):
        memory().order(value.device, value.stream, stream)
        return value.layout
    try:
        layout: Layout = memory().layout_of(value, stream)
    except Exception as error:  # each library refuses in its own way
        raise TypeError(f"{name} cannot be taken from its device: {_line(error)}") from None
    dtype = layout.dtype
    return layout._replace(dtype=bfloat16()) if dtype.kind == "V" and dtype.itemsize == 2 else layout


def arrived(name: str, value: Any, layout: Layout, home: Home) -> DeviceView:
    """A user's device array as a view."""
    address, shape, strides, dtype, read_only, _, keeper = layout
    if not dtype.isnative:
        raise TypeError(f"{name} must be of the machine's byte order on a device, got {dtype}")
    home.check_dtype(name, dtype)
    if address % dtype.alignment or any(step % dtype.alignment for step in strides or ()):
        raise ValueError(
            f"{name} must be aligned: its address and strides must be multiples of {dtype.alignment} bytes"
        )
    return view_at(address, shape, strides, dtype, read_only, home, keeper, value)
