"""The CPU backend: a canonical problem in, NumPy results out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from nbloss import layout
from nbloss.cpu import pointwise as pointwise_kernels
from nbloss.cpu import rowwise as rowwise_kernels
from nbloss.cpu.given import Operands
from nbloss.cpu.launch import Launch
from nbloss.cpu.pointwise import AHEAD
from nbloss.cpu.rowwise import CHECKED, UNCHECKED
from nbloss.cpu.scanning import can_scan, scan_labels
from nbloss.cpu.simd import NONTEMPORAL, UNLESS_NEW
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES
from nbloss.errors import refuse_labels, refuse_probabilities
from nbloss.problem import (
    FLOAT32,
    FLOAT64,
    LOSS_ONLY,
    WANT_GRADIENT,
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

Plan = Callable[..., Any]

_ONES = {dtype: np.ones((), dtype) for dtype in (FLOAT32, FLOAT64)}
_UNITS = {dtype: dtype.type(1) for dtype in (FLOAT32, FLOAT64)}
_KEEPS_TYPE = type(_UNITS[FLOAT32] * 1.0) is np.float32  # before NumPy 2, the product is a float64
_NO_WEIGHT = {dtype: np.empty(0, dtype) for dtype in (FLOAT32, FLOAT64)}
# Bytes of logits from which results are written past the caches, and pointwise losses alone are fetched ahead.
LARGE = 1 << 24


def plan(problem: Pointwise | Rowwise, value: bool, form: int, out: Array | None, in_place: bool) -> Plan | None:
    """How to solve all problems that differ from this one in the values of their arrays alone, if one kernel call does.

    It is a function of x, target, out and the factor of the gradient, and of weights by name, and keeps none of them.
    """
    if not problem.x.size or (out is not None and not out.dtype.isnative):
        return None
    if isinstance(problem, Rowwise):
        return _rowwise_plan(problem, value, form, out)
    return None if in_place and reads_ahead(problem) else _pointwise_plan(problem, value, out)


def _stored(array: Array) -> Array:
    """The array as kernels see it: half precision as 16-bit integers, bool as bytes."""
    if array.itemsize > 2 or array.dtype.kind in "iu":
        return array
    if array.itemsize == 1:
        return array.view(np.uint8)
    return array.view(np.uint16 if array.dtype == np.float16 else np.int16)


def _target(out: Array) -> Array:
    """The memory that kernels write for `out`: its own, or a stand-in where its byte order is not the machine's."""
    return out if out.dtype.isnative else np.empty(out.shape, out.dtype.newbyteorder("="))


def _past_caches(problem: Pointwise | Rowwise) -> int:
    """Whether results are written past the caches: 0, or how."""
    if problem.x.nbytes < LARGE:
        return 0
    return NONTEMPORAL | (UNLESS_NEW if problem.into_new else 0)


def _deliver(out: Array, written: Array) -> None:
    if not out.dtype.isnative:
        out[...] = written


def _reduced(total: float, count: float, one: Any) -> Any:
    """The sum over a count, as the scalar that users receive: of the type of `one`."""
    value = total / count if count else divided(total, count)
    if _KEEPS_TYPE and -3e38 < value < 3e38:
        return one * value  # 37 ns, type(one)(value) takes 120
    with np.errstate(over="ignore"):
        return type(one)(value)


def _rounded(value: float, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):  # a gradient beyond its dtype is inf
        return np.array(value, dtype)


# --- pointwise ----------------------------------------------------------------------------------------------


def pointwise(problem: Pointwise, value: bool, out: Array | None, in_place: bool, factor: Array) -> Any:
    """The loss if `value`, and its gradient in `out` if there is one."""
    shape, dtype, count = problem.x.shape, compute_dtype(problem.x.dtype), _count(problem)
    scale = factor if factor.ndim else _rounded(divided(float(factor), count), dtype)
    written = None if out is None else _target(out)
    loss = np.empty(shape, dtype) if value and problem.reduction == "none" else None
    if in_place and reads_ahead(problem):
        _run_pointwise(problem, 0, scale, written, None)
    total = _run_pointwise(problem, wanted(value, out), scale, written, loss)
    if out is not None and written is not None:
        _deliver(out, written)
    return loss if loss is not None or not value else _reduced(total, count, _UNITS[dtype])


def _run_pointwise(problem: Pointwise, want: int, scale: Array, out: Array | None, loss: Array | None) -> float:
    total = faults = 0.0
    for call, operands in _pointwise_calls(problem, want, scale, out, loss):
        sums = call(*operands)
        total += sums[0]
        faults += sums[1]
    if faults and problem.check:
        refuse_probabilities(problem.x)
    return total


def _pointwise_plan(problem: Pointwise, value: bool, out: Array | None) -> Plan | None:
    shape, size, dtype, check = problem.x.shape, problem.x.size, compute_dtype(problem.x.dtype), problem.check
    unreduced = value and problem.reduction == "none"
    known = None if has_weighted_mean(problem) else _count(problem)
    unit = np.array(1.0 if known is None else divided(1.0, known), dtype)
    loss = np.empty(shape, dtype) if unreduced else None
    (call, operands), *more = islice(_pointwise_calls(problem, wanted(value, out), unit, out, loss), 2)
    if more or not call.is_one_call:
        return None
    driver, ones, one = call.quickest(), _ONES[dtype], _UNITS[dtype]
    no_out, no_loss = operands[5] if out is None else ones, operands[6] if loss is None else ones

    def run(
        x: Array,
        target: Array,
        out: Array | None,
        factor: float,
        weight: Array = ones,
        pos_weight: Array = ones,
    ) -> Any:
        count = _total_weight(weight, size) if known is None else known
        scale = unit if factor == 1.0 and known is not None else _rounded(divided(factor, count), dtype)
        loss = np.empty(shape, dtype) if unreduced else no_loss
        gradient = no_out if out is None else out
        total, faults = driver(x, target, weight, pos_weight, scale, gradient, loss)
        if faults and check:
            refuse_probabilities(x)
        return loss if unreduced else _reduced(total, count, one) if value else None

    return run


def _pointwise_calls(
    problem: Pointwise, want: int, scale: Array, out: Array | None, loss: Array | None
) -> Iterator[tuple[Launch, tuple[Array, ...]]]:
    """Kernel calls and their operands, with stand-ins for the results that are not asked for."""
    x = _stored(problem.x)
    if not x.size:
        return
    ones = layout.same(_ONES[compute_dtype(problem.x.dtype)], x.shape)
    arrays = [
        x,
        _stored(problem.target),
        ones if problem.weight is None else _stored(problem.weight),
        ones if problem.pos_weight is None else _stored(problem.pos_weight),
        layout.same(scale, x.shape) if scale.ndim == 0 else scale,
        *(_stored(a) for a in (out, loss) if a is not None),
    ]
    how = want | (_past_caches(problem) if want & WANT_GRADIENT else 0) | (AHEAD if x.nbytes >= LARGE else 0)
    call = None
    for piece in layout.pointwise_pieces(arrays):
        outer = len(piece[0])
        gradient = np.empty((outer, 0), x.dtype) if out is None else piece[5]
        losses = np.empty((outer, 0), ones.dtype) if loss is None else piece[-1]
        operands = (*piece[:5], gradient, losses)
        call = call or pointwise_kernels.prepare(problem.name, operands, how)
        yield call, operands


def _count(problem: Pointwise) -> float:
    """What the sum is divided by."""
    if has_weighted_mean(problem) and problem.weight is not None:
        return _total_weight(problem.weight, problem.x.size)
    return float(problem.x.size) if problem.reduction == "mean" else 1.0


def _total_weight(weight: Array, size: int) -> float:
    """The sum of weights that are broadcast to so many."""
    own = weight[tuple(slice(None if step else 1) for step in weight.strides)]  # what broadcasting repeats, once
    return float(np.add.reduce(own, axis=None, dtype=np.float64)) * (size // max(own.size, 1))


# --- row-wise -------------------------------------------------------------------------------------------------


def rowwise(problem: Rowwise, value: bool, form: int, out: Array | None, factor: Array) -> Any:
    """The loss if `value`, and what `form` says in `out` if there is one."""
    labels, dtype, mean = problem.labels, compute_dtype(problem.x.dtype), problem.reduction == "mean"
    count: float = math.prod(problem.shape)
    if labels is not None:
        classes = problem.x.shape[problem.axis]
        bad, count = scan_labels(labels, _weight(problem), classes, problem.ignore_index)
        if bad and problem.check:
            refuse_labels(labels, classes, problem.ignore_index)
    loss, total = None, 0.0
    if value and not problem.x.size:
        loss = without_classes(problem, labels, dtype)
        total = float(loss.sum())
    elif value:
        loss = np.empty(problem.shape, dtype) if problem.reduction == "none" else None
    written = None if out is None else _target(out)
    multiplier = 1.0 if factor.ndim else float(factor)
    for k, stage in enumerate(_stages(problem, form)):
        if k and written is not None:
            written[...] = 0
        for call, operands in _rowwise_calls(problem, stage, 0, factor, written, None if k else loss):
            total += call(*operands, multiplier, count)[0]
    if out is not None and written is not None:
        _deliver(out, written)
    if problem.reduction == "none" or not value:
        return loss
    return _reduced(total, count if mean else 1.0, _UNITS[dtype])


def _rowwise_plan(problem: Rowwise, value: bool, form: int, out: Array | None) -> Plan | None:
    shape, dtype, mean = problem.shape, compute_dtype(problem.x.dtype), problem.reduction == "mean"
    classes, ignore, count = problem.x.shape[problem.axis], problem.ignore_index, float(math.prod(shape))
    labelled, dense = problem.labels is not None, problem.probabilities is not None
    unreduced = value and problem.reduction == "none"
    scan = (CHECKED if problem.check else UNCHECKED) if labelled else 0
    loss = np.empty(shape, dtype) if unreduced else None
    first, *later = _stages(problem, form)
    (call, operands), *more = islice(_rowwise_calls(problem, first, scan, _ONES[FLOAT64], out, loss), 2)
    if more or not call.is_one_call or (labelled and not can_scan(operands.t)):
        return None
    driver, one = call.quickest(), _UNITS[dtype]
    after = [next(_rowwise_calls(problem, stage, 0, _ONES[FLOAT64], out, None))[0] for stage in later]
    _, no_labels, _, no_weight, no_upstream, no_out, no_loss = rowwise_kernels.operands(
        operands.x[:0], None, None, _NO_WEIGHT[dtype], None, None, None
    )

    def run(x: Array, target: Any, out: Array | None, factor: float, weight: Array = no_weight) -> Any:
        labels, masses = target if labelled else no_labels, target if dense else x
        loss = np.empty(shape, dtype) if unreduced else no_loss
        written = no_out if out is None else out
        total, bad, divisor = driver(x, labels, masses, weight, no_upstream, written, loss, factor, count)
        if bad and scan == CHECKED:
            refuse_labels(target, classes, ignore)
        for call in after:
            written[...] = 0
            call(x, labels, masses, weight, no_upstream, written, no_loss, factor, divisor)
        return loss if unreduced else _reduced(total, divisor if mean else 1.0, one) if value else None

    return run


def _stages(problem: Rowwise, form: int) -> list[int]:
    """The forms to run kernels for, in order.

    A gradient of nll_loss takes two: the first reads x; then `out`, which may be x, is filled with zeros; the second
    writes one entry a row.
    """
    return [LOSS_ONLY, form] if problem.normalized and form != LOSS_ONLY else [form]


def _weight(problem: Rowwise) -> Array:
    return _NO_WEIGHT[compute_dtype(problem.x.dtype)] if problem.weight is None else problem.weight


def _rowwise_calls(
    problem: Rowwise, stage: int, scan: int, factor: Array, out: Array | None, loss: Array | None
) -> Iterator[tuple[Launch, Operands]]:
    """Kernel calls and their operands."""
    x, labels, masses = _stored(problem.x), problem.labels, problem.probabilities
    if not x.size:
        return
    kind = CLASS_INDEX if labels is not None else NO_TARGET if masses is None else PROBABILITIES
    options = (
        kind,
        stage,
        0 if stage == LOSS_ONLY else _past_caches(problem),
        problem.ignore_index,
        problem.label_smoothing,
        scan,
        problem.reduction == "mean",
    )
    # In this order: x, probabilities, out; labels, loss, factor, each where present.
    per_class = [x, *(_stored(a) for a in (masses, out) if a is not None)]
    per_row = [a for a in (labels, loss) if a is not None]
    if factor.ndim:
        per_row.append(factor)
    elif not per_row:  # a stand-in that says how many rows there are
        per_row.append(layout.same(factor, problem.shape))
    call = None
    rows_from = rowwise_kernels.ROWS_FROM[compute_dtype(problem.x.dtype).itemsize]
    for along, spread, rows in layout.rowwise_pieces(problem.axis, per_class, per_row, rows_from):
        operands = rowwise_kernels.operands(
            spread[0],
            None if labels is None else rows[0],
            None if masses is None else spread[1],
            _weight(problem),
            rows[-1] if factor.ndim else None,
            None if out is None else spread[-1],
            None if loss is None else rows[labels is not None],
        )
        call = call or rowwise_kernels.prepare(along, problem.normalized, operands, *options)
        yield call, operands
