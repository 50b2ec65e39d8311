"""How time grows with rows, with classes at a constant number of logits, and with threads."""

import pytest

from bench import peers
from bench.cases import CLASSES, ROWS, THREADS, VALUE_AND_GRAD
from bench.params import over

# The libraries that compile within a second a shape: enough to see whose time grows how.
ONLY = ("nbloss", "numpy", "torch", "jax")


@over(ROWS, (VALUE_AND_GRAD,))
def test_rows(case, work, contest):
    contest(case, work, only=ONLY, budget=0.6)


@over(CLASSES, (VALUE_AND_GRAD,))
def test_classes(case, work, contest):
    contest(case, work, only=ONLY, budget=0.6)


@pytest.mark.full
@pytest.mark.parametrize("threads", range(1, peers.available_threads() + 1))
@pytest.mark.parametrize("case", THREADS, ids=str)
def test_threads(case, threads, contest):
    powers = {1, 2, 4, 8, 16, 32, 64, 128, peers.available_threads()}
    if threads not in powers:
        pytest.skip("powers of two and all threads are measured")
    peers.use_threads(threads)
    try:
        contest(case, VALUE_AND_GRAD, only=("nbloss", "torch"), threads=threads, budget=0.6)
    finally:
        peers.use_threads(peers.available_threads())
