"""All the mathematics, once, for both backends.

Every function here is elementwise and branch-free, so that one text serves NumPy arrays (as imported, and so
in the tests), the CPU's vectors and the GPU's scalars: a backend calls `bind` to get these functions over its
own ``exp``, ``log1p``, ``where``, … and its own typed constants.

Pointwise losses are functions ``(x, t, pos_weight) -> (value, gradient, outside)``; ``outside`` is true where
the input lies outside the loss's domain. A compiler drops whatever a kernel does not use.

Row-wise losses start from two numbers a row, its maximum m and

    r = sum_j exp(x_j - m)  over all classes but one that attains the maximum,

so that log-sum-exp = m + log1p(r) and p_j = exp(x_j - m) / (1 + r). Leaving the maximum out keeps every digit of
a confident row, where 1 + r rounds to 1.
"""

import types

from numpy import abs as absolute
from numpy import exp, log, log1p, maximum, where
from numpy import log1p as log1p_unit  # for arguments in [0, 1], where a backend may have a shorter one
from numpy import reciprocal as inverse_unit  # for arguments in [1, 2], likewise

ZERO, ONE, TWO = 0.0, 1.0, 2.0
LOG_FLOOR = -100.0  # torch clamps each logarithm of binary_cross_entropy here
VARIANCE_FLOOR = 1e-12  # torch's lower bound of p (1 - p) in its gradient


def bind(formula, **backend):
    """`formula` with a backend's own primitives and constants in place of NumPy's."""
    return types.FunctionType(formula.__code__, {**formula.__globals__, **backend}, formula.__name__)


# --- pointwise ----------------------------------------------------------------------------------------------


def binary_cross_entropy_with_logits(x, t, pos_weight):
    """(1 - t) x + (1 + (pos_weight - 1) t) softplus(-x), as a sum of terms of one sign.

    With z = exp(-|x|): softplus(-x) = max(-x, 0) + log1p(z), and the linear parts gather to (1 - t) x for x > 0
    and -pos_weight t x for x < 0, which cancel nothing. The gradient (1 - t) s(x) - pos_weight t s(-x), with
    s the logistic function, keeps the small one of s(x) and s(-x) = 1 - s(x) to full precision.
    """
    z = exp(-absolute(x))
    negative, positive = ONE - t, pos_weight * t
    slope = where(x > ZERO, negative, -positive)
    linear = where(slope == ZERO, ZERO, slope * x)
    value = linear + (negative + positive) * log1p_unit(z)
    large = inverse_unit(ONE + z)
    small = z * large
    rising = x >= ZERO
    gradient = negative * where(rising, large, small) - positive * where(rising, small, large)
    return value, gradient, x < x


def binary_cross_entropy(p, t, pos_weight):
    """-(t log p + (1 - t) log(1 - p)), each logarithm at least -100."""
    q = ONE - t
    value = -(t * maximum(LOG_FLOOR, log(p)) + q * maximum(LOG_FLOOR, log1p(-p)))
    gradient = (p - t) / maximum(VARIANCE_FLOOR, p * (ONE - p))
    outside = maximum(p - ONE, -p) > ZERO
    return value, where(outside, ZERO, gradient), outside


def mse_loss(x, t, pos_weight):
    """(x - t)^2."""
    d = x - t
    return d * d, TWO * d, d < d


def l1_loss(x, t, pos_weight):
    """|x - t|, with gradient 0 where x = t."""
    d = x - t
    gradient = where(d > ZERO, ONE, where(d < ZERO, -ONE, d * ZERO))
    return absolute(d), gradient, d < d


POINTWISE = {f.__name__: f for f in (binary_cross_entropy_with_logits, binary_cross_entropy, mse_loss, l1_loss)}


# --- row-wise: a target mass q_j on each class, a = sum_j q_j -------------------------------------------------
#
#     loss = sum_j q_j (m - x_j) + a log1p(r)         gradient_j = a p_j - q_j
#
# Class indices: q_j = kept [j = t] + w_j u with kept = w_t (1 - eps) and u = eps / C; class probabilities pi:
# q_j = w_j ((1 - eps) pi_j + u). The mass on the target's own index is summed apart from the dense rest.


def mass_gap(q, m, x):
    """q (m - x), and 0 for no mass on a class at -inf."""
    return where(q == ZERO, ZERO, q * (m - x))


def row_loss(kept, m, x_t, gap, mass, log_norm):
    """The loss of a row, given gap = sum q_j (m - x_j) and mass = sum q_j of the dense part of its target."""
    return mass_gap(kept, m, x_t) + gap + (kept + mass) * log_norm


def target_gradient(x_t, m, r, a, slack):
    """a p_t - q_t = a (p_t - 1) + slack, slack = a - q_t being the mass on other classes."""
    excess = where(x_t == m, -r, (exp(x_t - m) - r) - ONE)
    return a * (excess / (ONE + r)) + slack


def dense_gradient(e, q, a, r):
    """a p - q for e = exp(x - m); where p > 1/2 as (a - q) - a r / (1 + r), keeping the digits of q near a."""
    norm = ONE / (ONE + r)
    plain = a * (e * norm) - q
    return where(e == ONE, where(r < ONE, (a - q) - a * (r * norm), plain), plain)
