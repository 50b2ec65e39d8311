"""Pointwise losses beside their peers."""

from bench.cases import POINTWISE
from bench.params import over


@over(POINTWISE)
def test_pointwise(case, work, contest):
    contest(case, work)
