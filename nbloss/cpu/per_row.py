"""What is one number a row, for a vector of rows: one lane for each."""

import numpy as np

from nbloss.cpu.labels import OUTSIDE, label_at, labelled, load_labels, without_class
from nbloss.cpu.simd import broadcast, first, inline, lanes, load, load_one, store, store_one, where, write
from nbloss.cpu.sums import add_wide_to
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, add_gap, row_loss, target_gradient


@inline
def rows_of(unit, rows, per_unit):
    """(i, start, stop): a unit is `per_unit` of the `rows` rows of plane i, or those that are left of it."""
    per_plane = (rows + per_unit - 1) // per_unit
    i = unit // per_plane
    start = (unit - i * per_plane) * per_unit
    return i, start, min(start + per_unit, rows)


@inline
def row_labels(operands, mode, scratch, i, k, count, like):
    """The labels of a vector of rows; lanes from `count` on hold anything."""
    if mode.kind != CLASS_INDEX:
        return broadcast(0.0, like)
    t, classes, copied = operands.t, operands.x.shape[1], scratch.labels
    if count == lanes(like) and t.strides[1] == t.itemsize:
        return load_labels(t[i], k, classes, mode.ignore, like)
    for c in range(count):
        copied[c] = np.int64(t[i, k + c])
    return load_labels(copied, 0, classes, mode.ignore, like)


@inline
def row_weights(operands, mode, scratch, labels, count, like):
    """The class weight of each row's target; anything where it has none."""
    weight, numbers = operands.weight, scratch.numbers
    if mode.kind != CLASS_INDEX or weight.shape[0] == 0:
        return broadcast(1.0, like)
    store(numbers, 0, labels)
    for c in range(count):
        label = label_at(numbers, c)
        store_one(numbers, c, load_one(weight, label if label > 0 else np.int64(0), like))
    return load(numbers, 0, like)


@inline
def row_factors(operands, scratch, i, k, count, like):
    """What the gradient of each row is multiplied by."""
    upstream, numbers = operands.upstream, scratch.numbers
    if upstream.shape[0] == 0:
        return broadcast(scratch.own_factor, like)
    for c in range(count):
        numbers[c] = upstream[i, k + c]
    return load(numbers, 0, like)


@inline
def nan_if_infinite(m):
    """Maxima of rows; NaN for a row without a finite class, or with one at +inf, and so is all that is made of it."""
    return m + (m - m)


@inline
def add_losses(to, loss, i, k, left, whole, a, log_norm, like):
    """A sum with the losses of a vector of rows, `left` or all of it, which are written where they are asked for."""
    value = row_loss(whole, a, log_norm)
    if loss.shape[1]:
        write(loss[i], k, min(lanes(like), left), value, like)
    return add_wide_to(to, where(first(left, value), value, 0.0))


@inline
def row_facts(mode, labels, w_t, m, exp_max, inverse, x_t, rest, own, gap, mass, like):
    """(sum of all exponentials, r, mass on the target alone, what `row_loss` is made of with r for log1p(r)).

    x_t and own are of the target, or else of one class that attains the maximum m; `rest` is the sum of the others.
    """
    kind = mode.kind
    norm = rest + own
    r = where(x_t == m, rest, norm - exp_max) * inverse
    kept = w_t * (1.0 if kind == NO_TARGET else mode.share if kind == CLASS_INDEX else 0.0)
    if kind == NO_TARGET:
        return norm, r, kept, m, broadcast(1.0, like), r
    idle = without_class(labels)
    fixed = where(labelled(labels, OUTSIDE), np.nan, broadcast(0.0, like))  # the loss of a row without a target
    whole = where(idle, fixed, add_gap(gap, kept, m, x_t))
    return norm, r, kept, whole, where(idle, 0.0, kept + mass), where(idle, 0.0, r)


@inline
def gradient_facts(mode, factor, w_t, exp_max, rest, own, norm, kept, mass):
    """(a, a / norm, what is written at the target, or else where the maximum is): what a row's gradient is made of."""
    a = kept + mass
    spread = mode.uniform * w_t  # what smoothing leaves on the target
    at_target = factor * target_gradient(rest, own, norm, a, kept + spread, mass - spread)
    if mode.kind == NO_TARGET:
        at_target = exp_max / norm  # the product with 1 / norm can miss 1
    return a, a / norm, at_target
