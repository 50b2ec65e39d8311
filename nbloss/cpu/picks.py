"""Log-probabilities given: no sum over the classes."""

import numpy as np

from nbloss.cpu.simd import broadcast, gather, inline, lane, scatter
from nbloss.cpu.targets import add_gap
from nbloss.problem import GRADIENT


@inline
def picks(operands, mode, unit, like, scratch):
    """One row of the negative log-likelihood; the gradient is written into an array of zeros."""
    x, t, _, weight, upstream, out, loss = operands
    i = unit // x.shape[2]
    k = unit - i * x.shape[2]
    label = np.int64(t[i, k])
    value = type(like)(0)
    if label < 0 or label >= x.shape[1]:
        if label != mode.ignore:
            value = type(like)(np.nan)
    elif label != mode.ignore:
        w_t = weight[label] if weight.shape[0] else type(like)(1)
        if mode.form == GRADIENT:
            scale = upstream[i, k] if upstream.shape[0] else scratch.own_factor
            scatter(out[i, :, k], label, 1, broadcast(-w_t * scale, like))
        else:
            x_t = gather(x[i, :, k], label, 1, like)
            value = lane(add_gap(0.0, broadcast(w_t, like), 0.0, x_t), 0)
    if loss.shape[1]:
        loss[i, k] = value
    return np.float64(value)
