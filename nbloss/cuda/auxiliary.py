"""What the launches of both families share: kernels that convert, and those that add what other kernels have found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from nbloss import layout
from nbloss.cuda import choices, sums
from nbloss.cuda.device import Home
from nbloss.cuda.intrinsics import SIMULATED
from nbloss.cuda.labels import LABEL_CODE
from nbloss.cuda.sums import OF_CLUSTERS, OF_FLOAT64, OF_TYPE
from nbloss.problem import CODES, FLOAT64

View = Any  # a DeviceView, or None; NumPy's functions are typed as if they gave plain arrays

# Scratch of a call: a count of faults (int64), the divisor of a mean (float64), the factor of its gradient.
FAULTS, DIVISOR, FACTOR, SCRATCH = 0, 8, 16, 24
BYTES = np.dtype(np.uint8)


@cache
def code_of(dtype: np.dtype[Any]) -> str:
    return CODES[dtype.name]


@cache
def compiled(factory: Callable[..., Any], *options: Any, bounds: tuple[int, int] | None = None) -> Any:
    if SIMULATED:
        return cuda.jit(factory(*options))
    return cuda.jit(factory(*options), launch_bounds=bounds, lto=False)  # as tests compile it


def address_of(view: View) -> int:
    return 0 if view is None or not view.size else view.address


def converted(view: View, dtype: np.dtype[Any]) -> View:
    """A contiguous copy of another dtype."""
    result = view.home.empty(view.shape, dtype)
    view = view.view(np.uint8) if view.dtype.kind == "b" else view
    source = LABEL_CODE[view.dtype] if view.dtype.kind in "iu" else code_of(view.dtype)
    _convert(compiled(sums.convert, source, code_of(dtype)), view, result)
    return result


def clear(view: View) -> None:
    if view.flags.c_contiguous or view.flags.f_contiguous:
        view.home.clear(view.address, view.nbytes)
        return
    code = code_of(view.dtype)
    _convert(compiled(sums.convert, code, code), None, view)


def _convert(kernel: Any, source: View, destination: View) -> None:
    if not destination.size:
        return
    pieces: Any = layout.pointwise_pieces([destination] if source is None else [destination, source])
    for to, *given in pieces:
        outer, inner = to.shape
        read = (given[0].address, *given[0].strides) if given else (0, 0, 0)
        blocks = -(-outer * inner // choices.POINT_THREADS)
        to.home.launch(kernel, blocks, choices.POINT_THREADS, read, (to.address, *to.strides), outer, inner)


def mean_of(home: Home, values: View, divisor_at: int, divisor: float, dtype: np.dtype[Any]) -> View:
    """The sum of all values (side by side) over a number, and over what lies at an address if it is not 0, 0-d."""
    result = home.empty((), dtype)
    values_of = (address_of(values), values.size, OF_FLOAT64 if values.dtype == FLOAT64 else OF_TYPE)
    total(home, values_of, dtype, (0, 0, divisor_at, result.address), 0.0, divisor)
    return result


def total(
    home: Home,
    values: tuple[int, int, int],
    dtype: np.dtype[Any],
    ending: tuple[int, int, int, int],
    numerator: float,
    divisor: float,
) -> None:
    """Add values, as nbloss.cuda.sums says, for a result of `dtype`."""
    clusters, partials = 0, []  # none is freed before the kernel that reads it is started
    while clusters != 1:
        kernel, parts = summing(home, sums.total, dtype, values[1])
        clusters = clusters_of_sum(values[1], parts)
        partials.append(partial := partial_sums(home, clusters))
        to = (address_of(partial), 0, clusters)
        arguments = (values, to, ending, numerator, divisor)
        home.launch(kernel, clusters * parts, choices.SUM_THREADS, *arguments, cluster=parts, early=chained(home))
        values = (address_of(partial), clusters, OF_CLUSTERS)


def summing(home: Home, factory: Callable[..., Any], dtype: np.dtype[Any], count: int) -> tuple[Any, int]:
    """A kernel that adds so many numbers, and how many blocks of it do so together."""
    threads, each, in_clusters = choices.SUM_THREADS, choices.SUM_EACH, chained(home)
    parts = choices.SUM_PARTS if in_clusters and count > threads * each else 1
    options = (code_of(dtype), threads, choices.WARP, each, choices.SUM_ROUNDS, parts, in_clusters)
    return compiled(factory, *options, bounds=(threads, 1)), parts


def chained(home: Home) -> bool:
    """Whether kernels can begin before the last has ended, and blocks form clusters."""
    return home.capability >= (9, 0)


def clusters_of_sum(count: int, parts: int) -> int:
    return max(-(-count // (choices.SUM_THREADS * choices.SUM_EACH * choices.SUM_ROUNDS * parts)), 1)


def partial_sums(home: Home, clusters: int) -> View:
    """Room for the sums of several clusters, and for what they know of faults."""
    return home.empty((3 * clusters,), FLOAT64) if clusters > 1 else None


def constant(home: Home, value: float, dtype: np.dtype[Any]) -> View:
    return home.upload(np.array(value, dtype))
