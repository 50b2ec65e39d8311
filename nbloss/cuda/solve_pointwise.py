"""Pointwise problems to kernel launches."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from nbloss import layout
from nbloss.cuda import choices
from nbloss.cuda import pointwise as kernels
from nbloss.cuda.arrays import DeviceView
from nbloss.cuda.auxiliary import (
    BYTES,
    DIVISOR,
    FACTOR,
    FAULTS,
    SCRATCH,
    View,
    address_of,
    code_of,
    compiled,
    constant,
    mean_of,
    total,
)
from nbloss.cuda.intrinsics import VECTOR_BYTES
from nbloss.cuda.sums import OF_TYPE
from nbloss.errors import refuse_probabilities
from nbloss.problem import (
    FLOAT64,
    WANT_VALUE,
    Array,
    Pointwise,
    checks_values,
    compute_dtype,
    divided,
    has_weighted_mean,
    rounded,
    wanted,
)

OPERANDS = ("x", "target", "weight", "pos_weight", "grad_output", "out", "loss")
OPTIONAL = ("weight", "pos_weight", "grad_output", "loss")
NOWHERE = (0, 0, 0)


def pointwise(problem: Pointwise, value: bool, out: View, in_place: bool, factor: Array) -> View:
    """The loss if `value`, and its gradient in `out` if there is one."""
    x: View = problem.x
    home = x.home
    dtype = compute_dtype(x.dtype)
    checked, weighted = checks_values(problem), has_weighted_mean(problem)
    count = float(x.size) if problem.reduction == "mean" else 1.0
    loss = home.empty(x.shape, dtype) if value and problem.reduction == "none" else None
    if not x.size:
        if loss is not None or not value:
            return loss
        return constant(home, divided(0.0, count) if problem.reduction == "mean" else 0.0, dtype)
    scratch = home.zeros(SCRATCH) if checked else home.empty((SCRATCH,), BYTES) if weighted else None
    at = address_of(scratch)
    host_factor = float(factor) if not isinstance(factor, DeviceView) else 1.0
    if weighted:
        assert problem.weight is not None
        weights: View = layout.once(problem.weight)
        count = float(x.size // weights.size)
        weights = weights.astype(dtype, copy=False)  # side by side
        values_of, ending = (weights.address, weights.size, OF_TYPE), (0, at + DIVISOR, 0, at + FACTOR)
        total(home, values_of, dtype, ending, divided(host_factor, count), 1.0)
    scale = 1.0 if weighted else divided(host_factor, count)
    arrays = {"x": x, "target": problem.target, "weight": problem.weight, "pos_weight": problem.pos_weight}
    if isinstance(factor, DeviceView):
        arrays["grad_output"] = np.broadcast_to(factor, x.shape, subok=True)
    arrays |= {"out": out, "loss": loss}
    present = {n: a for n, a in arrays.items() if a is not None}
    number, factor_at = rounded(scale, dtype)[()], at + FACTOR if weighted else 0
    ahead = checked and out is not None and in_place  # the input may be written only if all of it is good
    if ahead:
        _run_pointwise(problem.name, present, 0, (factor_at, 0, at + FAULTS), number)
    want = wanted(value, out)
    heed, report = (at + FAULTS, 0) if ahead else (0, at + FAULTS if checked else 0)
    sums = _run_pointwise(problem.name, present, want, (factor_at, heed, report), number)
    result = loss
    if value and loss is None:
        result = mean_of(home, sums, at + DIVISOR if weighted else 0, count, dtype)
    if checked and home.has_fault(at + FAULTS):
        refuse_probabilities(home.download(x))
    return result


def _run_pointwise(name: str, arrays: dict[str, View], want: int, status: tuple[int, int, int], scale: Any) -> View:
    """Start a kernel for each piece; the sums of all blocks, if there are to be any."""
    x = arrays["x"]
    options = name, code_of(x.dtype), code_of(arrays["target"].dtype), want, tuple(n for n in arrays if n in OPTIONAL)
    lanes = VECTOR_BYTES // x.itemsize
    launches, blocks = [], 0
    for (outer, inner), places in _places(arrays):
        chunks = max(outer * inner // (choices.POINT_BLOCKS * choices.POINT_THREADS * lanes), 1)
        chunks = min(chunks, choices.POINT_CHUNKS)
        straight = (outer == 1 or inner % lanes == 0) and all(
            _side_by_side(n, place, arrays[n].itemsize, outer) for n, place in places.items()
        )
        kernel = compiled(kernels.pointwise, *options, outer == 1, choices.POINT_THREADS, choices.WARP)
        operands = [places.get(n, NOWHERE) for n in OPERANDS]
        first, n = blocks, -(-outer * inner // (choices.POINT_THREADS * lanes * chunks))
        launches.append((kernel, n, operands, (outer, inner, chunks, int(straight)), first))
        blocks += n
    sums = x.home.empty((blocks,), FLOAT64) if want & WANT_VALUE and "loss" not in arrays else None
    at, size = (sums.address, sums.itemsize) if sums is not None else (0, 0)
    for kernel, n, operands, extent, first in launches:
        x.home.launch(kernel, n, choices.POINT_THREADS, *operands, extent, status, scale, at + first * size)
    return sums


def _places(arrays: dict[str, View]) -> list[tuple[tuple[int, int], dict[str, tuple[int, ...]]]]:
    """For each piece its (outer, inner), and the address of each array and its bytes along outer and inner."""
    if all(a.flags.c_contiguous for a in arrays.values()):  # the usual case, without the detours that others need
        return [((1, arrays["x"].size), {n: (a.address, 0, a.itemsize) for n, a in arrays.items()})]
    return [
        (
            cast("tuple[int, int]", views[0].shape),
            {n: (v.address, *v.strides) for n, v in zip(arrays, cast(Any, views))},
        )
        for views in layout.pointwise_pieces(list(arrays.values()))
    ]


def _side_by_side(name: str, place: tuple[int, ...], size: int, outer: int) -> bool:
    """Whether an operand's vectors can be read or written at once; one element for all of a row counts as such."""
    address, outer_step, inner_step = place
    if inner_step == 0 and name in OPTIONAL:
        return True
    return inner_step == size and address % VECTOR_BYTES == 0 and (outer == 1 or outer_step % VECTOR_BYTES == 0)
