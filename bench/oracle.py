"""The float64 reference that every library must agree with before it is timed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import special

from bench.cases import HALF, Array, Case, inputs_of, numpy_dtype

Result = tuple[float | None, Array | None]  # the reduced value, and the gradient or the array that is asked for

BLOCK = 1 << 20


@lru_cache(maxsize=1)
def reference(case: Case) -> Result:
    """(mean loss, its gradient) in float64; for row functions (None, the array)."""
    data = inputs_of(case)
    x = data.x.astype(np.float64)
    if case.loss == "softmax":
        return None, special.softmax(x, axis=-1)
    if case.loss == "log_softmax":
        return None, special.log_softmax(x, axis=-1)
    assert data.target is not None
    if case.loss in ("cross_entropy", "nll_loss"):
        return _of_classes(case, x)
    t = data.target.astype(np.float64)
    if case.loss == "mse_loss":
        return float(np.mean(np.square(x - t))), 2 * (x - t) / x.size
    if case.loss == "l1_loss":
        return float(np.mean(np.abs(x - t))), np.sign(x - t) / x.size
    if case.loss == "binary_cross_entropy":
        value = -np.mean(special.xlogy(t, x) + special.xlog1py(1 - t, -x))
        return float(value), (x - t) / (x * (1 - x)) / x.size
    weight = 1.0 if data.weight is None else data.weight.astype(np.float64)
    value = -np.mean(weight * t * special.log_expit(x) + (1 - t) * special.log_expit(-x))
    return float(value), ((1 - t) * special.expit(x) - weight * t * special.expit(-x)) / x.size


def _of_classes(case: Case, x: Array) -> Result:
    data = inputs_of(case)
    assert data.target is not None
    classes = x.shape[1]
    weight = np.ones(classes) if data.weight is None else data.weight.astype(np.float64)
    if data.target.dtype.kind in "iu":
        mass = np.zeros_like(x)
        active = data.target >= 0
        np.put_along_axis(mass, np.expand_dims(np.maximum(data.target, 0), 1), np.expand_dims(active, 1), axis=1)
        count = float(weight[data.target[active]].sum())
    else:
        mass = data.target.astype(np.float64)
        count = x.size / classes
    mass *= 1 - data.smoothing
    mass += data.smoothing / classes
    mass *= weight.reshape(-1, *[1] * (x.ndim - 2))
    if case.loss == "nll_loss":
        return float(-np.vdot(mass, x) / count), -mass / count
    log_p = special.log_softmax(x, axis=1)
    value = -np.vdot(mass, log_p) / count
    gradient = np.exp(log_p, out=log_p)
    gradient *= mass.sum(axis=1, keepdims=True)
    gradient -= mass
    gradient /= count
    return float(value), gradient


def disagreement(case: Case, result: Result) -> str | None:
    """How a result differs from the reference, or None where it agrees within its dtype.

    The gradient is judged twice: by its largest error, and by the sum of all errors, because a wrong factor on a
    hundred thousand small probabilities never shows beside the entry of the target.
    """
    value, array = reference(case)
    eps = float(_finfo(case.dtype).eps)
    allowed = eps * (8 if case.dtype in HALF else 256)
    if value is not None and result[0] is not None:
        error = abs(float(result[0]) - value) / abs(value)
        if not error <= allowed:
            return f"value {float(result[0])!r} instead of {value!r}: relative error {error:.2g}, allowed {allowed:.2g}"
    if array is not None and result[1] is not None:
        if result[1].shape != array.shape:
            return f"array of shape {result[1].shape} instead of {array.shape}"
        largest, mean, scale, norm = _errors(np.ravel(result[1]), np.ravel(array))
        # Entries of a half-precision mean gradient may lie below its normal range, where steps are constant.
        step = float(_finfo(case.dtype).smallest_subnormal)
        if not largest <= allowed * scale + step:
            return f"array: largest error {largest:.2g}, allowed {allowed * scale + step:.2g}"
        if not mean <= allowed * norm + step:
            return f"array: mean error {mean:.2g}, allowed {allowed * norm + step:.2g}"
    return None


def _errors(got: Array, expected: Array) -> tuple[float, float, float, float]:
    """(largest error, mean error, largest entry, mean entry), in blocks so that nothing large is allocated."""
    largest = total = scale = norm = 0.0
    for start in range(0, expected.size, BLOCK):
        part = expected[start : start + BLOCK]
        error = np.abs(got[start : start + BLOCK].astype(np.float64) - part)
        largest = float(np.maximum(largest, error.max()))  # NaN stays
        total += float(error.sum())
        scale = max(scale, float(np.abs(part).max()))
        norm += float(np.abs(part).sum())
    return largest, total / expected.size, scale, norm / expected.size


def _finfo(dtype: str) -> np.finfo:  # type: ignore[type-arg]
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.finfo(numpy_dtype(dtype))  # type: ignore[return-value]
    return np.finfo(dtype)
