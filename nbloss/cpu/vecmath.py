"""exp, log and log1p on vectors: no SVML comes with Numba, so a loop over ``math.exp`` is one library call an element.

Reductions and the shape of log follow Cody and Waite and fdlibm (`e_log.c`, `s_log1p.c`); the polynomials are
minimax fits of relative error (Remez), their error given beside them in units of half an ulp of 1.
Measured errors: exp 0.8 ulp, exp_difference 2.5 ulp, log and log1p 1.0 ulp (tests/test_vecmath.py).
"""

from nbloss.cpu.simd import (
    absolute,
    exponent_of,
    fma,
    fraction_of,
    inline,
    is_single,
    maximum,
    shifted_to_exponent,
    where,
)

INF = float("inf")
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
# ln 2 in two parts, the first short enough that n·LN2_HIGH is exact for every exponent n.
LN2_HIGH_32, LN2_LOW_32 = 0.693359375, -2.12194440054690581e-4
LN2_HIGH_64, LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# Adding this rounds to an integer and leaves it, plus the exponent bias, in the low bits.
ROUND_32, ROUND_64 = 1.5 * 2.0**23 + 127.0, 1.5 * 2.0**52 + 1023.0


@inline
def _exp_unit(r):
    """exp(r) for |r| <= ln 2 / 2."""
    if is_single(r):
        y = fma(r, 0.0013814628342314945881, 0.0083687167521207975126)  # 0.05
        y = fma(y, r, 0.041668387611309424097)
        y = fma(y, r, 0.16666520634018811219)
        y = fma(y, r, 0.49999993448816854909)
    else:
        y = fma(r, 2.500001743608507915e-8, 2.7630241259998390052e-7)  # 0.03
        y = fma(y, r, 2.755758646440899869e-6)
        y = fma(y, r, 0.00002480149311837144033)
        y = fma(y, r, 0.00019841269506539712052)
        y = fma(y, r, 0.0013888888943612336501)
        y = fma(y, r, 0.0083333333334944488405)
        y = fma(y, r, 0.04166666666653021997)
        y = fma(y, r, 0.16666666666666412591)
        y = fma(y, r, 0.5000000000000010621)
    return fma(fma(y, r, 1.0), r, 1.0)


@inline
def _reduced(x, round_to):
    """(x - n ln 2, n + round_to) with n the integer nearest to x / ln 2."""
    shifted = fma(x, LOG2E, round_to)
    n = shifted - round_to
    if is_single(x):
        return fma(n, -LN2_LOW_32, fma(n, -LN2_HIGH_32, x)), shifted
    return fma(n, -LN2_LOW_64, fma(n, -LN2_HIGH_64, x)), shifted


@inline
def exp_flush(x):
    """exp(x) for x <= 0, exactly 0 where the result would be subnormal (and at -inf); NaN stays NaN."""
    if is_single(x):
        r, shifted = _reduced(maximum(-88.02969, x), ROUND_32)  # n = -127: the power of two is 0
    else:
        r, shifted = _reduced(maximum(-709.0896, x), ROUND_64)
    return _exp_unit(r) * shifted_to_exponent(shifted)


@inline
def exp(x):
    """exp(x) for x <= 0, subnormal results included; NaN stays NaN."""
    # The lowest x has n where the power of two is 0: a product that underflows would take 60 cycles on some processors.
    if is_single(x):
        r, shifted = _reduced(maximum(-191.0 * LN2, x), ROUND_32 + 64.0)
        return _exp_unit(r) * shifted_to_exponent(shifted) * 2.0**-64
    r, shifted = _reduced(maximum(-1151.0 * LN2, x), ROUND_64 + 128.0)
    return _exp_unit(r) * shifted_to_exponent(shifted) * 2.0**-128


@inline
def exp_difference(x, m):
    """exp(x - m) for x <= m: 1 where they are equal, and within 2.5 ulp elsewhere.

    Rounding x - m would cost 8 ulp of exp(-20) in float32. Both are reduced by themselves, x = n ln 2 + r and
    m = k ln 2 + s: in exp(x - m) = exp(r) 2^(n - k) exp(-s), all of m moves out of a loop over x. A large m is taken
    from both first, exactly wherever the result is not 0 (Sterbenz: x lies in [m / 2, 2 m], or is too far away).
    """
    c = where(absolute(m) < (256.0 if is_single(m) else 2048.0), 0.0, m)
    if is_single(x):
        s, shifted_k = _reduced(m - c, ROUND_32)
        k = shifted_k - ROUND_32
        r, shifted = _reduced(maximum((k - 191.0) * LN2, x - c), (ROUND_32 + 64.0) - k)
        factor = _exp_unit(-s) * 2.0**-64
    else:
        s, shifted_k = _reduced(m - c, ROUND_64)
        k = shifted_k - ROUND_64
        r, shifted = _reduced(maximum((k - 1151.0) * LN2, x - c), (ROUND_64 + 128.0) - k)
        factor = _exp_unit(-s) * 2.0**-128
    return where(x == m, 1.0, _exp_unit(r) * shifted_to_exponent(shifted) * factor)


@inline
def _log_of_parts(k, f, correction):
    """k ln 2 + log(1 + f) + correction, for f in [sqrt(1/2) - 1, sqrt(2) - 1]: log(1 + f) = 2 atanh(f / (2 + f))."""
    s = f / (f + 2.0)
    z = s * s
    if is_single(f):
        p = fma(z, 0.23581756698369340268, 0.28537332889435488878)  # 8e-5
        p = fma(p, z, 0.40000334740518117737)
        p = fma(p, z, 0.66666665647810988892)
        high, low = LN2_HIGH_32, LN2_LOW_32
    else:
        p = fma(z, 0.14795813339505493216, 0.15314066387074876122)  # 0.01
        p = fma(p, z, 0.18183563621565627862)
        p = fma(p, z, 0.22222198588330132367)
        p = fma(p, z, 0.28571428742226010623)
        p = fma(p, z, 0.3999999999941545316)
        p = fma(p, z, 0.66666666666667342933)
        high, low = LN2_HIGH_64, LN2_LOW_64
    return fma(k, high, f - (s * (f - z * p) - fma(k, low, correction)))


@inline
def log(x):
    """log(x) for x >= 0: -inf at 0, subnormal arguments included; NaN for x < 0 and NaN."""
    if is_single(x):
        tiny, scale, shift = 2.0**-126, 2.0**25, 25.0
    else:
        tiny, scale, shift = 2.0**-1022, 2.0**54, 54.0
    small = x < tiny
    normal = where(small, x * scale, x)
    k = exponent_of(normal)
    y = _log_of_parts(where(small, k - shift, k), fraction_of(normal) - 1.0, 0.0)
    return where(x > 0.0, where(x < INF, y, x), where(x == 0.0, -INF, _nan(x)))


@inline
def _nan(x):
    return (x - x) / (x - x)


@inline
def log1p(x):
    """log(1 + x) for x >= -1: -inf at -1; NaN for x < -1 and NaN."""
    u = x + 1.0
    k = exponent_of(u)
    lost = where(x > 1.0, 1.0 - (u - x), x - (u - 1.0)) / u  # what 1 + x rounded away
    near = k == 0.0
    y = _log_of_parts(k, where(near, x, fraction_of(u) - 1.0), where(near, 0.0, lost))
    return where(u > 0.0, where(x < INF, y, x), where(u == 0.0, -INF, _nan(x)))


@inline
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as 2 atanh(s) with s = x / (2 + x) <= 1/3."""
    s = x / (x + 2.0)
    z = s * s
    if is_single(x):
        p = fma(z, 0.2428966469754892145, 0.21430710484606614506)  # 0.002
        p = fma(p, z, 0.28616599750583603873)
        p = fma(p, z, 0.39998888233453532525)
        p = fma(p, z, 0.66666675501982228378)
    else:
        p = fma(z, 0.17009768307085365217, 0.083449639205093785993)  # 0.01
        p = fma(p, z, 0.12104946995513829895)
        p = fma(p, z, 0.13301121059471151733)
        p = fma(p, z, 0.15386548422201414133)
        p = fma(p, z, 0.18181744477388011907)
        p = fma(p, z, 0.22222223953704984413)
        p = fma(p, z, 0.28571428548116838418)
        p = fma(p, z, 0.40000000000155128016)
        p = fma(p, z, 0.66666666666666309653)
    return fma(s * z, p, s + s)
