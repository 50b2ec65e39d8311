"""Losses on a CUDA device beside their peers; ``--device cuda`` runs this and nothing else."""

from __future__ import annotations

import re
import time

import pytest

from bench import peers_cuda
from bench.cases import VALUE, VALUE_AND_GRAD, WORKS, useful_bytes
from bench.params import over
from bench.peers import Absent
from bench.timing import Timing

# What peers warn of is not ours to fix.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]

# torch rounds the log-softmax of bfloat16.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-2, "bfloat16": 6e-2}


@pytest.fixture(scope="module")
def device_ceilings():
    return {writes: peers_cuda.ceiling(writes) for writes in (False, True)}


@pytest.fixture(autouse=True)
def _freed():
    yield
    peers_cuda.free()


def _one_line(error):
    colourless = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    return " ".join(f"{type(error).__name__}: {colourless}".split())[:160]


def _agreed(case, work, x, target, libraries):
    """{library: contestant} and {library: why not}."""
    contestants, left_out = {}, {}
    expected = peers_cuda.reference(case, x, target, work)
    for name in libraries:
        try:
            contestant = peers_cuda.PEERS[name](case, x, target, work)
            error = peers_cuda.error_of(case, work, contestant.run(), contestant.scale, expected)
        except Absent as reason:
            left_out[name] = str(reason)
            continue
        except Exception as problem:  # a peer's, such as a lack of memory, costs no other its figures
            if name == "nbloss":
                raise
            left_out[name] = _one_line(problem)
            continue
        if error <= TOLERANCE[case.dtype]:
            contestants[name] = contestant
            continue
        left_out[name] = f"disagrees: relative error {error:.2g}"
        if name == "nbloss":
            pytest.fail(f"{name} {left_out[name]}", pytrace=False)
    return contestants, left_out


@over([*peers_cuda.CASES, *peers_cuda.OTHERS], (VALUE, VALUE_AND_GRAD), peers_cuda.MAIN)
def test_beside_peers(case, work, quick, libraries, device_ceilings, report):
    if case.dtype == "float16" and work == VALUE_AND_GRAD:
        pytest.skip("the gradient of a mean over thousands of rows is below what float16 holds")
    x, target = peers_cuda.inputs_on_device(case)
    contestants, left_out = _agreed(case, work, x, target, libraries)
    times, late = {name: Timing(0.0) for name in contestants}, dict.fromkeys(contestants, 0)
    for _ in range(5 if quick else 15):
        for name, contestant in contestants.items():
            seconds, waited = peers_cuda.seconds(contestant)
            times[name].seconds.append(seconds)
            late[name] += waited
    writes = case.writes(work)
    moved = useful_bytes(x, target, writes)
    rows = [
        case.row("cuda", work, name)
        | {
            "best": t.best,
            "median": t.median,
            "rounds": len(t.seconds),
            "gbs": round(moved / t.best / 1e9, 1),
            "ceiling": round(device_ceilings[writes] / 1e9, 1),
            "share": round(moved / t.best / device_ceilings[writes], 3),
        }
        | ({"late": True} if 2 * late[name] > len(t.seconds) else {})
        | ({"ratio": round(t.best / times["nbloss"].best, 3)} if name != "nbloss" and "nbloss" in times else {})
        for name, t in times.items()
    ]
    figures = [f"{r['library']} {r['best'] * 1e3:.3f} ms{' (host)' if 'late' in r else ''}" for r in rows]
    reasons = [f"no {name} ({reason})" for name, reason in left_out.items()]
    report(f"{case} {WORKS[work]}: {', '.join(figures + reasons)}", rows)
    if "nbloss" not in contestants:
        pytest.skip(left_out["nbloss"])


@pytest.mark.parametrize("work", [VALUE, VALUE_AND_GRAD])
@pytest.mark.parametrize("check", [True, False], ids=["check", "no check"])
def test_launch(check, work, report):
    """Microseconds of the host for a small call, until it returns, beside torch's."""
    import torch

    import nbloss

    case = peers_cuda.Case("cross_entropy", (32, 10))
    x, target = peers_cuda.inputs_on_device(case)
    function = nbloss.cross_entropy if work == VALUE else nbloss.cross_entropy.value_and_grad
    calls = {
        "nbloss": lambda: function(x, target, check=check),
        "torch": peers_cuda.PEERS["torch"](case, x, target, work).run,
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
        {"test": "launch", "work": f"{WORKS[work]}, {label}", "library": name, "best": seconds}
        for name, seconds in best.items()
    ]
    figures = ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in best.items())
    report(f"{WORKS[work]} of {case.size} {label}: {figures}", rows)
