"""The formula of every loss and gradient, once, for both backends.

Every function here is elementwise and branch-free, so that one text serves NumPy arrays (as imported, and so
in the tests), the CPU's vectors and the GPU's scalars: a backend calls `bind` to get these functions over its
own ``exp``, ``log1p``, ``where``, … and its own typed constants.

Pointwise losses are functions ``(x, t, pos_weight) -> (value, gradient, outside)``; ``outside`` is true where
the input lies outside the loss's domain: a kernel makes that loss NaN and that gradient 0, whatever they are
multiplied by. A compiler drops whatever a kernel does not use.

Row-wise losses start from two numbers a row, its maximum m and

    r = sum_j exp(x_j - m)  over all classes but one that attains the maximum,

so that log-sum-exp = m + log1p(r) and p_j = exp(x_j - m) / (1 + r). Leaving the maximum out keeps every digit of
a confident row, where 1 + r rounds to 1.
"""

import types

from numpy import abs as absolute
from numpy import exp, log1p, maximum, where
from numpy import log as log_unit  # for arguments in [0, 1]; at 0 anything below LOG_FLOOR will do
from numpy import log1p as log1p_unit  # for arguments in [0, 1], where a backend may have a shorter one

ZERO, ONE, TWO = 0.0, 1.0, 2.0
LOG_FLOOR = -100.0  # torch clamps each logarithm of binary_cross_entropy here
VARIANCE_FLOOR = 1e-12  # torch's lower bound of p (1 - p) in its gradient


def bind(formula, **backend):
    """`formula` with a backend's own primitives and constants in place of NumPy's."""
    return types.FunctionType(formula.__code__, {**formula.__globals__, **backend}, formula.__name__)


def log_complement(x):
    """log(1 - x) for arguments in [0, 1/2]."""
    return log1p(-x)


def fma(a, b, c):
    """a b + c, rounded once where a backend can."""
    return a * b + c


def over_unit(a, b):
    """a / b for b in [1, 2], where a backend may have something shorter."""
    return a / b


def two_sum(a, b):
    """a + b as the rounded sum and what it rounds away (Knuth)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


# --- float32 polynomials ------------------------------------------------------------------------------------
#
# Minimax fits of relative error (Remez), given in units of 2^-24. Summed in pairs: as few operations as Horner's
# scheme, half as many of them waiting for each other.

# (log(1 + x) - x) / x^2 for x in [0, 1]: 0.6, rounded, 1.6 ulp of log(1 + x)
A0, A1, A2, A3 = -0.49999648332595825, 0.33321329951286316, -0.24857217073440552, 0.1915384829044342
A4, A5, A6, A7 = -0.13754187524318695, 0.07920882850885391, -0.030068300664424896, 0.005365422461181879
# (log(1 - x) + x) / x^2 for x in [0, 1/2]: 0.4, rounded, 1.3 ulp of log(1 - x)
B0, B1, B2, B3 = -0.49999523162841797, -0.33363157510757446, -0.24369029700756073, -0.2636367380619049
B4, B5, B6, B7 = 0.1807410567998886, -1.2082513570785522, 1.6390562057495117, -1.4142956733703613


def log1p_unit_single(x):
    z = x * x
    p = fma(fma(x, A7, A6), z, fma(x, A5, A4))
    return fma(z, fma(fma(p, z, fma(x, A3, A2)), z, fma(x, A1, A0)), x)


def log_complement_single(x):
    z = x * x
    p = fma(fma(x, B7, B6), z, fma(x, B5, B4))
    return fma(z, fma(fma(p, z, fma(x, B3, B2)), z, fma(x, B1, B0)), -x)


# --- pointwise ----------------------------------------------------------------------------------------------


def binary_cross_entropy_with_logits(x, t, pos_weight):
    """(1 - t) x + (1 + (pos_weight - 1) t) softplus(-x), as a sum of terms of one sign.

    With z = exp(-|x|): softplus(-x) = max(-x, 0) + log1p(z), and the linear parts gather to (1 - t) x for x > 0
    and -pos_weight t x for x < 0, which cancel nothing. The gradient (1 - t) s(x) - pos_weight t s(-x), with
    s the logistic function, has the larger one of s(x) and s(-x) = 1 - s(x) as 1 / (1 + z), the other as z / (1 + z).
    """
    z = exp(-absolute(x))
    negative, positive = ONE - t, pos_weight * t
    slope = where(x > ZERO, negative, -positive)
    linear = where(slope == ZERO, ZERO, slope * x)
    value = fma(negative + positive, log1p_unit(z), linear)
    gradient = over_unit(where(x >= ZERO, fma(-positive, z, negative), fma(negative, z, -positive)), ONE + z)
    return value, gradient, x < x  # every input is in the domain


def binary_cross_entropy(p, t, pos_weight):
    """-(t log p + (1 - t) log(1 - p)), each logarithm at least -100.

    The smaller one of p and 1 - p, which is exact, gives both: its own logarithm, weighed by t or 1 - t, and that of
    the larger one, log(1 - small) with small <= 1/2, a polynomial. `small` is negative for p outside [0, 1] only.
    """
    rest = ONE - p
    low = p < rest
    small = where(low, p, rest)
    mass = where(low, t, ONE - t)
    outside = small < ZERO
    value = fma(-mass, maximum(LOG_FLOOR, log_unit(small)), (mass - ONE) * log_complement(small))
    gradient = (p - t) / maximum(VARIANCE_FLOOR, p * rest)
    return value, gradient, outside


def mse_loss(x, t, pos_weight):
    """(x - t)^2."""
    d = x - t
    return d * d, TWO * d, d < d  # every input is in the domain


def l1_loss(x, t, pos_weight):
    """|x - t|, with gradient 0 where x = t."""
    d = x - t
    gradient = where(d > ZERO, ONE, where(d < ZERO, -ONE, d * ZERO))  # 0, or NaN for NaN
    return absolute(d), gradient, d < d


def summand(x, t, pos_weight):
    """x, for sums of it."""
    return x, ZERO, x < x


POINTWISE = {f.__name__: f for f in (binary_cross_entropy_with_logits, binary_cross_entropy, mse_loss, l1_loss)}


# --- row-wise: a target mass q_j on each class, a = sum_j q_j -------------------------------------------------
#
#     loss = sum_j q_j (m - x_j) + a log1p(r)         gradient_j = a p_j - q_j
#
# Class indices: q_j = kept [j = t] + w_j u with kept = w_t (1 - eps) and u = eps / C; class probabilities pi:
# q_j = w_j ((1 - eps) pi_j + u). The mass on the target's own index is summed apart from the dense rest.


def add_gap(gap, q, m, x):
    """gap + q (m - x), where no mass on a class at -inf adds nothing."""
    return where(q == ZERO, gap, fma(q, m - x, gap))


def picked_loss(q, x):
    """-q x for a log-probability x, where no mass on a class at -inf adds nothing, and NaN stays NaN."""
    return where(x == x, where(q == ZERO, ZERO, ZERO - q * x), x)


def row_loss(gap, a, log_norm):
    """The loss of a row, given gap = sum q_j (m - x_j) and a = sum q_j over all classes."""
    return gap + a * log_norm


def rest_of_target(x_t, m, r):
    """The sum of exp(x_j - m) over all classes but the target."""
    return where(x_t == m, r, (r - exp(x_t - m)) + ONE)


def target_gradient(rest, own, norm, a, q, slack):
    """a p_t - q_t for p_t = own / norm and 1 - p_t = rest / norm, the target's share and that of all others in the sum
    of exp(x_j - m); for p_t > 1/2 as slack - a (1 - p_t), with slack = a - q_t the mass on other classes."""
    most = own > rest
    share = where(most, rest, own) / norm
    return where(most, slack - a * share, a * share - q)


def dense_gradient(e, top, q, a, r):
    """a p - q for e = exp(x - m), `top` where x = m; for p > 1/2 as (a - q) - a r / (1 + r), which keeps q near a."""
    norm = ONE / (ONE + r)
    plain = a * (e * norm) - q
    return where(top, where(r < ONE, (a - q) - a * (r * norm), plain), plain)
