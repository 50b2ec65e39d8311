"""Digits: errors in ulp against extended precision, where the usual formulas lose them."""

import math

import mpmath
import numpy as np
import pytest
from conftest import SIMULATED, few

import nbloss

mpmath.mp.dps = 60
LONG = np.longdouble
DTYPES = [np.float32, np.float64]
extended = pytest.mark.skipif(np.finfo(LONG).eps > 2e-19, reason="long double is no wider than float64 here")


def ulps(actual, expected):
    """Error of each element in units in the last place of the expected value."""
    dtype = np.asarray(actual).dtype
    expected = np.asarray(expected, LONG)
    spacing = np.spacing(np.abs(expected).astype(dtype)).astype(LONG)
    return np.abs(np.asarray(actual).astype(LONG) - expected) / spacing


def row_reference(x, labels):
    """Losses and gradients of rows in extended precision, with nothing cancelled there either."""
    wide = x.astype(LONG)
    rows = np.arange(len(x))
    top = wide.argmax(axis=1)
    gap = wide - wide[rows, top][:, None]
    others = np.exp(gap)
    others[rows, top] = 0
    r = others.sum(axis=1)
    gradient = np.exp(gap) / (1 + r)[:, None]
    not_target = gradient.copy()
    not_target[rows, labels] = 0
    gradient[rows, labels] = -not_target.sum(axis=1)
    return np.log1p(r) - gap[rows, labels], gradient


@extended
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "limit"), [(1, 4), (3, 4), (10, 24), (30, 24)])
@pytest.mark.parametrize(("rows", "classes"), [(400, 2), (400, 10), (200, 257), (100, 1000), (20, 50_000)])
def test_cross_entropy_rows(rng, dtype, scale, limit, rows, classes):
    rows, classes = few(rows), few(classes, 1200)
    x = (rng.standard_normal((rows, classes)) * scale).astype(dtype)
    labels = rng.integers(0, classes, rows)
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
    expected, expected_gradient = row_reference(x, labels)
    assert ulps(loss, expected).max() <= limit
    # Four eps of the row's largest entry: of p, next to which the gradient is p - 1 or p.
    error = np.abs(gradient.astype(LONG) - expected_gradient).max(axis=1)
    largest = np.maximum(np.abs(expected_gradient).max(axis=1), np.finfo(dtype).tiny)
    assert (error / largest).max() <= 4 * np.finfo(dtype).eps
    # The same bits whichever axis the classes lie along is not promised; the same digits are.
    across = nbloss.cross_entropy(np.asfortranarray(x), labels, reduction="none")
    assert ulps(across, expected).max() <= limit


@extended
@pytest.mark.cpu  # a device sums the classes of a plane one after the other
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [np.asfortranarray, lambda x: x[:, ::-1].copy()[:, ::-1]])
@pytest.mark.parametrize("rise", [0, 400])
def test_many_classes_that_are_not_side_by_side(rng, dtype, layout, rise):
    x, q = rng.standard_normal((2, 16, 130_000)).astype(dtype)
    x += np.linspace(0, rise, 130_000, dtype=dtype)
    q = (np.exp(q) / np.exp(q).sum(axis=1, keepdims=True)).astype(dtype)
    wide = np.exp(x.astype(LONG))
    total = wide.sum(axis=1)
    x, q = layout(x), layout(q)
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, q, reduction="none")
    masses = q.astype(LONG)
    expected = (masses * (np.log(total)[:, None] - x.astype(LONG))).sum(axis=1)
    assert ulps(loss, expected).max() <= 3
    assert ulps(nbloss.softmax(x), wide / total[:, None]).max() <= 4
    error = np.abs(gradient.astype(LONG) - (masses.sum(axis=1) / total)[:, None] * wide + masses)
    assert (error <= 4 * np.finfo(dtype).eps * (masses + wide / total[:, None])).all()


@pytest.mark.parametrize("rows", [3, 4])
def test_many_equal_classes_that_are_not_side_by_side(rows):
    """Of sums of equal terms rounding takes the same again and again: 1e-4 of 130000 in float32."""
    x = np.zeros((few(130_000, 1600), rows), np.float32)
    x[0] = 1
    rest = (len(x) - 1) * np.exp(-1.0)
    assert ulps(nbloss.softmax(x, axis=0)[:2], [[1 / (1 + rest)] * rows, [np.exp(-1) / (1 + rest)] * rows]).max() <= 4
    assert ulps(nbloss.logsumexp(x, axis=0), 1 + np.log1p(rest)).max() <= 2


@extended
@pytest.mark.cpu  # a thread of a device adds its own classes one after the other
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("classes", [1000, 130_000])
def test_equal_classes_beside_a_confident_one(dtype, layout, classes):
    """Of sums of equal terms rounding takes the same again and again, in float64 too."""
    x = np.zeros((2, classes), dtype)
    x[:, 5] = 33.3
    gap = LONG(x[0, 5])
    rest = (classes - 1) * np.exp(-gap)
    expected = np.log1p(rest)
    assert ulps(nbloss.cross_entropy(layout(x), [5, 5], reduction="none"), expected).max() <= 6
    weights, target = np.full(classes, 0.1, dtype), np.zeros_like(x)
    target[:, 5] = 1
    weight, smoothing = LONG(weights[0]), LONG(0.1)
    expected = weight * (expected + smoothing * gap * (classes - 1) / classes)
    options = {"weight": weights, "label_smoothing": 0.1, "reduction": "none"}
    for mass in ([5, 5], layout(target)):
        assert ulps(nbloss.cross_entropy(layout(x), mass, **options), expected).max() <= 6


@extended
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [300] if SIMULATED else [1000, 20_000, 130_000])
def test_mass_on_many_classes(rng, dtype, classes):
    """Sums over all classes keep their digits, wherever the classes lie."""
    x = rng.standard_normal((classes, 2)).astype(dtype)
    probabilities = rng.random(x.shape).astype(dtype)
    probabilities /= probabilities.sum(axis=0)
    labels = rng.integers(0, classes, 2)
    wide = x.T.astype(LONG)
    m = wide.max(axis=1, keepdims=True)
    gap = m + np.log(np.exp(wide - m).sum(axis=1, keepdims=True)) - wide
    hard = np.zeros_like(wide)
    hard[[0, 1], labels] = 1
    for target, mass, smoothing, limit in (
        (labels, hard, 1, 6),
        (labels, hard, 0.1, 6),
        (probabilities, probabilities.T, 0, 8),
        (probabilities, probabilities.T, 0.1, 8),
    ):
        expected = ((1 - LONG(smoothing)) * mass * gap).sum(axis=1) + LONG(smoothing) * gap.mean(axis=1)
        for turned in (x, np.asfortranarray(x), x[::-1].copy()[::-1]):
            loss = nbloss.cross_entropy(turned, target, axis=0, label_smoothing=smoothing, reduction="none")
            assert ulps(loss, expected).max() <= limit


@pytest.mark.parametrize("classes", [3, 90])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("power", [-110, 100])
def test_gradients_of_any_size(rng, power, axis, classes):
    """A factor scales the gradient exactly, next to the largest and the smallest numbers too."""
    x, labels = rng.standard_normal((2, classes)).astype(np.float32), [0, 1]
    gradient = nbloss.cross_entropy.grad(x, labels, reduction="sum")
    moved = np.ascontiguousarray(np.moveaxis(x, 1, axis))
    scaled = nbloss.cross_entropy.grad(moved, labels, 2.0**power, reduction="sum", axis=axis)
    np.testing.assert_allclose(np.moveaxis(scaled, axis, 1) * np.float64(2.0**-power), gradient, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("confidence", [1, 5, 17, 30, 80])
@pytest.mark.parametrize("others", [1, 100, 400])
def test_confident_rows(dtype, confidence, others):
    x = np.zeros((1, 1 + others), dtype)
    x[0, 0] = confidence
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, [0])
    r = others * mpmath.exp(-confidence)
    assert ulps(loss, LONG(mpmath.nstr(mpmath.log1p(r), 30))) <= 4
    assert ulps(gradient[0, 0], LONG(mpmath.nstr(-r / (1 + r), 30))) <= 6
    assert ulps(gradient[0, 1], LONG(mpmath.nstr(mpmath.exp(-confidence) / (1 + r), 30))) <= 6
    # One-hot probabilities keep the same digits.
    one_hot = np.zeros_like(x)
    one_hot[0, 0] = 1
    dense_loss, dense_gradient = nbloss.cross_entropy.value_and_grad(x, one_hot)
    assert ulps(dense_loss, loss) <= 2
    assert ulps(dense_gradient, gradient).max() <= 2
    assert ulps(nbloss.log_softmax(x)[0, 0], -LONG(mpmath.nstr(mpmath.log1p(r), 30))) <= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_common_offset_changes_nothing(dtype):
    for v in (0.0, 1.0, 1e3, 1e6, 1e8, -1e8):
        x = np.full((1, 2), v, dtype)
        loss, gradient = nbloss.cross_entropy.value_and_grad(x, [1])
        assert ulps(loss, np.log(LONG(2))) <= 2
        np.testing.assert_array_equal(gradient, [[0.5, -0.5]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17), (20, 17), (20, 20), (20, 100), (3, 300), (3, 500), (3, 9000)])
def test_offsets_of_single_rows(rng, dtype, shape):
    """Each row keeps its digits, whatever the size of its neighbours."""
    shape = (shape[0], few(shape[1], 600))
    x = rng.integers(-8, 8, shape).astype(dtype)
    labels = rng.integers(0, shape[1], len(x))
    expected, expected_gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
    for offset in (255, -257, 2048, 2**18):  # all sums are exact
        moved = x.copy()
        moved[1] += offset
        loss, gradient = nbloss.cross_entropy.value_and_grad(moved, labels, reduction="none")
        assert ulps(loss, expected).max() <= 2
        assert ulps(gradient, expected_gradient).max() <= 4
        p = nbloss.softmax(moved, axis=1)
        np.testing.assert_array_equal(p[[0, 2]], nbloss.softmax(x, axis=1)[[0, 2]])
        assert ulps(p, nbloss.softmax(x, axis=1)).max() <= 4


@extended
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height", [0, 20, 400])
def test_rising_rows(rng, dtype, height):
    """A maximum that rises along the row, through the limit from which it is taken from every logit too."""
    classes = few(9000, 1500)
    labels = rng.integers(0, classes, few(20, 2))
    most = 5 if dtype == np.float32 else 8
    for offset in (0, 250, 2045, 10_000, -2060, -300):
        x = rng.standard_normal((len(labels), classes)) * 3 + np.linspace(0, height, classes) + offset
        x = x.astype(dtype)
        loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
        top = x.max(axis=1, keepdims=True).astype(LONG)
        p = np.exp(x.astype(LONG) - top)
        norm = p.sum(axis=1, keepdims=True)
        p /= norm
        assert ulps(nbloss.softmax(x, axis=1), p).max() <= most
        rows = np.arange(len(labels))
        assert ulps(loss, (top + np.log(norm))[:, 0] - x[rows, labels]).max() <= 2
        p[rows, labels] -= 1
        assert ulps(gradient, p).max() <= most


@extended
@pytest.mark.cpu
@pytest.mark.parametrize(("dtype", "height"), [(np.float32, 104), (np.float64, 709.1)])
def test_a_late_jump(dtype, height):
    """What is nearly too small beside a maximum that comes late is not lost."""
    x = np.full((1, 8192), -1, dtype)
    x[0, 0], x[0, 1024], x[0, -1] = 0, 4, height
    p = nbloss.softmax(x, axis=1)[0, 1024]
    exact = np.exp(LONG(4) - LONG(dtype(height)))
    assert p > 0
    assert abs(p - exact) <= 4 * max(np.spacing(p), np.finfo(dtype).smallest_subnormal)
    x = np.full((1, 8192), -1e308)
    x[0, -1] = 1e308  # further apart than float64 can tell
    assert nbloss.cross_entropy(x, [8191]) == 0
    for offset in (0, 1500, -2100, 2**20):  # large logits are taken from each other first, from 2048 on
        x = np.full((1, 8192), float(offset))
        x[0, -1] += 712.5
        assert ulps(nbloss.cross_entropy(x, [8191]), 8191 * np.exp(LONG(-712.5))) <= 4


@extended
@pytest.mark.cpu  # a device is an ulp off in float32
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [17, 20, 300, 600, 9000])
def test_a_certain_class(rng, dtype, classes):
    """Its probability is 1, not a neighbour of it, wherever the class lies; the others keep their digits."""
    x = rng.standard_normal((40, few(classes, 1200))).astype(dtype)
    certain = np.arange(40), rng.integers(0, x.shape[1], 40)
    x[certain] = 60 + 20 * rng.random(40)
    p = nbloss.softmax(x, axis=1)
    assert (p[certain] == 1).all()
    expected = np.exp(x.astype(LONG) - x[certain].astype(LONG)[:, None])
    assert ulps(p, expected)[p < 1].max() <= 4
    np.testing.assert_array_equal(nbloss.softmax(x.copy(), axis=1, out=x), p)


@extended
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [0, 1])
def test_binary_cross_entropy_with_logits(rng, dtype, target):
    x = np.concatenate(
        [
            np.linspace(-90, 90, few(20_001, 400)),
            rng.standard_normal(few(10_000, 200)),
            10.0 ** rng.uniform(-30, 0, few(2000, 200)),
        ]
    )
    x = x.astype(dtype)
    loss, gradient = nbloss.binary_cross_entropy_with_logits.value_and_grad(
        x, np.full_like(x, target), reduction="none"
    )
    wide = -x.astype(LONG) if target else x.astype(LONG)
    z = np.exp(-np.abs(wide))
    assert ulps(loss, np.maximum(wide, 0) + np.log1p(z)).max() <= 4
    probability = np.where(wide > 0, 1 / (1 + z), z / (1 + z))
    assert ulps(gradient, -probability if target else probability).max() <= 4


@extended
@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_cross_entropy(rng, dtype):
    p = np.concatenate(
        [
            rng.random(few(20_000, 400)),
            10.0 ** rng.uniform(-37, 0, few(5000, 200)),
            1 - 10.0 ** rng.uniform(-7, 0, few(5000, 200)),
        ]
    )
    p = p.astype(dtype)
    wide = p.astype(LONG)
    with np.errstate(divide="ignore"):
        for target, expected in ((1, np.maximum(np.log(wide), -100)), (0, np.maximum(np.log1p(-wide), -100))):
            loss = nbloss.binary_cross_entropy(p, np.full_like(p, target), reduction="none")
            assert ulps(loss, -expected).max() <= 4


@pytest.mark.cpu  # a device adds in another order
@pytest.mark.parametrize("start", [0, 1])
def test_float64_mean_over_many_elements(rng, start):
    """Added one by one, equal losses are off by 87 ulp."""
    n = 1_000_000
    for x in (np.full(n + start, 0.1), np.full(n + start, 1.7), rng.random(n + start)):
        x, target = x[start:], np.zeros(n)
        mean = math.fsum(x) / n
        assert ulps(nbloss.l1_loss(x, target), mean) <= 3
        assert ulps(nbloss.l1_loss.value_and_grad(x, target)[0], mean) <= 3
        assert ulps(nbloss.l1_loss(x[::-1], target), mean) <= 3
        assert ulps(nbloss.l1_loss(x, target, weight=np.full(n, 0.1)), mean) <= 4
    for classes in (4, 100, 1000):
        x = np.broadcast_to(rng.standard_normal(classes), (n // classes, classes))
        labels = np.zeros(len(x), np.int64)
        one = nbloss.cross_entropy(x[:1], labels[:1])
        for layout in (np.ascontiguousarray, np.asfortranarray):
            assert ulps(nbloss.cross_entropy(layout(x), labels), one) <= 5


def test_float32_mean_over_many_elements(rng):
    """Sums run in float64: within 1 ulp over 4 million elements, of equal values too."""
    n = 2_000 if SIMULATED else 4_000_000
    for x in (rng.random(n, dtype=np.float32), np.full(n, 0.1, np.float32), np.full(n, 1.7, np.float32)):
        target = np.zeros_like(x)
        assert ulps(nbloss.l1_loss(x, target), x.astype(np.float64).mean()) <= 1
        squares = nbloss.mse_loss(x, target, reduction="none").astype(np.float64)
        assert ulps(nbloss.mse_loss(x, target), squares.mean()) <= 1
    x = rng.standard_normal((n // 10, 10), dtype=np.float32)
    labels = rng.integers(0, 10, n // 10)
    rows = nbloss.cross_entropy(x, labels, reduction="none").astype(np.float64)
    assert ulps(nbloss.cross_entropy(x, labels), rows.mean()) <= 1


@pytest.mark.skipif(SIMULATED, reason="one simulated thread would do all classes of a row")
def test_more_equal_classes_than_float32_counts():
    """Ones that are added in float32 end at 2^24."""
    x = np.broadcast_to(np.float32(0), (2**25, 2))
    assert ulps(nbloss.logsumexp(x, axis=0), np.log(LONG(2**25))).max() <= 1


@pytest.mark.parametrize("layout", ["side by side", "strided"])
def test_mean_over_many_weighted_labels(layout):
    """Added one by one, 2^20 weights of 0.1 are off by a thousand ulp."""
    n = few(1 << 20, 1 << 11)
    labels = np.zeros((n, 2), np.int64)[:, 0] if layout == "strided" else np.zeros(n, np.int64)
    mean = nbloss.cross_entropy(np.broadcast_to(0.0, (n, 4)), labels, weight=np.full(4, 0.1))
    assert abs(mean / np.log(4) - 1) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 100, 600])
@pytest.mark.parametrize("weight", [0, 1e-12, 1])
@pytest.mark.parametrize("logit", [-50.7, -25.3, 0.0, 40.3])
def test_gradient_at_a_target_with_little_mass(dtype, classes, weight, logit):
    """Smoothing puts mass on all other classes: a p - q at the target is a difference of two small numbers."""
    x = np.full((1, classes), 17.77, dtype)
    x[0, 0] = logit
    weights = np.ones(classes, dtype)
    weights[0] = weight
    smoothing = 0.125
    options = {"weight": weights, "label_smoothing": smoothing, "reduction": "sum"}
    gradient = nbloss.cross_entropy.grad(x, [0], **options)[0, 0]
    w = mpmath.mpf(float(weights[0]))
    own = mpmath.exp(mpmath.mpf(float(x[0, 0])) - mpmath.mpf(float(x[0, 1])))
    spread = mpmath.mpf(smoothing) / classes
    own_mass, others = w * (1 - smoothing + spread), (classes - 1) * spread
    p, rest = own / (own + classes - 1), (classes - 1) / (own + classes - 1)
    exact, terms = others * p - own_mass * rest, others * p + own_mass * rest
    limit = 8 + classes / 64  # the masses of all classes are added, on a device in the dtype itself
    assert abs(mpmath.mpf(float(gradient)) - exact) < limit * np.finfo(dtype).eps * terms


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_plain_numpy(rng, dtype):
    """Errors of random rows, beside the same formula written plainly in NumPy at the same precision."""
    rows = few(500, 100)
    x = (rng.standard_normal((rows, 300)) * 5).astype(dtype)
    labels = rng.integers(0, 300, rows)
    expected, expected_gradient = row_reference(x, labels)
    m = x.max(axis=1, keepdims=True)
    e = np.exp(x - m)
    s = e.sum(axis=1, keepdims=True)
    plain = (m + np.log(s))[:, 0] - x[np.arange(rows), labels]
    plain_gradient = e / s
    plain_gradient[np.arange(rows), labels] -= 1
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, reduction="none")
    rms = [np.sqrt(np.mean((v.astype(LONG) - expected) ** 2)) for v in (loss, plain)]
    assert rms[0] <= (1.0 if dtype == np.float32 else 1.1) * rms[1]
    largest = [np.abs(v.astype(LONG) - expected_gradient).max() for v in (gradient, plain_gradient)]
    assert largest[0] <= 1.5 * largest[1]
