"""Pointwise problems to kernel calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from nbloss import layout
from nbloss.cpu import auxiliary
from nbloss.cpu import pointwise as kernels
from nbloss.cpu.auxiliary import UNITS, Plan, past_caches, reduced, stored
from nbloss.cpu.launch import PARALLEL, Launch
from nbloss.cpu.pointwise_driver import AHEAD
from nbloss.errors import refuse_probabilities
from nbloss.output import empty_like
from nbloss.problem import (
    CODES,
    FLOAT32,
    FLOAT64,
    WANT_GRADIENT,
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

_ONES = {dtype: np.ones((), dtype) for dtype in (FLOAT32, FLOAT64)}
_NOTHING = {dtype: np.empty((1, 1, 0), dtype) for dtype in (FLOAT32, FLOAT64)}


def plan(problem: Pointwise, value: bool, out: Array | None, in_place: bool, factor: Array) -> tuple[Plan, bool]:
    """As `solve.plan`, of a pointwise problem."""
    size, dtype, check = problem.x.size, compute_dtype(problem.x.dtype), problem.check
    unreduced = value and problem.reduction == "none"
    known = None if has_weighted_mean(problem) else float(size) if problem.reduction == "mean" else 1.0
    each = factor.ndim > 0
    # What gradients are multiplied by where `run` is given 1: one number, or the factor of each element itself.
    unit: Any = factor if each else rounded(1.0 if known is None else divided(1.0, known), dtype)
    loss = empty_like(problem.x, dtype) if unreduced else None
    driver, lasting = _sums(problem, wanted(value, out), unit, out, loss)
    ahead = None
    if in_place and checks_values(problem):
        ahead, stays = _sums(problem, 0, unit, None, None)
        lasting = lasting and stays
    if each:
        unit = None  # a plan keeps no array
    ones, nothing, one = _ONES[dtype], _NOTHING[dtype], UNITS[dtype]

    def run(
        x: Array,
        target: Array,
        out: Array | None,
        factor: Any,
        weight: Array = ones,
        pos_weight: Array = ones,
    ) -> Any:
        count = _total_weight(weight, size) if known is None else known
        upstream = factor
        if not each:
            upstream = unit if factor == 1.0 and known is not None else rounded(divided(factor, count), dtype)
        loss = empty_like(x, dtype) if unreduced else nothing
        if ahead is not None and ahead(x, target, weight, pos_weight, upstream, nothing, nothing)[1]:
            refuse_probabilities(x)
        gradient = nothing if out is None else out
        total, faults = driver(x, target, weight, pos_weight, upstream, gradient, loss)
        if faults and check:
            refuse_probabilities(x)
        return loss if unreduced else reduced(total, count, one) if value else None

    return run, lasting


def _sums(
    problem: Pointwise, want: int, upstream: Array, out: Array | None, loss: Array | None
) -> tuple[Callable[..., Sequence[float]], bool]:
    """What gives (sum of losses, faults) of operands, and whether it does of any that lie like these."""
    calls = list(islice(_calls(problem, want, upstream, out, loss), 2))
    if len(calls) == 1:
        return calls[0][0].quickest(), True
    writes, keeps = out is not None, loss is not None  # the arrays themselves are given anew

    def sums(*operands: Array) -> list[float]:
        upstream, gradient, losses = operands[4:]
        calls = _calls(problem, want, upstream, gradient if writes else None, losses if keeps else None)
        found = [call(*piece) for call, piece in calls]
        return [sum(column) for column in zip(*found)] or [0.0, 0.0]

    return sums, False


def _calls(
    problem: Pointwise, want: int, upstream: Array, out: Array | None, loss: Array | None
) -> Iterator[tuple[Launch, tuple[Array, ...]]]:
    """Kernel calls and their operands, with stand-ins for the results that are not asked for."""
    x = stored(problem.x)
    if not x.size:
        return
    ones = layout.same(_ONES[compute_dtype(problem.x.dtype)], x.shape)
    arrays = [
        x,
        stored(problem.target),
        ones if problem.weight is None else stored(problem.weight),
        ones if problem.pos_weight is None else stored(problem.pos_weight),
        layout.same(upstream, x.shape) if upstream.ndim == 0 else upstream,
        *(stored(a) for a in (out, loss) if a is not None),
    ]
    how = want | (past_caches(problem) if want & WANT_GRADIENT else 0) | (AHEAD if x.nbytes >= auxiliary.LARGE else 0)
    call = None
    for piece in layout.pointwise_pieces(arrays, kernels.DIMS):
        lines = piece[0].shape[:-1]
        gradient = np.empty((*lines, 0), x.dtype) if out is None else piece[5]
        losses = np.empty((*lines, 0), ones.dtype) if loss is None else piece[-1]
        operands = (*piece[:5], gradient, losses)
        call = call or kernels.prepare(problem.name, operands, how)
        yield call, operands


def _total_weight(weight: Array, size: int) -> float:
    """The sum of weights that are broadcast to so many."""
    own = layout.once(weight)
    if own.size >= PARALLEL and own.dtype.name in CODES:  # as a sum of losses: 2^24 in 0.3 of NumPy's time
        one, none = _ONES[compute_dtype(own.dtype)], _NOTHING[compute_dtype(own.dtype)]
        problem = Pointwise(kernels.SUMMAND, own, own, None, None, "sum", check=False)
        total = _sums(problem, WANT_VALUE, one, None, None)[0](own, own, one, one, one, none, none)[0]
    else:
        aligned = own if own.flags.aligned else own.copy()  # others NumPy adds in another order
        with np.errstate(all="ignore"):
            total = float(np.add.reduce(aligned, axis=None, dtype=np.float64))
    return total * (size // max(own.size, 1))
