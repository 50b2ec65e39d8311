"""Every library on a small input: right, or skipped with the reason why it takes no part."""

import pytest

from bench import peers
from bench.cases import Case, inputs_of
from bench.oracle import disagreement

CASES = {
    "cross_entropy": Case("cross_entropy", (37, 11)),
    "nll_loss": Case("nll_loss", (37, 11)),
    "log_softmax": Case("log_softmax", (37, 11)),
    "softmax": Case("softmax", (37, 11)),
    "binary_cross_entropy": Case("binary_cross_entropy", (1001,)),
    "binary_cross_entropy_with_logits": Case("binary_cross_entropy_with_logits", (1001,)),
    "mse_loss": Case("mse_loss", (1001,)),
    "l1_loss": Case("l1_loss", (1001,)),
}


@pytest.mark.parametrize("library", peers.MODULES)
def test_peer_agrees(library, libraries):
    if library not in libraries:
        pytest.skip(f"{library}: not among --libraries")
    reason = peers.why_missing(library)
    if reason:
        pytest.skip(f"{library}: {reason}")
    for loss, table in peers.PEERS.items():
        if library not in table:
            continue
        case = CASES[loss]
        for work in case.works:
            try:
                contestant = peers.set_up(library, case, inputs_of(case), work)
            except peers.Absent:
                continue
            problem = disagreement(case, contestant.read(contestant.run()))
            assert problem is None, f"{library} disagrees on {case} ({work}): {problem}"
