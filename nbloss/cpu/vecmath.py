"""exp, log and log1p on vectors: no SVML comes with Numba, so a loop over ``math.exp`` is one library call an element.

Reductions and the shape of log follow Cody and Waite and fdlibm (`e_log.c`, `s_log1p.c`); the polynomials are
minimax fits of relative error (Remez), their error given beside them in units of half an ulp of 1.
Measured errors: exp 0.6 ulp (with AVX2 0.7, float64 0.9), quotients of scaled_exp 2.5 ulp, log_unit
and log1p 1.0 ulp (with AVX-512 log1p in float32 0.85 ulp), log1p_unit and log_complement 2 ulp (tests/test_vecmath.py).
"""

import numpy as np

from nbloss import formulas
from nbloss.cpu.simd import (
    HAS_AVX512,
    PARTS_32,
    PARTS_64,
    absolute,
    any_lane,
    broadcast,
    exponent_of,
    fma,
    held,
    inline,
    is_single,
    lane,
    log_parts,
    maximum,
    multiple_of_root,
    root_alone,
    root_of_two,
    scaled,
    where,
)

INF, NAN = float("inf"), float("nan")
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
# ln 2 in two parts, the first short enough that n·LN2_HIGH is exact for every exponent n.
LN2_HIGH_32, LN2_LOW_32 = 0.693359375, -2.12194440054690581e-4
LN2_HIGH_64, LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# Adding WHOLE rounds to an integer. Adding ROUND rounds to a part of a binade (see PARTS in bits.py) and leaves the
# number of parts, plus that of the exponent's bias, in the low bits.
WHOLE_32, WHOLE_64 = 1.5 * 2.0**23, 1.5 * 2.0**52
ROUND_32, ROUND_64 = WHOLE_32 / PARTS_32 + 127.0, WHOLE_64 / PARTS_64 + 1023.0
# The exponent, from that of 1 on, whose bits are those of 0: `root_of_two` is 0 there, `multiple_of_root` one below.
ZERO_32, ZERO_64 = -128.0 if PARTS_32 == 4 else -127.0, -1023.0


@inline
def _plain(value, x):
    return value


# 32 registers hold all constants; of 16, some that are used once make better use (up to 1.1 times as fast).
_held_if_many = held if HAS_AVX512 else _plain


@inline
def _by_type(x, single, double):
    return single if is_single(x) else double


@inline
def _reduced(x, round_to):
    """(shifted, n, x - n ln 2): n = shifted - round_to is x / ln 2, rounded to a part of a binade."""
    shifted = fma(x, _held_if_many(LOG2E, x), round_to)
    n = shifted - round_to
    r = fma(n, _held_if_many(_by_type(x, -LN2_HIGH_32, -LN2_HIGH_64), x), x)
    return shifted, n, fma(n, _held_if_many(_by_type(x, -LN2_LOW_32, -LN2_LOW_64), x), r)


@inline
def _exp(x, round_to, any_multiple):
    """exp(x) 2^p for round_to = ROUND + p, and 0 where the power of two has the exponent of 0.

    With `any_multiple`, it may be times a number that is the same for every x.
    """
    shifted, _, r = _reduced(x, round_to)
    if PARTS_32 == 4 and is_single(x):
        y = fma(r, 0.04164176061749458, 0.16672103106975555)  # to (exp(r) - 1 - r) / r^2: 0.09
        y = fma(y, r, held(0.5000001788139343, r))
        if any_multiple:  # with one look-up in place of two, rows of 1000 classes are 1.08 times as fast
            root = multiple_of_root(shifted)
            return fma(root, fma(y, r * r, r), root)
        root, left_out = root_of_two(shifted)
        return fma(root, fma(y, r * r, r + left_out), root)
    root, left_out = root_of_two(shifted)
    # Looked up, roots of two made rows of 1000 classes 1.2 times as fast in float64 and up to 1.1 times in float32 with
    # AVX-512, 1.05 times in float32 with AVX2. So are, with AVX-512, logarithms in float32 (BCE: 1.2 times as fast).
    if _by_type(x, PARTS_32, PARTS_64) > 1:
        return fma(root, fma(_slope(r), r, left_out), root)
    return fma(root * r, _slope(r), root)  # root r is exact, and there is no product to wait for


@inline
def _slope(r):
    """(exp(r) - 1) / r for |r| <= ln 2 / (2 PARTS)."""
    if is_single(r):
        if PARTS_32 == 16:
            y = fma(r, held(0.16666718519167643, r), held(0.5000161889633831, r))  # 0.03
        else:
            z = r * r
            y = fma(z, 0.0013814628342314945881, fma(r, 0.0083687167521207975126, 0.041668387611309424097))  # 0.05
            y = fma(y, z, fma(r, 0.16666520634018811219, 0.49999993448816854909))
        return fma(y, r, held(1.0, r))
    if PARTS_64 == 8:
        y = fma(r, held(0.0001984056452144836, r), held(0.0013889782234426223, r))  # 0.03
        y = fma(y, r, held(0.008333333371260248, r))
        y = fma(y, r, held(0.04166666656973516, r))
        y = fma(y, r, held(0.16666666666663709, r))
        y = fma(y, r, held(0.5000000000000298, r))
        return fma(y, r, held(1.0, r))
    z = r * r  # in pairs, which wait for each other half as long as by Horner's scheme: 1.1 times as fast
    y = fma(r, 2.500001743608507915e-8, 2.7630241259998390052e-7)  # 0.03
    y = fma(y, z, fma(r, 2.755758646440899869e-6, 0.00002480149311837144033))
    y = fma(y, z, fma(r, 0.00019841269506539712052, 0.0013888888943612336501))
    y = fma(y, z, fma(r, 0.0083333333334944488405, 0.04166666666653021997))
    return fma(fma(y, z, fma(r, 0.16666666666666412591, 0.5000000000000010621)), r, 1.0)


@inline
def exp(x):
    """exp(x) for x <= 0, subnormal results included; NaN stays NaN."""
    power, round_to = _by_type(x, 64.0, 128.0), _by_type(x, ROUND_32, ROUND_64)
    x = maximum((_by_type(x, -127.0, -1023.0) - power) * LN2, x)  # from here on down, the result is 0
    if HAS_AVX512:  # one instruction multiplies by a power of two, and rounds what is subnormal
        shifted, n, r = _reduced(x, round_to)
        root, left_out = root_alone(shifted)
        return scaled(fma(root, fma(_slope(r), r, left_out), root), n)
    # A product that underflows would take 60 cycles on some processors.
    return _exp(x, round_to + power, False) * _by_type(x, 2.0**-64, 2.0**-128)


@inline
def scale_of(m):
    """What `scaled_exp` must know of the largest of its arguments.

    (Whether some m is large, what is taken from x, the lowest x whose result is not 0, round_to of `_exp`.)
    """
    # A large m is taken from every x first, exactly wherever the result is not 0 (Sterbenz: x lies in [m / 2, 2 m], or
    # is too far away).
    size, limit = absolute(m), _by_type(m, 256.0, 2048.0)
    c = where(size < limit, 0.0, m)
    some_large = any_lane(size >= limit)  # where none is, no x waits for a difference: 1.1 times faster
    whole, power = _by_type(m, WHOLE_32, WHOLE_64), _by_type(m, 32.0, 64.0)
    k = fma(m - c, LOG2E, whole) - whole
    lowest = (k + (_by_type(m, ZERO_32, ZERO_64) - power)) * LN2
    return some_large, c, lowest, (_by_type(m, ROUND_32, ROUND_64) + power) - k


@inline
def scaled_exp(x, scale):
    """exp(x - c) 2^(32 - k), in float64 2^(64 - k), for scale_of(m) with m >= x and k the integer nearest m / ln 2.

    With AVX2, float32 is times the FACTOR of `multiple_of_root` besides. scaled_exp(x) / scaled_exp(m) is exp(x - m)
    within 2.5 ulp, 1 where they are equal, and 0 at -inf: rounding x - m would cost 8 ulp of exp(-20) in float32. The
    power of two keeps every result normal that is not 0 as a quotient.
    """
    some_large, c, lowest, round_to = scale
    return _exp(maximum(lowest, x - c if some_large else x), round_to, True)


@inline
def scale_change(former, scale):
    """What to multiply scaled_exp of a former scale by for that of another, whose m is higher, times 2^64.

    That is a float64, which by itself might be too small for one. With c, k of the former scale and c', k' of the other
    it is exp(c - c') 2^(k - k' + 64).
    """
    _, former_c, _, former_round_to = former
    _, c, _, round_to = scale
    distance = max(np.float64(lane(former_c, 0)) - np.float64(lane(c, 0)), -1e300)  # at -inf, `lost` is NaN
    powers = np.float64(lane(round_to - former_round_to, 0))
    zero = broadcast(0.0, np.float64(0.0))
    if distance != 0.0:  # one c is 0, and the power takes most of the other away; or powers is 0
        high, low = distance + powers * LN2_HIGH_64, powers * LN2_LOW_64
        rest = high + low
        lost = (high - rest) + low  # of 700, it makes 200 ulp of the result
        return lane(scaled_exp(zero + rest, scale_of(zero)), 0) * (1.0 + lost)
    power, _ = root_of_two(maximum(zero + (powers + 64.0), zero - 1023.0) + ROUND_64)  # of -1023, it is 0
    return lane(power, 0)


@inline
def _log_tail(f, z):
    """(log(1 + f) - f) / f^2 in float32, for f in [sqrt(1/2) - 1, sqrt(2) - 1], given z = f^2."""
    p = fma(z, -0.076217770595391255346, fma(f, 0.12904433285341118448, -0.13242988328227706985))  # 0.09
    p = fma(p, z, fma(f, 0.14181825283963038304, -0.166090825337971837))
    p = fma(p, z, fma(f, 0.20001973914435523313, -0.25001582961366755229))
    return fma(p, z, fma(f, 0.33333325692509412798, -0.49999988346420091851))


@inline
def _log_of_parts(k, f, correction):
    """k ln 2 + log(1 + f) + correction, for the f of _log_tail."""
    if is_single(f):
        z = f * f
        return fma(k, LN2, f + fma(z, _log_tail(f, z), correction))
    # log(1 + f) = 2 atanh(f / (2 + f))
    s = f / (f + 2.0)
    z = s * s
    p = fma(z, 0.14795813339505493216, 0.15314066387074876122)  # 0.01
    p = fma(p, z, 0.18183563621565627862)
    p = fma(p, z, 0.22222198588330132367)
    p = fma(p, z, 0.28571428742226010623)
    p = fma(p, z, 0.3999999999941545316)
    p = fma(p, z, 0.66666666666667342933)
    return fma(k, LN2_HIGH_64, f - (s * (f - z * p) - fma(k, LN2_LOW_64, correction)))


@inline
def _sum_of_log(k, high, low, r):
    """k ln 2 + high + low + (log(1 + r) - r) in float32, for r in [-1/32, 1/16]."""
    tail = fma(fma(fma(r, 0.1886504888534546, -0.2500725984573364), r, 0.33334431052207947), r, -0.5)  # 0.05
    return fma(k, LN2, high + fma(r * r, tail, low))


@inline
def log_unit(x):
    """log(x) for 0 <= x <= 1, but a number below -110 at 0; NaN stays NaN."""
    if HAS_AVX512 and is_single(x):
        k, m, c, log_of_inverse = log_parts(x)
        r = fma(m, c, -1.0)
        return _sum_of_log(k, log_of_inverse, r, r)
    # Scaled, subnormal numbers are normal; adding 0 makes 0 of -0.
    if is_single(x):
        s = fma(x, 2.0**32, 0.0)
        k, power = exponent_of(s, 32)
        f = fma(power, s, -1.0)
        z = f * f
        # No second part of ln 2: the float32 next to it is off by a 31st of an ulp.
        return fma(k, LN2, fma(z, _log_tail(f, z), f))
    s = fma(x, 2.0**64, 0.0)
    k, power = exponent_of(s, 64)
    return _log_of_parts(k, fma(power, s, -1.0), 0.0)


@inline
def log1p(x):
    """log(1 + x) for x >= -1: -inf at -1; NaN for x < -1 and NaN."""
    u = x + 1.0
    lost = where(x > 1.0, 1.0 - (u - x), x - (u - 1.0))  # what 1 + x rounded away
    if HAS_AVX512 and is_single(x):
        k, m, c, log_of_inverse = log_parts(u)
        r = fma(m, c, -1.0)
        high = log_of_inverse + r
        rest = scaled(lost, -k) * c
        low = ((log_of_inverse - high) + r) + fma(-r, rest, rest)
        return _within(x, u, _sum_of_log(k, high, low, r))
    k, power = exponent_of(u, 0)
    near = k == 0.0
    f = where(near, x, fma(power, u, -1.0))
    lost = lost * (power * fma(fma(f, 0.914, -1.081), f, 1.005))  # over u: 1 / (1 + f) within 1% costs a 50th of an ulp
    return _within(x, u, _log_of_parts(k, f, where(near, 0.0, lost)))


@inline
def _within(x, u, y):
    """y = log(u) where u = 1 + x is finite and above 0; what log1p(x) is elsewhere."""
    return where(u == 0.0, -INF, where(u > 0.0, where(x < INF, y, x), NAN))


_log1p_unit_single = inline(formulas.bind(formulas.log1p_unit_single, fma=fma))
_log_complement_single = inline(formulas.bind(formulas.log_complement_single, fma=fma))


@inline
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1."""
    if is_single(x):
        return _log1p_unit_single(x)
    return _two_atanh(x / (x + 2.0))


@inline
def log_complement(x):
    """log(1 - x) for 0 <= x <= 1/2."""
    if is_single(x):
        return _log_complement_single(x)
    return _two_atanh(x / (x - 2.0))


@inline
def _two_atanh(s):
    """2 atanh(s) in float64 for |s| <= 1/3."""
    z = s * s
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
