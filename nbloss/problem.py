"""A validated problem: arrays of the right kinds, shapes and native dtypes, checked against each other.

Their values (class indices, probabilities) are checked by the backend that solves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeGuard

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Reduction = Literal["none", "mean", "sum"]
Backend = Literal["auto", "cpu", "cuda"]

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
    into_new: bool = False  # whether the call allocates the array for its result
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
    into_new: bool = False  # whether the call allocates the array for its result
    arrays: ClassVar = ("labels", "probabilities", "weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unreduced loss: x's without the class axis."""
        return self.x.shape[: self.axis] + self.x.shape[self.axis + 1 :]

    @property
    def target(self) -> Array | None:
        """What was given as target."""
        return self.probabilities if self.labels is None else self.labels


# What kernels are told of a dtype: NumPy's code for what its elements are stored in, uint16 for float16 and int16 for
# bfloat16, as Numba's CPU target has neither.
CODES = {"float16": "H", "bfloat16": "h", "float32": "f", "float64": "d"}
# Targets and weights that the CPU's kernels read beside any input: 16 bits are half precision to them. A device's read
# what is computed in, and targets of the input's dtype.
READ_AS_GIVEN = {np.dtype(kind) for kind in (bool, "i1", "u1", "i4", "u4", "i8", "u8", "f4", "f8")}
WEIGHTED_MEAN = {"mse_loss", "l1_loss"}  # whose mean is divided by the sum of the weights, as torch does


def wanted(value: bool, out: Array | None) -> int:
    """What a pointwise kernel is asked for."""
    return (WANT_VALUE if value else 0) | (0 if out is None else WANT_GRADIENT)


def has_weighted_mean(problem: Pointwise) -> bool:
    """Whether the sum of a loss is divided by the sum of its weights."""
    return problem.reduction == "mean" and problem.weight is not None and problem.name in WEIGHTED_MEAN


def checks_values(problem: Pointwise) -> bool:
    """Whether an input outside the loss's domain is an error: in place, known before anything is written."""
    return problem.check and problem.name == "binary_cross_entropy"


def without_classes(problem: Rowwise, labels: Array | None, dtype: np.dtype[Any]) -> Array:
    """The losses of rows that have no classes, given their labels on the host."""
    losses = np.full(problem.shape, -np.inf if problem.target is None else 0.0, dtype)
    if labels is not None:
        losses[labels != problem.ignore_index] = np.nan
    return losses


def divided(total: float, count: float) -> float:
    """IEEE division: the mean of nothing is NaN, not an error."""
    if count:
        return total / count
    return math.nan if total == 0 or math.isnan(total) else math.copysign(math.inf, total)


def rounded(value: float, dtype: np.dtype[Any]) -> Array:
    """A number as a 0-d array: what is beyond the dtype is inf, without a warning."""
    with np.errstate(over="ignore"):
        return np.array(value, dtype)


# --- arrays -------------------------------------------------------------------------------------------------

FLOAT32, FLOAT64 = np.dtype("f4"), np.dtype("f8")


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


class DeviceMemory(np.ndarray[tuple[int, ...], np.dtype[Any]]):
    """Memory of a device (see nbloss.cuda.arrays): it has a shape and a dtype, and cannot be read from the host."""

    home: Any  # the device and the stream


def is_device_view(value: object) -> TypeGuard[Any]:
    """Whether this is memory of a device."""
    return isinstance(value, DeviceMemory)


def device_of(value: object) -> int | None:
    """The number of the device that an array is on; None on the host."""
    return value.home.number if isinstance(value, DeviceMemory) else None


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which an input of this dtype is computed, and of its loss."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32
