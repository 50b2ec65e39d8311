"""Device memory, streams and launches, through cuda.core and Numba. Nothing else in nbloss talks to a device, and only
this module imports CUDA's packages.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import threading
from array import array
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import LEGACY_DEFAULT_STREAM, Buffer, Device, Stream
from cuda.core.utils import StridedMemoryView
from numba import cuda

from nbloss.cuda.arrays import DLPACK_CUDA, Layout, call_bfloat16, parameters
from nbloss.problem import bfloat16

LEGACY_STREAM = 1  # what the legacy default stream, 0, is called in DLPack
TENSOR_DTYPES = {"float16", "float32", "float64", "bool"} | {f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}
CURRENT = contextlib.nullcontext()
PACKED = {np.float32: "f4x", np.float64: "d", float: "d"}  # in eight bytes each; all others are integers
SUCCESS, ATTRIBUTE = driver.CUresult.CUDA_SUCCESS, driver.CUfunction_attribute


def device_names() -> list[str]:
    return [gpu.name.decode() if isinstance(gpu.name, bytes) else str(gpu.name) for gpu in cuda.gpus]


def current_device() -> int:
    number: int = cuda.get_current_device().id
    return number


def layout_of(value: Any, stream: int) -> Layout:
    """How an array lies in memory.

    Work that its library has under way on another stream is waited for by `stream`.
    """
    torch = sys.modules.get("torch")
    layout = _layout_of_tensor(torch, value, stream) if torch is not None and type(value) is torch.Tensor else None
    if layout is not None:
        return layout
    with on(_device_of(value)):
        view = StridedMemoryView.from_any_interface(value, stream_ptr=stream or LEGACY_STREAM)
    dtype = np.dtype(view.dtype)
    strides = None if view.strides is None else tuple(n * dtype.itemsize for n in view.strides)
    return Layout(int(view.ptr), tuple(view.shape), strides, dtype, bool(view.readonly), view.device_id, view)


def _layout_of_tensor(torch: Any, tensor: Any, stream: int) -> Layout | None:
    """`layout_of` a plain tensor of PyTorch, whose DLPack takes 5 µs; None for what that is to take or refuse."""
    dtype = _dtype_of(tensor.dtype)
    if dtype is None or not tensor.is_cuda or tensor.layout is not torch.strided:
        return None
    address, number, size = tensor.data_ptr(), tensor.get_device(), dtype.itemsize
    if tensor.requires_grad or tensor.is_neg() or not address:
        return None
    order(number, torch._C._cuda_getCurrentRawStream(number), stream)
    strides = tuple([n * size for n in tensor.stride()])
    return Layout(address, tuple(tensor.shape), strides, dtype, False, number, tensor)


def stream_of(value: Any) -> int | None:
    """The stream that an array's library works on now, if that is known; Numba's memory is free when all is done."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return int(torch._C._cuda_getCurrentRawStream(value.get_device()))
    library = type(value).__module__.partition(".")[0]
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return 0 if library == "numba" else None


@cache
def _dtype_of(dtype: Any) -> np.dtype[Any] | None:
    """The dtype of a dtype of PyTorch."""
    name = str(dtype).removeprefix("torch.")
    return bfloat16() if name == "bfloat16" else np.dtype(name) if name in TENSOR_DTYPES else None


def _device_of(value: Any) -> int:
    ask = getattr(value, "__dlpack_device__", None)
    if ask is not None:
        return int(ask()[1])
    address = value.__cuda_array_interface__["data"][0]
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, number = driver.cuPointerGetAttribute(attribute, address)
    return int(number) if error == SUCCESS else current_device()


def check_stream(number: int, stream: int) -> None:
    """Raise if the stream is not one of this device."""
    if stream <= 2:  # the default streams belong to every device
        return
    error, context = driver.cuStreamGetCtx(stream)
    if error == SUCCESS and int(context) == _primary_context(number):
        return
    actual = Stream.from_handle(stream).device.device_id
    if actual != number:
        raise ValueError(f"stream must be one of device {number}, where the arrays are, got one of device {actual}")


@lru_cache(64)
def _stream(stream: int) -> Any:
    return Stream.from_handle(stream) if stream else LEGACY_DEFAULT_STREAM


def allocate(number: int, size: int, stream: int) -> tuple[int, object]:
    """(address, owner) of new memory from the device's pool, given back in the order of the stream."""
    with on(number):
        buffer = Device(number).memory_resource.allocate(max(size, 1), stream=_stream(stream))
    return int(buffer.handle), buffer


@cache
def _primary_context(number: int) -> int:
    return int(cuda.gpus[number].get_primary_context().handle)


def on(number: int) -> Any:
    """Work on a device, whose context is made current where it is not: 0.3 µs where it is, 5 µs where it is not."""
    primary = _primary_context(number)  # first, for until Numba has asked for a device, CUDA may not be initialised
    _, context = driver.cuCtxGetCurrent()
    return CURRENT if int(context) == primary else cuda.gpus[number]


def _checked(result: tuple[Any, ...]) -> None:
    if result[0] != SUCCESS:
        raise RuntimeError(f"the CUDA driver says {result[0].name}")


def copy_to_host(destination: int, address: int, size: int, number: int, stream: int) -> None:
    """Copy, and wait until the copy is there."""
    with on(number):
        _checked(driver.cuMemcpyDtoHAsync(destination, address, size, stream))
        _checked(driver.cuStreamSynchronize(stream))


def copy_to_device(address: int, source: int, size: int, number: int, stream: int) -> None:
    """Copy; the source may change as soon as this returns, for the driver has staged what is not page-locked."""
    with on(number):
        _checked(driver.cuMemcpyHtoDAsync(address, source, size, stream))


def wait(number: int, stream: int) -> None:
    """Wait until all that was started on the stream is done."""
    with on(number):
        _checked(driver.cuStreamSynchronize(stream))


def clear(address: int, size: int, number: int, stream: int) -> None:
    """Fill memory with zeros."""
    with on(number):
        _checked(driver.cuMemsetD8Async(address, 0, size, stream))


_loaded: dict[tuple[Any, int], tuple[Any, struct.Struct]] = {}


def _load(kernel: Any, number: int, arguments: tuple[Any, ...], shared: int) -> tuple[Any, struct.Struct]:
    """Compile a kernel for a device, for arguments of these types: a kernel is never given others.

    One that asks for `shared` memory at its launch may have as much as there is.
    """
    from nbloss.cuda.compile import own_way  # not above: there is no compiler where the simulator is tested

    with on(number), own_way():
        (compiled,) = kernel.specialize(*arguments).overloads.values()
        handle = int(compiled.library.get_cufunc().handle)
        if shared:
            _let_share(driver.CUkernel(handle), number)
        function = driver.CUfunction(handle)
    packed = struct.Struct("".join(PACKED.get(type(n), "q") for n in parameters(arguments)))
    _loaded[kernel, number] = function, packed
    return function, packed


def _let_share(kernel: Any, number: int) -> None:
    """Let a kernel ask for all the shared memory there is beside what it declares."""
    device = driver.CUdevice(number)
    error, declared = driver.cuKernelGetAttribute(ATTRIBUTE.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel, device)
    _checked((error,))
    for attribute, value in (
        (ATTRIBUTE.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes(number) - declared),
        (ATTRIBUTE.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # percent
    ):
        _checked(driver.cuKernelSetAttribute(attribute, value, kernel, device))


class Launch:
    """A kernel and its parameters, to be started again on any stream with other addresses.

    `moved` says which parameters are addresses: number of the parameter, number of the base that it is counted from,
    and bytes from there. Numba compiles the kernel, and gives each number of a tuple a parameter of its own; its own
    launch would take 20 to 40 µs more.
    """

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
        self._function, packed = _loaded.get((kernel, number)) or _load(kernel, number, arguments, shared)
        self._numbers = array("q", packed.pack(*parameters(arguments)))
        first, count = self._numbers.buffer_info()
        self._places = array("Q", range(first, first + 8 * count, 8))
        self._places_at, _ = self._places.buffer_info()
        self._moved = moved
        self._configuration = _configuration(blocks, threads, cluster, early, shared)
        self._lock = threading.Lock()

    def start(self, stream: int, bases: Sequence[int] = ()) -> None:
        """Start the kernel, in the context of its device; the driver copies the parameters before this returns."""
        with self._lock:
            numbers = self._numbers
            for parameter, base, offset in self._moved:
                numbers[parameter] = bases[base] + offset
            self._configuration.hStream = stream or LEGACY_STREAM
            _checked(driver.cuLaunchKernelEx(self._configuration, self._function, self._places_at, 0))


KIND = driver.CUlaunchAttributeID


def _attribute(kind: Any) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = kind
    return attribute


def _configuration(blocks: int, threads: int, cluster: int, early: bool, shared: int) -> Any:
    configuration = driver.CUlaunchConfig()
    configuration.sharedMemBytes = shared
    configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = blocks, 1, 1
    configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = threads, 1, 1
    attributes = []
    if cluster > 1:
        attributes.append(_attribute(KIND.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION))
        dimension = attributes[-1].value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
    if early:
        attributes.append(_attribute(KIND.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION))
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if attributes:
        configuration.attrs, configuration.numAttrs = attributes, len(attributes)
    return configuration


@cache
def capability(number: int) -> tuple[int, int]:
    """The device's compute capability."""
    major, minor = Device(number).compute_capability
    return major, minor


@cache
def shared_bytes(number: int) -> int:
    """How many bytes of shared memory a block may have."""
    return int(Device(number).properties.max_shared_memory_per_block_optin)


def order(number: int, first: int, then: int) -> None:
    """Let what is started on stream `then` from now on wait for what stream `first` has under way."""
    if (first or LEGACY_STREAM) == (then or LEGACY_STREAM):
        return
    with on(number):
        error, event = driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        _checked((error,))
        try:
            _checked(driver.cuEventRecord(event, first))
            _checked(driver.cuStreamWaitEvent(then, event, 0))
        finally:
            _checked(driver.cuEventDestroy(event))


def dlpack(
    view: Any,
    *,
    stream: int | None = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> object:
    """A DLPack capsule of device memory that nbloss owns; the consumer's stream waits for ours."""
    number = view.home.number
    if copy or (dl_device is not None and tuple(dl_device) != (DLPACK_CUDA[0], number)):
        raise BufferError("nbloss shares its arrays where they are, without a copy")
    if stream != -1:
        order(number, view.home.stream, stream or LEGACY_STREAM)
    strides = tuple(step // view.dtype.itemsize for step in view.strides)
    bfloat16 = view.dtype.kind == "V"
    dtype = np.dtype(np.uint16) if bfloat16 else view.dtype
    with on(number):
        # Of all that the keeper holds, the view's part; the view holds the stream too, on which it is given back.
        memory = Buffer.from_handle(view.address, max(view.nbytes, 1), owner=view)
        shared = StridedMemoryView.from_buffer(memory, shape=view.shape, strides=strides, dtype=dtype)
        capsule: object = shared.__dlpack__(max_version=max_version)
    if bfloat16:
        call_bfloat16(capsule)
    return capsule
