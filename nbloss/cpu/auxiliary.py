"""What pointwise and row-wise problems have in common on their way to kernel calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbloss.cpu.simd import NONTEMPORAL, UNLESS_NEW
from nbloss.problem import FLOAT32, FLOAT64, Array, Pointwise, Rowwise, divided

Plan = Callable[..., Any]  # of x, target, out, the gradient's factor or factors, and weights by name: gives the loss

UNITS = {dtype: dtype.type(1) for dtype in (FLOAT32, FLOAT64)}
_KEEPS_TYPE = type(UNITS[FLOAT32] * 1.0) is np.float32  # before NumPy 2, the product is a float64
# Bytes of logits from which results are written past the caches, and pointwise losses alone are fetched ahead.
LARGE = 1 << 24


def stored(array: Array) -> Array:
    """The array as kernels see it: half precision as 16-bit integers, bool as bytes."""
    if array.itemsize > 2 or array.dtype.kind in "iu":
        return array
    if array.itemsize == 1:
        return array.view(np.uint8)
    return array.view(np.uint16 if array.dtype == np.float16 else np.int16)


def past_caches(problem: Pointwise | Rowwise) -> int:
    """Whether results are written past the caches: 0, or how."""
    if problem.x.nbytes < LARGE:
        return 0
    return NONTEMPORAL | (UNLESS_NEW if problem.into_new else 0)


def reduced(total: float, count: float, one: Any) -> Any:
    """The sum over a count, as the scalar that users receive: of the type of `one`."""
    value = total / count if count else divided(total, count)
    if _KEEPS_TYPE and -3e38 < value < 3e38:
        return one * value  # 37 ns, type(one)(value) takes 120
    with np.errstate(over="ignore"):
        return type(one)(value)
