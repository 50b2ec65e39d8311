"""The functions of nbloss.formulas, and what they are made of, for the scalars of a CUDA kernel."""

import math
from functools import cache

import numpy as np
from numba.cuda import libdevice

from nbloss import formulas
from nbloss.cuda.intrinsics import REAL, SIMULATED, TYPE, device_function, estimated_inverse, exp2, fma, power_of_two

two_sum = device_function(formulas.two_sum)


@device_function
def where(condition, a, b):
    return a if condition else b


@device_function
def maximum(a, b):
    """The larger of a and b; b where either is NaN."""
    return a if a > b else b


LIBRARY = {
    np.float32: [getattr(libdevice, n) for n in ("expf", "logf", "log1pf", "fabsf", "fmaxf", "fmaf_rn")],
    np.float64: [getattr(libdevice, n) for n in ("exp", "log", "log1p", "fabs", "fmax", "fma_rn")],
}
LOG2E, LOG2E_REST = np.float32(1.44269504), np.float32(1.92596303e-8)  # their sum is log2(e)
# Adding this to a float32 rounds it to an integer, which it leaves in the lowest bits.
ROUND = np.float32(1.5 * 2**23)
BIAS, ONE, NOTHING = np.float32(127), np.float32(1), np.float32(0)
UP = np.float32(24)  # exponentials are kept as so many binary orders more, for sums of them may be subnormal
TWO_UP = np.float32(2**24)
UNIT, PER_UNIT = 2, 3  # where in what `around` gives
FAR = np.float32(256)  # exp(-FAR) is 0, and so is exp(x - m) for |m| >= FAR, unless x - m is exact (Sterbenz)


@device_function
def inverse(x):
    return 1 / x


if SIMULATED:
    inverse_unit = inverse
else:

    @device_function
    def inverse_unit(x):
        """1 / x for 1 <= x <= 2 in float32: an estimate and a step of Newton's, without a branch."""
        y = estimated_inverse(x)
        return fma(y, fma(-x, y, ONE), y)


def _over(inverse):
    @device_function
    def over_unit(a, b):
        return a * inverse(b)

    return over_unit


@cache
class Functions:
    """The formulas and what they are made of, for scalars of the type that a storage type is computed in.

    One object a type, so that kernels share what Numba has compiled of it.
    """

    def __init__(self, code):
        real = REAL[code]
        self.real, self.type, self._half = real, TYPE[real], code in "Hh"
        plain = np.exp, np.log, np.log1p, np.abs, np.fmax, formulas.fma
        exp, log, log1p, absolute, self.larger, fused = plain if SIMULATED else LIBRARY[real]
        self.exp, self.log1p, self.absolute = exp, log1p, absolute
        constants = {n: real(v) for n, v in vars(formulas).items() if isinstance(v, float)}
        self._primitives = {"log1p": log1p, "fma": fused, **constants}
        single = real is np.float32
        self._primitives |= {
            "exp": exp,
            "log_unit": log,
            "log1p_unit": self.bound(formulas.log1p_unit_single) if single else log1p,
            "log_complement": self.bound(formulas.log_complement_single if single else formulas.log_complement),
            "over_unit": _over(inverse if real is np.float64 else estimated_inverse if self._half else inverse_unit),
            "absolute": absolute,
            "where": where,
            "maximum": maximum,
        }
        self.add_gap = self.bound(formulas.add_gap)
        self.picked_loss = self.bound(formulas.picked_loss)
        self.row_loss = self.bound(formulas.row_loss)
        self.rest_of_target = self.bound(formulas.rest_of_target)
        self.target_gradient = self.bound(formulas.target_gradient)
        self.dense_gradient = self.bound(formulas.dense_gradient)
        self.around, self.scaled_exp = self._row_exponential()

    def bound(self, formula):
        return device_function(formulas.bind(formula, **self._primitives))

    def _row_exponential(self):
        """Two functions for a row with the maximum m: around(m), and with what that gives

            scaled_exp(x, around(m)) = exp(x - m) unit

        to 3 ulp for any x <= m, and exactly unit for x = m, with unit = around(m)[UNIT] and its inverse in [PER_UNIT].

        No x - m is rounded: with n the integer next to x log2(e), and k that next to m log2(e), exp(x - m) is
        2^(x log2(e) - n) 2^(n - k) over the same of m, which is unit (times 2^24). Nine instructions; NaN stays NaN.
        """
        if self.real is np.float64:
            exp, lowest, nothing, one = self.exp, self.real(-math.inf), self.real(0), self.real(1)

            @device_function
            def around_wide(m):
                return m, m, one, one

            @device_function
            def scaled_exp_wide(x, state):
                # No instruction for 2^x here: what the subtraction rounds away is put back (TwoSum).
                m = state[0]
                d = x - m
                rounded_m = d - x
                lost = (x - (d - rounded_m)) - (m + rounded_m)
                e = exp(d)
                return e + e * (lost if d > lowest else nothing)

            return around_wide, scaled_exp_wide

        if self._half:
            # Next to the input's own 8 or 11 bits, 8 ulp are nothing: three instructions do.
            @device_function
            def around_short(m):
                unit = exp2(UP)
                return m, m, unit, estimated_inverse(unit)

            @device_function
            def scaled_exp_short(x, state):
                return exp2(fma(x - state[0], LOG2E, UP))

            return around_short, scaled_exp_short

        larger, absolute = self.larger, self.absolute

        @device_function
        def around(m):
            centre = m if absolute(m) >= FAR else NOTHING
            d = m - centre
            k = fma(d, LOG2E, ROUND) - ROUND
            unit = exp2(fma(d, LOG2E_REST, fma(d, LOG2E, -k))) * TWO_UP
            return centre, (ROUND + (BIAS + UP)) - k, unit, estimated_inverse(unit)

        @device_function
        def scaled_exp(x, state):
            d = x - state[0]
            shifted = larger(fma(d, LOG2E, state[1]), ROUND)  # 2^-151 and less are 0
            n = shifted - state[1]
            return exp2(fma(d, LOG2E_REST, fma(d, LOG2E, -n))) * power_of_two(shifted)

        return around, scaled_exp


@device_function
def add(a, b):
    return a + b
