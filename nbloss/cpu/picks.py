"""Log-probabilities given: no sum over the classes."""

import numpy as np

from nbloss.cpu.labels import OUTSIDE, labelled, without_class
from nbloss.cpu.per_row import add_losses, row_factors, row_labels, row_weights, rows_of
from nbloss.cpu.results import clear_row
from nbloss.cpu.simd import broadcast, gather_classes, inline, lanes, plane_of, scatter_classes, total, where
from nbloss.cpu.sums import no_sum, sum_of
from nbloss.cpu.targets import picked_loss
from nbloss.problem import GRADIENT


@inline
def picks(operands, mode, unit, like, scratch):
    """`per_unit` rows of the negative log-likelihood; of the gradient, zeros where the classes lie side by side, and
    else into an array of them, the one entry of each row that is not 0.
    """
    step = lanes(like)
    i, start, stop = rows_of(unit, operands.x.shape[2], scratch.per_unit)
    zero = broadcast(0.0, like)
    value_sum = no_sum()
    for k in range(start, stop, step):
        count = min(step, stop - k)
        labels = row_labels(operands, mode, scratch, i, k, count, like)
        w_t = row_weights(operands, mode, scratch, labels, count, like)
        if mode.form == GRADIENT:
            if operands.out.strides[1] == operands.out.itemsize:
                for row in range(k, k + count):
                    clear_row(operands.out[i, :, row], mode.nontemporal, like)
            gradient = zero - w_t * row_factors(operands, scratch, i, k, count, like)
            scatter_classes(plane_of(operands.out, i), labels, k, count, gradient)
        else:
            x_t = gather_classes(plane_of(operands.x, i), labels, k, count, like)
            fixed = where(labelled(labels, OUTSIDE), np.nan, zero)
            value = where(without_class(labels), fixed, picked_loss(w_t, x_t))
            value_sum = add_losses(value_sum, operands.loss, i, k, count, value, zero, zero, like)
    return total(sum_of(value_sum))
