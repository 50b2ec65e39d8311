"""The CUDA backend: a canonical problem in, results out, on the device or on the host it came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
from numba import cuda

from nbloss import layout
from nbloss.cuda import choices, device
from nbloss.cuda import planes as plane_kernels
from nbloss.cuda import pointwise as pointwise_kernels
from nbloss.cuda import rows as row_kernels
from nbloss.cuda import rowwise as rowwise_kernels
from nbloss.cuda import sums as sum_kernels
from nbloss.cuda.arrays import DeviceView
from nbloss.cuda.device import Home
from nbloss.cuda.intrinsics import SIMULATED, VECTOR_BYTES
from nbloss.cuda.labels import LABEL_CODE
from nbloss.cuda.sums import BY_WEIGHTS
from nbloss.errors import refuse_labels, refuse_probabilities
from nbloss.problem import (
    CODES,
    FLOAT64,
    LOSS_ONLY,
    WANT_VALUE,
    Array,
    Pointwise,
    Rowwise,
    compute_dtype,
    divided,
    has_weighted_mean,
    reads_ahead,
    wanted,
    without_classes,
)

View = Any  # a DeviceView, or None; NumPy's functions are typed as if they gave plain arrays

WARP = 32
PLANE_THREADS = 128
# A thread of a pointwise kernel does up to so many vectors, fewer where that would make fewer blocks: 2048 are three
# rounds of the 5 to 6 that fit on each of an H100's 132 multiprocessors.
POINT_THREADS, POINT_CHUNKS, POINT_BLOCKS = 256, 16, 2048
# Sums over rows and blocks: threads of a block, elements that a thread reads at once, how often, blocks of a cluster,
# if a device has any. 32768 labels took one block 9 µs.
SUM_THREADS, SUM_EACH, SUM_ROUNDS, SUM_PARTS = 1024, 8, 8, 8

# Scratch of a call: a count of faults (int64), the divisor of a mean (float64), the factor of its gradient.
FAULTS, DIVISOR, FACTOR, SCRATCH = 0, 8, 16, 24
BYTES = np.dtype(np.uint8)


@cache
def _code(dtype: np.dtype[Any]) -> str:
    return CODES[dtype.name]


@cache
def _compiled(factory: Callable[..., Any], *options: Any, bounds: tuple[int, int] | None = None) -> Any:
    if SIMULATED:
        return cuda.jit(factory(*options))
    return cuda.jit(factory(*options), launch_bounds=bounds, lto=False)  # as tests compile it


def _address(view: View) -> int:
    return 0 if view is None or not view.size else view.address


# --- host arrays ------------------------------------------------------------------------------------------------


def through_device(
    problem: Pointwise | Rowwise, value: bool, form: int, out: View, in_place: bool, factor: Array
) -> Any:
    """Solve a problem of host arrays: copied in, and results copied out."""
    home = Home(device.memory().current_device(), problem.stream)
    home.check_dtype("the input", problem.x.dtype)  # where another array is bfloat16, so is this, or that was converted
    copies: dict[str, Any] = {
        n: home.upload(a) for n in ("x", *problem.arrays) if (a := getattr(problem, n)) is not None
    }
    moved = dataclasses.replace(problem, **copies)
    written: View = None
    if out is not None:
        written = moved.x if in_place else home.empty(out.shape, moved.x.dtype)
    factor = factor if factor.ndim == 0 else home.upload(factor.astype(compute_dtype(moved.x.dtype)))
    loss = run(moved, value, form, written, in_place, factor)
    if out is not None:
        out[...] = home.download(written)
    if loss is None:
        return None
    host = home.download(loss)
    return host if problem.reduction == "none" else host[()]


def run(problem: Pointwise | Rowwise, value: bool, form: int, out: View, in_place: bool, factor: Array) -> View:
    """The loss if `value`, and what `form` says in `out`."""
    x: View = problem.x
    for name in problem.arrays:  # a number may come from the host
        array = getattr(problem, name)
        if array is not None and not isinstance(array, DeviceView):
            number = x.home.upload(array[(0,) * array.ndim]) if array.size else x.home.empty((), array.dtype)
            setattr(problem, name, np.broadcast_to(number, array.shape, subok=True))
    if isinstance(problem, Pointwise):
        return pointwise(problem, value, out, in_place, factor)
    return rowwise(problem, value, form, out, factor)


# --- what both families share -------------------------------------------------------------------------------------


def converted(view: View, dtype: np.dtype[Any]) -> View:
    """A contiguous copy of another dtype."""
    result = view.home.empty(view.shape, dtype)
    view = view.view(np.uint8) if view.dtype.kind == "b" else view
    source = LABEL_CODE[view.dtype] if view.dtype.kind in "iu" else _code(view.dtype)
    _convert(_compiled(sum_kernels.convert, source, _code(dtype)), view, result)
    return result


def _clear(view: View) -> None:
    if view.flags.c_contiguous or view.flags.f_contiguous:
        view.home.clear(view.address, view.nbytes)
        return
    code = _code(view.dtype)
    _convert(_compiled(sum_kernels.convert, code, code), None, view)


def _convert(kernel: Any, source: View, destination: View) -> None:
    if not destination.size:
        return
    pieces: Any = layout.pointwise_pieces([destination] if source is None else [destination, source])
    for to, *given in pieces:
        outer, inner = to.shape
        read = (given[0].address, *given[0].strides) if given else (0, 0, 0)
        blocks = -(-outer * inner // POINT_THREADS)
        to.home.launch(kernel, blocks, POINT_THREADS, read, (to.address, *to.strides), outer, inner)


def _mean_of(home: Home, values: View, divisor_at: int, divisor: float, dtype: np.dtype[Any]) -> View:
    """The sum of all values (side by side) over a divisor, 0-d."""
    result = home.empty((), dtype)
    values_of = (_address(values), values.size, 0)
    _total(home, values_of, dtype, (0, 0, divisor_at, result.address), 0.0, divisor)
    return result


def _total(
    home: Home,
    values: tuple[int, int, int],
    dtype: np.dtype[Any],
    ending: tuple[int, int, int, int],
    numerator: float,
    divisor: float,
) -> None:
    """Add values of `dtype`, or the sums of clusters, as nbloss.cuda.sums says."""
    clusters, partials = 0, []  # none is freed before the kernel that reads it is started
    while clusters != 1:
        kernel, parts = _summing(home, sum_kernels.total, dtype, values[1])
        clusters = _clusters_of_sum(values[1], parts)
        partials.append(partial := _partial(home, clusters))
        sums = (_address(partial), 0, clusters)
        arguments = (values, sums, ending, numerator, divisor)
        home.launch(kernel, clusters * parts, SUM_THREADS, *arguments, cluster=parts, early=_chained(home))
        values = (_address(partial), clusters, 1)


def _summing(home: Home, factory: Callable[..., Any], dtype: np.dtype[Any], count: int) -> tuple[Any, int]:
    """A kernel that adds so many numbers, and how many blocks of it do so together."""
    chained = _chained(home)
    parts = SUM_PARTS if chained and count > SUM_THREADS * SUM_EACH else 1
    options = (_code(dtype), SUM_THREADS, WARP, SUM_EACH, SUM_ROUNDS, parts, chained)
    return _compiled(factory, *options, bounds=(SUM_THREADS, 1)), parts


def _chained(home: Home) -> bool:
    """Whether kernels can begin before the last has ended, and blocks form clusters."""
    return home.capability >= (9, 0)


def _clusters_of_sum(count: int, parts: int) -> int:
    return max(-(-count // (SUM_THREADS * SUM_EACH * SUM_ROUNDS * parts)), 1)


def _partial(home: Home, clusters: int) -> View:
    """Room for the sums of several clusters, and for what they know of faults."""
    return home.empty((3 * clusters,), FLOAT64) if clusters > 1 else None


def _constant(home: Home, value: float, dtype: np.dtype[Any]) -> View:
    return home.upload(np.array(value, dtype))


# --- pointwise ------------------------------------------------------------------------------------------------


OPERANDS = ("x", "target", "weight", "pos_weight", "grad_output", "out", "loss")
OPTIONAL = ("weight", "pos_weight", "grad_output", "loss")
NOWHERE = (0, 0, 0)


def pointwise(problem: Pointwise, value: bool, out: View, in_place: bool, factor: Array) -> View:
    """The loss if `value`, and its gradient in `out` if there is one."""
    x: View = problem.x
    home = x.home
    dtype = compute_dtype(x.dtype)
    checked, weighted = reads_ahead(problem), has_weighted_mean(problem)
    count = float(x.size) if problem.reduction == "mean" else 1.0
    loss = home.empty(x.shape, dtype) if value and problem.reduction == "none" else None
    if not x.size:
        if loss is not None or not value:
            return loss
        return _constant(home, divided(0.0, count) if problem.reduction == "mean" else 0.0, dtype)
    scratch = home.zeros(SCRATCH) if checked else home.empty((SCRATCH,), BYTES) if weighted else None
    at = _address(scratch)
    host_factor = float(factor) if not isinstance(factor, DeviceView) else 1.0
    scale = host_factor if weighted else divided(host_factor, count)
    if weighted:
        weights: View = problem.weight
        weights = weights.astype(dtype, copy=False)  # side by side
        _total(home, (weights.address, weights.size, 0), dtype, (0, at + DIVISOR, 0, at + FACTOR), scale, 1.0)
        scale = 1.0
    arrays = {"x": x, "target": problem.target, "weight": problem.weight, "pos_weight": problem.pos_weight}
    if isinstance(factor, DeviceView):
        arrays["grad_output"] = np.broadcast_to(factor, x.shape, subok=True)
    arrays |= {"out": out, "loss": loss}
    present = {n: a for n, a in arrays.items() if a is not None}
    number, factor_at = dtype.type(scale), at + FACTOR if weighted else 0
    ahead = checked and out is not None and in_place  # the input may be written only if all of it is good
    if ahead:
        _run_pointwise(problem.name, present, 0, (factor_at, 0, at + FAULTS), number)
    want = wanted(value, out)
    heed, report = (at + FAULTS, 0) if ahead else (0, at + FAULTS if checked else 0)
    sums = _run_pointwise(problem.name, present, want, (factor_at, heed, report), number)
    result = loss
    if value and loss is None:
        result = _mean_of(home, sums, at + DIVISOR if weighted else 0, count, dtype)
    if checked and home.has_fault(at + FAULTS):
        refuse_probabilities(home.download(x))
    return result


def _run_pointwise(name: str, arrays: dict[str, View], want: int, status: tuple[int, int, int], scale: Any) -> View:
    """Start a kernel for each piece; the sums of all blocks, as pairs, if there are to be any."""
    x = arrays["x"]
    options = name, _code(x.dtype), _code(arrays["target"].dtype), want, tuple(n for n in arrays if n in OPTIONAL)
    lanes = VECTOR_BYTES // x.itemsize
    launches, blocks = [], 0
    for (outer, inner), places in _places(arrays):
        chunks = min(max(outer * inner // (POINT_BLOCKS * POINT_THREADS * lanes), 1), POINT_CHUNKS)
        straight = (outer == 1 or inner % lanes == 0) and all(
            _side_by_side(n, place, arrays[n].itemsize, outer) for n, place in places.items()
        )
        kernel = _compiled(pointwise_kernels.pointwise, *options, outer == 1, POINT_THREADS, WARP)
        operands = [places.get(n, NOWHERE) for n in OPERANDS]
        first, n = blocks, -(-outer * inner // (POINT_THREADS * lanes * chunks))
        launches.append((kernel, n, operands, (outer, inner, chunks, int(straight)), first))
        blocks += n
    sums = x.home.empty((2 * blocks,), compute_dtype(x.dtype)) if want & WANT_VALUE and "loss" not in arrays else None
    at, size = (sums.address, 2 * sums.itemsize) if sums is not None else (0, 0)
    for kernel, n, operands, extent, first in launches:
        x.home.launch(kernel, n, POINT_THREADS, *operands, extent, status, scale, at + first * size)
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
    """Whether an operand's vectors can be read or written at once; what may be one element for all of a row is then."""
    address, outer_step, inner_step = place
    if inner_step == 0 and name in OPTIONAL:
        return True
    return inner_step == size and address % VECTOR_BYTES == 0 and (outer == 1 or outer_step % VECTOR_BYTES == 0)


# --- row-wise -------------------------------------------------------------------------------------------------


def rowwise(problem: Rowwise, value: bool, form: int, out: View, factor: View) -> View:
    """The loss if `value`, and what `form` says in `out` if there is one."""
    x: View = problem.x
    labels: View = problem.labels
    home = x.home
    dtype = compute_dtype(x.dtype)
    classes, rows = x.shape[problem.axis], math.prod(problem.shape)
    mean = problem.reduction == "mean"
    host_factor = float(factor) if not isinstance(factor, DeviceView) else 1.0
    count, scale = (float(rows), divided(host_factor, rows)) if mean and labels is None else (1.0, host_factor)
    scratch = None
    if labels is not None and rows and (mean or problem.check):
        scratch = home.empty((SCRATCH,), BYTES)
    at = _address(scratch)
    # Labels are read with the losses that are added, if both lie in one order and there is no gradient: or else ahead.
    beside = out is None and problem.reduction != "none" and labels is not None and labels.flags.c_contiguous
    ahead = scratch is not None and not beside
    if ahead:
        _scan(problem, None, dtype, (at + FAULTS, at + DIVISOR, 0, at + FACTOR), scale)
    by_labels = mean and scratch is not None
    loss = home.empty(problem.shape, dtype) if value else None
    if x.size:
        faults = at + FAULTS if ahead and problem.check else 0
        factor_at, scale = (at + FACTOR, 1.0) if ahead and by_labels else (0, scale)
        _run_rowwise(problem, form, out, loss, factor, factor_at, faults, dtype.type(scale))
    elif loss is not None:
        labels_here = None if labels is None else home.download(labels)
        loss = home.upload(without_classes(problem, labels_here, dtype))
    if loss is not None and problem.reduction != "none":
        if scratch is not None and not ahead:
            losses, loss = loss, home.empty((), dtype)
            _scan(problem, losses, dtype, (at + FAULTS, 0, int(BY_WEIGHTS) if mean else 0, loss.address), 0.0)
        elif by_labels:
            loss = _mean_of(home, loss, at + DIVISOR, 1.0, dtype)
        elif mean and not rows:
            loss = _constant(home, math.nan, dtype)
        else:
            loss = _mean_of(home, loss, 0, count, dtype)
    if scratch is not None and problem.check and home.has_fault(at + FAULTS):
        assert labels is not None
        refuse_labels(home.download(labels), classes, problem.ignore_index)
    return loss


def _label_code(labels: View) -> int:
    return LABEL_CODE[labels.dtype]


def _scan(
    problem: Rowwise, losses: View, dtype: np.dtype[Any], ending: tuple[int, int, int, int], numerator: float
) -> None:
    """Read all labels: faults, the divisor of a mean, and the sum of losses, if given, as nbloss.cuda.sums says."""
    labels: View = problem.labels
    home, classes = labels.home, problem.x.shape[problem.axis]
    kernel, parts = _summing(home, sum_kernels.scan_labels, dtype, labels.size)
    pieces: Any = list(layout.pointwise_pieces([labels] if losses is None else [labels, losses]))
    clusters = sum(_clusters_of_sum(piece[0].size, parts) for piece in pieces)
    partial = _partial(home, clusters)
    weight, done = _address(problem.weight), 0
    for piece, *given in pieces:
        target = (piece.address, *piece.strides, _label_code(labels), problem.ignore_index)
        n = _clusters_of_sum(piece.size, parts)
        extent, sums = (*piece.shape, classes), (_address(partial), done, clusters)
        losses_of = (given[0].address, *given[0].strides) if given else (0, 0, 0)
        arguments = (target, extent, weight, losses_of, sums, ending, numerator)
        early = losses is not None and _chained(home)  # after the kernel of rows
        home.launch(kernel, n * parts, SUM_THREADS, *arguments, cluster=parts, early=early)
        done += n
    if clusters > 1:
        _total(home, (_address(partial), clusters, 1), dtype, ending, numerator, 1.0)


def _run_rowwise(
    problem: Rowwise,
    form: int,
    out: View,
    loss: View,
    factor: View,
    factor_at: int,
    faults: int,
    scale: Any,
) -> None:
    x: View = problem.x
    home = x.home
    code, real = _code(x.dtype), compute_dtype(x.dtype).type
    classes = x.shape[problem.axis]
    uniform = real(problem.label_smoothing / classes)
    share = real(1 - problem.label_smoothing)
    per_class = {"x": x, "mass": problem.probabilities, "out": out}
    per_row = {"target": problem.labels, "loss": loss}
    if isinstance(factor, DeviceView):
        per_row["grad_output"] = np.broadcast_to(factor, problem.shape, subok=True)
    per_class = {n: a for n, a in per_class.items() if a is not None}
    per_row = {n: a for n, a in per_row.items() if a is not None} or {"none": np.moveaxis(x, problem.axis, -1)[..., 0]}
    dense = problem.probabilities is not None or problem.label_smoothing != 0
    mass_code = _code(problem.probabilities.dtype) if problem.probabilities is not None else code
    forms = [form]
    if problem.normalized:
        forms = [LOSS_ONLY] * (loss is not None) + [form] * (out is not None)
    for stage in forms:
        if problem.normalized and stage != LOSS_ONLY and out is not None:
            # The zeros that most of it is; before, in place, nothing may be overwritten if there is a fault.
            if faults and home.has_fault(faults):
                return
            _clear(out)
        for along, spread, rows in layout.rowwise_pieces(
            problem.axis, list(per_class.values()), list(per_row.values()), 1
        ):
            arrays = dict(zip(per_class, spread)) | dict(zip(per_row, rows))
            outer, _, inner = arrays["x"].shape
            cluster, early = 1, False
            numbers = (scale,) if problem.normalized else (share, uniform, scale)
            if problem.normalized:
                kernel = _compiled(rowwise_kernels.picks, code, stage)
                blocks, threads = -(-outer * inner // PLANE_THREADS), PLANE_THREADS
            elif along:
                even = _even(arrays)
                shape = choices.row_shape(classes, code, stage, dense, home.capability)
                threads, height, _, parts = shape
                options = (code, mass_code, stage, dense, threads, height, shape.held(code, dense), parts, even, WARP)
                early = _chained(home) and bool(faults or factor_at)  # after that of labels, or of another piece
                bounds = shape.bounds(code, stage, dense, even, home.capability)
                kernel = _compiled(row_kernels.rows, *options, _chained(home), bounds=bounds)
                cluster = max(parts, 1)
                blocks, threads = -(-outer // height) * cluster, threads * height
            else:
                wide = _wide(arrays)
                kernel = _compiled(plane_kernels.planes, code, mass_code, stage, dense, wide)
                lanes = VECTOR_BYTES // x.dtype.itemsize if wide else 1
                blocks, threads = -(-outer * inner // (lanes * PLANE_THREADS)), PLANE_THREADS
            arguments = _arguments(problem, arrays, factor_at, faults)
            home.launch(kernel, blocks, threads, *arguments, *numbers, cluster=cluster, early=early)


def _arguments(problem: Rowwise, arrays: dict[str, Any], factor_at: int, faults: int) -> tuple[tuple[int, ...], ...]:
    """The five tuples that row-wise kernels take: see nbloss.cuda.rowwise."""
    x = arrays["x"]

    def place(name: str, axes: int) -> tuple[int, ...]:
        return (arrays[name].address, *arrays[name].strides) if name in arrays else (0,) * (axes + 1)

    code = _label_code(problem.labels) if problem.labels is not None else 0
    return (
        (*place("x", 3), *x.shape),
        (*place("target", 2), code, problem.ignore_index),
        (*place("mass", 3), _address(problem.weight)),
        (*place("out", 3), *place("loss", 2)),
        (*place("grad_output", 2), factor_at, faults),
    )


def _even(arrays: dict[str, Any]) -> bool:
    """Whether all rows of classes side by side begin and end on sixteen bytes."""
    given = [arrays[name] for name in ("x", "out") if name in arrays]
    return not any(n % VECTOR_BYTES for a in given for n in (a.address, a.strides[0], a.shape[1] * a.itemsize))


def _wide(arrays: dict[str, Any]) -> bool:
    """Whether sixteen bytes of neighbouring rows can be read and written at once."""
    for name in ("x", "out"):
        if name in arrays:
            a = arrays[name]
            if a.strides[2] != a.itemsize or a.shape[2] * a.itemsize % VECTOR_BYTES:
                return False
            if any(n % VECTOR_BYTES for n in (a.address, *a.strides[:2])):
                return False
    return True
