"""The CPU backend: a canonical problem in, NumPy results out."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbloss.cpu import solve_pointwise, solve_rowwise
from nbloss.cpu.auxiliary import Plan
from nbloss.problem import Array, Pointwise, Rowwise


def plan(
    problem: Pointwise | Rowwise, value: bool, form: int, out: Array | None, in_place: bool, factor: Array
) -> tuple[Plan, bool]:
    """(a plan, whether it serves all problems that differ from this one in the values of their arrays alone).

    It does where it is a single kernel call, and keeps no array then.
    """
    if out is not None and not out.dtype.isnative:
        native = np.empty(out.shape, out.dtype.newbyteorder("="))
        solve, _ = plan(problem, value, form, native, in_place, factor)

        def run(x: Array, target: Any, out: Array, factor: Any, **weights: Array) -> Any:
            result = solve(x, target, native, factor, **weights)
            out[...] = native
            return result

        return run, False
    if isinstance(problem, Rowwise):
        return solve_rowwise.plan(problem, value, form, out, factor)
    return solve_pointwise.plan(problem, value, out, in_place, factor)
