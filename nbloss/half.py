"""What kernels store, for NumPy: uint16 holds float16, int16 holds bfloat16, floats are as they are.

It is what loads and stores mean where kernels run as Python: without the compiler, and on a simulated device.
"""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def decoded(raw: NDArray[Any]) -> Any:
    """Stored values as floats."""
    if raw.dtype == np.uint16:
        return raw.view(np.float16).astype(np.float32)
    if raw.dtype == np.int16:
        return (raw.astype(np.int32) << 16).view(np.float32)
    return raw.copy()


def encoded(value: NDArray[Any], dtype: DTypeLike) -> Any:
    """Floats as they are stored, rounded to nearest even."""
    if dtype == np.uint16:
        with np.errstate(over="ignore"):
            return value.astype(np.float16).view(np.uint16)
    if dtype == np.int16:
        bits = value.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(value), (bits | 0x400000) >> 16, rounded).astype(np.uint16).view(np.int16)
    return value
