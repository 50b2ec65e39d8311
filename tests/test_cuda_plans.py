"""Calls on device arrays that are alike: later ones, which take the plan of the first, give what a first one would."""

import ctypes
import functools
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from conftest import CUDA, SIMULATED
from test_cuda import LAYOUTS, Foreign
from test_plans import CASES, FORMS, ROWWISE, SHAPE, bits

import nbloss
from nbloss.cuda import device

pytestmark = pytest.mark.skipif(not CUDA, reason="needs NUMBA_ENABLE_CUDASIM=1, or a GPU and NBLOSS_TEST_CUDA=1")

if CUDA:
    from nbloss.cuda import plans, solve_pointwise, solve_rowwise


def arguments(rng, name, options, dtype="float32", layout="contiguous"):
    x = LAYOUTS[layout](rng.random(SHAPE).astype(dtype))
    labels = name in ROWWISE
    target = rng.integers(0, SHAPE[1], SHAPE[0]) if labels else rng.random(SHAPE).astype(dtype)
    if labels:
        target[rng.integers(SHAPE[0])] = options.get("ignore_index", -100)
    weights = {n: Foreign(rng.uniform(0.5, 2, SHAPE[1]).astype(dtype)) for n, v in options.items() if v is True}
    return Foreign(x), Foreign(target), {**options, **weights}


def run(name, form, x, target, options, layout="contiguous"):
    """The results of a call, and what it left of its input."""
    loss = getattr(nbloss, name)
    if form == "value":
        made = [loss(x, target, **options)]
    elif form == "value_and_grad":
        made = loss.value_and_grad(x, target, **options)
    elif form == "grad_output":
        made = [loss.grad(x, target, grad_output=0.3, **options)]
    elif form == "grad":
        made = [loss.grad(x, target, **options)]
    else:
        out = Foreign(LAYOUTS[layout](x.host() if form == "in place" else np.full(SHAPE, 7, x.dtype)))
        loss, gradient = loss.value_and_grad(out if form == "in place" else x, target, out=out, **options)
        assert gradient is out
        made = [loss, out.host()]
    return [*bits(made), x.host().tobytes()]


def plan():
    (only,) = plans._plans.values()
    return only


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_later_calls(rng, name, options, form):
    """Of other values at other addresses."""
    dtype = "float16" if options else "float32"
    calls = [arguments(rng, name, options, dtype) for _ in range(4)]
    expected = []
    for given in calls:
        plans._plans.clear()
        expected.append(run(name, form, *given))
    plans._plans.clear()
    for turn, given in enumerate(calls):
        assert run(name, form, *given) == expected[turn]
        assert (plan() is None) == (turn == 0 and form != "in place")


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "mse_loss"])
def test_a_first_call_in_place_that_fails(rng, monkeypatch, name):
    """What it takes is compiled before it writes: here the kernel that adds, which comes last, cannot be."""
    x, t, _ = arguments(rng, name, {})
    before = x.host().tobytes()

    def broken(*_, **__):
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(solve_pointwise, "mean_of", broken)
        patch.setattr(solve_rowwise, "mean_of", broken)
        with pytest.raises(RuntimeError, match="no memory left"):
            getattr(nbloss, name).value_and_grad(x, t, out=x)
    assert x.host().tobytes() == before
    getattr(nbloss, name).value_and_grad(x, t, out=x)
    assert x.host().tobytes() != before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "mse_loss"])
def test_layouts(rng, name, layout):
    expected = None
    given = arguments(rng, name, {}, layout=layout)
    for _ in range(3):
        got = [run(name, form, *given, layout) for form in ("value_and_grad", "out", "in place")]
        assert got == (expected or got)
        expected = got
    assert None not in plans._plans.values()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_functions_of_rows(rng, name):
    function = getattr(nbloss, name)
    for shape in ((4, 6), ()):
        for _ in range(3):
            x = rng.standard_normal(shape)
            given = Foreign(x)
            np.testing.assert_array_equal(function(given), function(x))
            if name != "logsumexp":
                assert function(given, out=given) is given
                np.testing.assert_array_equal(given.host(), function(x))
    assert sum(kept is not None for kept in plans._plans.values()) == (2 if name == "logsumexp" else 4)


def test_numbers_of_the_host(rng):
    """Those that a plan holds are part of what makes calls alike, to the sign of zero."""
    bce = nbloss.binary_cross_entropy_with_logits.value_and_grad
    x, t, _ = arguments(rng, "mse_loss", {})
    for _ in range(3):
        for factor in (2, 0.0, -0.0, np.float32(0.1), float("nan")):
            for positive in (3.0, 0.5):
                loss, gradient = bce(x, t, factor, pos_weight=positive)
                expected = bce(x.host(), t.host(), factor, pos_weight=positive)
                assert bits([loss, gradient]) == bits(expected)
    assert len(plans._plans) == 10


def test_other_alignment(rng):
    """Kernels are chosen by it: an array elsewhere is of another kind."""
    values, labels = rng.standard_normal((4, 16)).astype(np.float32), Foreign(rng.integers(0, 16, 4))
    expected = nbloss.cross_entropy.value_and_grad(Foreign(values), labels)
    for offset in (0, 1, 0, 4, 2, 1, 3, 1, 2):
        apart = np.zeros(values.size + offset, np.float32)[offset:].reshape(values.shape)
        apart[...] = values
        assert bits(nbloss.cross_entropy.value_and_grad(Foreign(apart), labels)) == bits(expected)
    assert len(plans._plans) == 4


def test_results_are_apart(rng):
    """What an earlier call gave is not touched by later ones."""
    calls = [arguments(rng, "cross_entropy", {}) for _ in range(5)]
    made = [nbloss.cross_entropy.value_and_grad(x, t) for x, t, _ in calls]
    before = [bits(results) for results in made]
    for x, t, _ in calls[::-1]:
        nbloss.cross_entropy.value_and_grad(x, t)
    assert [bits(results) for results in made] == before
    plans._plans.clear()
    assert [bits(nbloss.cross_entropy.value_and_grad(x, t)) for x, t, _ in calls] == before


def test_large_results_are_kept_alone(rng):
    """A loss that is kept does not keep a gradient, nor losses of rows."""
    x, t = Foreign(rng.standard_normal((600, 3))), Foreign(rng.integers(0, 3, 600))
    for _ in range(2):
        nbloss.cross_entropy.value_and_grad(x, t)
    loss, gradient = (result.place[0] - 2 for result in plan().results)
    sizes = plan().sizes
    assert (sizes[gradient], sizes.count(4864), sizes[loss] <= 4096) == (14592, 1, True)


def test_faults(rng):
    """A label, or a probability, that is none is refused as by a first call, and in place the input is left alone."""
    for name, error, wrong in (
        ("cross_entropy", IndexError, 9),
        ("nll_loss", IndexError, -1),
        ("binary_cross_entropy", ValueError, 1.5),
    ):
        for form in ("value", "value_and_grad", "in place"):
            plans._plans.clear()
            for _ in range(2):
                run(name, form, *arguments(rng, name, {}))
            x, target, _ = arguments(rng, name, {})
            assert plan() is not None
            x, target = x.host().copy(), target.host().copy()
            (target if name in ROWWISE else x).flat[4] = wrong
            given = Foreign(x)
            call = getattr(nbloss, name)
            call = call if form == "value" else call.value_and_grad
            with pytest.raises(error, match=r"\[4\] is|probs\[0, 4\]"):
                call(given, Foreign(target), **({"out": given} if form == "in place" else {}))
            np.testing.assert_array_equal(given.host(), x)
            run(name, form, *arguments(rng, name, {}))


def test_refusals(rng):
    """What makes a call wrong makes it one of another kind."""
    x, t, _ = arguments(rng, "cross_entropy", {})
    for out in (x, Foreign(x.host().copy())):
        for _ in range(3):
            nbloss.cross_entropy.grad(x, t, out=out)
    address, _ = x.__cuda_array_interface__["data"]
    for data, message in (((address, True), "writable"), ((address + 16, False), "overlaps the input")):
        out = Foreign(x.host().copy())
        out.__cuda_array_interface__["data"] = data
        with pytest.raises(ValueError, match=message):
            nbloss.cross_entropy.grad(x, t, out=out)
    whole = Foreign(np.zeros((12, 9), np.float32))
    whole.shape = whole.__cuda_array_interface__["shape"] = SHAPE
    for _ in range(3):
        with pytest.raises(ValueError, match="overlaps target"):
            nbloss.mse_loss.grad(x, whole, out=whole)
    plans._plans.clear()
    for _ in range(3):
        nbloss.cross_entropy(x, t, ignore_index=2**62, check=False)
        nbloss.mse_loss(x, x, weight=np.array(2.0))
    assert not plans._plans


@pytest.mark.skipif(SIMULATED, reason="the simulator has no memory to share")
def test_results_are_shared_where_they_lie(rng):
    """Those of a plan are parts of what was asked for at once."""
    utils = pytest.importorskip("cuda.core.utils")
    x, t, _ = arguments(rng, "cross_entropy", {})
    for _ in range(3):
        for made in nbloss.cross_entropy.value_and_grad(x, t, check=False):
            address, _ = made.__cuda_array_interface__["data"]
            assert utils.StridedMemoryView.from_dlpack(made, stream_ptr=-1).ptr == address


@pytest.mark.skipif(not SIMULATED, reason="streams that are but numbers")
def test_other_streams(rng, monkeypatch):
    """A plan is done on the stream of each call; what another stream made, or will read, is waited for."""
    x, t, _ = arguments(rng, "cross_entropy", {})
    made = nbloss.softmax(x, stream=16)
    seen = []
    launch, order, allocate = (getattr(device.memory(), n) for n in ("launch", "order", "allocate"))
    monkeypatch.setattr(device.memory(), "launch", lambda *a: (seen.append(a[4]), launch(*a)))
    monkeypatch.setattr(device.memory(), "order", lambda *a: (seen.append(a[1:]), order(*a)))
    monkeypatch.setattr(device.memory(), "allocate", lambda *a: (seen.append(a[2]), allocate(*a))[1])
    monkeypatch.setattr(device.memory(), "stream_of", lambda value: 16)
    for turn, stream in enumerate((32, 32, 32, 48, 0)):
        seen.clear()
        gradient = nbloss.cross_entropy.grad(made, t, stream=stream or None, check=False)
        assert (seen[0], seen[-1]) == ((16, stream), (stream, 16))
        assert set(seen[1:-1]) == {stream}
        assert seen[1:-1] == [stream] * (4 if turn == 0 else 3)
        assert gradient.stream == stream


def test_a_call_like_another_asks_for_memory_once(rng, monkeypatch):
    x, t, _ = arguments(rng, "cross_entropy", {})
    allocate, sizes = device.memory().allocate, []
    monkeypatch.setattr(device.memory(), "allocate", lambda *a: (sizes.append(a[1]), allocate(*a))[1])
    for expected in (4, 1, 1):
        sizes.clear()
        nbloss.cross_entropy.value_and_grad(x, t)
        assert len(sizes) == expected


def test_threads(rng, monkeypatch):
    one = threading.Lock()

    def alone(do, *args):
        with one:
            do(*args)

    for operation in ("launch", "copy_to_host") if SIMULATED else ():  # it cannot do two things at a time
        do = getattr(device.memory(), operation)
        monkeypatch.setattr(device.memory(), operation, functools.partial(alone, do))
    calls = [arguments(rng, "cross_entropy", {}) for _ in range(4)]
    expected = [bits(nbloss.cross_entropy.value_and_grad(x, t)) for x, t, _ in calls]
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda k: bits(nbloss.cross_entropy.value_and_grad(*calls[k % 4][:2])), range(24))
        assert list(made) == expected * 6


def test_plans_are_few(rng, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 4)
    x, t, _ = arguments(rng, "mse_loss", {})
    for factor in range(10):
        nbloss.mse_loss.grad(x, t, factor)
        assert set(plans._plans.values()) == {None}
        assert len(plans._plans) <= 4


def test_strides_as_large_as_addresses(rng):
    """Those of an axis of one element may be anything."""
    x, t = Foreign(rng.standard_normal((1, 6)).astype(np.float32)), Foreign(np.array([2]))
    expected = float(nbloss.cross_entropy(x, t))
    x.__cuda_array_interface__["strides"] = (1 << 50, 4)
    assert {float(nbloss.cross_entropy(x, t)) for _ in range(4)} == {expected}


def test_parameters_lie_as_kernels_read_them():
    """Eight bytes each, found by their addresses; no device is needed for this."""
    pytest.importorskip("cuda.core")
    from nbloss.cuda import driver

    arguments = ((1, -2), np.float32(1.5), 2.5, np.float64(3.5), 2**62)
    packed = driver.struct.Struct("qqf4xddq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(driver._loaded, ("kernel", 0), (None, packed))
        launch = driver.Launch("kernel", 5, 64, 0, arguments, 4, True, 96, [(1, 0, 8)])
    kinds = (ctypes.c_int64, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_double, ctypes.c_int64)
    read = [kind.from_address(at).value for kind, at in zip(kinds, launch._places)]
    assert read == [1, -2, 1.5, 2.5, 3.5, 2**62]
    assert ctypes.addressof(ctypes.c_uint64.from_address(launch._places_at)) == launch._places.buffer_info()[0]
    assert (launch._configuration.gridDimX, launch._configuration.blockDimX) == (5, 64)
    assert launch._configuration.sharedMemBytes == 96
    cluster, early = launch._configuration.attrs
    assert cluster.value.clusterDim.x == 4
    assert early.value.programmaticStreamSerializationAllowed == 1


class Tensor:
    """What a tensor of PyTorch answers."""

    def __init__(self, **different):
        self.dtype, self.layout, self.is_cuda, self.requires_grad, self.shape = (
            "torch.float16",
            "strided",
            True,
            False,
            (3, 4),
        )
        self.__dict__ |= different

    is_neg, data_ptr, get_device, stride = (lambda self, v=v: v for v in (False, 4096, 1, (8, 2)))


def test_tensors(monkeypatch):
    """Plain ones are read directly; of all others DLPack has to say what they are, or why not."""
    pytest.importorskip("cuda.core")
    from nbloss.cuda import driver

    waits = []
    monkeypatch.setattr(driver, "order", lambda *args: waits.append(args))
    torch = types.SimpleNamespace(
        strided="strided", _C=types.SimpleNamespace(_cuda_getCurrentRawStream=lambda n: 7 + n)
    )
    tensor = Tensor()
    expected = (4096, (3, 4), (16, 4), np.dtype("float16"), False, 1, tensor)
    assert driver._layout_of_tensor(torch, tensor, 9) == expected
    assert waits == [(1, 8, 9)]
    assert driver._layout_of_tensor(torch, Tensor(dtype="torch.bfloat16"), 9).dtype == ml_dtypes.bfloat16
    for different in (
        {"dtype": "torch.complex64"},
        {"is_cuda": False},
        {"layout": "sparse"},
        {"requires_grad": True},
        {"is_neg": lambda: True},
        {"data_ptr": lambda: 0},
    ):
        assert driver._layout_of_tensor(torch, Tensor(**different), 9) is None


def test_streams_of_libraries(monkeypatch):
    pytest.importorskip("cuda.core")
    from nbloss.cuda import driver

    stream = types.SimpleNamespace(ptr=5)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(get_current_stream=lambda: stream))
    torch = types.SimpleNamespace(Tensor=Tensor, _C=types.SimpleNamespace(_cuda_getCurrentRawStream=lambda n: 7 + n))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)

    def array_of(module):
        return type("Array", (), {"__module__": module})()

    found = [driver.stream_of(array) for array in (Tensor(), *map(array_of, ("cupy", "numba.cuda.cudadrv", "jaxlib")))]
    assert found == [8, 5, 0, None]
