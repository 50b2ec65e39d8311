"""The oracle: each loss and its gradient as plainly as SciPy says it, in float64, unreduced."""

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax, xlog1py, xlogy


def rows_first(x, axis):
    """x with its class axis last."""
    return np.moveaxis(np.asarray(x, np.float64), axis, -1)


def target_mass(x, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, axis=1):
    """(q, divisor of the mean): the mass on every class, class axis last."""
    axis = 0 if np.ndim(x) == 1 and axis == 1 else axis
    classes = np.shape(x)[axis]
    w = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    target = np.asarray(target)
    if target.dtype.kind not in "iub":
        hard = rows_first(target, axis)
        return w * ((1 - label_smoothing) * hard + label_smoothing / classes), float(hard[..., 0].size)
    labels = target.astype(np.int64)
    kept = (labels != ignore_index)[..., None]
    one_hot = (labels[..., None] == np.arange(classes)) & kept
    q = w * ((1 - label_smoothing) * one_hot + label_smoothing / classes) * kept
    return q, float((w * one_hot).sum())


def cross_entropy(x, target, *, axis=1, grad_output=1.0, reduction="mean", **options):
    """(loss, gradient) for finite logits."""
    axis = 0 if np.ndim(x) == 1 and axis == 1 else axis
    q, divisor = target_mass(x, target, axis=axis, **options)
    logits = rows_first(x, axis)
    loss = -(q * log_softmax(logits, axis=-1)).sum(-1)
    gradient = q.sum(-1, keepdims=True) * softmax(logits, axis=-1) - q
    return reduced(loss, np.moveaxis(gradient, -1, axis), reduction, divisor, grad_output, axis)


def nll_loss(x, target, *, axis=1, grad_output=1.0, reduction="mean", **options):
    """(loss, gradient) given log-probabilities."""
    axis = 0 if np.ndim(x) == 1 and axis == 1 else axis
    q, divisor = target_mass(x, target, axis=axis, **options)
    loss = -(q * rows_first(x, axis)).sum(-1)
    return reduced(loss, np.moveaxis(-q, -1, axis), reduction, divisor, grad_output, axis)


def binary_cross_entropy(p, t, *, weight=1.0, reduction="mean", grad_output=1.0):
    """(loss, gradient) with torch's floors."""
    p, t = np.asarray(p, np.float64), np.asarray(t, np.float64)
    with np.errstate(divide="ignore"):
        log_p, log_q = np.maximum(xlogy(1.0, p), -100), np.maximum(xlog1py(1.0, -p), -100)
    loss = -(t * log_p + (1 - t) * log_q)
    gradient = (p - t) / np.maximum(p * (1 - p), 1e-12)
    return reduced(loss * weight, gradient * weight, reduction, p.size, grad_output)


def binary_cross_entropy_with_logits(x, t, *, weight=1.0, pos_weight=1.0, reduction="mean", grad_output=1.0):
    """(loss, gradient)."""
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    loss = -(pos_weight * t * log_expit(x) + (1 - t) * log_expit(-x))
    gradient = (1 - t) * expit(x) - pos_weight * t * expit(-x)
    return reduced(loss * weight, gradient * weight, reduction, x.size, grad_output)


def mse_loss(x, t, *, weight=None, reduction="mean", grad_output=1.0):
    """(loss, gradient); a weighted mean divides by the weights."""
    d, w, divisor = _difference(x, t, weight)
    return reduced(w * d**2, 2 * w * d, reduction, divisor, grad_output)


def l1_loss(x, t, *, weight=None, reduction="mean", grad_output=1.0):
    """(loss, gradient); a weighted mean divides by the weights."""
    d, w, divisor = _difference(x, t, weight)
    return reduced(w * np.abs(d), w * np.sign(d), reduction, divisor, grad_output)


def _difference(x, t, weight):
    d = np.asarray(x, np.float64) - np.asarray(t, np.float64)
    w = np.broadcast_to(1.0 if weight is None else np.asarray(weight, np.float64), d.shape)
    return d, w, d.size if weight is None else w.sum()


def reduced(loss, gradient, reduction, divisor, grad_output, axis=None):
    """Reduce the loss and chain the gradient."""
    factor = np.asarray(grad_output, np.float64)
    if reduction == "none":
        spread = np.expand_dims(factor, axis) if axis is not None and factor.ndim else factor
        return loss, gradient * spread
    if reduction == "sum":
        return loss.sum(), gradient * factor
    with np.errstate(invalid="ignore", divide="ignore"):
        return loss.sum() / divisor, gradient * factor / divisor
