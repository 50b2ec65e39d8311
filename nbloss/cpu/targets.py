"""What row-wise kernels share: the kinds of target, and the formulas bound to vectors."""

from nbloss import formulas
from nbloss.cpu.simd import fma, inline, where

NO_TARGET, CLASS_INDEX, PROBABILITIES = 0, 1, 2  # kind of target


def _bound(formula, **primitives):
    return inline(formulas.bind(formula, **primitives))


add_gap = _bound(formulas.add_gap, where=where, fma=fma)
picked_loss = _bound(formulas.picked_loss, where=where)
row_loss = _bound(formulas.row_loss)
target_gradient = _bound(formulas.target_gradient, where=where)
dense_gradient = _bound(formulas.dense_gradient, where=where)
