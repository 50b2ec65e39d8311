"""Problems over classes to kernel launches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbloss import layout
from nbloss.cuda import choices
from nbloss.cuda import planes as plane_kernels
from nbloss.cuda import rows as row_kernels
from nbloss.cuda import rowwise as rowwise_kernels
from nbloss.cuda import sums as sum_kernels
from nbloss.cuda.arrays import DeviceView
from nbloss.cuda.auxiliary import (
    BYTES,
    DIVISOR,
    FACTOR,
    FAULTS,
    SCRATCH,
    View,
    address_of,
    chained,
    clear,
    clusters_of_sum,
    code_of,
    compiled,
    constant,
    mean_of,
    partial_sums,
    summing,
    total,
)
from nbloss.cuda.intrinsics import VECTOR_BYTES
from nbloss.cuda.labels import LABEL_CODE
from nbloss.cuda.sums import BY_WEIGHTS, OF_CLUSTERS
from nbloss.errors import refuse_labels
from nbloss.problem import LOSS_ONLY, Rowwise, compute_dtype, divided, rounded, without_classes


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
    at = address_of(scratch)
    # Contiguous labels are read together with the losses that are added, if there is no gradient; or else ahead.
    beside = out is None and problem.reduction != "none" and labels is not None and labels.flags.c_contiguous
    ahead = scratch is not None and not beside
    if ahead:
        _scan(problem, None, dtype, (at + FAULTS, at + DIVISOR, 0, at + FACTOR), scale)
    by_labels = mean and scratch is not None
    loss = home.empty(problem.shape, dtype) if value else None
    if x.size:
        faults = at + FAULTS if ahead and problem.check else 0
        factor_at, scale = (at + FACTOR, 1.0) if ahead and by_labels else (0, scale)
        _run_rowwise(problem, form, out, loss, factor, factor_at, faults, rounded(scale, dtype)[()])
    elif loss is not None:
        labels_here = None if labels is None else home.download(labels)
        loss = home.upload(without_classes(problem, labels_here, dtype))
    if loss is not None and problem.reduction != "none":
        if scratch is not None and not ahead:
            losses, loss = loss, home.empty((), dtype)
            _scan(problem, losses, dtype, (at + FAULTS, 0, int(BY_WEIGHTS) if mean else 0, loss.address), 0.0)
        elif by_labels:
            loss = mean_of(home, loss, at + DIVISOR, 1.0, dtype)
        elif mean and not rows:
            loss = constant(home, math.nan, dtype)
        else:
            loss = mean_of(home, loss, 0, count, dtype)
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
    kernel, parts = summing(home, sum_kernels.scan_labels, dtype, labels.size)
    pieces: Any = list(layout.pointwise_pieces([labels] if losses is None else [labels, losses]))
    clusters = sum(clusters_of_sum(piece[0].size, parts) for piece in pieces)
    partial = partial_sums(home, clusters)
    weight, done = address_of(problem.weight), 0
    for piece, *given in pieces:
        target = (piece.address, *piece.strides, _label_code(labels), problem.ignore_index)
        n = clusters_of_sum(piece.size, parts)
        extent, sums = (*piece.shape, classes), (address_of(partial), done, clusters)
        losses_of = (given[0].address, *given[0].strides) if given else (0, 0, 0)
        arguments = (target, extent, weight, losses_of, sums, ending, numerator)
        early = losses is not None and chained(home)  # after the kernel of rows
        home.launch(kernel, n * parts, choices.SUM_THREADS, *arguments, cluster=parts, early=early)
        done += n
    if clusters > 1:
        total(home, (address_of(partial), clusters, OF_CLUSTERS), dtype, ending, numerator, 1.0)


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
    code, real = code_of(x.dtype), compute_dtype(x.dtype).type
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
    mass_code = code_of(problem.probabilities.dtype) if problem.probabilities is not None else code
    forms = [form]
    if problem.normalized:
        forms = [LOSS_ONLY] * (loss is not None) + [form] * (out is not None)
    for stage in forms:
        if problem.normalized and stage != LOSS_ONLY and out is not None:
            # The zeros that most of it is; in place, they may not be written if there is a fault.
            if faults and out.address == x.address and home.has_fault(faults):
                return
            clear(out)
        for along, spread, rows in layout.rowwise_pieces(
            problem.axis, list(per_class.values()), list(per_row.values()), 1
        ):
            arrays = dict(zip(per_class, spread)) | dict(zip(per_row, rows))
            outer, _, inner = arrays["x"].shape
            cluster, early, shared = 1, False, 0
            numbers = (scale,) if problem.normalized else (share, uniform, scale)
            if problem.normalized:
                kernel = compiled(rowwise_kernels.picks, code, stage)
                blocks, threads = -(-outer * inner // choices.PLANE_THREADS), choices.PLANE_THREADS
            elif along:
                even = _even(arrays)
                shape = choices.row_shape(classes, code, stage, dense, home.capability, home.shared)
                threads, height, _, parts, room = shape
                held, warp = shape.held(code, dense), choices.WARP
                options = (code, mass_code, stage, dense, threads, height, held, parts, room > 0, even, warp)
                early = chained(home) and bool(faults or factor_at)  # after that of labels, or of another piece
                bounds = shape.bounds(code, stage, dense, even, home.capability)
                kernel = compiled(row_kernels.rows, *options, chained(home), bounds=bounds)
                cluster, shared = max(parts, 1), shape.shared(code, classes)
                blocks, threads = -(-outer // height) * cluster, threads * height
            else:
                wide = _wide(arrays)
                kernel = compiled(plane_kernels.planes, code, mass_code, stage, dense, wide)
                lanes = VECTOR_BYTES // x.dtype.itemsize if wide else 1
                blocks, threads = -(-outer * inner // (lanes * choices.PLANE_THREADS)), choices.PLANE_THREADS
            arguments = _arguments(problem, arrays, factor_at, faults)
            home.launch(kernel, blocks, threads, *arguments, *numbers, cluster=cluster, early=early, shared=shared)


def _arguments(problem: Rowwise, arrays: dict[str, Any], factor_at: int, faults: int) -> tuple[tuple[int, ...], ...]:
    """The five tuples that row-wise kernels take: see nbloss.cuda.rowwise."""
    x = arrays["x"]

    def place(name: str, axes: int) -> tuple[int, ...]:
        return (arrays[name].address, *arrays[name].strides) if name in arrays else (0,) * (axes + 1)

    code = _label_code(problem.labels) if problem.labels is not None else 0
    return (
        (*place("x", 3), *x.shape),
        (*place("target", 2), code, problem.ignore_index),
        (*place("mass", 3), address_of(problem.weight)),
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
