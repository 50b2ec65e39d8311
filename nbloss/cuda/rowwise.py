"""The row-wise kernels: cross-entropy with every kind of target, softmax, log-softmax, log-sum-exp, and nll_loss.

As on the CPU, both large ones find for each row its maximum m and r = sum exp(x - m) over all classes but one at the
maximum, and take it from there with nbloss.formulas. ``rows`` gives a row to a group of threads, which hold as much of
it in registers as fits (a span): a row of one span is read once and written once, and so is one of several spans that
as many blocks hold, or that shared memory holds; any other is read again from its end, where the cache still has it.
``planes`` gives a row to a thread, for a class axis that is not last, or any strides. Losses are written row by row and
summed apart (nbloss.cuda.sums).

What these kernels are given, besides a few numbers, is five tuples of integers:

    logits    address; bytes along (outer, classes, inner); lengths (outer, classes, inner)
    target    address, 0 for none; bytes along (outer, inner); code of the dtype; ignore_index
    mass      address of class probabilities, 0 for none; bytes along (outer, classes, inner); address of class weights
    result    address of the gradient; bytes along (outer, classes, inner); address of losses; along (outer, inner)
    upstream  address of grad_output; bytes along (outer, inner); address of one more factor; address of a count of
              faults, on which nothing is written
"""

import math
from functools import cache

import numpy as np
from numba import cuda

from nbloss.cuda.functions import PER_UNIT, UNIT, Functions, two_sum
from nbloss.cuda.intrinsics import REAL, STORED, device_function, load, load_integer, store
from nbloss.cuda.labels import load_label
from nbloss.problem import LOG_SOFTMAX, LOSS_ONLY


@cache
class Row:
    """What both kernels do with one row, compiled for one dtype."""

    def __init__(self, code, mass_code, form, dense):
        real, f = REAL[code], Functions(code)
        lowest, highest, nothing, one, nan = (real(v) for v in (-math.inf, math.inf, 0, 1, math.nan))
        self.lowest, self.nothing, self.one, self.type = lowest, nothing, one, f.type
        self.add_gap = f.add_gap
        exp, around, scaled_exp, log1p = f.exp, f.around, f.scaled_exp, f.log1p
        add_gap, row_loss, dense_gradient = f.add_gap, f.row_loss, f.dense_gradient
        rest_of_target, target_gradient = f.rest_of_target, f.target_gradient
        stored_mass, weight_size = STORED[mass_code], one.itemsize

        @device_function
        def weight_at(weight, j):
            return load(weight + j * weight_size, one) if weight != 0 else one

        @device_function
        def mass_at(j, q, q_class, weight, share, uniform):
            """Mass of class j apart from that on the target itself: w_j (share q_j + uniform)."""
            spread = uniform + share * load(q + j * q_class, stored_mass) if q != 0 else uniform
            return spread * weight_at(weight, j)

        @device_function
        def row_mass(summed, q, weight, uniform, classes):
            """The sum of `mass_at` over a row; equal masses are not added, for that would round in one direction."""
            return summed if q != 0 or weight != 0 else uniform * real(classes)

        @device_function
        def moved(below, ties, m, state):
            """The sum of all entries at most m, as entries below a larger maximum, of which state is `around`."""
            return (below + ties) * (scaled_exp(m, state) * state[PER_UNIT])

        @device_function
        def others(below, ties, m):
            """r, from the sum over entries below the maximum and the number at it; NaN where m is infinite."""
            return below + (ties - one) if m > lowest and m < highest else nan

        @device_function
        def loss_of(labelled, q, kept, m, x_t, gap, mass, r):
            log_norm = log1p(r)
            if labelled and not dense:
                d, lost = two_sum(m, -x_t)
                if d < highest:
                    log_norm += lost  # with it the loss is rounded twice, not three times
            if labelled or q != 0:
                return row_loss(add_gap(gap, kept, m, x_t), kept + mass, log_norm)
            return m + log_norm

        @device_function
        def at_target(scale, x_t, m, r, kept, mass, uniform, weight_t):
            spread = uniform * weight_t if dense else nothing  # what smoothing leaves on the target
            rest = rest_of_target(x_t, m, r)
            if dense:  # the mass may be so little that p says it all
                state = around(m)
                own = scaled_exp(x_t, state) * state[PER_UNIT]
            else:
                own = exp(x_t - m)
            return scale * target_gradient(rest, own, one + r, kept + mass, kept + spread, mass - spread)

        @device_function
        def entry(x, j, m, r, log_norm, state, slope, scale, a, q, q_class, weight, share, uniform):
            """What is written for class j, if it is not the target; state is around(m)."""
            if form == LOG_SOFTMAX:
                return (x - m) - log_norm
            e = scaled_exp(x, state)
            if not dense:
                return e * state[PER_UNIT] * slope
            e = one if e == state[UNIT] else e * state[PER_UNIT]
            mass = mass_at(j, q, q_class, weight, share, uniform)
            if q != 0:
                return scale * dense_gradient(e, e == one, mass, a, r)
            return slope * e - scale * mass

        self.weight_at, self.mass_at, self.row_mass = weight_at, mass_at, row_mass
        self.moved, self.others = moved, others
        self.loss_of, self.at_target, self.entry = loss_of, at_target, entry


ZERO = np.int64(0)
NAN = np.float32(math.nan)


def picks(code, form):
    """The kernel of nll_loss, a row a thread: its loss, or its gradient at the target (the rest of which is 0)."""
    stored, real = STORED[code], REAL[code]
    nothing, one = real(0), real(1)
    picked_loss = Functions(code).picked_loss
    weight_size = one.itemsize

    def kernel(logits, target, mass, result, upstream, scale):
        x, x_outer, x_class, x_inner, outer, classes, inner = logits
        t, t_outer, t_inner, t_code, ignore = target
        _, _, _, _, weight = mass
        out, out_outer, out_class, out_inner, loss, loss_outer, loss_inner = result
        grad_output, grad_output_outer, grad_output_inner, factor, faults = upstream
        if faults != 0 and load_integer(faults, ZERO) != 0:
            return
        unit = np.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        i, k = unit // inner, unit % inner
        if i >= outer:
            return
        label = load_label(t + i * t_outer + k * t_inner, t_code, ignore)
        active = label != ignore and label >= 0 and label < classes
        weight_t = load(weight + label * weight_size, one) if active and weight != 0 else one
        if form == LOSS_ONLY:
            value = nothing if label == ignore else NAN
            if active:
                value = picked_loss(weight_t, load(x + i * x_outer + label * x_class + k * x_inner, stored))
            store(loss + i * loss_outer + k * loss_inner, value, one)
        elif active:
            if factor != 0:
                scale *= load(factor, one)
            if grad_output != 0:
                scale *= load(grad_output + i * grad_output_outer + k * grad_output_inner, one)
            store(out + i * out_outer + label * out_class + k * out_inner, -(scale * weight_t), stored)

    return kernel
