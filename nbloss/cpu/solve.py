"""The CPU backend: a canonical problem in, NumPy results out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nbloss import layout
from nbloss.cpu import pointwise as pointwise_kernels
from nbloss.cpu import rowwise as rowwise_kernels
from nbloss.cpu.compile import Kernel
from nbloss.cpu.launch import BLOCK
from nbloss.cpu.pointwise import GRADIENT, VALUE
from nbloss.cpu.rowwise import CHECKED, UNCHECKED
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES
from nbloss.problem import (
    FLOAT32,
    FLOAT64,
    LOSS_ONLY,
    WEIGHTED_MEAN,
    Array,
    Pointwise,
    Rowwise,
    compute_dtype,
    divided,
    refuse_labels,
    refuse_probabilities,
)

_ONES = {dtype: np.ones((), dtype) for dtype in (FLOAT32, FLOAT64)}
_NO_WEIGHT = {dtype: np.empty(0, dtype) for dtype in (FLOAT32, FLOAT64)}
STREAM_FROM = 1 << 24  # bytes of gradient from which it is written past the caches


def _stored(array: Array) -> Array:
    """The array as kernels see it: half precision as 16-bit integers."""
    if array.itemsize > 2:
        return array
    return array.view(np.uint16 if array.dtype == np.float16 else np.int16)


def _target(out: Array) -> Array:
    """The memory that kernels write for `out`: its own, or a stand-in where its byte order is not the machine's."""
    return _stored(out if out.dtype.isnative else np.empty(out.shape, out.dtype.newbyteorder("=")))


def _deliver(out: Array, written: Array) -> None:
    if not out.dtype.isnative:
        out[...] = written.view(out.dtype.newbyteorder("="))


def _reduced(value: float, dtype: np.dtype[Any]) -> Any:
    if dtype is FLOAT32 and abs(value) > 3e38:
        with np.errstate(over="ignore"):
            return np.float32(value)
    return dtype.type(value)


def pointwise(problem: Pointwise, value: bool, out: Array | None, in_place: bool, factor: Array) -> Any:
    """The loss if `value`, and its gradient in `out` if there is one."""
    x, dtype = problem.x, compute_dtype(problem.x.dtype)
    count: float = 1.0
    if problem.reduction == "mean":
        count = float(x.size)
        if problem.weight is not None and problem.name in WEIGHTED_MEAN:
            count = float(np.sum(problem.weight, dtype=np.float64))
    ones = layout.same(_ONES[dtype], x.shape)
    scale = np.array(divided(float(factor), count) if factor.ndim == 0 else factor, dtype)
    operands = (
        _stored(x),
        _stored(problem.target),
        ones if problem.weight is None else problem.weight,
        ones if problem.pos_weight is None else problem.pos_weight,
        layout.same(scale, x.shape) if scale.ndim == 0 else scale,
    )
    written = None if out is None else _target(out)
    loss = np.empty(x.shape, dtype) if value and problem.reduction == "none" else None
    if in_place and problem.check and problem.name == "binary_cross_entropy":
        _run_pointwise(problem, operands, written, None, 0)
    total = _run_pointwise(problem, operands, written, loss, (VALUE if value else 0) | (0 if out is None else GRADIENT))
    if out is not None and written is not None:
        _deliver(out, written)
    if loss is not None or not value:
        return loss
    return _reduced(divided(total, count) if problem.reduction == "mean" else total, dtype)


def _run_pointwise(
    problem: Pointwise, operands: tuple[Array, ...], out: Array | None, loss: Array | None, want: int
) -> float:
    total = faults = 0.0
    if not problem.x.size:
        return total
    results = [a for a in (out, loss) if a is not None]
    for x, target, weight, pos_weight, upstream, *rest in layout.pointwise_pieces([*operands, *results]):
        gradient = np.empty((x.shape[0], 0), x.dtype) if out is None else rest[0]
        losses = np.empty((x.shape[0], 0), weight.dtype) if loss is None else rest[-1]
        piece = pointwise_kernels.run(problem.name, x, target, weight, pos_weight, upstream, gradient, losses, want)
        total += piece[0]
        faults += piece[1]
    if faults and problem.check:
        refuse_probabilities(problem.x)
    return total


def rowwise(problem: Rowwise, value: bool, form: int, out: Array | None, factor: Array) -> Any:
    """The loss if `value`, and what `form` says in `out` if there is one."""
    x, labels, dtype = problem.x, problem.labels, compute_dtype(problem.x.dtype)
    weight = _NO_WEIGHT[dtype] if problem.weight is None else problem.weight
    mean = problem.reduction == "mean"
    kind = CLASS_INDEX if labels is not None else NO_TARGET if problem.probabilities is None else PROBABILITIES
    found = np.empty(2)  # labels out of range, divisor of the mean
    scan = 0
    if labels is None:
        found[1] = math.prod(problem.shape)
    elif 0 < x.size <= BLOCK and x.ndim <= 2 and not problem.normalized:
        # A call this small is one kernel call, which looks at its labels first: 1.5 us less.
        scan = CHECKED if problem.check else UNCHECKED
    else:
        found[:] = rowwise_kernels.scan_labels(labels, weight, x.shape[problem.axis], problem.ignore_index)
        _raise_if_bad(problem, found)
    loss = None
    if value and problem.reduction == "none":
        empty_row = -np.inf if kind == NO_TARGET else 0.0  # the value of a row without classes
        loss = np.full(problem.shape, empty_row, dtype)
    total = 0.0
    if x.size:
        per_class = [_stored(x)]
        if problem.probabilities is not None:
            per_class.append(_stored(problem.probabilities))
        if out is not None:
            per_class.append(_target(out))
        per_row = [a for a in (labels, loss) if a is not None]
        if factor.ndim:
            per_row.append(factor)
        elif not per_row:  # a stand-in that says how many rows there are
            per_row.append(layout.same(factor, problem.shape))
        past = out is not None and x.nbytes >= STREAM_FROM
        forms = [form]
        if problem.normalized:
            # What kernels write here is a few of many zeros, and in place the values are needed first.
            forms = [LOSS_ONLY, form] if value and out is not None else forms
        for stage in forms:
            if problem.normalized and stage != LOSS_ONLY:
                per_class[-1][...] = 0
            for along, spread, rows in layout.rowwise_pieces(problem.axis, per_class, per_row):
                sums = rowwise_kernels.run(
                    along,
                    problem.normalized,
                    spread[0],
                    None if labels is None else rows[0],
                    spread[1] if kind == PROBABILITIES else None,
                    weight,
                    rows[-1] if factor.ndim else None,
                    None if out is None else spread[-1],
                    None if loss is None or stage != forms[0] else rows[labels is not None],
                    found,
                    kind,
                    stage,
                    past,
                    problem.ignore_index,
                    problem.label_smoothing,
                    1.0 if factor.ndim else float(factor),
                    scan,
                    mean,
                )
                total += sums if stage == forms[0] else 0.0
        if scan:
            _raise_if_bad(problem, found)
        if out is not None:
            _deliver(out, per_class[-1])
    if loss is not None or not value:
        return loss
    return _reduced(divided(total, float(found[1])) if mean else total, dtype)


def _raise_if_bad(problem: Rowwise, found: Array) -> None:
    if found[0] and problem.check and problem.labels is not None:
        refuse_labels(problem.labels, problem.x.shape[problem.axis], problem.ignore_index)


# --- compiling ahead ----------------------------------------------------------------------------------------

_CODES = {"float16": "H", "bfloat16": "h", "float32": "f", "float64": "d"}
_ROW_FUNCTIONS = ("cross_entropy", "nll_loss", "logsumexp", "log_softmax", "softmax")


def kernels_of(dtypes: list[str], losses: list[str] | None) -> list[tuple[str, Callable[[], object]]]:
    """(label, compile it) for every kernel variant that these losses use."""
    known = [*_ROW_FUNCTIONS, *pointwise_kernels.KERNELS]
    for kind, asked, names in (("dtype", dtypes, list(_CODES)), ("loss", losses or [], known)):
        for name in asked:
            if name not in names:
                raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(names)}")
    variants: dict[tuple[object, ...], tuple[str, Callable[[], object]]] = {}
    for loss in known if losses is None else losses:
        for dtype in dtypes:
            code = _CODES[dtype]
            wanted: list[tuple[Kernel, tuple[str, ...]]]
            if loss in pointwise_kernels.KERNELS:
                wanted = [(pointwise_kernels.KERNELS[loss], (code, code))]
            else:
                kernels = (
                    [rowwise_kernels.PICKS] if loss == "nll_loss" else [rowwise_kernels.ROWS, rowwise_kernels.TILES]
                )
                wanted = [(kernel, (code, "l", code)) for kernel in kernels]
                wanted.append((rowwise_kernels.SCAN, ("l", "d" if code == "d" else "f")))
            for kernel, codes in wanted:
                for parallel in (False,) if kernel is rowwise_kernels.SCAN else (False, True):
                    label = f"{kernel.name} {dtype}{' parallel' if parallel else ''}"
                    variants[kernel, codes, parallel] = (label, partial(kernel.variant, parallel, *codes))
    return list(variants.values())
