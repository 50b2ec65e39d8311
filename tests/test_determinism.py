"""Same input, same bits: threads, alignment, repetition."""

from functools import partial

import numpy as np
import pytest
from conftest import POINTWISE, bits
from numba import njit

import nbloss
from nbloss import plans
from nbloss.cpu import launch, rowwise
from nbloss.cpu.compile import Kernel
from nbloss.cpu.simd import is_mapped

pytestmark = pytest.mark.cpu

ROWS = [(700, 10), (333, 29), (600, 100), (40, 450), (300, 1000), (20, 9000), (34, 4501), (8, 70_001)]
ROWS += [(3, 7, 4099), (300, 3, 5), (1, 4200, 70), (1, 100_003, 3)]


def of_a_crop(x, target, out=None):
    out = None if out is None else out[..., 1:, 1:]
    return nbloss.cross_entropy.value_and_grad(x[..., 1:, 1:], target[..., 1:, 1:], out=out)


def calls(rng, dtype):
    """Name and call of every loss at sizes that fill many blocks."""
    smoothed = partial(nbloss.cross_entropy.value_and_grad, label_smoothing=0.1)
    for shape in ROWS:
        x = (rng.standard_normal(shape) * 3).astype(dtype)
        labels = rng.integers(0, shape[1], np.delete(shape, 1))
        yield f"cross_entropy {shape}", nbloss.cross_entropy.value_and_grad, x, labels
        yield f"probabilities {shape}", nbloss.cross_entropy.value_and_grad, x, rng.random(shape).astype(dtype)
        yield f"smoothing {shape}", smoothed, x, labels
        if labels.size > 16:  # fewer are one vector, and one thread's
            yield f"nll_loss {shape}", nbloss.nll_loss.value_and_grad, x, labels
    x, labels = rng.standard_normal((3, 5, 9, 40)).astype(dtype), rng.integers(0, 5, (3, 9, 40))
    yield "crop", of_a_crop, x, labels
    weighted = partial(nbloss.cross_entropy.value_and_grad, weight=rng.random(3))
    for shape in ((40_000, 3), (3, 3, 20_000)):  # labels are scanned in several pieces
        yield f"weights {shape}", weighted, rng.random(shape).astype(dtype), rng.integers(0, 3, np.delete(shape, 1))
    weights = {"weight": rng.random(3), "pos_weight": rng.random((40_000, 1))}
    short = partial(nbloss.binary_cross_entropy_with_logits.value_and_grad, **weights)
    yield "weights of short lines", short, *rng.standard_normal((2, 40_000, 3)).astype(dtype)
    many = rng.random((3, 2**19 + 40)).astype(dtype)  # weights that a kernel sums
    yield "mean of many weights", partial(nbloss.mse_loss.value_and_grad, weight=many[2]), many[0], many[1]
    for size in (70_001, 8192 + 17):  # of the last segment, whole vectors may be all or none
        x, t = rng.random(size).astype(dtype), rng.random(size).astype(dtype)
        for name in POINTWISE:
            loss = getattr(nbloss, name)
            yield f"{name} {size}", loss.value_and_grad, x, t
            yield f"gradient of {name} {size}", lambda *args, loss=loss, **options: [loss.grad(*args, **options)], x, t


@pytest.mark.skipif(launch.max_threads() < 2, reason="one processor")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 10), (40, 37), (40, 100), (9, 600), (2, 21, 70)])
def test_in_place_on_several_threads(rng, monkeypatch, dtype, shape):
    """LLVM must not be told that the input and `out` lie apart, as Numba told it of what parallel loops are given."""
    monkeypatch.setattr(launch, "PARALLEL", 0)
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(rowwise, "GROUPED", 1)
    x, labels = rng.standard_normal(shape).astype(dtype), rng.integers(0, shape[1], np.delete(shape, 1))
    for function in (
        partial(nbloss.softmax, axis=1),
        partial(nbloss.log_softmax, axis=1),
        lambda x, **out: nbloss.cross_entropy.grad(x, labels, **out),
        lambda x, **out: nbloss.mse_loss.grad(x, x + 1, **out),
    ):
        expected, given = function(x), x.copy()
        function(given, out=given)
        np.testing.assert_array_equal(given, expected)


@pytest.mark.skipif(launch.max_threads() < 2, reason="one processor")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads(rng, monkeypatch, dtype):
    parallel, variant, variants = launch.PARALLEL, Kernel.variant, set()

    def asked_for(kernel, is_parallel, *dtypes):
        variants.add(is_parallel)
        return variant(kernel, is_parallel, *dtypes)

    monkeypatch.setattr(Kernel, "variant", asked_for)
    monkeypatch.setattr(launch, "BLOCK", 1)  # each unit of work a block, for there to be several
    monkeypatch.setattr(rowwise, "GROUPED", 1)
    for name, call, x, target in calls(rng, dtype):
        monkeypatch.setattr(launch, "PARALLEL", 1 << 60)
        serial = bits(call(x, target))
        monkeypatch.setattr(launch, "PARALLEL", 0)
        plans._plans.clear()
        for threads in range(1, launch.max_threads() + 1):
            monkeypatch.setattr(launch, "_threads", threads)
            variants.clear()
            for _ in range(3):
                assert bits(call(x, target)) == serial, (name, threads)
            assert (True in variants) == (threads > 1), name
        monkeypatch.setattr(launch, "PARALLEL", parallel)


@pytest.mark.parametrize("classes", [3, 17, 20, 40, 100, 300, 600, 5000])
def test_rows_do_not_touch(rng, classes):
    """A row gives the same bits alone and among others, some of them ignored or not finite."""
    x = rng.standard_normal((21, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 21)
    x[3], x[4, 1], labels[[0, 7, 8, 20]] = -np.inf, np.nan, -100
    for call in (
        lambda x, t: nbloss.cross_entropy.value_and_grad(x, t, reduction="none"),
        lambda x, t: (nbloss.logsumexp(x), nbloss.log_softmax(x)),
        lambda x, t: (nbloss.softmax(x),),
    ):
        together = call(x, labels)
        for i in range(21):
            assert bits(call(x[i : i + 1], labels[i : i + 1])) == bits(r[i : i + 1] for r in together)


@pytest.mark.parametrize("classes", [300, 5000])
def test_rows_too_long_to_keep(rng, monkeypatch, classes):
    """The same bits where exponentials are kept and where they are computed twice."""
    from nbloss.cpu import rowwise

    monkeypatch.setattr(rowwise, "GROUPS_FROM", {4: 1 << 40})
    monkeypatch.setattr(rowwise, "ROWS_FROM", {4: 1})
    x = rng.standard_normal((40, classes)).astype(np.float32) + np.linspace(0, 30, classes, dtype=np.float32)
    labels = rng.integers(0, classes, 40)
    results = []
    for most in (1 << 22, 0):
        monkeypatch.setattr(rowwise, "MOST_OF_A_ROW", most)
        plans._plans.clear()
        results.append(nbloss.cross_entropy.value_and_grad(x, labels, reduction="none"))
    assert bits(results[0]) == bits(results[1])


def test_new_memory(rng):
    """The same bits where a gradient goes past the caches and, in memory that is new, through them."""
    compiled = njit(lambda a: is_mapped(a))
    room = np.empty(1 << 28, np.uint8)
    for start in range(32):
        assert compiled(room[start:]) == is_mapped(room[start:])
    x, labels = rng.standard_normal((9000, 1000)).astype(np.float32), rng.integers(0, 1000, 9000)
    line, t = x.ravel(), rng.random(x.size).astype(np.float32)
    at = -room.ctypes.data % 4096
    used = room[at : at + x.nbytes].view(np.float32)
    assert not compiled(used)
    for loss, arguments in ((nbloss.cross_entropy, (x, labels)), (nbloss.mse_loss, (line, t))):
        new = loss.grad(*arguments)
        assert new.tobytes() == loss.grad(*arguments, out=used.reshape(new.shape)).tobytes()


@pytest.mark.parametrize("columns", [1, 2, 5, 16, 300, 1024])
def test_weights_of_short_lines(rng, columns):
    """An element's bits are those that it has among elements with a weight each."""
    x, t = rng.standard_normal((2, 40_000 // columns, columns)).astype(np.float32)
    column, row = rng.random(columns, np.float32), rng.random((len(x), 1), np.float32)
    every, own = np.zeros_like(x), np.asfortranarray(rng.random(x.shape, np.float32))
    loss = nbloss.binary_cross_entropy_with_logits
    for weight, pos_weight in ((column, row), (row, column), (own, column)):
        few = loss.value_and_grad(x, t, weight=weight, pos_weight=pos_weight, reduction="none")
        each = loss.value_and_grad(x, t, weight=weight + every, pos_weight=pos_weight + every, reduction="none")
        assert bits(few) == bits(each)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_fetched_ahead(rng, monkeypatch, dtype):
    from nbloss.cpu import auxiliary

    x, t = rng.random(70_001).astype(dtype), rng.random(70_001).astype(dtype)
    for name in POINTWISE:
        found = []
        for large in (1 << 60, 0):
            monkeypatch.setattr(auxiliary, "LARGE", large)
            plans._plans.clear()
            found.append(getattr(nbloss, name)(x, t))
        assert found[0] == found[1] == getattr(nbloss, name)(x.copy(), t)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("past_caches", [False, True])
def test_alignment(rng, monkeypatch, past_caches, dtype):
    from nbloss.cpu import auxiliary

    monkeypatch.setattr(auxiliary, "LARGE", 0 if past_caches else 1 << 60)
    for name, call, x, target in calls(rng, dtype):
        expected = bits(call(x, target))
        for offset in [*range(0, 64, 4), 1, 2, 3]:
            raw = np.zeros(x.nbytes + 64, np.uint8)
            moved = raw[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)
            moved[...] = x
            out_raw = np.full(x.nbytes + 128, 170, np.uint8)
            out = out_raw[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)
            assert bits(call(moved, target, out=out)) == expected, (name, offset)
            assert (out_raw[:offset] == 170).all()
            assert (out_raw[offset + x.nbytes :] == 170).all()
            assert bits(call(moved, target, out=moved)) == expected, (name, offset, "in place")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("classes", [300, 1001, 4200])
def test_rows_past_the_caches(rng, monkeypatch, dtype, classes):
    """A target in each place, rows that are ignored, of one value, large or not finite: the bits of rows in caches, and
    of units of fewer rows.
    """
    from nbloss.cpu import auxiliary

    x = (rng.standard_normal((90, classes)) * 3).astype(dtype)
    labels = np.arange(90) * classes // 89 % classes
    labels[[0, 7, 20, 21, 40, 89]] = -100
    x[[3, 41]], x[5], x[22, 17], x[23, 2], x[50] = 0.0, -np.inf, np.nan, np.inf, x[50] * 300
    calls = (
        lambda out: nbloss.cross_entropy.value_and_grad(x, labels, reduction="none", out=out),
        lambda out: nbloss.cross_entropy.value_and_grad(x, labels, reduction="none", label_smoothing=0.1, out=out),
        lambda out: (nbloss.softmax(x, out=out),),
        lambda out: (nbloss.log_softmax(x, out=out),),
    )
    expected = [bits(call(np.empty_like(x))) for call in calls]
    monkeypatch.setattr(rowwise, "MANY", 1)
    monkeypatch.setattr(auxiliary, "LARGE", 0)
    plans._plans.clear()
    for offset in range(0, 64, 2 * x.itemsize):
        raw = np.full(x.nbytes + 128, 170, np.uint8)
        out = raw[offset : offset + x.nbytes].view(dtype).reshape(x.shape)
        assert [bits(call(out)) for call in calls] == expected, offset
        assert (raw[:offset] == 170).all()
        assert (raw[offset + x.nbytes :] == 170).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("classes", "inner"), [(5, 800), (5, 801), (9, 3001), (20, 4096), (32, 6144)])
def test_planes_past_the_caches(rng, monkeypatch, dtype, classes, inner):
    """Several tiles to a unit, moved by vectors from 8 classes on; planes that begin in line with each other, and that
    do not.
    """
    from nbloss.cpu import auxiliary, rowwise

    monkeypatch.setattr(rowwise, "FEW", 1)
    x, labels = rng.standard_normal((2, classes, inner)).astype(dtype), rng.integers(0, classes, (2, inner))
    expected = nbloss.cross_entropy.value_and_grad(x, labels)
    apart = np.empty((2, classes, inner + 10), dtype)[..., :inner]
    apart[...] = x
    assert bits(nbloss.cross_entropy.grad(apart, labels)) == bits(expected[1])  # sums are of other tiles
    monkeypatch.setattr(auxiliary, "LARGE", 0)
    for offset in [*range(0, 64, x.itemsize), 1]:
        raw = np.full(x.nbytes + 128, 170, np.uint8)
        out = raw[offset : offset + x.nbytes].view(dtype).reshape(x.shape)
        assert bits(nbloss.cross_entropy.value_and_grad(x, labels, out=out)) == bits(expected), offset
        assert (raw[:offset] == 170).all()
        assert (raw[offset + x.nbytes :] == 170).all()
        out[...] = x
        assert bits(nbloss.cross_entropy.value_and_grad(out, labels, out=out)) == bits(expected), (offset, "in place")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [20, 40, 150, 300])
def test_planes_whole_pages_apart(rng, monkeypatch, dtype, classes):
    """Tiles that are copied in turns hold what others do: where the last one is narrow, and with classes reversed."""
    monkeypatch.setattr(rowwise, "FEW", 1)
    x, q = (rng.random((1, classes, 4096)).astype(dtype)[..., :2001] for _ in range(2))
    labels = rng.integers(0, classes, (1, 2001))
    for turned in (x, x[:, ::-1]):
        apart = turned.copy()
        for target in (labels, q):
            results = (nbloss.cross_entropy.value_and_grad(a, target, reduction="none") for a in (turned, apart))
            assert len({tuple(bits(result)) for result in results}) == 1
        assert bits(nbloss.log_softmax(turned, axis=1)) == bits(nbloss.log_softmax(apart, axis=1))


@pytest.mark.parametrize("size", [9000, 2**19 + 40])
def test_alignment_of_weights(rng, size):
    """What a mean is divided by is the same sum wherever weights begin."""
    x, t, weight = rng.random((3, size))
    for kind in (np.float32, np.float64):
        given = weight.astype(kind)
        apart = np.empty(given.nbytes + 1, np.uint8)[1:].view(kind)
        apart[:] = given
        aligned, other = (nbloss.mse_loss.value_and_grad(x, t, weight=w) for w in (given, apart))
        assert bits(aligned) == bits(other)


def test_repeats(rng):
    for name, call, x, target in calls(rng, np.float32):
        assert len({tuple(bits(call(x, target))) for _ in range(100)}) == 1, name


def test_the_users_thread_setting_is_kept(rng):
    import numba

    before = numba.get_num_threads()
    x = rng.standard_normal((2000, 100))
    nbloss.cross_entropy(x, np.zeros(2000, int))
    assert numba.get_num_threads() == before
