"""What a call adds to its problem: the upstream gradient, and the array that receives the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbloss.arguments import as_array, as_real, converted
from nbloss.problem import FLOAT64, Array, Pointwise, Rowwise, compute_dtype, device_of, is_device_view

APART = "{} must be where the input is: both on the host, or both on one device"
_OVERLAP = "out must be the input itself or apart from all arguments, but it overlaps {}"
_ONE = np.array(1.0)


def upstream(problem: Pointwise | Rowwise, grad_output: ArrayLike | None) -> Array:
    """grad_output, 0-d or of the unreduced loss's shape.

    On the host a number is float64, and so is one for each row; one for each element, and any array on a device, is of
    the type that is computed in.
    """
    if grad_output is None:
        return _ONE
    computed = compute_dtype(problem.x.dtype)
    factor = as_real("grad_output", grad_output)
    each = is_device_view(factor) or (factor.ndim and isinstance(problem, Pointwise))
    factor = converted(factor, computed if each else FLOAT64)
    if device_of(factor) != device_of(problem.x) and (factor.ndim or is_device_view(factor)):
        raise TypeError(APART.format("grad_output"))
    if factor.ndim == 0 or (problem.reduction == "none" and factor.shape == problem.shape):
        return factor
    expected = f"a scalar or of the loss's shape {problem.shape}" if problem.reduction == "none" else "a scalar"
    raise ValueError(f"grad_output must be {expected}, got shape {factor.shape}")


def empty_like(x: Array, dtype: np.dtype[Any] | None = None) -> Array:
    """A new array of an array's shape, in the order in which it lies in memory, as NumPy's functions give.

    In another order, results of column-major input would take up to 3 times as long.
    """
    if x.flags.c_contiguous or 0 in x.strides:
        return np.empty(x.shape, dtype or x.dtype)
    return np.empty_like(x, dtype)


def array_for(
    problem: Pointwise | Rowwise, out: object, grad_output: object, given: tuple[Any, ...]
) -> tuple[Array, bool]:
    """The array that receives the gradient, and whether it is the input itself.

    `given` are x, target and options: the problem may hold a converted copy, but what was given must not be written.
    """
    x: Any = problem.x
    if out is None:
        return empty_like(x) if type(x) is np.ndarray else x.home.empty(x.shape, x.dtype), False
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if not (type(out) is type(x) is np.ndarray) and device_of(out) != device_of(x):
        raise TypeError(APART.format("out"))
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out must not be a masked array")
    if out.shape != x.shape:
        raise ValueError(f"out must have the input's shape {x.shape}, got {out.shape}")
    if out.dtype != x.dtype and out.dtype.newbyteorder("=") != x.dtype:
        raise TypeError(f"out must have the input's dtype {x.dtype}, got {out.dtype}")
    if type(out) is not np.ndarray and not is_device_view(out):
        out = out.view(np.ndarray)  # some subclasses are of two axes whatever is done with them
    if not out.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got shape {out.shape} with strides {out.strides}")
    near = np.may_share_memory(out, x)
    in_place = near and _same_memory(out, x)
    if near and not in_place and _overlap(out, x):
        raise ValueError(_OVERLAP.format("the input"))
    given_x, target, options = given
    source = _memory_of(given_x)
    is_copied = source is not None and not np.may_share_memory(source, x)
    if is_copied and _overlap(out, source) and not _same_memory(out, source):
        raise ValueError(_OVERLAP.format("the input"))
    for name, value in {"grad_output": grad_output, "target": target, **options}.items():
        if _overlap(out, _memory_of(value)):
            raise ValueError(_OVERLAP.format(name))
    return out, in_place


def _memory_of(value: object) -> Array | None:
    """An argument's own memory, as an array, if it has any that NumPy can see."""
    if isinstance(value, np.ndarray):
        return value
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        return None
    try:
        return as_array("", value)
    except TypeError:  # it is refused elsewhere, or is no array
        return None


def _argument(name: str) -> str:
    """The argument that an array of a problem was."""
    return "target" if name in ("labels", "probabilities") else name


def are_on_device(problem: Pointwise | Rowwise) -> bool:
    """Whether the arrays of a problem are on a device; TypeError where some are and some are not."""
    host = type(problem.x) is np.ndarray
    device = None if host else device_of(problem.x)
    for name in problem.arrays:
        array = getattr(problem, name)
        if array is not None and not (host and type(array) is np.ndarray) and device_of(array) != device:
            number = device_of(array) is None and isinstance(problem, Pointwise) and not any(array.strides)
            if not number:
                raise TypeError(APART.format(_argument(name)))
    return device is not None


def begin_together(a: Array, b: Array) -> bool:
    """Whether the first elements of two arrays are one place in memory."""
    return bool(a.__array_interface__["data"][0] == b.__array_interface__["data"][0])


def _same_memory(a: Array, b: Any) -> bool:
    if a is b:
        return True
    steps, others = ([step for n, step in zip(v.shape, v.strides) if n > 1] for v in (a, b))  # others are never taken
    return steps == others and a.shape == b.shape and a.dtype == b.dtype and begin_together(a, b)


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
