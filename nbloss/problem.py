"""Arguments to one canonical problem, or a clear error.

A problem holds arrays that are checked against each other: right kinds, right shapes, native dtypes. What it does
not know yet are values (class indices, probabilities), which a backend looks at.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, SupportsIndex, TypeGuard, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Reduction = Literal["none", "mean", "sum"]

LOSS_ONLY, GRADIENT, LOG_SOFTMAX = 0, 1, 2  # what a row-wise kernel writes; softmax is the gradient without a target
WANT_VALUE, WANT_GRADIENT = 1, 2  # what a pointwise kernel computes, added up


@dataclass(slots=True)
class Pointwise:
    """One loss of nbloss.formulas.POINTWISE on an input and a target of one shape."""

    name: str
    x: Array
    target: Array
    weight: Array | None
    pos_weight: Array | None
    reduction: Reduction
    check: bool
    backend: str = "auto"
    stream: object = None
    arrays: ClassVar = ("target", "weight", "pos_weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unreduced loss."""
        return self.x.shape


@dataclass(slots=True)
class Rowwise:
    """A class axis and, if the problem is a loss, a target: class indices, or probabilities on every class."""

    x: Array
    axis: int
    reduction: Reduction = "none"
    labels: Array | None = None
    probabilities: Array | None = None
    weight: Array | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    normalized: bool = False  # x holds log-probabilities already
    check: bool = True
    backend: str = "auto"
    stream: object = None
    arrays: ClassVar = ("labels", "probabilities", "weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unreduced loss: x's without the class axis."""
        return self.x.shape[: self.axis] + self.x.shape[self.axis + 1 :]

    @property
    def target(self) -> Array | None:
        """What was given as target."""
        return self.probabilities if self.labels is None else self.labels


CODES = {"float16": "H", "bfloat16": "h", "float32": "f", "float64": "d"}  # what kernels are told of a dtype
WEIGHTED_MEAN = {"mse_loss", "l1_loss"}  # whose mean is divided by the sum of the weights, as torch does


def wanted(value: bool, out: Array | None) -> int:
    """What a pointwise kernel is asked for."""
    return (WANT_VALUE if value else 0) | (0 if out is None else WANT_GRADIENT)


def has_weighted_mean(problem: Pointwise | Rowwise) -> bool:
    """Whether the sum of a pointwise loss is divided by the sum of its weights."""
    return (
        isinstance(problem, Pointwise)
        and problem.reduction == "mean"
        and problem.weight is not None
        and problem.name in WEIGHTED_MEAN
    )


# --- arrays -------------------------------------------------------------------------------------------------

FLOAT32, FLOAT64 = np.dtype("f4"), np.dtype("f8")
NATIVE = {np.dtype("f2"), FLOAT32, FLOAT64}


def reads_ahead(problem: Pointwise) -> bool:
    """Whether values out of range must be known before anything is written in place."""
    return problem.check and problem.name == "binary_cross_entropy"


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is ml_dtypes' bfloat16 (which NumPy knows by name only)."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def bfloat16() -> np.dtype[Any]:
    """ml_dtypes' bfloat16."""
    try:
        from ml_dtypes import bfloat16 as scalar
    except ImportError:
        raise TypeError("bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from None
    wanted: np.dtype[Any] = np.dtype(scalar)
    return wanted


def is_device_view(value: object) -> TypeGuard[Any]:
    """Whether this is memory of a device (nbloss.cuda.arrays): it has a shape and a dtype, and cannot be read here."""
    return device_of(value) is not None


def device_of(value: object) -> int | None:
    """The number of the device that an array is on; None on the host."""
    home = getattr(value, "home", None)
    return None if home is None else home.number


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which an input of this dtype is computed, and of its loss."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def as_floats(name: str, value: ArrayLike, others: str = "") -> Array:
    """`value` as an array of a supported floating dtype, in native byte order; `others` would do too."""
    array = _as_array(name, value)
    if array.dtype in NATIVE or is_bfloat16(array.dtype):
        return array
    if array.dtype.kind == "f" and array.dtype.newbyteorder("=") in NATIVE:
        native: Array = array.astype(array.dtype.newbyteorder("="))
        return native
    raise TypeError(f"{name} must be {others}float16, bfloat16, float32 or float64, got {array.dtype}")


def _as_array(name: str, value: ArrayLike) -> Array:
    if type(value) is np.ndarray or is_device_view(value):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: fill it, or select the valid elements first")
    try:
        array: Array = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{name} cannot be made an array: {error}") from None
    return array


def _as_real(name: str, value: ArrayLike, dtype: np.dtype[Any]) -> Array:
    """A target or weight: floating, integer or bool, as floats."""
    array = _as_array(name, value)
    if array.dtype.kind in "iub":
        return array.astype(dtype)
    return as_floats(name, array, "integer, bool, ")


def _as_labels(array: Array, classes: int, ignore_index: int, check: bool) -> Array:
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if is_device_view(array):
        device_labels: Array = array
        return device_labels
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:  # compared as int64: no huge label may wrap around
        array = array.astype(np.uint64, copy=False)
        huge = array > 2**63 - 1
        if check and huge.any():
            refuse_labels(array, classes, ignore_index)
        outside = -2 if ignore_index == -1 else -1
        within: Array = np.where(huge, outside, array.astype(np.int64))
        return within
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


# --- options ------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A wrong value for an error of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _reduction(value: object) -> Reduction:
    name = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(name, str) and name in get_args(Reduction):
        return cast("Reduction", name)
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {shown(value)}")


def normal_axis(axis: SupportsIndex, ndim: int) -> int:
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {shown(axis)}") from None
    if not -ndim <= index < ndim:
        raise np.exceptions.AxisError(f"axis must be between {-ndim} and {ndim - 1} for {ndim} dimensions, got {index}")
    return index % ndim


def _class_weight(value: ArrayLike | None, classes: int, dtype: np.dtype[Any]) -> Array | None:
    if value is None:
        return None
    weight = _as_real("weight", value, dtype)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one for each class, got {weight.shape}")
    return weight.astype(dtype, order="C", copy=False)


def _broadcast_weight(name: str, value: ArrayLike | None, x: Array) -> Array | None:
    if value is None:
        return None
    dtype = compute_dtype(x.dtype)
    weight = _as_real(name, value, dtype).astype(dtype, copy=False)
    try:
        return np.broadcast_to(weight, x.shape, subok=True)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the input's shape {x.shape}, got shape {weight.shape}") from None


# --- problems -----------------------------------------------------------------------------------------------


def pointwise(
    name: str,
    argument: str,
    x: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    pos_weight: ArrayLike | None,
    reduction: Reduction,
    check: bool,
) -> Pointwise:
    """The problem of a pointwise loss; `argument` is what its first argument is called."""
    values = as_floats(argument, x)
    wanted = _as_real("target", target, compute_dtype(values.dtype))
    if wanted.shape != values.shape:
        raise ValueError(f"target must have the shape of {argument}, {values.shape}, got {wanted.shape}")
    if wanted.dtype != values.dtype:
        wanted = wanted.astype(compute_dtype(values.dtype), copy=False)
    return Pointwise(
        name,
        values,
        wanted,
        _broadcast_weight("weight", weight, values),
        _broadcast_weight("pos_weight", pos_weight, values),
        _reduction(reduction),
        check,
    )


def class_axis(argument: str, x: Array, axis: SupportsIndex) -> int:
    """The class axis of a loss: as asked for, and the only one where logits are one row."""
    if x.ndim == 0:
        raise ValueError(f"{argument} must have at least one dimension, its classes")
    return 0 if x.ndim == 1 and axis == 1 else normal_axis(axis, x.ndim)


def cross_entropy(
    x: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    ignore_index: SupportsIndex,
    label_smoothing: float,
    axis: SupportsIndex,
    reduction: Reduction,
    check: bool,
) -> Rowwise:
    """The problem of cross_entropy; the target's dtype decides what it means."""
    logits = as_floats("logits", x)
    where = class_axis("logits", logits, axis)
    try:
        smoothing = float(label_smoothing)
    except (TypeError, ValueError):
        raise TypeError(f"label_smoothing must be a number, got {shown(label_smoothing)}") from None
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    problem = Rowwise(
        logits,
        where,
        _reduction(reduction),
        weight=_class_weight(weight, logits.shape[where], compute_dtype(logits.dtype)),
        ignore_index=_ignore_index(ignore_index),
        label_smoothing=smoothing,
        check=check,
    )
    wanted = _as_array("target", target)
    if wanted.dtype.kind in "iub":
        return _with_labels(problem, "logits", wanted)
    problem.probabilities = as_floats("target", wanted, "of an integer dtype (class indices), or ")
    if wanted.shape != logits.shape:
        advice = ": class indices are integers, target.astype(int)" if wanted.shape == problem.shape else ""
        raise ValueError(
            f"target must be class indices of shape {problem.shape} or probabilities of the logits' shape "
            f"{logits.shape}, got {wanted.dtype} of shape {wanted.shape}{advice}"
        )
    if problem.ignore_index >= 0:
        raise ValueError(f"ignore_index applies to class indices, got {ignore_index} with a target of {wanted.dtype}")
    if problem.probabilities.dtype != logits.dtype:
        problem.probabilities = problem.probabilities.astype(compute_dtype(logits.dtype), copy=False)
    return problem


def nll_loss(
    x: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    ignore_index: SupportsIndex,
    axis: SupportsIndex,
    reduction: Reduction,
    check: bool,
) -> Rowwise:
    """The problem of nll_loss."""
    log_probs = as_floats("log_probs", x)
    where = class_axis("log_probs", log_probs, axis)
    labels = _as_array("target", target)
    if labels.dtype.kind not in "iub":
        raise TypeError(f"target must be class indices of an integer or bool dtype, got {labels.dtype}")
    problem = Rowwise(
        log_probs,
        where,
        _reduction(reduction),
        weight=_class_weight(weight, log_probs.shape[where], compute_dtype(log_probs.dtype)),
        ignore_index=_ignore_index(ignore_index),
        normalized=True,
        check=check,
    )
    return _with_labels(problem, "log_probs", labels)


def rows(x: ArrayLike, axis: SupportsIndex) -> Rowwise:
    """The problem of a function of rows, without a target."""
    values = as_floats("x", x)
    if values.ndim == 0:
        normal_axis(axis, 1)
        values = values.reshape(1)
    return Rowwise(values, normal_axis(axis, values.ndim))


def _ignore_index(value: SupportsIndex) -> int:
    try:
        index = int(operator.index(value))
    except TypeError:
        raise TypeError(f"ignore_index must be an integer, got {shown(value)}") from None
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"ignore_index must be an int64, got {index}")
    return index


def _with_labels(problem: Rowwise, argument: str, labels: Array) -> Rowwise:
    x = problem.x
    if labels.shape != problem.shape:
        fitting = [k for k in range(x.ndim) if labels.shape == x.shape[:k] + x.shape[k + 1 :]]
        advice = f": it fits axis={fitting[-1]}" if fitting else ""
        if labels.shape == x.shape and not problem.normalized:
            advice = ": class probabilities are floating, target.astype(float)"
        raise ValueError(
            f"target must have shape {problem.shape} for {argument} of shape {x.shape} with classes along axis "
            f"{problem.axis}, got {labels.shape}{advice}"
        )
    problem.labels = _as_labels(labels, x.shape[problem.axis], problem.ignore_index, problem.check)
    return problem


# --- what a call adds to its problem --------------------------------------------------------------------------


def upstream(problem: Pointwise | Rowwise, grad_output: ArrayLike | None) -> Array:
    """grad_output as float64, 0-d or of the unreduced loss's shape."""
    if grad_output is None:
        return _ONE
    wanted = compute_dtype(problem.x.dtype) if is_device_view(grad_output) else FLOAT64
    factor = _as_real("grad_output", grad_output, wanted).astype(wanted, copy=False)
    if device_of(factor) != device_of(problem.x) and (factor.ndim or is_device_view(factor)):
        raise TypeError(_APART.format("grad_output"))
    if factor.ndim == 0 or (problem.reduction == "none" and factor.shape == problem.shape):
        return factor
    expected = f"a scalar or of the loss's shape {problem.shape}" if problem.reduction == "none" else "a scalar"
    raise ValueError(f"grad_output must be {expected}, got shape {factor.shape}")


_ONE = np.array(1.0)


def output(problem: Pointwise | Rowwise, out: object, grad_output: object = None) -> tuple[Array, bool]:
    """The array that receives the gradient, and whether it is the input itself."""
    x: Any = problem.x
    if out is None:
        return (np.empty if type(x) is np.ndarray else x.home.empty)(x.shape, x.dtype), False
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if not (type(out) is type(x) is np.ndarray) and device_of(out) != device_of(x):
        raise TypeError(_APART.format("out"))
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out must not be a masked array")
    if out.shape != x.shape:
        raise ValueError(f"out must have the input's shape {x.shape}, got {out.shape}")
    if out.dtype != x.dtype and out.dtype.newbyteorder("=") != x.dtype:
        raise TypeError(f"out must have the input's dtype {x.dtype}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got shape {out.shape} with strides {out.strides}")
    near = np.may_share_memory(out, x)
    in_place = near and _same_memory(out, x)
    if near and not in_place and _overlap(out, x):
        raise ValueError(_OVERLAP.format("the input"))
    if _overlap(out, grad_output):
        raise ValueError(_OVERLAP.format("grad_output"))
    for name in problem.arrays:
        if _overlap(out, getattr(problem, name)):
            raise ValueError(_OVERLAP.format(name))
    return out, in_place


_APART = "{} must be where the input is: both on the host, or both on one device"


def at_one_place(problem: Pointwise | Rowwise) -> bool:
    """Whether the arrays of a problem are on a device; TypeError where some are and some are not."""
    host = type(problem.x) is np.ndarray
    device = None if host else device_of(problem.x)
    for name in problem.arrays:
        array = getattr(problem, name)
        if array is not None and not (host and type(array) is np.ndarray) and device_of(array) != device:
            number = device_of(array) is None and isinstance(problem, Pointwise) and not any(array.strides)
            if not number:
                raise TypeError(_APART.format("target" if name in ("labels", "probabilities") else name))
    return device is not None


_OVERLAP = "out must be the input itself or apart from all arguments, but it overlaps {}"


def begin_together(a: Array, b: Array) -> bool:
    """Whether the first elements of two arrays are one place in memory."""
    return bool(a.__array_interface__["data"][0] == b.__array_interface__["data"][0])


def _same_memory(a: Array, b: Array) -> bool:
    return a is b or (a.strides == b.strides and a.dtype == b.dtype and begin_together(a, b))


def _overlap(a: Array, b: object) -> bool:
    if not isinstance(b, np.ndarray) or not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # NumPy's stub knows -1 and 0 only
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: Array) -> bool:
    steps = sorted((abs(step), n) for step, n in zip(array.strides, array.shape) if n > 1)
    end, nested = array.itemsize, True  # whether each dimension steps over all of those with smaller steps
    for step, n in steps:
        nested &= step >= end
        end += step * (n - 1)
    if nested or not array.size:
        return False
    if steps[0][0] == 0:
        return True
    places = np.zeros(1, np.int64)
    for step, n in steps:
        places = np.add.outer(places, step * np.arange(n)).ravel()
    places.sort()
    return bool((np.diff(places) < array.itemsize).any())


def without_classes(problem: Rowwise, labels: Array | None, dtype: np.dtype[Any]) -> Array:
    """The losses of rows that have no classes, given their labels on the host."""
    losses = np.full(problem.shape, -np.inf if problem.target is None else 0.0, dtype)
    if labels is not None:
        losses[labels != problem.ignore_index] = np.nan
    return losses


def refuse_labels(labels: Array, classes: int, ignore_index: int) -> None:
    """IndexError for the first label that is neither a class nor ignored, if there is one."""
    beyond = labels >= np.uint64(classes) if labels.dtype == np.uint64 else labels.astype(np.int64) >= classes
    wide = labels.astype(np.int64)
    bad = ((wide < 0) | beyond) & ((wide != ignore_index) | (beyond & (wide < 0)))
    if bad.any():
        place, value = _first(labels, bad)
        raise IndexError(
            f"target{place} is {value}: class indices must be in [0, {classes}) or equal ignore_index ({ignore_index})"
        )


def refuse_probabilities(probs: Array) -> None:
    """ValueError for the first probability outside [0, 1], if there is one."""
    bad = (probs < 0) | (probs > 1)
    if bad.any():
        place, value = _first(probs, bad)
        raise ValueError(f"probs must be in [0, 1], got probs{place} = {value}")


def _first(array: Array, wrong: Array) -> tuple[str, Any]:
    """Where the first wrong element is, as an index is written, and its value."""
    index = np.unravel_index(np.flatnonzero(wrong)[0], array.shape)
    return f"[{', '.join(map(str, index))}]" if index else "", array[index]


def divided(total: float, count: float) -> float:
    """IEEE division: the mean of nothing is NaN, not an error."""
    if count:
        return total / count
    return math.nan if total == 0 or math.isnan(total) else math.copysign(math.inf, total)
