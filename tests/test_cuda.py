"""Arrays on a device: what goes in, what comes out, and what is refused. Run with NUMBA_ENABLE_CUDASIM=1 or a GPU."""

import collections
import functools

import ml_dtypes
import numpy as np
import pytest
import reference
import scipy.special
from conftest import CUDA, POINTWISE, SIMULATED, close, few

import nbloss
from nbloss.cuda import choices, device
from nbloss.cuda.arrays import DeviceArray, call_bfloat16
from nbloss.cuda.device import Home

pytestmark = pytest.mark.skipif(not CUDA, reason="needs NUMBA_ENABLE_CUDASIM=1, or a GPU and NBLOSS_TEST_CUDA=1")


class Foreign:
    """An array of another library: device memory behind __cuda_array_interface__."""

    def __init__(self, array, read_only=False, number=0):
        self._whole = Home(0, 0).upload(whole(array).ravel(order="K").view(np.uint8))
        self.device = number
        offset = array.__array_interface__["data"][0] - whole(array).__array_interface__["data"][0]
        self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
            "data": (self._whole.address + offset, read_only),
            "stream": None,
        }

    def host(self):
        raw = Home(0, 0).download(self._whole)
        offset = self.__cuda_array_interface__["data"][0] - self._whole.address
        return np.ndarray(self.shape, self.dtype, raw.tobytes(), offset, self.strides)


def whole(array):
    """The array that owns the memory of a view."""
    return array if array.base is None else whole(array.base)


LAYOUTS = {
    "contiguous": lambda x: x.copy(),
    "fortran": lambda x: np.asfortranarray(x).copy(order="F"),
    "strided": lambda x: np.repeat(x, 2, axis=-1).copy()[..., ::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "padded": lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 2)])[..., 1:-2],
}
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 140), (2, 5, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy(rng, layout, shape, dtype):
    x = LAYOUTS[layout](rng.standard_normal(shape).astype(dtype))
    labels = rng.integers(0, shape[1], np.delete(shape, 1))
    expected = reference.cross_entropy(x, labels)
    logits, target = Foreign(x), Foreign(labels)
    loss, gradient = nbloss.cross_entropy.value_and_grad(logits, target)
    assert isinstance(loss, DeviceArray)
    assert isinstance(gradient, DeviceArray)
    assert (loss.shape, gradient.shape, gradient.dtype) == ((), shape, np.dtype(dtype))
    assert loss.dtype == (np.float64 if dtype == "float64" else np.float32)
    close(loss, expected[0], "float64" if dtype == "float64" else "float32", scale=4)
    close(gradient.copy_to_host(), expected[1], dtype)
    np.testing.assert_array_equal(logits.host(), x)
    out = Foreign(LAYOUTS[layout](np.zeros(shape, dtype)))
    assert nbloss.cross_entropy.grad(logits, target, out=out) is out
    np.testing.assert_array_equal(out.host(), gradient.copy_to_host())
    assert nbloss.cross_entropy.grad(logits, target, out=logits) is logits
    np.testing.assert_array_equal(logits.host(), gradient.copy_to_host())


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise(rng, layout, name):
    x, t = rng.random((5, 9), np.float32), rng.random((5, 9), np.float32)
    weight = rng.random(9)
    expected = getattr(reference, name)(x, t, weight=weight)
    loss, gradient = getattr(nbloss, name).value_and_grad(
        Foreign(LAYOUTS[layout](x)), Foreign(t), weight=Foreign(weight)
    )
    close(loss, expected[0], np.float32)
    close(gradient, expected[1], np.float32)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("columns", [3, 16, 21])
def test_pointwise_kernels_agree(rng, columns, dtype):
    """Vectors, single elements and rows that lie apart give the same bits; blocks of several vectors a thread too."""
    x, t = rng.standard_normal((33, columns)).astype(dtype), rng.random((33, columns)).astype(dtype)
    weight = rng.random(columns).astype("float64" if dtype == "float64" else "float32")
    options = {"weight": Foreign(weight), "pos_weight": 3.0}
    bce = nbloss.binary_cross_entropy_with_logits.value_and_grad
    whole = [
        [np.asarray(a) for a in bce(Foreign(LAYOUTS[layout](x)), Foreign(t), **options)]
        for layout in ("contiguous", "padded", "strided")
    ]
    apart = np.empty(x.size + 1, dtype)[1:].reshape(x.shape)
    apart[...] = x
    whole.append([np.asarray(a) for a in bce(Foreign(apart), Foreign(t), **options)])
    for loss, gradient in whole[1:]:
        assert loss.tobytes() == whole[0][0].tobytes()
        np.testing.assert_array_equal(gradient, whole[0][1])
    expected = reference.binary_cross_entropy_with_logits(x, t, weight=weight, pos_weight=3.0)
    close(whole[0][0], expected[0], np.float64 if dtype == "float64" else np.float32)
    close(whole[0][1], expected[1], dtype)


def test_numbers_may_come_from_the_host(rng):
    x, t = rng.standard_normal((3, 4)), rng.random((3, 4))
    expected = reference.binary_cross_entropy_with_logits(x, t, pos_weight=3.0, grad_output=0.5)
    given = Foreign(x), Foreign(t)
    loss, gradient = nbloss.binary_cross_entropy_with_logits.value_and_grad(*given, 0.5, pos_weight=3.0)
    close(loss, expected[0])
    close(gradient, expected[1])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_grad_output_on_the_device(rng, reduction):
    x, labels = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    factor = rng.random(6) if reduction == "none" else np.array(3.0)
    expected = reference.cross_entropy(x, labels, grad_output=factor, reduction=reduction)[1]
    gradient = nbloss.cross_entropy.grad(Foreign(x), Foreign(labels), Foreign(factor), reduction=reduction)
    close(gradient, expected)


def test_row_functions(rng):
    x = rng.standard_normal((4, 6, 5))
    for axis in (-1, 1, (0, 2), None):
        close(nbloss.logsumexp(Foreign(x), axis=axis), np.log(np.exp(x).sum(axis=axis)))
    for axis in (-1, 0):
        e = np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)
        close(nbloss.softmax(Foreign(x), axis=axis), e)
        close(nbloss.log_softmax(Foreign(x), axis=axis), np.log(e))
    assert nbloss.softmax(Foreign(np.array(2.0))).shape == ()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_label_dtypes(rng, dtype):
    x, labels = rng.standard_normal((6, 5)), rng.integers(0, 2, 6).astype(dtype)
    expected = reference.cross_entropy(x, labels)[0]
    close(nbloss.cross_entropy(Foreign(x), Foreign(labels)), expected)


def test_targets_of_other_dtypes(rng):
    x = rng.random((3, 4), np.float32)
    for target in (rng.integers(0, 2, (3, 4)), rng.random((3, 4)), rng.random((3, 4)).astype("float16")):
        close(nbloss.mse_loss(Foreign(x), Foreign(target)), reference.mse_loss(x, target)[0], np.float32)
    half = x.astype("float16")
    probabilities = rng.random((3, 4))
    close(
        nbloss.cross_entropy(Foreign(half), Foreign(probabilities)),
        reference.cross_entropy(half, probabilities)[0],
        np.float32,
    )


def test_empty_arrays():
    none = Foreign(np.empty((0, 3)))
    loss, gradient = nbloss.cross_entropy.value_and_grad(none, Foreign(np.empty(0, int)))
    assert np.isnan(float(loss))
    assert gradient.shape == (0, 3)
    assert float(nbloss.mse_loss(none, none, reduction="sum")) == 0
    assert nbloss.logsumexp(Foreign(np.empty((2, 0)))).copy_to_host().tolist() == [-np.inf] * 2


def test_results_are_arrays_for_other_libraries(rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    gradient = nbloss.cross_entropy.grad(Foreign(x), Foreign(np.zeros(3, int)))
    interface = gradient.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["strides"]) == ((3, 4), "<f4", None)
    assert gradient.__dlpack_device__() == (2, 0)
    assert (gradient.ndim, gradient.size, gradient.nbytes, len(gradient)) == (2, 12, 48, 3)
    assert "DeviceArray" in repr(gradient)
    again = nbloss.mse_loss(gradient, gradient)  # and nbloss takes them itself
    assert float(again) == 0
    assert np.asarray(gradient, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        gradient.__array__(copy=False)
    if SIMULATED:
        with pytest.raises(BufferError):
            gradient.__dlpack__()


LOGITS, MANY = (5, 6), (80, 6)
OPERATIONS = {  # what a call asks of the device: kernels, memory cleared, copies that are waited for
    "cross-entropy": (lambda x, t: nbloss.cross_entropy(x, t), LOGITS, (2, 0, 1)),
    "its gradient too": (lambda x, t: nbloss.cross_entropy.value_and_grad(x, t), LOGITS, (3, 0, 1)),
    "unchecked": (lambda x, t: nbloss.cross_entropy.value_and_grad(x, t, check=False), LOGITS, (3, 0, 0)),
    "its gradient alone": (lambda x, t: nbloss.cross_entropy.grad(x, t, check=False), LOGITS, (2, 0, 0)),
    "of each row": (lambda x, t: nbloss.cross_entropy(x, t, reduction="none", check=False), LOGITS, (1, 0, 0)),
    "of more rows than a cluster adds": (lambda x, t: nbloss.cross_entropy(x, t, check=False), MANY, (3, 0, 0)),
    "softmax": (lambda x, t: nbloss.softmax(x), LOGITS, (1, 0, 0)),
    "mean squared error": (lambda x, t: nbloss.mse_loss.value_and_grad(x, x), LOGITS, (2, 0, 0)),
    "weighted": (lambda x, t: nbloss.mse_loss.value_and_grad(x, x, weight=x), LOGITS, (3, 0, 0)),
    "BCE's gradient": (lambda x, t: nbloss.binary_cross_entropy_with_logits.grad(x, x), LOGITS, (1, 0, 0)),
    "BCE of probabilities": (lambda x, t: nbloss.binary_cross_entropy(x, x), LOGITS, (2, 1, 1)),
    "in place": (lambda x, t: nbloss.binary_cross_entropy.value_and_grad(x, t, out=x), LOGITS, (3, 1, 1)),
}


@pytest.mark.skipif(not SIMULATED, reason="counts what reaches the simulator")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_a_call(monkeypatch, name):
    call, shape, expected = OPERATIONS[name]
    x = Foreign(np.full(shape, 0.5, np.float32))
    t = Foreign(np.full(shape, 0.5, np.float32) if name == "in place" else np.zeros(shape[0], int))
    count = collections.Counter()
    for operation in ("launch", "clear", "copy_to_host"):
        do = getattr(device.memory(), operation)
        counted = functools.partial(lambda do, operation, *args: (count.update([operation]), do(*args)), do, operation)
        monkeypatch.setattr(device.memory(), operation, counted)
    call(x, t)
    assert tuple(count[n] for n in ("launch", "clear", "copy_to_host")) == expected


class TestRefusals:
    def arguments(self, rng):
        return rng.standard_normal((4, 3)), np.array([0, 2, 1, 0])

    def test_labels(self, rng):
        x, labels = self.arguments(rng)
        labels[2] = 3
        logits = Foreign(x)
        for call in (nbloss.cross_entropy, nbloss.cross_entropy.value_and_grad, nbloss.nll_loss.grad):
            with pytest.raises(IndexError, match=r"target\[2\] is 3: class indices must be in \[0, 3\)"):
                call(logits, Foreign(labels))
        for loss in (nbloss.cross_entropy, nbloss.nll_loss):
            with pytest.raises(IndexError, match=r"target\[2\] is 3"):
                loss.grad(logits, Foreign(labels), out=logits)
            np.testing.assert_array_equal(logits.host(), x)
        loss, gradient = nbloss.cross_entropy.value_and_grad(logits, Foreign(labels), reduction="none", check=False)
        np.testing.assert_array_equal(np.isnan(loss), [False, False, True, False])
        np.testing.assert_array_equal(gradient.copy_to_host()[2], [0, 0, 0])

    def test_probabilities(self, rng):
        p = rng.random((4, 3))
        p[1, 2] = 1.5
        probs, target = Foreign(p), Foreign(rng.random((4, 3)))
        message = r"probs must be in \[0, 1\], got probs\[1, 2\] = 1.5"
        with pytest.raises(ValueError, match=message):
            nbloss.binary_cross_entropy(probs, target)
        with pytest.raises(ValueError, match=message):
            nbloss.binary_cross_entropy.value_and_grad(probs, target, out=probs)
        np.testing.assert_array_equal(probs.host(), p)

    def test_host_and_device(self, rng):
        x, labels = self.arguments(rng)
        place = "must be where the input is: both on the host, or both on one device"
        for given in ((Foreign(x), labels), (x, Foreign(labels))):
            with pytest.raises(TypeError, match=f"target {place}"):
                nbloss.cross_entropy(*given)
        with pytest.raises(TypeError, match=f"weight {place}"):
            nbloss.cross_entropy(Foreign(x), Foreign(labels), weight=np.ones(3))
        with pytest.raises(TypeError, match=f"out {place}"):
            nbloss.cross_entropy.grad(Foreign(x), Foreign(labels), out=np.empty_like(x))
        with pytest.raises(TypeError, match=f"out {place}"):
            nbloss.cross_entropy.grad(x, labels, out=Foreign(x))
        with pytest.raises(TypeError, match=f"grad_output {place}"):
            nbloss.cross_entropy.grad(Foreign(x), Foreign(labels), np.ones(4), reduction="none")
        with pytest.raises(TypeError, match="backend='cpu' takes arrays on the host"):
            nbloss.cross_entropy(Foreign(x), Foreign(labels), backend="cpu")

    @pytest.mark.skipif(not SIMULATED, reason="needs a second device")
    def test_devices(self, rng):
        x, labels = self.arguments(rng)
        with pytest.raises(TypeError, match="target must be where the input is"):
            nbloss.cross_entropy(Foreign(x), Foreign(labels, number=1))
        with pytest.raises(TypeError, match="out must be where the input is"):
            nbloss.cross_entropy.grad(Foreign(x), Foreign(labels), out=Foreign(x, number=1))

    @pytest.mark.skipif(not SIMULATED, reason="needs a second device")
    def test_a_stream_of_another_device(self, rng, monkeypatch):
        """Nothing is started on it, nor made to wait for it: the driver would raise an error of its own."""
        x, _ = self.arguments(rng)
        made = nbloss.softmax(Foreign(x, number=1))

        def check_stream(number, stream):
            if stream and number:
                raise ValueError("stream must be one of device 1")

        order = []
        monkeypatch.setattr(device.memory(), "check_stream", check_stream)
        monkeypatch.setattr(device.memory(), "order", lambda *streams: order.append(streams))
        with pytest.raises(ValueError, match="stream must be one of device 1"):
            nbloss.softmax(made, stream=16)
        with pytest.raises(TypeError, match="target must be where the input is"):
            nbloss.mse_loss(Foreign(x), made, stream=16)
        assert order == [(1, 0, 16)] * 2

    def test_read_only_out(self, rng):
        x, labels = self.arguments(rng)
        with pytest.raises(ValueError, match="out must be writable"):
            nbloss.cross_entropy.grad(Foreign(x), Foreign(labels), out=Foreign(x, read_only=True))

    def test_overlapping_out(self, rng):
        x, labels = self.arguments(rng)
        logits = Foreign(x)
        shifted = Foreign(x)
        address, _ = logits.__cuda_array_interface__["data"]
        shifted.__cuda_array_interface__["data"] = (address + 8, False)
        with pytest.raises(ValueError, match="overlaps the input"):
            nbloss.cross_entropy.grad(logits, Foreign(labels), out=shifted)

    def test_unaligned(self, rng):
        x, labels = self.arguments(rng)
        logits = Foreign(x)
        address, _ = logits.__cuda_array_interface__["data"]
        logits.__cuda_array_interface__["data"] = (address + 1, False)
        with pytest.raises(ValueError, match="logits must be aligned: its address and strides must be multiples of 8"):
            nbloss.cross_entropy(logits, Foreign(labels))

    def test_dtypes(self, rng, monkeypatch):
        x, labels = self.arguments(rng)
        monkeypatch.setattr(device.memory(), "capability", lambda number: (7, 5))
        with pytest.raises(TypeError, match="logits must not be bfloat16 on a device below"):
            nbloss.cross_entropy(Foreign(x.astype(ml_dtypes.bfloat16)), Foreign(labels))
        with pytest.raises(TypeError, match="the input must not be bfloat16 on a device below"):
            nbloss.cross_entropy(x.astype(ml_dtypes.bfloat16), labels, backend="cuda")
        with pytest.raises(TypeError, match="logits must be float16, bfloat16, float32 or float64, got int64"):
            nbloss.cross_entropy(Foreign(labels), Foreign(labels))
        monkeypatch.setattr(device.memory(), "capability", lambda number: (6, 1))
        with pytest.raises(RuntimeError, match=r"compute capability 7\.0 or above, got 6\.1"):
            nbloss.cross_entropy(Foreign(x), Foreign(labels))

    @pytest.mark.parametrize("stream", ["0", 1.5, object(), True])
    def test_streams(self, rng, stream):
        x, labels = self.arguments(rng)
        with pytest.raises(TypeError, match="stream must be an integer or a CUDA stream"):
            nbloss.cross_entropy(Foreign(x), Foreign(labels), stream=stream)


@pytest.mark.skipif(not SIMULATED, reason="streams that are but numbers")
def test_what_another_stream_uses_is_waited_for(rng, monkeypatch):
    """Memory of a result is read, and given back, in the order of the stream that it was made on."""
    order = []
    monkeypatch.setattr(device.memory(), "order", lambda number, first, then: order.append((first, then)))
    given = Foreign(rng.standard_normal((4, 3)))
    made = nbloss.softmax(given, stream=16)
    for use in (
        lambda: nbloss.softmax(made, stream=32),
        lambda: nbloss.logsumexp(made, stream=32),
        lambda: nbloss.softmax(given, out=made, stream=32),
        lambda: nbloss.mse_loss(given, made, stream=32),
        lambda: nbloss.mse_loss.grad(given, target=given, out=made, stream=32),
        lambda: nbloss.mse_loss(given, given, weight=made, stream=32),
    ):
        order.clear()
        use()
        assert order == [(16, 32), (32, 16)]


@pytest.mark.skipif(not SIMULATED, reason="streams that are but numbers")
def test_the_stream_of_a_library_waits(rng, monkeypatch):
    """What it does next with an array that was read or written, unless the user has said where that is."""
    order = []
    monkeypatch.setattr(device.memory(), "order", lambda number, first, then: order.append((first, then)))
    monkeypatch.setattr(device.memory(), "stream_of", lambda value: 48)
    x, t = Foreign(rng.random((4, 3))), Foreign(rng.random((4, 3)))
    nbloss.mse_loss.grad(x, t, out=x)
    assert order == [(0, 48)]
    order.clear()
    nbloss.mse_loss.grad(x, t, out=x, stream=32)
    assert order == []


@pytest.mark.skipif(not SIMULATED, reason="streams that are but numbers")
def test_a_library_without_a_known_stream_is_waited_for(rng, monkeypatch):
    """It may use an array's memory again as soon as the call lets go of it; a user who gives a stream sees to that."""
    waits = []
    monkeypatch.setattr(device.memory(), "wait", lambda *place: waits.append(place))
    x, t = Foreign(rng.random((4, 3))), Foreign(rng.random((4, 3)))
    for _ in range(3):  # a plan is made, and done
        waits.clear()
        nbloss.mse_loss(x, t, check=False)
        assert waits == [(0, 0)]
    nbloss.mse_loss(x, t, check=False, stream=32)
    assert waits == [(0, 0)]
    made = nbloss.softmax(x, stream=32)
    waits.clear()
    nbloss.softmax(made)
    assert waits == []


def test_weights_that_are_repeated(rng, monkeypatch):
    """A mean over the sum of weights adds each of them once, and makes no array of those that it repeats."""
    x, t = rng.random((40, 24), np.float32), rng.random((40, 24), np.float32)
    sizes, allocate = [], device.memory().allocate

    def counted(number, size, stream):
        sizes.append(size)
        return allocate(number, size, stream)

    number = Foreign(np.array(0.5))
    assert float(nbloss.mse_loss(number, Foreign(np.array(2.0)), weight=number)) == 2.25
    for shape in ((40, 1), (24,), (40, 24), (1, 1)):
        weight = rng.random(shape, np.float32)[::-1]
        given = Foreign(x), Foreign(t), Foreign(weight)
        with monkeypatch.context() as patch:
            patch.setattr(device.memory(), "allocate", counted)
            loss, gradient = nbloss.mse_loss.value_and_grad(*given[:2], 3.0, weight=given[2])
        expected = reference.mse_loss(x, t, weight=weight, grad_output=3.0)
        close(loss, expected[0], np.float32)
        close(gradient, expected[1], np.float32)
        assert sizes.count(x.nbytes) == 1 + (shape == x.shape)  # the gradient, and weights side by side
        assert max(sizes) == x.nbytes
        sizes.clear()


def test_integers_as_numbers(rng):
    """Targets of every integer dtype; those of uint64 beyond int64 are rounded once."""
    x = np.zeros(5, np.float32)
    for dtype in (bool, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        top = 1 if dtype is bool else np.iinfo(dtype).max
        target = np.array([0, 1, top, top // 2, top - top // 3], dtype)
        values = np.asarray(nbloss.l1_loss(Foreign(x), Foreign(target), reduction="none"))
        np.testing.assert_array_equal(values, target.astype(np.float32))


@pytest.mark.skipif(not SIMULATED, reason="memory that tells whether it was given back")
def test_sums_of_many_blocks_hold_what_they_add(rng):
    """The simulated device refuses memory that nobody holds; 400 rows are more sums than one block adds there."""
    x, labels = rng.standard_normal((400, 6)), rng.integers(0, 6, 400)
    for weight in (None, rng.uniform(0.5, 2, 6)):
        given = {} if weight is None else {"weight": Foreign(weight)}
        mean = nbloss.cross_entropy(Foreign(x), Foreign(labels), **given)
        assert float(mean) == pytest.approx(nbloss.cross_entropy(x, labels, weight=weight), rel=1e-12)


def test_streams_of_other_libraries():
    class Numba:
        handle = type("Pointer", (), {"value": 7})()

    class CuPy:
        ptr = 8

    class Torch:
        cuda_stream = 9

    class Protocol:
        def __cuda_stream__(self):
            return 0, 10

    assert [device.stream_pointer(s) for s in (None, 3, Numba(), CuPy(), Torch(), Protocol())] == [0, 3, 7, 8, 9, 10]
    with pytest.raises(ValueError, match="stream must be the address of a CUDA stream, got -1"):
        device.stream_pointer(-1)


def test_options_on_the_device_are_no_numbers(rng):
    given = Foreign(rng.standard_normal((4, 3))), Foreign(np.zeros(4, int))
    for option in ("label_smoothing", "ignore_index", "axis"):
        with pytest.raises(TypeError, match=f"{option} must be"):
            nbloss.cross_entropy(*given, **{option: Foreign(np.array(0))})


def test_empty_arrays_with_numbers_of_the_host():
    none = Foreign(np.empty((0, 3)))
    assert float(nbloss.mse_loss(none, none, weight=2.0, reduction="sum")) == 0
    assert nbloss.logsumexp(none, axis=(1,)).shape == (0,)


def test_bfloat16_is_exported_as_such(rng):
    """The capsule of another dtype's export, renamed: with the memory of the host, which needs no device."""
    utils = pytest.importorskip("cuda.core.utils")
    bits = rng.integers(0, 2**15, (3, 4)).astype(np.uint16)
    for version in (None, (1, 0)):
        view = utils.StridedMemoryView.from_dlpack(bits, stream_ptr=-1)
        capsule = view.__dlpack__(max_version=version)
        call_bfloat16(capsule)

        class Exporter:
            def __dlpack__(self, capsule=capsule, **_):
                return capsule

            def __dlpack_device__(self):
                return 1, 0

        again = utils.StridedMemoryView.from_dlpack(Exporter(), stream_ptr=-1)
        assert again.dtype == np.dtype(ml_dtypes.bfloat16)
        assert (again.shape, again.ptr) == ((3, 4), bits.ctypes.data)


def test_same_bits_every_time(rng):
    x, labels = rng.standard_normal((7, 40)).astype(np.float32), rng.integers(0, 40, 7)
    given = Foreign(x), Foreign(labels)
    results = {tuple(np.asarray(r).tobytes() for r in nbloss.cross_entropy.value_and_grad(*given)) for _ in range(5)}
    assert len(results) == 1


@pytest.mark.parametrize("shape", choices.CANDIDATES, ids=lambda shape: "x".join(map(str, shape)))
def test_candidates(rng, monkeypatch, shape):
    """Whatever a benchmark tries gives the right results."""
    if SIMULATED:
        monkeypatch.setattr(choices, "WARP", 32)
        monkeypatch.setattr(choices, "ROWS", choices.ROWS[-1:])  # where it does not serve: no cluster of a few threads
        if shape.threads * max(shape.parts, 1) > 256:
            pytest.skip("more threads than can be simulated at once")
    monkeypatch.setattr(choices, "forced", shape)
    classes = int(min(shape.reach("f", False), 40 * shape.threads)) - 3
    rows = 2 * shape.height if shape.threads <= 128 else 1
    x, labels = rng.standard_normal((rows, classes)).astype(np.float32), rng.integers(0, classes, rows)
    for smoothing in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, **options)
        expected = reference.cross_entropy(x, labels, **options)
        close(loss, expected[0], np.float32)
        close(gradient, expected[1], np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("size", ["even", "odd"])
@pytest.mark.parametrize("room", [0, choices.THIRD], ids=["registers", "staged"])
def test_rows_of_several_blocks(rng, monkeypatch, room, size, parts, dtype):
    """Blocks that hold a row together tell each other what they found; as bits for any alignment and in place too."""
    shape = choices.RowShape(256, 1, 32, parts, room)
    if SIMULATED:
        shape = choices.RowShape(4 if room else 8, 1, 16, parts, room and 640)
        monkeypatch.setattr(choices, "WARP", 4)  # as many lanes as parts
    code = {"float64": "d", "float32": "f"}.get(str(np.dtype(dtype)), "h")
    most = int(shape.reach(code, False))
    classes = most - 16 if size == "even" else most - 13
    monkeypatch.setattr(choices, "forced", shape)
    x = np.pad((rng.standard_normal((5, classes)) * 3).astype(dtype), ((0, 0), (0, 1)))[:, :-1]
    x[3, : most // 2] = -np.inf  # parts of nothing
    labels = rng.integers(most // 2, classes, 5)
    labels[1] = -100
    finite = np.maximum(x.astype(np.float64), -1e4)  # of which the exponential is 0 too
    expected, gradient = reference.cross_entropy(finite, labels, reduction="none")
    for given in (x.copy(), x):
        loss, got = nbloss.cross_entropy.value_and_grad(given, labels, reduction="none")
        close(loss, expected, "float64" if code == "d" else dtype, np.abs(expected).max())
        close(got.astype(np.float64), gradient, dtype, 1.0)
    again = x.copy()
    nbloss.cross_entropy.value_and_grad(again, labels, reduction="none", out=again)
    np.testing.assert_array_equal(again, got)
    probabilities = scipy.special.softmax(x.astype(np.float64), axis=-1)
    close(nbloss.softmax(x).astype(np.float64), probabilities, dtype, 1.0)
    x[4, classes // 3] = np.nan
    values = nbloss.logsumexp(x)
    np.testing.assert_array_equal(np.isnan(values), np.arange(5) == 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forced", [None, *(() if SIMULATED else choices.STAGED)], ids=str)
def test_alignment_changes_no_bit(rng, monkeypatch, forced, dtype):
    """Rows that begin anywhere are read sixteen bytes at a time, and give what they give elsewhere."""
    lanes = 16 // np.dtype(dtype).itemsize
    monkeypatch.setattr(choices, "forced", forced)
    for classes in (3, 37, 80, 150, 300) if SIMULATED else (3, 37, 80, 300, 9000, 20_000, 50_257, 140_000):
        even, rows = -(-classes // lanes) * lanes, few(6, 3)
        x = np.full((rows, even), -np.inf)
        x[:, :classes] = rng.standard_normal((rows, classes)) * 3
        labels = rng.integers(0, classes, rows)
        x = x.astype(dtype)
        loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
        alone = nbloss.cross_entropy(x, labels, reduction="none")
        for offset in range(lanes + 1):
            line = np.zeros(offset + rows * (even + 1), dtype)
            moved = line[offset:].reshape(rows, even + 1)[:, :even]
            moved[:] = x
            values, got = nbloss.cross_entropy.value_and_grad(moved, labels, reduction="none")
            np.testing.assert_array_equal(values, loss)
            np.testing.assert_array_equal(got.astype(np.float64), gradient.astype(np.float64))
            if forced is None:
                np.testing.assert_array_equal(nbloss.cross_entropy(moved, labels, reduction="none"), alone)
        short = np.ascontiguousarray(x[:, :classes])
        values, got = nbloss.cross_entropy.value_and_grad(short, labels, reduction="none")
        np.testing.assert_array_equal(values, loss)
        np.testing.assert_array_equal(got.astype(np.float64), gradient[:, :classes].astype(np.float64))
