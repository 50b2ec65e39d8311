"""Cross-entropy on a CUDA device beside its peers; ``--device cuda`` runs this and nothing else."""

import pytest

from bench import peers_cuda
from bench.cases import VALUE, VALUE_AND_GRAD, WORKS
from bench.peers import Absent
from bench.timing import Timing

pytestmark = pytest.mark.cuda

TOLERANCE = {"float32": 1e-5, "bfloat16": 6e-2}


@pytest.fixture(scope="module")
def device_ceilings():
    return {writes: peers_cuda.ceiling(writes) for writes in (False, True)}


@pytest.mark.parametrize("work", [VALUE, VALUE_AND_GRAD])
@pytest.mark.parametrize("case", peers_cuda.CASES, ids=str)
def test_cross_entropy(case, work, quick, libraries, device_ceilings, report):
    x, target = peers_cuda.inputs_on_device(case)
    expected, gradient = peers_cuda.reference(x, target)
    runs, reasons = {}, []
    for name in libraries:
        try:
            run = peers_cuda.PEERS[name](case, x, target, work)
            result = run()
        except Absent as reason:
            reasons.append(f"{name}: {reason}")
            continue
        value, got = result if work == VALUE_AND_GRAD else (result, None)
        error = abs(float(value) - expected) / expected
        if got is not None:
            import torch

            got = torch.from_dlpack(got)
            error = max(error, float((got - gradient).abs().sum(dtype=torch.float64) / gradient.abs().sum()))
        if not error <= TOLERANCE[case.dtype]:
            pytest.fail(f"{name} disagrees on {case} ({WORKS[work]}): relative error {error:.2g}", pytrace=False)
        runs[name] = run
    times = {name: Timing(0.0) for name in runs}
    for _ in range(10 if quick else 50):
        for name, run in runs.items():
            run()
            times[name].seconds.append(peers_cuda.seconds(run))
    writes = work == VALUE_AND_GRAD
    moved = x.nbytes * (2 if writes else 1) + target.nbytes
    rows = [
        {
            "test": "cuda",
            "loss": case.loss,
            "shape": case.size,
            "dtype": case.dtype,
            "work": work,
            "library": name,
            "best": t.best,
            "median": t.median,
            "rounds": len(t.seconds),
            "gbs": round(moved / t.best / 1e9, 1),
            "ceiling": round(device_ceilings[writes] / 1e9, 1),
            "share": round(moved / t.best / device_ceilings[writes], 3),
        }
        | ({"ratio": round(t.best / times["nbloss"].best, 3)} if name != "nbloss" and "nbloss" in times else {})
        for name, t in times.items()
    ]
    report(f"{case} {WORKS[work]}: " + ", ".join(f"{r['library']} {r['best'] * 1e3:.3f} ms" for r in rows), rows)
    if "nbloss" in runs:
        return
    pytest.skip("; ".join(reasons))
