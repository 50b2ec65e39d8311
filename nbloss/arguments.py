"""Arguments to one canonical problem, or a clear error."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from nbloss.errors import refuse_labels, shown
from nbloss.problem import (
    FLOAT32,
    FLOAT64,
    READ_AS_GIVEN,
    Array,
    Pointwise,
    Reduction,
    Rowwise,
    bfloat16,
    compute_dtype,
    is_bfloat16,
    is_device_view,
)

NATIVE = {np.dtype("f2"), FLOAT32, FLOAT64}


def as_floats(name: str, value: ArrayLike, others: str = "") -> Array:
    """`value` as an array of a supported floating dtype, in native byte order; `others` would do too."""
    array = as_array(name, value)
    native = array.dtype.newbyteorder("=")
    if native in NATIVE or is_bfloat16(native):
        floats: Array = array if array.dtype.isnative else array.astype(native)
        return floats
    raise TypeError(f"{name} must be {others}float16, bfloat16, float32 or float64, got {array.dtype}")


def as_array(name: str, value: object) -> Array:
    """`value` as an array, of another library without a copy; a TypeError, whatever that library raises."""
    if type(value) is np.ndarray or is_device_view(value):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: fill it, or select the valid elements first")
    try:
        tensor = _bfloat16_tensor(value)
        return np.asarray(value) if tensor is None else tensor
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name} cannot be made an array: {' '.join(str(error).split())}") from None


def _bfloat16_tensor(value: object) -> Array | None:
    """PyTorch's tensor of bfloat16, which it gives NumPy no array of, without a copy; None for anything else."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
        return None
    array: Array = value.view(torch.int16).numpy().view(bfloat16())
    return array


def converted(array: Array, dtype: np.dtype[Any], order: Literal["K", "C"] = "K") -> Array:
    """The array in a dtype; without a warning, what is beyond the dtype is inf."""
    with np.errstate(all="ignore"):
        return array.astype(dtype, order=order, copy=False)


def as_real(name: str, value: ArrayLike) -> Array:
    """A target or weight: floating, integer or bool."""
    array = as_array(name, value)
    return array if array.dtype.kind in "iub" else as_floats(name, array, "integer, bool, ")


def _as_operand(name: str, value: ArrayLike, x: Array) -> Array:
    """A target or weight as kernels read it: as it is, or else in the dtype that x is computed in."""
    array = as_array(name, value)
    if array.dtype in READ_AS_GIVEN and not (is_device_view(x) or is_device_view(array)):
        return array
    return converted(as_real(name, array), compute_dtype(x.dtype))


def _as_target(target: ArrayLike, rows: tuple[int, ...]) -> Array:
    """The target of a loss over classes. A list for no rows, which NumPy takes for floats, is one of labels."""
    array = as_array("target", target)
    return array.astype(np.int64) if isinstance(target, (list, tuple)) and array.shape == rows == (0,) else array


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


def _reduction(value: object) -> Reduction:
    name = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(name, str) and name in get_args(Reduction):
        return cast("Reduction", name)
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {shown(value)}")


def _integer(name: str, value: SupportsIndex) -> int:
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None


def normal_axis(axis: SupportsIndex, ndim: int) -> int:
    index = _integer("axis", axis)
    if not -ndim <= index < ndim:
        raise np.exceptions.AxisError(f"axis must be between {-ndim} and {ndim - 1} for {ndim} dimensions, got {index}")
    return index % ndim


def _class_weight(value: ArrayLike | None, classes: int, dtype: np.dtype[Any]) -> Array | None:
    if value is None:
        return None
    weight = as_real("weight", value)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one for each class, got {weight.shape}")
    return converted(weight, dtype, "C")


def _broadcast_weight(name: str, value: ArrayLike | None, x: Array) -> Array | None:
    if value is None:
        return None
    weight = _as_operand(name, value, x)
    if weight.shape != x.shape or not weight.ndim:  # little to convert, for which no other kernel is compiled
        weight = converted(weight, compute_dtype(x.dtype))
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
    wanted = as_array("target", target)
    if wanted.dtype != values.dtype:
        wanted = _as_operand("target", wanted, values)
    if wanted.shape != values.shape:
        raise ValueError(f"target must have the shape of {argument}, {values.shape}, got {wanted.shape}")
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
    index = _integer("axis", axis)
    return 0 if x.ndim == 1 and index == 1 else normal_axis(index, x.ndim)


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
        if isinstance(label_smoothing, (str, bytes)):
            raise TypeError
        smoothing = float(label_smoothing)
    except OverflowError:
        smoothing = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"label_smoothing must be a number, got {shown(label_smoothing)}") from None
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {shown(label_smoothing)}")
    problem = _over_classes(logits, where, weight, ignore_index, reduction, check)
    problem.label_smoothing = smoothing
    wanted = _as_target(target, problem.shape)
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
        problem.probabilities = _as_operand("target", problem.probabilities, logits)
    return problem


def _over_classes(
    x: Array, axis: int, weight: ArrayLike | None, ignore_index: SupportsIndex, reduction: Reduction, check: bool
) -> Rowwise:
    """The problem of a loss over classes, without its target."""
    return Rowwise(
        x,
        axis,
        _reduction(reduction),
        weight=_class_weight(weight, x.shape[axis], compute_dtype(x.dtype)),
        ignore_index=_ignore_index(ignore_index),
        check=check,
    )


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
    problem = _over_classes(log_probs, where, weight, ignore_index, reduction, check)
    labels = _as_target(target, problem.shape)
    if labels.dtype.kind not in "iub":
        raise TypeError(f"target must be class indices of an integer or bool dtype, got {labels.dtype}")
    problem.normalized = True
    return _with_labels(problem, "log_probs", labels)


def with_axes_last(values: Array, axis: Sequence[SupportsIndex] | None) -> Array:
    """The array with these axes, or all, as its last one; of their entries in whatever order they lie in memory."""
    axes = range(values.ndim) if axis is None else [normal_axis(k, max(values.ndim, 1)) for k in axis]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must not name a dimension twice, got {axis!r}")
    kept = [k for k in range(values.ndim) if k not in axes]
    gone = sorted((k for k in axes if k < values.ndim), key=lambda k: -abs(values.strides[k]))
    entries = math.prod(values.shape[k] for k in gone)
    last: Array = values.transpose(*kept, *gone).reshape(*(values.shape[k] for k in kept), entries)
    return last


def rows(x: ArrayLike, axis: SupportsIndex) -> Rowwise:
    """The problem of a function of rows, without a target."""
    values = as_floats("x", x)
    if values.ndim == 0:
        normal_axis(axis, 1)
        values = values.reshape(1)
    return Rowwise(values, normal_axis(axis, values.ndim))


def _ignore_index(value: SupportsIndex) -> int:
    index = _integer("ignore_index", value)
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
