"""Cross-entropy, softmax and log-softmax beside their peers."""

from bench.cases import ROWWISE
from bench.params import over


@over(ROWWISE)
def test_rowwise(case, work, contest):
    contest(case, work)
