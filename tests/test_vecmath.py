"""The vector functions and formulas by themselves."""

import numpy as np
import pytest
from numba import njit
from test_accuracy import DTYPES, LONG, extended, ulps

from nbloss import formulas
from nbloss.cpu import bits, vecmath
from nbloss.cpu.simd import broadcast, halves, lanes, load, pair, read, store, write

pytestmark = pytest.mark.cpu


def over_arrays(function):
    """A vector function as one over arrays."""

    @njit(error_model="numpy")
    def loop(x, out, like):
        for i in range(0, x.size, lanes(like)):
            count = min(lanes(like), x.size - i)
            write(out, i, count, function(read(x, i, count, 0.5, like)), like)

    def call(x):
        out = np.empty_like(x)
        loop(x, out, x.dtype.type(0))
        return out

    return call


@extended
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors(rng, dtype):
    lowest = -103 if dtype == np.float32 else -744
    x = np.concatenate(
        [rng.uniform(lowest, 0, 200_000), rng.uniform(-3, 0, 50_000), -(10.0 ** rng.uniform(-20, 0, 50_000))]
    )
    x = x.astype(dtype)
    exact = np.exp(x.astype(LONG))
    assert ulps(over_arrays(vecmath.exp)(x), exact).max() < 1

    tiny = 10.0 ** rng.uniform(-44 if dtype == np.float32 else -320, 30, 100_000)
    unit = np.concatenate([tiny[tiny <= 1], rng.random(100_000), 1 - 10.0 ** rng.uniform(-9, 0, 50_000)]).astype(dtype)
    unit = unit[unit > 0]
    assert ulps(over_arrays(vecmath.log_unit)(unit), np.log(unit.astype(LONG))).max() < 1
    assert ulps(over_arrays(vecmath.log1p_unit)(unit), np.log1p(unit.astype(LONG))).max() < 2
    half = unit[unit <= 0.5]
    assert ulps(over_arrays(vecmath.log_complement)(half), np.log1p(-half.astype(LONG))).max() < 2
    x = np.concatenate([tiny, rng.random(100_000) * 10, -rng.random(100_000), -np.minimum(tiny, 0.9)])
    x = np.concatenate([x, rng.uniform(0.05, 0.07, 50_000)]).astype(dtype)
    x = x[x > -1]
    assert ulps(over_arrays(vecmath.log1p)(x), np.log1p(x.astype(LONG))).max() < 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs(rng, dtype):
    """Two vectors taken at once give the bits of each."""
    exp, log1p, log_unit = vecmath.exp, vecmath.log1p, vecmath.log_unit

    @njit(error_model="numpy")
    def loop(x, alone, together, like):
        step = lanes(like)
        for i in range(0, x.size, 2 * step):
            a, b = load(x, i, like), load(x, i + step, like)
            both = exp(-pair(a, b)), log1p(pair(a, b)), log_unit(pair(a, b))
            each = exp(-a), exp(-b), log1p(a), log1p(b), log_unit(a), log_unit(b)
            for k in range(3):
                one, other = halves(both[k])
                store(together[k], i, one)
                store(together[k], i + step, other)
                store(alone[k], i, each[2 * k])
                store(alone[k], i + step, each[2 * k + 1])

    x = np.concatenate([rng.random(1000), 10.0 ** rng.uniform(-44, 0, 1000), np.linspace(0, 1, 48)]).astype(dtype)
    alone, together = np.zeros((2, 3, x.size), dtype)
    loop(x, alone, together, dtype(0))
    np.testing.assert_array_equal(together, alone)
    assert alone.any(axis=1).all()


@extended
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_exp(rng, dtype):
    """As good as if x - m were exact, however far m is from 0, and subnormal results too."""

    @njit(error_model="numpy")
    def loop(x, m, out, like):
        for i in range(0, x.size, lanes(like)):
            v, top = read(x, i, lanes(like), 0.0, like), broadcast(m, like)
            scale = vecmath.scale_of(top)
            write(out, i, lanes(like), vecmath.scaled_exp(v, scale) / vecmath.scaled_exp(top, scale), like)

    deepest = 103 if dtype == np.float32 else 744
    limit = dtype(256 if dtype == np.float32 else 2048)
    for m in (0, 0.35, -1.7, 19.3, -88.1, np.nextafter(limit, dtype(0)), limit, -limit, 1e5, -3e30):
        m = dtype(m)
        x = (m - np.concatenate([rng.uniform(0, deepest, 8192), 10.0 ** rng.uniform(-9, 0, 8192)])).astype(dtype)
        out = np.empty_like(x)
        loop(x, m, out, dtype(0))
        exact = np.exp(x.astype(LONG) - LONG(m))
        assert ulps(out, exact).max() < 3
        assert (out[x == m] == 1).all()
        loop(np.full(lanes(m), -np.inf, dtype), m, out, m)
        assert (out[: lanes(m)] == 0).all()
        loop(np.full(lanes(m), np.nan, dtype), m, out, m)
        assert np.isnan(out[: lanes(m)]).all()


@extended
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_change(rng, dtype):
    """It turns scaled_exp of one scale into that of another: to the bit where neither m is large."""

    @njit(error_model="numpy")
    def loop(x, former, m, changed, out, like):
        scale, old = vecmath.scale_of(broadcast(m, like)), vecmath.scale_of(broadcast(former, like))
        for i in range(0, x.size, lanes(like)):
            v = read(x, i, lanes(like), 0.0, like)
            ratio = broadcast(vecmath.scale_change(old, scale), like)
            write(changed, i, lanes(like), vecmath.scaled_exp(v, old) * ratio * 2.0**-64, like)
            write(out, i, lanes(like), vecmath.scaled_exp(v, scale), like)

    limit = 256 if dtype == np.float32 else 2048
    for former, m in ((0, 5), (-60, 10), (-1, 30), (limit - 2, limit + 3), (-limit - 3, -limit + 1), (1e4, 1e4 + 9)):
        x = np.linspace(former - 20, former, 512).astype(dtype)
        changed, out = np.empty_like(x), np.empty_like(x)
        loop(x, dtype(former), dtype(m), changed, out, dtype(0))
        if max(abs(former), abs(m)) < limit:
            np.testing.assert_array_equal(changed, out)
        assert ulps(changed, out.astype(LONG)).max() <= 4


def test_multiples_of_roots():
    """Rounding leaves out nothing worth a look-up, and what is exact with powers of two stays so."""
    multiples, left_out = bits._roots(4, np.float32, bits.FACTOR)
    assert np.abs(left_out).max() < 2.0**-28
    np.testing.assert_array_equal(multiples, (bits.FACTOR * 2.0 ** (np.arange(4) / 4)).astype(np.float32))
    terms = np.arange(1, 8192, dtype=np.float32)
    np.testing.assert_array_equal(terms * multiples[0], np.arange(1, 8192) * bits.FACTOR)
    assert multiples[0] * (1 / multiples[0]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(dtype):
    inf, nan = np.inf, np.nan
    x = np.array([0, -0.0, -inf, -1e4, nan], dtype)
    np.testing.assert_array_equal(over_arrays(vecmath.exp)(x), [1, 1, 0, 0, nan])
    x = np.array([1, nan, 0, -0.0], dtype)
    y = over_arrays(vecmath.log_unit)(x)
    np.testing.assert_array_equal(y[:2], [0, nan])
    assert (y[2:] < formulas.LOG_FLOOR).all()
    for function in (vecmath.log1p_unit, vecmath.log_complement):
        np.testing.assert_array_equal(over_arrays(function)(x[1:]), [nan, 0, 0])
    x = np.array([0, inf, -1, -2, -inf, nan], dtype)
    np.testing.assert_array_equal(over_arrays(vecmath.log1p)(x), [0, inf, -inf, nan, nan, nan])


@extended
def test_float32_polynomials(rng):
    """Without fused operations too, which NumPy lacks."""
    x = np.concatenate([rng.random(100_000), 2.0 ** -rng.uniform(0, 140, 100_000), [0, 1]]).astype(np.float32)
    assert ulps(formulas.log1p_unit_single(x), np.log1p(x.astype(LONG))).max() < 2
    x /= 2
    assert ulps(formulas.log_complement_single(x), np.log1p(-x.astype(LONG))).max() < 2


@pytest.mark.parametrize("name", formulas.POINTWISE)
def test_formulas_are_plain_numpy_too(rng, name):
    """The text that kernels are made of, run on arrays: gradients against central differences."""
    x, t = rng.uniform(0.1, 0.9, 100), rng.random(100)
    pos_weight = np.full(100, 1.5)
    value, gradient, outside = formulas.POINTWISE[name](x, t, pos_weight)
    above, below = (formulas.POINTWISE[name](x + d, t, pos_weight)[0] for d in (1e-6, -1e-6))
    np.testing.assert_allclose(gradient, (above - below) / 2e-6, atol=1e-6)
    assert value.shape == x.shape
    assert not outside.any()
