"""How each shape of row kernel does on rows of so many classes: what nbloss/cuda/choices.py is set from.

``python -m bench.shapes`` compiles all candidates in several processes, which takes most of the time, and lets one
after the other have the device for itself.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from dataclasses import replace
from typing import Any, NamedTuple

from bench import machine, peers_cuda, store
from bench.cases import VALUE, VALUE_AND_GRAD, WORKS, Case

ROUNDS = 9
CASES = [
    *(Case("cross_entropy", (32768, 1 << k), dtype) for dtype in ("float32", "bfloat16") for k in (8, *range(10, 15))),
    *(Case("cross_entropy", (8192, n), dtype) for dtype in ("float32", "bfloat16") for n in (32000, 50257, 128256)),
    *(Case("cross_entropy", (4096, 262144), dtype) for dtype in ("float32", "bfloat16")),
    *(Case("cross_entropy", (8192, 32000), variant=variant) for variant in ("smoothing", "probabilities")),
    *(Case("cross_entropy", (8192, n), "float64") for n in (1000, 32000)),
]
CODES = {"float32": "f", "bfloat16": "h", "float64": "d"}


class Job(NamedTuple):
    """One shape on one work of one case."""

    case: Case
    work: str
    shape: Any


def jobs() -> list[Job]:
    """All that is worth measuring: shapes that hold the row, and give each of their threads some of it."""
    from nbloss.cuda import choices

    def serves(case: Case, work: str, shape: Any) -> bool:
        code, dense = CODES[case.dtype], bool(case.variant)
        classes = case.shape[1]
        spread = shape.threads * max(shape.parts, 1) * (16 if shape.parts > 1 else 4)
        once = work == VALUE and shape.parts > 1  # a value alone needs no cluster
        return (
            not once
            and shape.reach(code, dense) >= classes > spread
            and bool(shape.serves(code, dense, (9, 0)))
            and (shape.parts > 0 or classes >= 4096)
        )

    return [
        Job(case, work, shape)
        for case in CASES
        for work in (VALUE, VALUE_AND_GRAD)
        for shape in choices.CANDIDATES
        if serves(case, work, shape)
    ]


_turn: Any = None  # of a process, to have the device for itself


def measured(job: Job) -> store.Row:
    """The row of a job: its kernels are compiled beside others, and timed while this process has its turn."""
    from nbloss.cuda import choices

    case, work, shape = job
    choices.forced = shape
    few = replace(case, shape=(8, case.shape[1]))
    x, target = peers_cuda.inputs_on_device(few)
    result = peers_cuda.PEERS["nbloss"](few, x, target, work).run()
    error = peers_cuda.error_of(few, work, result, 1.0, peers_cuda.reference(few, x, target, work))
    with _turn:
        x, target = peers_cuda.inputs_on_device(case)
        contestant = peers_cuda.PEERS["nbloss"](case, x, target, work)
        best = min(peers_cuda.seconds(contestant)[0] for _ in range(ROUNDS))
        moved = x.nbytes * (2 if case.writes(work) else 1) + target.nbytes
        del x, target, contestant, result
        peers_cuda.free()
    row = {"test": "shapes", "loss": case.loss, "shape": case.size, "dtype": case.dtype, "work": work}
    row |= {"variant": case.variant} if case.variant else {}
    return row | {
        "library": str(tuple(shape)),
        "best": best,
        "gbs": round(moved / best / 1e9, 1),
        "error": float(f"{error:.1e}"),
    }


def attempted(job: Job) -> store.Row | str:
    """The row of a job, or a line that says what went wrong: one shape costs the others nothing."""
    try:
        return measured(job)
    except Exception as error:
        return f"{job.case} {WORKS[job.work]} {tuple(job.shape)}: {type(error).__name__}: {error}".splitlines()[0]


def _begin(turn: Any) -> None:
    global _turn
    _turn = turn


def ranking(rows: list[store.Row]) -> str:
    """A table a case: shapes from the fastest on, with a star at the one that is chosen."""
    from nbloss.cuda import choices
    from nbloss.problem import GRADIENT, LOSS_ONLY

    choices.forced = None
    lines = []
    for case, (work, form) in itertools.product(CASES, {VALUE: LOSS_ONLY, VALUE_AND_GRAD: GRADIENT}.items()):
        chosen = tuple(choices.row_shape(case.shape[1], CODES[case.dtype], form, bool(case.variant), (9, 0)))
        lines.append(f"{case} {WORKS[work]}")
        this = case.size, case.dtype, case.variant, work
        own = [row for row in rows if (row["shape"], row["dtype"], row.get("variant", ""), row["work"]) == this]
        for row in sorted(own, key=lambda row: float(row["best"])):
            star = "*" if row["library"] == str(chosen) else " "
            figures = f"{row['best'] * 1e3:.4f} ms {row['gbs']:.0f} GB/s, off by {row['error']:.0e}"
            lines.append(f"{star} {row['library']:<28} {figures}")
    return "\n".join(lines)


def main() -> None:
    processes = max((os.cpu_count() or 2) - 2, 1)
    run = {"date": time.strftime("%Y-%m-%d"), "command": "python -m bench.shapes", "quick": False}
    run["versions"] = machine.versions("cuda")
    results = store.Store(machine.describe("cuda"), run, print)
    todo = jobs()
    start = time.perf_counter()
    # Not forked: a process that has CUDA under way cannot be.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin, (context.Lock(),)) as pool:
        for done, row in enumerate(pool.imap_unordered(attempted, todo), 1):
            if isinstance(row, str):
                print(f"[{done}/{len(todo)}] {row}", flush=True)
                continue
            results.add([row])
            print(f"[{done}/{len(todo)}] {time.perf_counter() - start:.0f} s", end="\r", flush=True)
    print(ranking(results.new_rows()))


if __name__ == "__main__":
    main()
