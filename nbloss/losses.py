"""The public losses and row functions: signature, documentation, and which problem each one is.

A function below `@loss` gives the problem that its arguments pose; the decorator makes of it what users call, with
`value_and_grad` and `grad`, and has the problem solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike

from nbloss import arguments
from nbloss.dispatch import choose, loss, plain_array, results, solve
from nbloss.plans import key_of_rows, replay
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY, Array, Backend, Pointwise, Reduction, Rowwise


@loss
def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: SupportsIndex = -100,
    label_smoothing: float = 0.0,
    axis: SupportsIndex = 1,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Rowwise:
    """Cross-entropy between softmax(logits) and a target, from log-sum-exp.

    For each row of C classes, with lse the log-sum-exp of its logits x and q its target mass::

        loss = sum_j q_j (lse - x_j)        gradient_j = a p_j - q_j,  a = sum_j q_j,  p = softmax(x)

    Class indices t:          q_j = w_t (1 - eps) [j = t] + w_j eps / C
    Class probabilities pi:   q_j = w_j ((1 - eps) pi_j + eps / C)

    Parameters
    ----------
    logits : float16, bfloat16, float32 or float64 array of shape (C,), (N, C) or (N, C, d1, ...)
        Unnormalised log-probabilities; any strides.
    target : array
        Class indices (any integer dtype or bool) of the logits' shape without `axis`, or class probabilities
        (floating) of the logits' shape. The dtype decides. Probabilities are used as given: they need not sum to 1, and
        are not checked.
    weight : array of shape (C,), optional
        A factor w for each class.
    ignore_index : int
        Rows with this target contribute nothing, whatever their logits hold, and their gradient is 0.
    label_smoothing : float in [0, 1]
        The share eps of the target mass that is spread evenly over the classes.
    axis : int
        The class axis. The default suits (C,) too.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the weight of the targets that count (class indices), or by the number of rows (class
        probabilities); it is NaN where there are none.
    backend : {"auto", "cpu", "cuda"}
        "auto" is where the arrays are: on a CUDA device, or on the host. "cuda" takes host arrays to the device.
    stream : CUDA stream or its address, for device arrays
        None is the legacy default stream.
    check : bool
        False: no error for a class index out of range; that row's loss is NaN and its gradient 0. A call on a device
        then does not wait for it.

    Returns
    -------
    A NumPy scalar, or for "none" an array of the logits' shape without `axis`: float64 for float64 logits,
    else float32. For logits on a device, an array there.

    Raises
    ------
    IndexError
        For a class index outside [0, C) that is not `ignore_index`.
    ValueError
        For shapes that do not fit, an axis out of range (AxisError), an unknown reduction or backend, a label_smoothing
        outside [0, 1], or an ignore_index of 0 or more with class probabilities.
    TypeError
        For logits that are not floating, a masked, object or complex array, or arrays that are not all in one place.
    RuntimeError
        For arrays on a device, or backend="cuda", where CUDA cannot be used: it says why, and what to install.

    Notes
    -----
    A class at -inf without target mass has probability and gradient 0; with target mass the loss is inf. A row of -inf
    only, or with +inf or NaN, gives NaN for that row.

    Label smoothing is that of Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016).

    `cross_entropy.value_and_grad` and `cross_entropy.grad` give the gradient too, for an upstream gradient and into
    `out` if there are any.

    Examples
    --------
    >>> import nbloss
    >>> print(round(nbloss.cross_entropy([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]], [0, 2]), 10))
    1.228823143
    >>> loss, grad = nbloss.cross_entropy.value_and_grad([[2.0, 1.0, 0.1]], [0])
    >>> print(grad.round(4))
    [[-0.341   0.2424  0.0986]]
    """
    return choose(
        backend,
        stream,
        arguments.cross_entropy(logits, target, weight, ignore_index, label_smoothing, axis, reduction, check),
    )


@loss
def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: SupportsIndex = -100,
    axis: SupportsIndex = 1,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Rowwise:
    """Negative log-likelihood of class indices, given log-probabilities.

    For each row, ``loss = -w_t x_t`` with x the row's log-probabilities, t its target and w the class weights; the
    gradient is -w_t at the target and 0 elsewhere.

    Parameters
    ----------
    log_probs : float16, bfloat16, float32 or float64 array of shape (C,), (N, C) or (N, C, d1, ...)
        Log-probabilities, such as `log_softmax` gives; they are not normalised again.
    target : integer or bool array of log_probs' shape without `axis`
        Class indices.
    weight, ignore_index, axis, reduction, backend, stream, check
        As in `cross_entropy`.

    Returns
    -------
    A NumPy scalar, or for "none" an array of log_probs' shape without `axis`: float64 for float64 log_probs, else
    float32.

    Raises
    ------
    IndexError, ValueError, TypeError
        As in `cross_entropy`; class probabilities as target are a TypeError.

    Notes
    -----
    Only the target's entry of a row is read: -inf there gives inf, NaN gives NaN.

    `nll_loss.value_and_grad` and `nll_loss.grad` give the gradient too, for an upstream gradient and into `out` if
    there are any.

    Examples
    --------
    >>> import nbloss
    >>> log_probs = nbloss.log_softmax([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]])
    >>> print(round(nbloss.nll_loss(log_probs, [0, 2]), 10))
    1.228823143
    """
    return choose(backend, stream, arguments.nll_loss(log_probs, target, weight, ignore_index, axis, reduction, check))


@loss
def binary_cross_entropy(
    probs: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Pointwise:
    """Binary cross-entropy between probabilities and targets.

    ``loss = -w (t log p + (1 - t) log(1 - p))``, each logarithm at least -100 as in torch, so that the loss is finite;
    the gradient is ``w (p - t) / max(p (1 - p), 1e-12)``.

    Parameters
    ----------
    probs : float16, bfloat16, float32 or float64 array of any shape
        Probabilities p in [0, 1].
    target : array of the same shape, floating, integer or bool
        Targets t, usually in [0, 1].
    weight : array that broadcasts to the shape of probs, optional
        A factor w for each element.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements.
    backend, stream
        As in `cross_entropy`.
    check : bool
        False: no error for a probability outside [0, 1]; its loss is NaN and its gradient 0.

    Returns
    -------
    A NumPy scalar, or for "none" an array of the shape of probs: float64 for float64 probs, else float32.

    Raises
    ------
    ValueError
        For a probability outside [0, 1], shapes that do not fit, or an unknown reduction or backend.
    TypeError
        For probs that are not floating, or a masked, object or complex array.

    Notes
    -----
    NaN in probs or target gives NaN for that element. Logits lose digits on their way through a sigmoid: where you
    have them, use `binary_cross_entropy_with_logits`.

    `binary_cross_entropy.value_and_grad` and `binary_cross_entropy.grad` give the gradient too, for an upstream
    gradient and into `out` if there are any.

    Examples
    --------
    >>> import nbloss
    >>> print(round(nbloss.binary_cross_entropy([0.8, 0.2, 0.4], [1, 0, 0]), 10))
    0.3190375755
    """
    return choose(
        backend,
        stream,
        arguments.pointwise("binary_cross_entropy", "probs", probs, target, weight, None, reduction, check),
    )


@loss
def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Pointwise:
    """Binary cross-entropy between sigmoid(logits) and targets, stable for every logit.

    ``loss = w ((1 - t) x + (1 + (pos_weight - 1) t) softplus(-x))`` for logits x; the gradient is
    ``w ((1 - t) s(x) - pos_weight t s(-x))`` with s the logistic function.

    Parameters
    ----------
    logits : float16, bfloat16, float32 or float64 array of any shape
    target : array of the same shape, floating, integer or bool
        Targets t, usually in [0, 1].
    weight : array that broadcasts to the shape of logits, optional
        A factor w for each element.
    pos_weight : array that broadcasts to the shape of logits, optional
        A factor for the positive part of each target.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements.
    backend, stream, check
        As in `cross_entropy`; there is nothing to check in the values.

    Returns
    -------
    A NumPy scalar, or for "none" an array of the shape of logits: float64 for float64 logits, else float32.

    Raises
    ------
    ValueError
        For shapes that do not fit, or an unknown reduction or backend.
    TypeError
        For logits that are not floating, or a masked, object or complex array.

    Notes
    -----
    Infinite logits give the limits: 0 on the target's side and inf on the other. NaN gives NaN for that element.

    `binary_cross_entropy_with_logits.value_and_grad` and `binary_cross_entropy_with_logits.grad` give the gradient
    too, for an upstream gradient and into `out` if there are any.

    Examples
    --------
    >>> import nbloss
    >>> x = [0.8269, -0.7197, -0.6237, 0.1657]
    >>> print(round(nbloss.binary_cross_entropy_with_logits(x, [0, 0, 0, 1]), 10))
    0.6573274536
    """
    return choose(
        backend,
        stream,
        arguments.pointwise(
            "binary_cross_entropy_with_logits", "logits", logits, target, weight, pos_weight, reduction, check
        ),
    )


@loss
def mse_loss(
    input: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Pointwise:
    """Squared error.

    ``loss = w (x - t)^2``; the gradient is ``2 w (x - t)``.

    Parameters
    ----------
    input : float16, bfloat16, float32 or float64 array of any shape
        Values x.
    target : array of the same shape, floating, integer or bool
        Targets t.
    weight : array that broadcasts to the shape of input, optional
        A factor w for each element.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements, or by the sum of the weights where they are given, as in torch.
    backend, stream, check
        As in `cross_entropy`; there is nothing to check in the values.

    Returns
    -------
    A NumPy scalar, or for "none" an array of the shape of input: float64 for float64 input, else float32.

    Raises
    ------
    ValueError
        For shapes that do not fit (nothing is broadcast but the weight), or an unknown reduction or backend.
    TypeError
        For an input that is not floating, or a masked, object or complex array.

    Notes
    -----
    Infinite values follow IEEE arithmetic; NaN gives NaN for that element.

    `mse_loss.value_and_grad` and `mse_loss.grad` give the gradient too, for an upstream gradient and into `out` if
    there are any.

    Examples
    --------
    >>> import nbloss
    >>> print(nbloss.mse_loss([1.0, 2.0, 4.0], [1.0, 2.0, 1.0]))
    3.0
    """
    return choose(
        backend, stream, arguments.pointwise("mse_loss", "input", input, target, weight, None, reduction, check)
    )


@loss
def l1_loss(
    input: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Pointwise:
    """Absolute error.

    ``loss = w |x - t|``; the gradient is ``w sign(x - t)``, 0 where x = t.

    Parameters
    ----------
    input, target, weight, reduction, backend, stream, check
        As in `mse_loss`.

    Returns
    -------
    A NumPy scalar, or for "none" an array of the shape of input: float64 for float64 input, else float32.

    Raises
    ------
    ValueError, TypeError
        As in `mse_loss`.

    Notes
    -----
    Infinite values follow IEEE arithmetic; NaN gives NaN for that element.

    `l1_loss.value_and_grad` and `l1_loss.grad` give the gradient too, for an upstream gradient and into `out` if
    there are any.

    Examples
    --------
    >>> import nbloss
    >>> print(nbloss.l1_loss([1.0, 2.0, 4.0], [1.0, 2.0, 1.0]))
    1.0
    """
    return choose(
        backend, stream, arguments.pointwise("l1_loss", "input", input, target, weight, None, reduction, check)
    )


def logsumexp(
    x: ArrayLike,
    *,
    axis: SupportsIndex | Sequence[SupportsIndex] | None = -1,
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Any:
    """log(sum(exp(x))) along an axis, without overflow.

    Computed as ``m + log1p(r)``, m the maximum of a row and r the sum of ``exp(x - m)`` over its other entries.

    Parameters
    ----------
    x : float16, bfloat16, float32 or float64 array
    axis : int, tuple of ints, or None for all
    backend, stream, check
        As in `cross_entropy`; there is nothing to check in the values.

    Returns
    -------
    An array of the shape of x without `axis` (a NumPy scalar where that is 0-d): float64 for float64 x, else float32.

    Raises
    ------
    ValueError
        For an axis out of range (AxisError) or named twice, or an unknown backend.
    TypeError
        For x that is not floating, or a masked, object or complex array.

    Notes
    -----
    Over no entries it is -inf. A row of -inf only, or with +inf or NaN, gives NaN, as everywhere in nbloss.

    Examples
    --------
    >>> import nbloss
    >>> print(nbloss.logsumexp([[1000.0, 1000.0], [0.0, -40.0]]))
    [1.00069315e+03 4.24835426e-18]
    """
    if type(x) is not np.ndarray:
        x = plain_array("x", x)
    several = type(axis) is not int and (axis is None or isinstance(axis, Sequence))
    if several and type(x) is np.ndarray:  # calls of what they come to are alike
        x, axis, several = arguments.with_axes_last(x, cast("Any", axis)), -1, False
    key = key_of_rows("logsumexp", x, axis, None, backend, stream)
    known = replay(key, x, None, LOSS_ONLY, None, 1.0, {})
    if known is not None:
        return known[0][()]

    def solved(called: list[Any]) -> tuple[Any, Any]:
        values, where = called[0], axis
        if several:
            values, where = arguments.with_axes_last(arguments.as_floats("x", values), cast("Any", axis)), -1
        rows = choose(backend, stream, arguments.rows(values, cast("SupportsIndex", where)))
        return solve(rows, value=True, key=key, given=(values, None, {}))

    names = ["x", "axis", "backend", "stream"]
    result = results("logsumexp", solved, names, [x, axis, backend, stream])[0]
    return result[()] if isinstance(result, np.ndarray) else result


def log_softmax(
    x: ArrayLike,
    *,
    axis: SupportsIndex = -1,
    out: object = None,
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Array:
    """The logarithm of softmax(x) along an axis, without overflow and with all digits near 0.

    ``(x - m) - log1p(r)``, m the maximum of a row and r the sum of ``exp(x - m)`` over its other entries.

    Parameters
    ----------
    x : float16, bfloat16, float32 or float64 array
    axis : int
    out : array, optional
        Receives the result: of the shape and dtype of x, writable, any strides; it may be x itself.
    backend, stream, check
        As in `cross_entropy`; there is nothing to check in the values.

    Returns
    -------
    An array of the shape and dtype of x.

    Raises
    ------
    ValueError
        For an axis out of range (AxisError), an `out` that does not fit, or an unknown backend.
    TypeError
        For x that is not floating, or a masked, object or complex array.

    Notes
    -----
    An entry at -inf stays -inf. A row of -inf only, or with +inf or NaN, gives NaN for that row.

    Examples
    --------
    >>> import nbloss
    >>> print(nbloss.log_softmax([0.0, 0.0]))
    [-0.69314718 -0.69314718]
    """
    return _map_rows(x, axis, out, backend, stream, LOG_SOFTMAX)


def softmax(
    x: ArrayLike,
    *,
    axis: SupportsIndex = -1,
    out: object = None,
    backend: Backend = "auto",
    stream: object = None,
    check: bool = True,
) -> Array:
    """exp(x) / sum(exp(x)) along an axis, without overflow.

    ``exp(x - m) / (1 + r)``, m the maximum of a row and r the sum of ``exp(x - m)`` over its other entries.

    Parameters
    ----------
    x, axis, out, backend, stream, check
        As in `log_softmax`.

    Returns
    -------
    An array of the shape and dtype of x.

    Raises
    ------
    ValueError, TypeError
        As in `log_softmax`.

    Notes
    -----
    An entry at -inf gives 0. A row of -inf only, or with +inf or NaN, gives NaN for that row.

    Examples
    --------
    >>> import nbloss
    >>> print(nbloss.softmax([0.0, 0.0]))
    [0.5 0.5]
    """
    return _map_rows(x, axis, out, backend, stream, GRADIENT)


_MAPS = {LOG_SOFTMAX: "log_softmax", GRADIENT: "softmax"}


def _map_rows(x: ArrayLike, axis: SupportsIndex, out: object, backend: Backend, stream: object, form: int) -> Array:
    if type(x) is not np.ndarray:
        x = plain_array("x", x)
    key = key_of_rows(_MAPS[form], x, axis, out, backend, stream)
    known = replay(key, x, None, form, out, 1.0, {})
    if known is not None:
        return cast("Array", known[1])

    def solved(called: list[Any]) -> tuple[Any, Any]:
        x, out, *_ = called
        values = arguments.as_floats("x", x)
        flat = out
        if values.shape == () and isinstance(out, np.ndarray):
            if out.shape != ():
                raise ValueError(f"out must have the input's shape (), got {out.shape}")
            flat = out.reshape(1)
        rows = choose(backend, stream, arguments.rows(values, axis))
        given = x if flat is out else np.asarray(x).reshape(1)
        result = solve(rows, value=False, form=form, out=flat, key=key, given=(given, None, {}))[1]
        assert result is not None
        return None, result.reshape(values.shape)

    names = ["x", "out", "axis", "backend", "stream"]
    result = results(_MAPS[form], solved, names, [x, out, axis, backend, stream])[1]
    return cast("Array", result if out is None else out)
