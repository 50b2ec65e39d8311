"""Row-wise problems to kernel calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from nbloss import layout
from nbloss.cpu import rowwise as kernels
from nbloss.cpu.auxiliary import UNITS, Plan, past_caches, reduced, stored
from nbloss.cpu.given import Operands
from nbloss.cpu.launch import Launch
from nbloss.cpu.rowwise_driver import CHECKED, UNCHECKED
from nbloss.cpu.scanning import can_scan, scan_labels
from nbloss.cpu.targets import CLASS_INDEX, NO_TARGET, PROBABILITIES
from nbloss.errors import refuse_labels
from nbloss.problem import FLOAT32, FLOAT64, LOSS_ONLY, Array, Rowwise, compute_dtype, without_classes

_NO_WEIGHT = {dtype: np.empty(0, dtype) for dtype in (FLOAT32, FLOAT64)}


def plan(problem: Rowwise, value: bool, form: int, out: Array | None, factor: Array) -> tuple[Plan, bool]:
    """As `solve.plan`, of a row-wise problem."""
    shape, dtype, mean = problem.shape, compute_dtype(problem.x.dtype), problem.reduction == "mean"
    classes, ignore, count = problem.x.shape[problem.axis], problem.ignore_index, float(math.prod(shape))
    labelled, dense = problem.labels is not None, problem.probabilities is not None
    unreduced, one = value and problem.reduction == "none", UNITS[dtype]
    scan = (CHECKED if problem.check else UNCHECKED) if labelled else 0
    loss = np.empty(shape, dtype) if unreduced else None
    apart = problem.labels is not None and not problem.labels.flags.c_contiguous
    if apart:  # kernels scan labels that lie side by side
        problem = replace(problem, labels=np.ascontiguousarray(problem.labels))
    first, *later = _stages(problem, form)
    driver, lasting = _sums(problem, value, first, scan, factor, out, loss)
    after = [_sums(problem, False, stage, 0, factor, out, None) for stage in later]
    each = factor.ndim > 0
    clears = out is not None and classes > 1 and out.strides[problem.axis] == out.itemsize  # as nbloss.cpu.picks does
    _, no_labels, _, no_weight, no_upstream, no_out, no_loss = kernels.operands(
        stored(problem.x)[:0], None, None, _NO_WEIGHT[dtype], None, None, None
    )

    def run(x: Array, target: Any, out: Array | None, factor: Any, weight: Array = no_weight) -> Any:
        labels, masses = target if labelled else no_labels, target if dense else x
        if apart:
            labels = np.ascontiguousarray(target)
        loss = np.empty(shape, dtype) if unreduced else no_loss
        written = no_out if out is None else out
        upstream, factor = (factor, 1.0) if each else (no_upstream, factor)
        total, bad, divisor = driver(x, labels, masses, weight, upstream, written, loss, factor, count)
        if bad and scan == CHECKED:
            refuse_labels(target, classes, ignore)
        for call, _ in after:
            if not clears:
                written[...] = 0
            call(x, labels, masses, weight, upstream, written, no_loss, factor, divisor)
        return loss if unreduced else reduced(total, divisor if mean else 1.0, one) if value else None

    return run, lasting and all(stays for _, stays in after)


def _sums(
    problem: Rowwise, value: bool, stage: int, scan: int, factor: Array, out: Array | None, loss: Array | None
) -> tuple[Callable[..., Sequence[float]], bool]:
    """What gives (sum of losses, labels out of range, weight of the rest), and whether it does of any operands that lie
    like these.
    """
    calls = list(islice(_calls(problem, value, stage, scan, factor, out, loss), 2))
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
        calls = _calls(problem, value, stage, 0, factor, written if writes else None, losses if keeps else None)
        for call, operands in calls:
            total += call(*operands, multiplier, divisor)[0]
        return total, bad, divisor

    return sums, False


def _stages(problem: Rowwise, form: int) -> list[int]:
    """The forms to run kernels for, in order.

    A gradient of nll_loss takes two: the first reads x; the second fills `out`, which may be x, with zeros, unless that
    is done before, and writes one entry a row.
    """
    return [LOSS_ONLY, form] if problem.normalized and form != LOSS_ONLY else [form]


def _weight(problem: Rowwise) -> Array:
    return _NO_WEIGHT[compute_dtype(problem.x.dtype)] if problem.weight is None else problem.weight


def _calls(
    problem: Rowwise, value: bool, stage: int, scan: int, factor: Array, out: Array | None, loss: Array | None
) -> Iterator[tuple[Launch, Operands]]:
    """Kernel calls and their operands."""
    x, labels, masses = stored(problem.x), problem.labels, problem.probabilities
    if not x.size:
        return
    kind = CLASS_INDEX if labels is not None else NO_TARGET if masses is None else PROBABILITIES
    options = (
        kind,
        value,
        stage,
        0 if stage == LOSS_ONLY else past_caches(problem),
        problem.ignore_index,
        problem.label_smoothing,
        scan,
        problem.reduction == "mean",
    )
    # In this order: x, probabilities, out; labels, loss, factor, each where present.
    per_class = [x, *(stored(a) for a in (masses, out) if a is not None)]
    per_row = [a for a in (labels, loss) if a is not None]
    if factor.ndim:
        per_row.append(factor)
    elif not per_row:  # a stand-in that says how many rows there are
        per_row.append(layout.same(factor, problem.shape))
    call = None
    rows_from = kernels.ROWS_FROM[compute_dtype(problem.x.dtype).itemsize]
    for along, spread, rows in layout.rowwise_pieces(problem.axis, per_class, per_row, rows_from, kernels.ROW_AXES):
        operands = kernels.operands(
            spread[0],
            None if labels is None else rows[0],
            None if masses is None else spread[1],
            _weight(problem),
            rows[-1] if factor.ndim else None,
            None if out is None else spread[-1],
            None if loss is None else rows[labels is not None],
        )
        call = call or kernels.prepare(along, problem.normalized, operands, *options)
        yield call, operands
