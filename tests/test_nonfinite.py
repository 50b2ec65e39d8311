"""Infinities and NaN: one table for every layout, dtype and entry point."""

import ml_dtypes
import numpy as np
import pytest
from conftest import CUDA, SIMULATED, few

import nbloss
from nbloss.cpu import rowwise

INF, NAN = np.inf, np.nan
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
LAYOUTS = ["rows", "groups", "tiles", "planes", *([] if CUDA else ["streams", "folded"])]


def spread(row, layout):
    """The row, with enough classes or company for each kernel, and how to find it again."""
    if layout in ("rows", "groups"):  # classes at -inf carry no mass
        classes = 500 if layout == "rows" else 100
        return np.concatenate([row, np.full(classes - len(row), -INF)])[None], (0,)
    if layout == "tiles":
        return np.stack([row] * 3), (1,)
    if layout in ("streams", "folded"):  # of several blocks, or pieces
        row = np.concatenate([row, np.full(130 - len(row), -INF)])
    if layout == "folded":
        return np.repeat(row[None], 2, axis=1)[:, ::2], (0,)
    return np.repeat(row[None, :, None], 40, axis=2), (0, 7)


def solve(row, target, dtype, layout, **options):
    x, at = spread(np.array(row), layout)
    x = x.astype(dtype)
    labels = np.full(np.delete(x.shape, 1), target)
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none", **options)
    np.testing.assert_array_equal(nbloss.cross_entropy(x, labels, reduction="none", **options), loss)
    alone = nbloss.cross_entropy.grad(x, labels, reduction="none", **options)
    gradient = gradient.astype(np.float64)
    np.testing.assert_array_equal(alone.astype(np.float64), gradient)
    return loss[at], np.moveaxis(gradient, 1, -1)[at][: len(row)]


pytestmark = pytest.mark.usefixtures("backend", "tall")


@pytest.fixture
def tall(request, monkeypatch):
    """Few classes, or few of few rows, for kernels of many."""
    layout = request.node.callspec.params.get("layout")
    if layout == "streams":
        monkeypatch.setattr(rowwise, "TALLEST", 0)
    if layout == "folded":
        monkeypatch.setattr(rowwise, "FOLDED_FROM", 1)
        monkeypatch.setattr(rowwise, "PIECE", 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
class TestClasses:
    def test_at_minus_infinity_without_mass(self, dtype, layout):
        loss, gradient = solve([0.0, -INF, 0.0], 0, dtype, layout)
        assert loss == np.float32(np.log(2)) or loss == np.log(2)
        np.testing.assert_array_equal(gradient, [-0.5, 0, 0.5])

    def test_at_minus_infinity_as_target(self, dtype, layout):
        loss, gradient = solve([0.0, -INF, 0.0], 1, dtype, layout)
        assert loss == INF
        np.testing.assert_array_equal(gradient, [0.5, -1, 0.5])

    def test_at_minus_infinity_under_smoothing(self, dtype, layout):
        loss, gradient = solve([0.0, -INF, 0.0], 0, dtype, layout, label_smoothing=0.5)
        assert loss == INF
        assert np.isfinite(gradient).all()

    @pytest.mark.parametrize(
        "row", [[-INF, -INF, -INF], [0.0, INF, 1.0], [0.0, NAN, 1.0], [NAN, NAN, NAN], [INF, INF, -INF]]
    )
    def test_rows_that_give_nan(self, dtype, layout, row):
        loss, gradient = solve(row, 0, dtype, layout)
        assert np.isnan(loss)
        assert np.isnan(gradient).all()

    def test_ignored_rows_are_not_read(self, dtype, layout):
        loss, gradient = solve([NAN, INF, -INF], 1, dtype, layout, ignore_index=1)
        assert loss == 0
        np.testing.assert_array_equal(gradient, [0, 0, 0])

    def test_weightless_target_at_minus_infinity(self, dtype, layout):
        x, _ = spread(np.array([0.0, -INF, 0.0]), layout)
        weight = np.ones(x.shape[1])
        weight[1] = 0
        loss, gradient = solve([0.0, -INF, 0.0], 1, dtype, layout, weight=weight)
        assert loss == 0
        np.testing.assert_array_equal(gradient, [0, 0, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_row(rng, layout):
    shapes = {"rows": (5, 500), "groups": (40, 100), "tiles": (40, 6), "planes": (2, 6, 40), "streams": (2, 130, 40)}
    shapes["folded"] = 5, 130
    shape = shapes[layout]
    x = rng.standard_normal(shape).astype(np.float32, order="F" if layout == "folded" else "C")
    labels = rng.integers(0, shape[1], np.delete(shape, 1))
    clean = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
    where = (3, slice(None)) if len(shape) == 2 else (1, slice(None), 17)
    x[where] = np.nan
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
    row = where[:1] if len(shape) == 2 else (1, 17)
    assert np.isnan(loss[row])
    assert np.isnan(gradient[where]).all()
    loss[row], gradient[where] = clean[0][row], clean[1][where]
    np.testing.assert_array_equal(loss, clean[0])
    np.testing.assert_array_equal(gradient, clean[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probabilities(layout):
    x, at = spread(np.array([0.0, -INF, 0.0]), layout)
    q, _ = spread(np.array([0.5, 0.0, 0.5]), layout)
    q[q == -INF] = 0
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, q, reduction="none")
    assert loss[at] == pytest.approx(np.log(2), rel=1e-15)
    np.testing.assert_array_equal(np.moveaxis(gradient, 1, -1)[at][:3], [0, 0, 0])
    q, _ = spread(np.array([0.25, 0.5, 0.25]), layout)
    q[q == -INF] = 0
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, q, reduction="none")
    assert loss[at] == INF
    np.testing.assert_array_equal(np.moveaxis(gradient, 1, -1)[at][:3], [0.25, -0.5, 0.25])


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_functions(dtype):
    x = np.array([[0.0, -INF, 0.0], [-INF, -INF, -INF], [0.0, INF, 1.0], [NAN, 0.0, 1.0]]).astype(dtype)
    for more in (0, 100, 400):
        a = np.concatenate([x, np.full((4, more), -INF).astype(dtype)], axis=1)
        half = np.log(2)
        np.testing.assert_allclose(nbloss.logsumexp(a), [half, NAN, NAN, NAN], rtol=1e-7)
        p, log_p = nbloss.softmax(a).astype(float), nbloss.log_softmax(a).astype(float)
        np.testing.assert_array_equal(p[0, :3], [0.5, 0, 0.5])
        np.testing.assert_allclose(log_p[0, :3], [-half, -INF, -half], rtol=4e-3)
        assert np.isnan(p[1:]).all()
        assert np.isnan(log_p[1:]).all()


@pytest.mark.parametrize("classes", [90, 190, 900] if SIMULATED else [3000, 9000, 70_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_that_begin_with_minus_infinity(rng, classes, dtype):
    """As rows of masked classes do."""
    x = rng.standard_normal((3, classes)).astype(dtype)
    x[:, : classes // 2] = -INF
    x[1, : classes - 1] = -INF
    labels = np.array([classes - 2, classes - 1, classes - 3])
    finite = x[::2, classes // 2 :]
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
    expected, expected_gradient = nbloss.cross_entropy.value_and_grad(
        finite, labels[::2] - classes // 2, reduction="none"
    )
    np.testing.assert_allclose(loss[::2].astype(float), expected.astype(float), rtol=1e-6)
    assert loss[1] == 0
    np.testing.assert_allclose(
        gradient[::2, classes // 2 :].astype(float), expected_gradient.astype(float), rtol=1e-2, atol=1e-6
    )
    assert (gradient[:, : classes // 2] == 0).all()
    np.testing.assert_allclose(nbloss.logsumexp(x)[1], float(x[1, -1]), rtol=1e-6)
    np.testing.assert_allclose(float(nbloss.softmax(x)[1, -1]), 1, rtol=1.2e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_of_any_payload(layout, dtype):
    """R's missing value and the like, whose lowest bits are set."""
    bits = np.uint32(0x7FC0_07A2) if dtype == np.float32 else np.uint64(0x7FF8_0000_0000_07A2)
    x, at = spread(np.array([0.0, 1.0, bits.view(dtype)], dtype), layout)
    assert np.isnan(nbloss.logsumexp(x, axis=1)[at])
    assert np.isnan(np.moveaxis(nbloss.softmax(x, axis=1), 1, -1)[at]).all()


def test_all_rows_ignored():
    x = np.ones((3, 4))
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, [-100] * 3)
    assert np.isnan(loss)
    np.testing.assert_array_equal(gradient, np.zeros((3, 4)))
    assert nbloss.cross_entropy(x, [-100] * 3, reduction="sum") == 0
    assert np.isnan(nbloss.nll_loss(x, [-100] * 3))


@pytest.mark.parametrize("loss", [nbloss.cross_entropy, nbloss.nll_loss])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
def test_a_class_without_weight(loss, layout):
    """It hides an infinite loss, but no NaN."""
    x, weight = np.array([[-INF, -1, -1], [NAN, -1, -1], [-2, -1, -1]]), np.array([0.0, 1, 1])
    found = loss(layout(x), [0, 0, 0], weight=weight, reduction="none")
    np.testing.assert_array_equal(found, [0, NAN, 0])


def test_nothing_at_all():
    assert np.isnan(nbloss.cross_entropy(np.ones((0, 4)), np.ones(0, int)))
    assert nbloss.cross_entropy(np.ones((0, 4)), np.ones(0, int), reduction="sum") == 0
    assert nbloss.cross_entropy.grad(np.ones((0, 4)), np.ones(0, int)).shape == (0, 4)
    assert np.isnan(nbloss.mse_loss(np.ones(0), np.ones(0)))
    assert nbloss.softmax(np.ones((5, 0, 0))).shape == (5, 0, 0)
    np.testing.assert_array_equal(nbloss.logsumexp(np.ones((2, 0))), [-INF, -INF])


def test_binary_cross_entropy_with_logits_limits():
    x = np.array([INF, INF, -INF, -INF, NAN, 0.0])
    t = np.array([1.0, 0.0, 0.0, 1.0, 1.0, NAN])
    loss, gradient = nbloss.binary_cross_entropy_with_logits.value_and_grad(x, t, reduction="none")
    np.testing.assert_array_equal(loss, [0, INF, 0, INF, NAN, NAN])
    np.testing.assert_array_equal(gradient, [0, 1, 0, -1, NAN, NAN])


def test_binary_cross_entropy_edges():
    p, t = np.array([0.0, 0.0, 1.0, 1.0, NAN]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    loss, gradient = nbloss.binary_cross_entropy.value_and_grad(p, t, reduction="none")
    np.testing.assert_array_equal(loss, [0, 100, 100, 0, NAN])
    np.testing.assert_array_equal(gradient, [0, -1e12, 1e12, 0, NAN])


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
def test_differences(name):
    loss, gradient = getattr(nbloss, name).value_and_grad([INF, NAN, -INF], [0.0, 0.0, 0.0], reduction="none")
    np.testing.assert_array_equal(loss, [INF, NAN, INF])
    assert gradient[0] > 0 > gradient[2]
    assert np.isnan(gradient[1])


def test_sums_beyond_float32():
    """Sums are of float64, so that a mean of large losses is as large as they are."""
    n = few(9000, 500)
    x, zeros = np.full(n, 1e19, np.float32), np.zeros(n, np.float32)
    assert nbloss.mse_loss(x, zeros) == pytest.approx(1e38)
    assert nbloss.mse_loss(x, zeros, reduction="sum") == INF
    logits = np.tile(np.array([0, 1e38], np.float32), (n, 1))
    assert nbloss.cross_entropy(logits, np.zeros(n, int)) == pytest.approx(1e38)


def test_infinite_class_weight(backend):
    """The mean's divisor is inf: rows of other classes have no gradient, and no NaN."""
    gradient = nbloss.cross_entropy.grad(np.zeros((3, 3)), [0, 1, 2], weight=[1, np.inf, 1])
    np.testing.assert_array_equal(gradient[[0, 2]], np.zeros((2, 3)))
    assert np.isnan(gradient[1]).all()
