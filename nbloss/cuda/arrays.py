"""Device memory as seen from the host. Nothing here imports CUDA.

Inside nbloss, device memory is a `DeviceView`: a NumPy view whose data pointer is a device address. NumPy's own
algebra of shapes and strides (transpose, reshape, broadcast, overlap) then serves both backends, and no element is ever
read through it. What a user receives is a `DeviceArray`, which other libraries take without a copy.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nbloss.problem import Array, DeviceMemory

if TYPE_CHECKING:
    from nbloss.cuda.device import Home

DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
DLPACK_BFLOAT16 = 4


class Layout(NamedTuple):
    """Where and how an array lies in device memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in bytes; None: contiguous
    dtype: np.dtype[Any]
    read_only: bool
    number: int  # of the device
    keeper: object  # what holds the memory


def extent(address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> tuple[int, int]:
    """Where the memory of an array begins, and where it ends."""
    if strides is None:
        return address, address + math.prod(shape) * itemsize
    reach = [(n - 1) * step for n, step in zip(shape, strides)]
    return address + sum(r for r in reach if r < 0), address + sum(r for r in reach if r > 0) + itemsize


_ON_HOST = {np.ndarray, list, tuple, int, float, str, bool, type(None)}  # what is not worth asking


def on_device(value: object) -> bool:
    """Whether an argument is an array on a CUDA device."""
    if type(value) in _ON_HOST:
        return False
    if getattr(value, "is_cuda", False) is True:  # of PyTorch, whose DLPack takes 2 µs to say so
        return True
    if getattr(value, "is_cpu", False) is True:
        return False
    ask = getattr(value, "__dlpack_device__", None)
    if ask is not None:
        try:
            return ask()[0] in DLPACK_CUDA
        except Exception:  # whatever a library raises for an array that is nowhere
            return False
    return hasattr(value, "__cuda_array_interface__")


class DeviceView(DeviceMemory):
    """Shape, strides, dtype and address of device memory; its elements cannot be read from the host."""

    home: Home  # the device and the stream
    source: object = None  # the user's array, if this is one
    keeper: object = None  # what holds the memory
    _address: int | None = None

    __array_ufunc__ = None  # type: ignore[assignment]  # arithmetic would read device memory from the host

    def __array_finalize__(self, source: object) -> None:
        if isinstance(source, DeviceView):
            # The keeper first: attributes go in this order, and memory is given back on a stream that `home` keeps.
            self.keeper, self.home, self.source = source.keeper, source.home, source.source

    @property
    def address(self) -> int:
        """Where the first element lies."""
        if self._address is None:
            self._address = self.__array_interface__["data"][0]
        return self._address

    def astype(self, dtype: Any, *_: object, copy: bool = True, **__: object) -> DeviceView:  # type: ignore[override]
        """A contiguous array of another dtype, converted on the device; the same one where nothing changes."""
        if not copy and self.dtype == dtype and self.flags.c_contiguous:
            return self
        return self.home.converted(self, np.dtype(dtype))

    def reshape(self, *shape: Any, **_: object) -> DeviceView:  # type: ignore[override]
        """A view of another shape; of a copy made on the device, where strides allow none."""
        try:
            # Without copy=False, NumPy reads what it would have to copy.
            view: DeviceView = np.ndarray.reshape(self, *shape, copy=False)
            return view
        except ValueError:
            if self.flags.c_contiguous:
                raise
            return self.astype(self.dtype).reshape(*shape)

    def _not_a_number(self, *_: object) -> Any:
        raise TypeError("an array on a device is not a number of the host")

    __float__ = __int__ = __index__ = __bool__ = __complex__ = item = tolist = _not_a_number

    def __repr__(self) -> str:
        return f"DeviceView(shape={self.shape}, dtype={self.dtype})"


# All memory, of which no byte is read: NumPy lays a view over a part of it five times faster than over an address.
EVERYTHING: Any = (ctypes.c_char * (1 << 62)).from_address(1)


def view_at(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    read_only: bool,
    home: Home,
    keeper: object,
    source: object = None,
) -> DeviceView:
    """A view of the device memory at an address."""
    view: DeviceView = DeviceView(shape, dtype, EVERYTHING, max(address, 1) - 1, strides)
    if read_only:
        view.flags.writeable = False
    view.keeper, view.home, view.source, view._address = keeper, home, source, address
    return view


def parameters(arguments: Iterable[Any]) -> list[Any]:
    """The numbers that a kernel is given, those in tuples one by one."""
    numbers: list[Any] = []
    for argument in arguments:
        if type(argument) is tuple:
            numbers += argument
        else:
            numbers.append(argument)
    return numbers


def delivered(array: Any) -> Any:
    """A result as the user receives it: their own array, where they gave one to write into."""
    if not isinstance(array, DeviceView):
        return array
    if array.source is not None:
        return array.source
    home = array.home
    layout = Layout(array.address, array.shape, array.strides, array.dtype, False, home.number, array.keeper)
    return DeviceArray(layout, home)


class DeviceArray:
    """An array on a CUDA device, as nbloss returns it.

    CuPy, PyTorch, JAX and Numba take it without a copy (``__dlpack__``, ``__cuda_array_interface__``);
    `copy_to_host`, ``np.asarray`` and, for one element, ``float`` wait for the device and copy it to the host.
    """

    def __init__(self, layout: Layout, home: Home) -> None:
        # In this order they go, and memory is given back on a stream that `home` keeps.
        self.layout, self._home = layout, home

    @cached_property
    def _view(self) -> DeviceView:
        address, shape, strides, dtype, read_only, _, keeper = self.layout
        return view_at(address, shape, strides, dtype, read_only, self._home, keeper)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._view.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next along each axis."""
        return self._view.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._view.dtype

    @property
    def ndim(self) -> int:
        return self._view.ndim

    @property
    def size(self) -> int:
        return self._view.size

    @property
    def nbytes(self) -> int:
        return self._view.nbytes

    @property
    def device(self) -> int:
        """Number of the device."""
        return self._home.number

    def __len__(self) -> int:
        return len(self._view)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        view = self._view
        return {
            "version": 3,
            "shape": view.shape,
            "strides": None if view.flags.c_contiguous else view.strides,
            "typestr": view.dtype.str,
            "data": (view.address if view.size else 0, False),
            "stream": self._home.stream or 1,  # 1: the legacy default stream
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_CUDA[0], self.device

    def __dlpack__(self, **options: Any) -> object:
        return self._home.dlpack(self._view, **options)

    @property
    def stream(self) -> int:
        """Address of the stream that computes it; 0 is the legacy default stream."""
        return self._home.stream

    def copy_to_host(self) -> Array:
        """The elements as a NumPy array, once the device has computed them."""
        return self._home.download(self._view)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array on a device cannot be read without a copy")
        host = self.copy_to_host()
        return host if dtype is None else host.astype(dtype)

    def item(self) -> Any:
        """The one element, as a Python scalar."""
        return self.copy_to_host().item()

    def __float__(self) -> float:
        return float(self.item())

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device})"


def call_bfloat16(capsule: object) -> None:
    """Let a DLPack capsule of 16-bit integers say bfloat16, which cuda.core does not export (dlpack.h, version 1.0)."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    name = api.PyCapsule_GetName(capsule)
    # A versioned capsule has version, context, deleter and flags before its DLTensor: 4 times 8 bytes. In there, data
    # (8), device (8) and the number of axes (4) come before the code of the dtype.
    tensor = api.PyCapsule_GetPointer(capsule, name) + (32 if name == b"dltensor_versioned" else 0)
    ctypes.c_uint8.from_address(tensor + 20).value = DLPACK_BFLOAT16
