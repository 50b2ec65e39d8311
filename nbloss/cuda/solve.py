"""The CUDA backend: a canonical problem in, results out, on the device or on the host it came from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nbloss.cuda import device
from nbloss.cuda.arrays import DeviceView
from nbloss.cuda.auxiliary import View
from nbloss.cuda.device import Home
from nbloss.cuda.solve_pointwise import pointwise
from nbloss.cuda.solve_rowwise import rowwise
from nbloss.problem import Array, Pointwise, Rowwise, compute_dtype


def through_device(
    problem: Pointwise | Rowwise, value: bool, form: int, out: View, in_place: bool, factor: Array
) -> Any:
    """Solve a problem of host arrays: copied in, and results copied out."""
    home = Home(device.memory().current_device(), problem.stream)
    home.check_dtype("the input", problem.x.dtype)  # where another array is bfloat16, so is this, or that was converted
    copies: dict[str, Any] = {"x": home.upload(problem.x)}
    for name in problem.arrays:
        if (array := getattr(problem, name)) is not None:
            if name != "labels" and array.dtype != problem.x.dtype:
                array = array.astype(compute_dtype(problem.x.dtype), copy=False)
            copies[name] = home.upload(array)
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
