"""What rows and tiles share: the kinds of target, and the formulas bound to vectors."""

from nbloss import formulas
from nbloss.cpu.simd import inline, where

NO_TARGET, CLASS_INDEX, PROBABILITIES = 0, 1, 2  # kind of target


def _bound(formula, **primitives):
    return inline(formulas.bind(formula, **primitives))


mass_gap = _bound(formulas.mass_gap, where=where)
linear_loss = _bound(formulas.linear_loss, mass_gap=mass_gap)
row_loss = _bound(formulas.row_loss)
target_gradient = _bound(formulas.target_gradient)
dense_gradient = _bound(formulas.dense_gradient, where=where)
