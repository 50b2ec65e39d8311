"""The same kernels as plain Python on NumPy arrays: run with NUMBA_DISABLE_JIT=1, so that their lines are covered."""

import numpy as np
import pytest
import reference
from conftest import POINTWISE, close
from numba.core import config

import nbloss
from nbloss import plans

pytestmark = [
    pytest.mark.skipif(
        not config.DISABLE_JIT, reason="covers kernel lines with NUMBA_DISABLE_JIT=1, in a process of its own"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 7), (18, 100), (2, 300), (2, 500), (1, 9000), (2, 3, 20)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(rng, dtype, shape, smoothing):
    x = rng.standard_normal(shape).astype(dtype)
    labels = rng.integers(0, shape[1], np.delete(shape, 1))
    labels.flat[0] = -100
    weight = rng.uniform(0.5, 2, shape[1])
    options = {"label_smoothing": smoothing, "weight": weight, "reduction": "none"}
    expected = reference.cross_entropy(x, labels, **options)
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, **options)
    close(loss, expected[0], "float32" if dtype == "float16" else dtype)
    close(gradient, expected[1], dtype)
    probabilities = rng.random(shape).astype(dtype)
    expected = reference.cross_entropy(x, probabilities, **options)
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, probabilities, **options)
    close(loss, expected[0], "float32" if dtype == "float16" else dtype, scale=10)
    close(gradient, expected[1], dtype, scale=10)
    close(nbloss.log_softmax(x, axis=1), np.log(nbloss.softmax(x.astype(float), axis=1)), dtype, scale=10)
    close(nbloss.logsumexp([[3.0, 1.0]], axis=1), [np.log(np.exp(3) + np.exp(1))])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("classes", [20, 40, 100])
def test_past_the_caches(rng, monkeypatch, dtype, classes):
    from nbloss.cpu import auxiliary

    x, labels = rng.standard_normal((40, classes)).astype(dtype), rng.integers(0, classes, 40)
    line, t = x.ravel(), rng.random(x.size).astype(dtype)
    near = nbloss.cross_entropy.grad(x, labels), nbloss.mse_loss.grad(line, t)
    monkeypatch.setattr(auxiliary, "LARGE", 0)
    for start in range(3):  # whatever the alignment
        room = np.empty(x.size + 3, dtype)[start : start + x.size]
        np.testing.assert_array_equal(nbloss.cross_entropy.grad(x, labels, out=room.reshape(x.shape)), near[0])
        np.testing.assert_array_equal(nbloss.mse_loss.grad(line, t, out=room), near[1])


@pytest.mark.parametrize("kind", ["bool", "u1", "i8", "f8"])
def test_operands_of_other_dtypes(rng, kind):
    x, (target, weight) = rng.random((5, 9), np.float32), (rng.random((2, 5, 9)) * 1.9).astype(kind)
    for step in (1, -1):
        t, w = target[:, ::step], weight[:, ::step]
        result = nbloss.mse_loss.grad(x, t, weight=w, reduction="none")
        assert result.dtype == np.float32
        t, w = t.astype(x.dtype), w.astype(x.dtype)
        np.testing.assert_array_equal(result, nbloss.mse_loss.grad(x, t, weight=w, reduction="none"))


@pytest.mark.parametrize("columns", [2, 40])
def test_weights_of_short_lines(rng, columns):
    shape = (200, columns)
    x, target = rng.standard_normal((2, *shape))
    column, row, full = rng.random(columns), rng.random((200, 1)), rng.random(shape).copy(order="F")
    for weight, pos_weight in ((column, row), (row, full), (full, column)):
        options = {"weight": weight, "pos_weight": pos_weight}
        expected = reference.binary_cross_entropy_with_logits(x, target, **options)
        for result, wanted in zip(
            nbloss.binary_cross_entropy_with_logits.value_and_grad(x, target, **options), expected
        ):
            close(result, wanted)


def test_smoothing_that_vanishes(rng):
    """A sixteenth of it is 0: tiles have the room of targets with dense mass, and the kernel no such mass."""
    x, labels = rng.standard_normal((16, 16, 1024)), rng.integers(0, 16, (16, 1024))
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, label_smoothing=5e-324)
    expected = nbloss.cross_entropy.value_and_grad(x, labels)
    close(loss, expected[0], "float64")
    close(gradient, expected[1], "float64")


@pytest.mark.parametrize(("classes", "inner"), [(3, 300), (3, 301), (8, 700), (17, 1024)])
def test_planes_past_the_caches(rng, monkeypatch, classes, inner):
    """Several tiles to a unit; in the last two cases, one is moved by vectors while the one before it is worked out."""
    from nbloss.cpu import auxiliary, rowwise

    monkeypatch.setattr(rowwise, "FEW", 1)
    x, labels = rng.standard_normal((1, classes, inner)), rng.integers(0, classes, (1, inner))
    near = nbloss.cross_entropy.grad(x, labels)
    monkeypatch.setattr(auxiliary, "LARGE", 0)
    for start in range(9):
        room = np.full(x.size + 9, 7.0)
        out = room[start : start + x.size].reshape(x.shape)
        np.testing.assert_array_equal(nbloss.cross_entropy.grad(x, labels, out=out), near)
        assert (room[:start] == 7).all()
        assert (room[start + x.size :] == 7).all()


@pytest.mark.parametrize("mapped", [True, False])
def test_new_memory(rng, monkeypatch, mapped):
    """What a call allocates is written past the caches unless it is new; what it is given, always."""
    from nbloss.cpu import auxiliary, pointwise_driver, results, rowwise_driver

    x, t = rng.standard_normal((2, 600)).astype(np.float32), rng.random(1200).astype(np.float32)
    calls = (nbloss.cross_entropy, (x, [3, 400])), (nbloss.mse_loss, (x.ravel(), t))
    near = [loss.value_and_grad(*arguments) for loss, arguments in calls]
    past, fetched = [], []
    for module in (pointwise_driver, results):
        stream = module.stream
        monkeypatch.setattr(module, "stream", lambda *store, stream=stream: past.append(stream(*store)))
    monkeypatch.setattr(pointwise_driver, "prefetch_far", lambda a, i, like: fetched.append(i))
    for module in (pointwise_driver, rowwise_driver):
        monkeypatch.setattr(module, "is_mapped", lambda a: mapped)
    for large in (1 << 40, 0):
        monkeypatch.setattr(auxiliary, "LARGE", large)
        plans._plans.clear()
        for (loss, arguments), (value, gradient) in zip(calls, near):
            for _ in range(2):  # afresh, and as planned
                past.clear()
                np.testing.assert_array_equal(loss.grad(*arguments), gradient)
                assert bool(past) == (large == 0 and not mapped)
                past.clear()
                np.testing.assert_array_equal(loss.grad(*arguments, out=np.empty_like(gradient)), gradient)
                assert bool(past) == (large == 0)
            fetched.clear()
            assert loss(*arguments) == value
        assert bool(fetched) == (large == 0)


@pytest.mark.parametrize("most", [1 << 22, 0])
def test_long_rows(rng, monkeypatch, most):
    """Three to a unit, with exponentials kept and computed twice, through a limit of `scale_of` and past the caches."""
    from nbloss.cpu import auxiliary, rowwise

    monkeypatch.setattr(rowwise, "MOST_OF_A_ROW", most)
    x = (rng.standard_normal((17, 4200)) + np.linspace(240, 270, 4200)).astype(np.float32)
    x[3] -= 250
    x[4] = -1e4
    x[4, 4150] = 1
    labels = rng.integers(0, 4200, 17)
    labels[[4, 7, 16]] = 4150, -100, -100
    expected = reference.cross_entropy(x, labels, reduction="none")
    for large in (0, 1 << 40):
        monkeypatch.setattr(auxiliary, "LARGE", large)
        plans._plans.clear()
        out = np.empty(x.size + 5, np.float32)[5:].reshape(x.shape)
        loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, out=out, reduction="none")
        close(loss, expected[0], "float32")
        close(gradient, expected[1], "float32")
        close(nbloss.logsumexp(x, axis=1), np.logaddexp.reduce(x.astype(float), axis=1), "float32")


def test_tall_arrays(rng, monkeypatch):
    """More classes than a tile holds, of one vector of rows and of several."""
    from nbloss.cpu import rowwise

    monkeypatch.setattr(rowwise, "TALLEST", 0)
    for rows in (3, 70):
        x, labels = rng.standard_normal((1, 70, rows)), rng.integers(0, 70, (1, rows))
        expected = reference.cross_entropy(x, labels, reduction="none")
        for result, wanted in zip(nbloss.cross_entropy.value_and_grad(x, labels, reduction="none"), expected):
            close(result, wanted)
        close(np.exp(nbloss.log_softmax(x, axis=1)), nbloss.softmax(x, axis=1))


def test_few_rows(rng, monkeypatch):
    """Classes that lie apart, folded into vectors."""
    from nbloss.cpu import rowwise

    monkeypatch.setattr(rowwise, "FOLDED_FROM", 1)
    monkeypatch.setattr(rowwise, "PIECE", 20)
    x, labels = rng.standard_normal((70, 3)).T, rng.integers(0, 70, 3)
    expected = reference.cross_entropy(x, labels, reduction="none")
    for result, wanted in zip(nbloss.cross_entropy.value_and_grad(x, labels, reduction="none"), expected):
        close(result, wanted)
    close(np.exp(nbloss.log_softmax(x)), nbloss.softmax(x))


def test_confident_row_and_nll():
    x = np.array([[30.0, 0.0]], np.float32)
    assert nbloss.cross_entropy(x, [0]) == pytest.approx(9.357623e-14, rel=1e-6)
    wide = np.zeros((1, 300), np.float32)
    wide[0, 0] = 40
    assert nbloss.cross_entropy(wide, [0]) == pytest.approx(299 * np.exp(-40.0), rel=1e-6)
    assert nbloss.nll_loss.value_and_grad(x, [0])[1].tolist() == [[-1, 0]]
    with pytest.raises(IndexError, match="target"):
        nbloss.cross_entropy(x, [2])


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(rng, name):
    x, t = rng.random((3, 40)), rng.random((3, 40))
    options = {"weight": rng.random(40), "reduction": "none"}
    expected = getattr(reference, name)(x, t, **options)
    for layout in (x, np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1]):
        loss, gradient = getattr(nbloss, name).value_and_grad(layout, t, **options)
        close(loss, expected[0])
        close(gradient, expected[1])
    assert np.isfinite(getattr(nbloss, name)(x.astype(np.float32), t))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(rng, dtype):
    """Those of results, and those that kernels take arrays for where no plan is made."""
    x, labels = rng.standard_normal((4, 3)).astype(dtype), np.array([0, 2, 1, 1])
    for loss, target in ((nbloss.cross_entropy, labels), (nbloss.nll_loss, labels), (nbloss.mse_loss, -x)):
        assert loss(x, target).dtype == np.float32
        doubled = loss.grad(x, target, grad_output=np.full(target.shape, 2.0), reduction="none")
        np.testing.assert_array_equal(doubled, 2 * loss.grad(x, target, reduction="none"))
    assert nbloss.nll_loss(x, labels, weight=np.ones(3)).dtype == np.float32


def test_all_rows_ignored():
    loss, gradient = nbloss.cross_entropy.value_and_grad(np.zeros((2, 3)), np.full(2, -100))
    assert np.isnan(loss)
    assert not gradient.any()
