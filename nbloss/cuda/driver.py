"""Device memory, streams and launches, through cuda.core and Numba. Nothing else in nbloss talks to a device."""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from typing import Any

import numpy as np

Layout = tuple[int, tuple[int, ...], "tuple[int, ...] | None", "np.dtype[Any]", bool, int, object]

LEGACY_STREAM = 1  # what the legacy default stream, 0, is called in DLPack
INSTALL = "pip install 'nbloss[cu13]', or 'nbloss[cu12]' for a CUDA 12 driver"


@cache
def why_not() -> str | None:
    """Why no device can be used, or None."""
    for module in ("numba_cuda", "cuda"):
        if importlib.util.find_spec(module) is None:
            return f"numba-cuda is not installed: {INSTALL}"
    try:
        from cuda.core import Device
        from numba import cuda
    except ImportError as error:
        return f"{_line(error)}: {INSTALL}"
    if getattr(cuda, "implementation", None) != "NVIDIA":
        return f"Numba's built-in CUDA target is deprecated, and numba-cuda did not take its place: {INSTALL}"
    try:
        Device(0).set_current()
        cuda.current_context()
    except Exception as error:  # whatever the driver, its absence or its version raises
        return f"no usable CUDA device or driver ({_line(error)})"
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def device_names() -> list[str]:
    from numba import cuda

    return [gpu.name.decode() if isinstance(gpu.name, bytes) else str(gpu.name) for gpu in cuda.gpus]


def current_device() -> int:
    from numba import cuda

    number: int = cuda.get_current_device().id
    return number


def layout_of(value: Any, stream: int) -> Layout:
    """(address, shape, strides in bytes, dtype, whether it is read-only, device, owner) of an array.

    Work that its library has under way on another stream is waited for by `stream`.
    """
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_any_interface(value, stream_ptr=stream or LEGACY_STREAM)
    dtype = np.dtype(view.dtype)
    strides = None if view.strides is None else tuple(n * dtype.itemsize for n in view.strides)
    return int(view.ptr), tuple(view.shape), strides, dtype, bool(view.readonly), view.device_id, view


def check_stream(number: int, stream: int) -> None:
    """Raise if the stream is not one of this device."""
    if stream <= 2:  # the default streams belong to every device
        return
    from cuda.core import Stream

    actual = Stream.from_handle(stream).device.device_id
    if actual != number:
        raise ValueError(f"stream must be one of device {number}, where the arrays are, got one of device {actual}")


@cache
def _stream(stream: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(stream) if stream else LEGACY_DEFAULT_STREAM


@cache
def _numba_stream(stream: int) -> Any:
    from numba import cuda

    return cuda.external_stream(stream) if stream else 0


def allocate(number: int, size: int, stream: int) -> tuple[int, object]:
    """(address, owner) of new memory from the device's pool, given back in the order of the stream."""
    from cuda.core import Device

    with _on(number):
        owner = Device(number)
        owner.set_current()  # the context is current, but cuda.core wants to be told
        buffer = owner.allocate(max(size, 1), stream=_stream(stream))
    return int(buffer.handle), buffer


def _on(number: int) -> Any:
    from numba import cuda

    return cuda.gpus[number]


def _checked(result: tuple[Any, ...]) -> None:
    from cuda.bindings import driver

    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver says {result[0].name}")


def copy_to_host(destination: int, address: int, size: int, number: int, stream: int) -> None:
    """Copy, and wait until the copy is there."""
    from cuda.bindings import driver

    with _on(number):
        _checked(driver.cuMemcpyDtoHAsync(destination, address, size, stream))
        _checked(driver.cuStreamSynchronize(stream))


def copy_to_device(address: int, source: int, size: int, number: int, stream: int) -> None:
    """Copy; the source may change as soon as this returns, for the driver has staged what is not page-locked."""
    from cuda.bindings import driver

    with _on(number):
        _checked(driver.cuMemcpyHtoDAsync(address, source, size, stream))


def clear(address: int, size: int, number: int, stream: int) -> None:
    """Fill memory with zeros."""
    from cuda.bindings import driver

    with _on(number):
        _checked(driver.cuMemsetD8Async(address, 0, size, stream))


@lru_cache(1024)
def _configured(kernel: Any, blocks: int, threads: int, number: int, stream: int) -> Any:
    return kernel[blocks, threads, _numba_stream(stream)]


def launch(kernel: Any, blocks: int, threads: int, number: int, stream: int, arguments: tuple[Any, ...]) -> None:
    """Start a kernel."""
    with _on(number):
        _configured(kernel, blocks, threads, number, stream)(*arguments)


@cache
def has_bfloat16(number: int) -> bool:
    """Whether the device converts to bfloat16 (compute capability 8.0)."""
    from cuda.core import Device

    return tuple(Device(number).compute_capability) >= (8, 0)


def dlpack(view: Any, **options: Any) -> object:
    """A DLPack capsule of device memory that nbloss owns."""
    from cuda.core.utils import StridedMemoryView

    strides = tuple(step // view.dtype.itemsize for step in view.strides)
    shared = StridedMemoryView.from_buffer(view.keeper, shape=view.shape, strides=strides, dtype=view.dtype)
    return shared.__dlpack__(**options)
