"""Errors of one line about a value: which one it is, and where."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbloss.problem import Array


def shown(value: object) -> str:
    """A wrong value for an error of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_labels(labels: Array, classes: int, ignore_index: int) -> None:
    """IndexError for the first label that is neither a class nor ignored, if there is one."""
    beyond = labels >= np.uint64(classes) if labels.dtype == np.uint64 else labels.astype(np.int64) >= classes
    wide = labels.astype(np.int64)
    # A uint64 from 2^63 on is negative as int64, where it may equal ignore_index: it is bad all the same.
    bad = ((wide < 0) | beyond) & ((wide != ignore_index) | (beyond & (wide < 0)))
    if bad.any():
        place, value = _first(labels, bad)
        raise IndexError(
            f"target{place} is {value}: class indices must be in [0, {classes}) or equal ignore_index ({ignore_index})"
        )


def refuse_probabilities(probs: Array) -> None:
    """ValueError for the first probability outside [0, 1], if there is one."""
    with np.errstate(invalid="ignore"):  # NaN of ml_dtypes' bfloat16
        bad = (probs < 0) | (probs > 1)
    if bad.any():
        place, value = _first(probs, bad)
        raise ValueError(f"probs must be in [0, 1], got probs{place} = {value}")


def _first(array: Array, wrong: Array) -> tuple[str, Any]:
    """Where the first wrong element is, as an index is written, and its value."""
    index = np.unravel_index(np.flatnonzero(wrong)[0], array.shape)
    return f"[{', '.join(map(str, index))}]" if index else "", array[index]
