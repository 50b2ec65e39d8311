"""What can be compiled before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from nbloss import formulas
from nbloss.cpu import pointwise as pointwise_kernels
from nbloss.cpu import rowwise as rowwise_kernels
from nbloss.cpu.compile import Kernel
from nbloss.cpu.scanning import SCAN
from nbloss.problem import CODES, WEIGHTED_MEAN

_ROW_FUNCTIONS = ("cross_entropy", "nll_loss", "logsumexp", "log_softmax", "softmax")


def kernels_of(dtypes: list[str], losses: list[str] | None) -> list[tuple[str, Callable[[], object]]]:
    """(label, compile it) for the kernel variants that these losses take, of contiguous arrays of one dtype, with int64
    labels and no weights, or weights of that dtype for each element.
    """
    known = [*_ROW_FUNCTIONS, *formulas.POINTWISE]
    asked_for = known if losses is None else losses
    for kind, asked, names in (("dtype", dtypes, list(CODES)), ("loss", asked_for, known)):
        if not asked:
            raise ValueError(f"no {kind} to warm up: choose from {', '.join(names)}")
        for name in asked:
            if name not in names:
                raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(names)}")
    labels = np.dtype(np.int64).char
    variants: dict[tuple[object, ...], tuple[str, Callable[[], object]]] = {}
    for loss in asked_for:
        for dtype in dtypes:
            code = CODES[dtype]
            computed = "d" if code == "d" else "f"
            wanted: list[tuple[Kernel, tuple[str, ...]]]
            if loss in formulas.POINTWISE:
                wanted = [(pointwise_kernels.KERNELS[loss], (code, code, computed, computed))]
            else:
                kernels = (
                    [rowwise_kernels.PICKS]
                    if loss == "nll_loss"
                    else [rowwise_kernels.ROWS, rowwise_kernels.GROUPS, rowwise_kernels.TILES]
                )
                wanted = [(kernel, (code, labels, code)) for kernel in kernels]
                if loss in ("cross_entropy", "nll_loss"):
                    wanted.append((SCAN, (labels, computed)))
            if loss in WEIGHTED_MEAN:
                wanted.append((pointwise_kernels.KERNELS[pointwise_kernels.SUMMAND], (computed,) * 4))
            for kernel, codes in wanted:
                for parallel in (False,) if kernel is SCAN else (False, True):
                    label = f"{kernel.name} {dtype}{' parallel' if parallel else ''}"
                    variants[kernel, codes, parallel] = (label, partial(kernel.variant, parallel, *codes))
    return list(variants.values())
