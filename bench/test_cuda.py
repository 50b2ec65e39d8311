"""Losses on a CUDA device beside their peers; ``--device cuda`` runs this and nothing else."""

from __future__ import annotations

import time

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
def test_beside_peers(case, work, quick, libraries, device_ceilings, report):
    if work not in case.works:
        pytest.skip("has no gradient of its own")
    x, target = peers_cuda.inputs_on_device(case)
    expected, array = peers_cuda.reference(case, x, target)
    runs, reasons = {}, []
    for name in libraries:
        try:
            run = peers_cuda.PEERS[name](case, x, target, work)
            result = run()
        except Absent as reason:
            reasons.append(f"{name}: {reason}")
            continue
        value, got = result if work == VALUE_AND_GRAD else (None, result) if case.writes(work) else (result, None)
        error = 0.0 if value is None else abs(float(value) - expected) / expected
        if got is not None:
            import torch

            got = torch.from_dlpack(got)
            size = array.abs().sum(dtype=torch.float64)
            error = max(error, float((got - array).abs().sum(dtype=torch.float64) / size))
        if not error <= TOLERANCE[case.dtype]:
            pytest.fail(f"{name} disagrees on {case} ({WORKS[work]}): relative error {error:.2g}", pytrace=False)
        runs[name] = run
    times = {name: Timing(0.0) for name in runs}
    for _ in range(10 if quick else 50):
        for name, run in runs.items():
            run()
            times[name].seconds.append(peers_cuda.seconds(run))
    writes = case.writes(work)
    moved = x.nbytes * (2 if writes else 1) + (0 if target is None else target.nbytes)
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


SHAPED = [
    (peers_cuda.Case("cross_entropy", shape, dtype), work)
    for dtype in ("float32", "bfloat16")
    for work, shapes in (
        (VALUE, ((32768, 256), (32768, 1024), (32768, 4096), (32768, 8192), (32768, 65536))),
        (VALUE_AND_GRAD, ((32768, 1024), (32768, 8192), (8192, 32000), (8192, 50257), (8192, 128256))),
    )
    for shape in shapes
]


@pytest.mark.parametrize(("case", "work"), SHAPED, ids=lambda v: str(v))
def test_shapes(case, work, quick, device_ceilings, report, monkeypatch):
    """How each shape of kernel does on rows of so many classes: what nbloss/cuda/choices.py is set from."""
    from nbloss.cuda import choices

    x, target = peers_cuda.inputs_on_device(case)
    moved = x.nbytes * (1 if work == VALUE else 2) + target.nbytes
    code = "h" if case.dtype == "bfloat16" else "f"
    runs = {}
    for shape in choices.CANDIDATES:
        # No more threads than the row gives work, and no more than four times over it.
        if not shape.reach(code, False) >= case.shape[1] > shape.threads * 4 * max(shape.parts, 1):
            continue
        monkeypatch.setattr(choices, "forced", shape)
        run = peers_cuda.PEERS["nbloss"](case, x, target, work)
        run()
        times = Timing(0.0)
        for _ in range(5 if quick else 20):
            times.seconds.append(peers_cuda.seconds(run))
        runs[shape] = times
    monkeypatch.setattr(choices, "forced", None)
    chosen = choices.row_shape(case.shape[1], code, False, (9, 0))
    ceiling = device_ceilings[work != VALUE]
    ranking = sorted(runs, key=lambda shape: runs[shape].best)
    lines = [
        f"{'*' if shape == chosen else ' '} {tuple(shape)} {runs[shape].best * 1e3:.3f} ms "
        f"{moved / runs[shape].best / ceiling:.0%}"
        for shape in ranking
    ]
    rows = [
        {"test": "shapes", "loss": case.loss, "shape": case.size, "dtype": case.dtype, "work": work}
        | {
            "library": str(tuple(shape)),
            "best": runs[shape].best,
            "share": round(moved / runs[shape].best / ceiling, 3),
        }
        for shape in ranking
    ]
    report(f"{case} {WORKS[work]}, * is the default:\n" + "\n".join(lines), rows)


@pytest.mark.parametrize("check", [True, False], ids=["check", "no check"])
def test_launch(check, report):
    """Microseconds of the host for a small call, until it returns, beside torch's."""
    import torch

    import nbloss

    x, target = peers_cuda.inputs_on_device(peers_cuda.Case("cross_entropy", (32, 10)))
    calls = {
        "nbloss": lambda: nbloss.cross_entropy(x, target, check=check),
        "torch": lambda: torch.nn.functional.cross_entropy(x, target),
    }
    best = {}
    for name, call in calls.items():
        times = []
        for _ in range(200):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        best[name] = min(times)
    label = "with a check, which waits for the device" if check else "without a check"
    rows = [
        {"test": "launch", "work": f"check={check}", "library": name, "best": seconds} for name, seconds in best.items()
    ]
    report(f"a call of 32 x 10 {label}: " + ", ".join(f"{n} {s * 1e6:.1f} us" for n, s in best.items()), rows)
