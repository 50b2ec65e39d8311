"""The CPU backend: a canonical problem in, NumPy results out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from nbloss import layout
from nbloss.cpu import pointwise as pointwise_kernels
from nbloss.cpu import rowwise as rowwise_kernels
from nbloss.cpu.given import Operands
from nbloss.cpu.launch import PARALLEL, Launch
from nbloss.cpu.pointwise import AHEAD
from nbloss.cpu.rowwise import CHECKED, UNCHECKED
from nbloss.cpu.scanning import can_scan, scan_labels
from nbloss.cpu.simd import NONTEMPORAL, UNLESS_NEW
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES
from nbloss.errors import refuse_labels, refuse_probabilities
from nbloss.problem import (
    CODES,
    FLOAT32,
    FLOAT64,
    LOSS_ONLY,
    WANT_GRADIENT,
    WANT_VALUE,
    Array,
    Pointwise,
    Rowwise,
    checks_values,
    compute_dtype,
    divided,
    has_weighted_mean,
    rounded,
    wanted,
    without_classes,
)

Plan = Callable[..., Any]  # of x, target, out, the factor of the gradient, and weights by name: gives the loss

_ONES = {dtype: np.ones((), dtype) for dtype in (FLOAT32, FLOAT64)}
_UNITS = {dtype: dtype.type(1) for dtype in (FLOAT32, FLOAT64)}
_KEEPS_TYPE = type(_UNITS[FLOAT32] * 1.0) is np.float32  # before NumPy 2, the product is a float64
_NOTHING = {dtype: np.empty((1, 0), dtype) for dtype in (FLOAT32, FLOAT64)}
_NO_WEIGHT = {dtype: np.empty(0, dtype) for dtype in (FLOAT32, FLOAT64)}
# Bytes of logits from which results are written past the caches, and pointwise losses alone are fetched ahead.
LARGE = 1 << 24


def plan(
    problem: Pointwise | Rowwise, value: bool, form: int, out: Array | None, in_place: bool, factor: Array
) -> tuple[Plan, bool]:
    """How to solve a problem, and whether that serves all that differ from it in the values of their arrays alone.

    It does where one kernel call is all, and keeps no array then.
    """
    if out is not None and not out.dtype.isnative:
        native = np.empty(out.shape, out.dtype.newbyteorder("="))
        solve, _ = plan(problem, value, form, native, in_place, factor)

        def run(x: Array, target: Any, out: Array, factor: float, **weights: Array) -> Any:
            result = solve(x, target, native, factor, **weights)
            out[...] = native
            return result

        return run, False
    if isinstance(problem, Rowwise):
        return _rowwise(problem, value, form, out, factor)
    return _pointwise(problem, value, out, in_place, factor)


def _stored(array: Array) -> Array:
    """The array as kernels see it: half precision as 16-bit integers, bool as bytes."""
    if array.itemsize > 2 or array.dtype.kind in "iu":
        return array
    if array.itemsize == 1:
        return array.view(np.uint8)
    return array.view(np.uint16 if array.dtype == np.float16 else np.int16)


def _past_caches(problem: Pointwise | Rowwise) -> int:
    """Whether results are written past the caches: 0, or how."""
    if problem.x.nbytes < LARGE:
        return 0
    return NONTEMPORAL | (UNLESS_NEW if problem.into_new else 0)


def _reduced(total: float, count: float, one: Any) -> Any:
    """The sum over a count, as the scalar that users receive: of the type of `one`."""
    value = total / count if count else divided(total, count)
    if _KEEPS_TYPE and -3e38 < value < 3e38:
        return one * value  # 37 ns, type(one)(value) takes 120
    with np.errstate(over="ignore"):
        return type(one)(value)


# --- pointwise ----------------------------------------------------------------------------------------------


def _pointwise(problem: Pointwise, value: bool, out: Array | None, in_place: bool, factor: Array) -> tuple[Plan, bool]:
    shape, size, dtype, check = problem.x.shape, problem.x.size, compute_dtype(problem.x.dtype), problem.check
    unreduced = value and problem.reduction == "none"
    known = None if has_weighted_mean(problem) else float(size) if problem.reduction == "mean" else 1.0
    # What gradients are multiplied by where `run` is given 1: one number, or the factor of each element itself.
    unit = factor if factor.ndim else rounded(1.0 if known is None else divided(1.0, known), dtype)
    loss = np.empty(shape, dtype) if unreduced else None
    driver, lasting = _pointwise_sums(problem, wanted(value, out), unit, out, loss)
    ahead = _pointwise_sums(problem, 0, unit, None, None)[0] if in_place and checks_values(problem) else None
    ones, nothing, one = _ONES[dtype], _NOTHING[dtype], _UNITS[dtype]

    def run(
        x: Array,
        target: Array,
        out: Array | None,
        factor: float,
        weight: Array = ones,
        pos_weight: Array = ones,
    ) -> Any:
        count = _total_weight(weight, size) if known is None else known
        scale = unit if factor == 1.0 and known is not None else rounded(divided(factor, count), dtype)
        loss = np.empty(shape, dtype) if unreduced else nothing
        if ahead is not None and ahead(x, target, weight, pos_weight, scale, nothing, nothing)[1]:
            refuse_probabilities(x)
        gradient = nothing if out is None else out
        total, faults = driver(x, target, weight, pos_weight, scale, gradient, loss)
        if faults and check:
            refuse_probabilities(x)
        return loss if unreduced else _reduced(total, count, one) if value else None

    return run, lasting


def _pointwise_sums(
    problem: Pointwise, want: int, scale: Array, out: Array | None, loss: Array | None
) -> tuple[Callable[..., Sequence[float]], bool]:
    """What gives (sum of losses, faults) of operands, and whether it does of any that lie like these."""
    if not scale.ndim:
        calls = list(islice(_pointwise_calls(problem, want, scale, out, loss), 2))
        if len(calls) == 1:
            return calls[0][0].quickest(), True
    writes, keeps = out is not None, loss is not None  # the arrays themselves are given anew

    def sums(*operands: Array) -> list[float]:
        scale, gradient, losses = operands[4:]
        calls = _pointwise_calls(problem, want, scale, gradient if writes else None, losses if keeps else None)
        found = [call(*piece) for call, piece in calls]
        return [sum(column) for column in zip(*found)] or [0.0, 0.0]

    return sums, False


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


def _total_weight(weight: Array, size: int) -> float:
    """The sum of weights that are broadcast to so many."""
    own = weight[tuple(slice(None if step else 1) for step in weight.strides)]  # what broadcasting repeats, once
    if own.size >= PARALLEL and own.dtype.name in CODES:  # as a sum of losses: 2^24 in 0.3 of NumPy's time
        one, none = _ONES[compute_dtype(own.dtype)], _NOTHING[compute_dtype(own.dtype)]
        problem = Pointwise(pointwise_kernels.ITSELF, own, own, None, None, "sum", check=False)
        total = _pointwise_sums(problem, WANT_VALUE, one, None, None)[0](own, own, one, one, one, none, none)[0]
    else:
        aligned = own if own.flags.aligned else own.copy()  # others NumPy adds in another order
        with np.errstate(all="ignore"):
            total = float(np.add.reduce(aligned, axis=None, dtype=np.float64))
    return total * (size // max(own.size, 1))


# --- row-wise -------------------------------------------------------------------------------------------------


def _rowwise(problem: Rowwise, value: bool, form: int, out: Array | None, factor: Array) -> tuple[Plan, bool]:
    shape, dtype, mean = problem.shape, compute_dtype(problem.x.dtype), problem.reduction == "mean"
    classes, ignore, count = problem.x.shape[problem.axis], problem.ignore_index, float(math.prod(shape))
    labelled, dense = problem.labels is not None, problem.probabilities is not None
    unreduced, one = value and problem.reduction == "none", _UNITS[dtype]
    scan = (CHECKED if problem.check else UNCHECKED) if labelled else 0
    loss = np.empty(shape, dtype) if unreduced else None
    first, *later = _stages(problem, form)
    driver, lasting = _rowwise_sums(problem, first, scan, factor, out, loss)
    after = [_rowwise_sums(problem, stage, 0, factor, out, None)[0] for stage in later]
    _, no_labels, _, no_weight, no_upstream, no_out, no_loss = rowwise_kernels.operands(
        _stored(problem.x)[:0], None, None, _NO_WEIGHT[dtype], None, None, None
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

    return run, lasting


def _rowwise_sums(
    problem: Rowwise, stage: int, scan: int, factor: Array, out: Array | None, loss: Array | None
) -> tuple[Callable[..., Sequence[float]], bool]:
    """What gives (sum of losses, labels out of range, weight of the rest), and whether it does of any operands that lie
    like these.
    """
    if not factor.ndim:
        calls = list(islice(_rowwise_calls(problem, stage, scan, factor, out, loss), 2))
        if len(calls) == 1 and calls[0][0].is_one_call and (not scan or can_scan(calls[0][1].t)):
            return calls[0][0].quickest(), True

    writes, keeps = out is not None, loss is not None  # the arrays themselves are given anew

    def sums(x: Array, labels: Array, masses: Array, weight: Array, *more: Any) -> Sequence[float]:
        _, written, losses, multiplier, divisor = more
        bad = total = 0.0
        if scan:
            bad, divisor = scan_labels(labels, weight, problem.x.shape[problem.axis], problem.ignore_index)
            if bad and scan == CHECKED:
                return total, bad, divisor
        if not x.size:
            empty = without_classes(problem, problem.labels, weight.dtype)
            total = float(empty.sum())
            if keeps:
                losses[...] = empty
        calls = _rowwise_calls(problem, stage, 0, factor, written if writes else None, losses if keeps else None)
        for call, operands in calls:
            total += call(*operands, multiplier, divisor)[0]
        return total, bad, divisor

    return sums, False


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
