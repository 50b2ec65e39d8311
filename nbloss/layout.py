"""Strided views: from arrays of any layout to the few shapes that kernels take, without a copy.

Kernels see (outer, inner) for pointwise and (outer, classes, inner) for row-wise work, those of the CPU with one axis
more in front. Axes that memory does not let merge into these are looped over in Python: each piece below is one call of
a kernel, and most arrays are one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nbloss.problem import Array

LANES = 16  # rows that a tile wants side by side


def same(value: Array, shape: tuple[int, ...]) -> Array:
    """A view, to be read, of one value in every place of `shape`: broadcast_to, ten times faster."""
    view: Array = np.ndarray(shape, value.dtype, value, 0, (0,) * len(shape))
    return view


def once(array: Array) -> Array:
    """A view of what an array repeats, once."""
    # The dots, for without them a number is read, which no host can on a device.
    places = (..., *(slice(None if step else 1) for step in array.strides))
    view: Array = array[places]
    return view


def pointwise_pieces(arrays: Sequence[Array], dims: int = 2) -> Iterator[tuple[Array, ...]]:
    """Views (…, outer, inner) of arrays of one shape, of so many dimensions; the first array decides which axis is the
    inner one, and the longest other ones are the outer.
    """
    if all(a.flags.c_contiguous or not any(a.strides) for a in arrays):
        line = (*[1] * (dims - 1), -1)
        yield tuple(a.reshape(line) for a in arrays)
        return
    first = arrays[0]
    order = sorted(range(first.ndim), key=lambda axis: -abs(first.strides[axis]))
    turned = [a.transpose(order) for a in arrays]
    *others, inner = _merged(turned)
    others = [1] * (dims - 1 - len(others)) + others
    outer = sorted(sorted(range(len(others)), key=lambda k: (others[k], k))[1 - dims :])
    turned = [np.moveaxis(a.reshape(*others, inner), outer, range(-dims, -1)) for a in turned]
    for index in np.ndindex(*turned[0].shape[:-dims]):
        yield tuple(a[index] for a in turned)


def are_side_by_side(arrays: Sequence[Array], axis: int) -> bool:
    """Whether the elements along an axis are, in each of the arrays."""
    return all(a.strides[axis] == a.itemsize for a in arrays)


def rowwise_pieces(
    axis: int, per_class: Sequence[Array], per_row: Sequence[Array], rows_from: int, row_axes: int = 2
) -> Iterator[tuple[bool, list[Array], list[Array]]]:
    """Views (…, outer, classes, inner) of arrays with a class axis, and (…, outer, inner) of arrays without it, with so
    many axes of rows.

    The first item of a piece says whether its rows, of `rows_from` classes or more, lie along memory (inner is 1).
    """
    classes = per_class[0].shape[axis]
    along = classes >= rows_from and are_side_by_side(per_class, axis)
    if axis == 1 and per_class[0].ndim == 2:  # the usual case, without the detours that other cases need
        front = (None,) * (row_axes - 1)
        row = front[1:] + (..., None)
        if along:
            yield True, [a[row] for a in per_class], [a[row] for a in per_row]
        else:
            yield False, [a.T[front] for a in per_class], [a[front] for a in per_row]
        return
    rows, spread = list(per_row), [np.moveaxis(a, axis, -1) for a in per_class]
    if rows[0].ndim != 1:
        shape = _merged([*rows, *(a[..., 0] for a in spread)])
        rows = [a.reshape(shape) for a in rows]
        spread = [a.reshape(*shape, classes) for a in spread]
    kept = _kept_axes(rows[0].shape, spread[0].strides, along, row_axes)
    looped = [k for k in range(rows[0].ndim) if k not in kept]
    order = looped + kept
    rows = [a.transpose(order) for a in rows]
    spread = [a.transpose(*order, len(order)) for a in spread]
    front = (None,) * (row_axes - along - len(kept))
    row = front + (..., None)
    for index in np.ndindex(*rows[0].shape[: len(looped)]):
        if along:
            yield True, [a[index][row] for a in spread], [a[index][row] for a in rows]
        else:
            yield False, [a[index].swapaxes(-1, -2)[front] for a in spread], [a[index][front] for a in rows]


def _kept_axes(shape: tuple[int, ...], strides: tuple[int, ...], along: bool, row_axes: int) -> list[int]:
    """The axes of one kernel call: the longest; for tiles, neighbours in memory last, if they fill a vector."""
    axes = sorted(range(len(shape)), key=shape.__getitem__)
    if along:
        return axes[1 - row_axes :]
    lane = min(axes, key=lambda k: (shape[k] < LANES, abs(strides[k]))) if shape[axes[-1]] >= LANES else axes[-1]
    return [*[k for k in axes if k != lane][1 - row_axes :], lane]


def _merged(arrays: Sequence[Array]) -> list[int]:
    """The shape of the arrays with all axes merged that lie one after the other in each of them."""
    shape: list[int] = []
    steps: list[tuple[int, ...]] = []
    for n, *strides in zip(arrays[0].shape, *(a.strides for a in arrays)):
        if n == 1:
            continue
        if shape and all(outer == inner * n for outer, inner in zip(steps[-1], strides)):
            shape[-1] *= n
            steps[-1] = tuple(strides)
        else:
            shape.append(n)
            steps.append(tuple(strides))
    return shape or [1]
