"""How each shape of row kernel does on rows of so many classes: what nbloss/cuda/choices.py is set from.

``python -m bench.shapes`` compiles all candidates in several processes, which takes most of the time, and lets one
after the other time what it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine, peers_cuda, store
from bench.cases import VALUE, VALUE_AND_GRAD, WORKS, Case, useful_bytes
from nbloss.problem import CODES

ROUNDS = 12
PROCESSES = 8  # each keeps the device's memory for the largest gradient that it has made, 4 GB
CASES = [
    *(Case("cross_entropy", (32768, 1 << k), dtype) for dtype in ("float32", "bfloat16") for k in (8, *range(10, 15))),
    *(Case("cross_entropy", (8192, n), dtype) for dtype in ("float32", "bfloat16") for n in (32000, 50257, 128256)),
    *(Case("cross_entropy", (1 << 30 - k, 1 << k), dtype) for dtype in ("float32", "bfloat16") for k in (16, 18)),
    *(Case("cross_entropy", (8192, n), variant=v) for n in (32000, 128256) for v in ("smoothing", "probabilities")),
    *(Case("cross_entropy", (8192, n), "float64") for n in (1000, 32000)),
]


class Job(NamedTuple):
    """One shape on one work of one case."""

    case: Case
    work: str
    shape: Any


def _device() -> tuple[tuple[int, int], int]:
    """What shapes are chosen by: the device's compute capability, and the shared memory that a block may have."""
    from nbloss.cuda.device import memory

    return memory().capability(0), memory().shared_bytes(0)


def jobs() -> list[Job]:
    """All that is worth measuring: shapes that hold the row, and give each of their threads some of it."""
    from nbloss.cuda import choices

    capability, shared = _device()

    def is_worth(case: Case, work: str, shape: Any) -> bool:
        code, dense = CODES[case.dtype], bool(case.variant)
        classes = case.shape[1]
        spread = shape.threads * max(shape.parts, 1) * (16 if shape.parts > 1 else 4)
        return (
            not (work == VALUE and (shape.room or shape.parts > 1))  # it reads its row once, whoever holds it
            and shape.reach(code, dense, shared) >= classes > spread
            and bool(shape.serves(code, dense, capability))
            and (shape.parts > 0 or classes >= 4096)
        )

    return [
        Job(case, work, shape)
        for case in CASES
        for work in (VALUE, VALUE_AND_GRAD)
        for shape in choices.CANDIDATES
        if is_worth(case, work, shape)
    ]


def measured(job: Job, turn: Any) -> store.Row:
    """The row of a job: its kernels are compiled beside others, and timed in this process's turn."""
    from nbloss.cuda import choices

    case, work, shape = job
    choices.forced = shape
    few = replace(case, shape=(8, case.shape[1]))
    x, target = peers_cuda.inputs_on_device(few)
    result = peers_cuda.PEERS["nbloss"](few, x, target, work).run()
    error = peers_cuda.error_of(few, work, result, 1.0, peers_cuda.reference(few, x, target, work))
    del x, target, result
    with turn:
        try:
            x, target = peers_cuda.inputs_on_device(case)
            moved = useful_bytes(x, target, case.writes(work))
            contestant = peers_cuda.PEERS["nbloss"](case, x, target, work)
            rounds = [peers_cuda.seconds(contestant) for _ in range(ROUNDS)]
            del x, target, contestant
        finally:
            peers_cuda.free()
    in_time = [seconds for seconds, late in rounds if not late]  # the host was, or else it is part of the figure
    best = min(in_time or [seconds for seconds, _ in rounds])
    row = case.row("shapes", work, str(tuple(shape))) | ({} if in_time else {"late": True})
    return row | {
        "best": best,
        "gbs": round(moved / best / 1e9, 1),
        "error": float(f"{error:.1e}"),
    }


class Turn:
    """A lock between processes that a process which dies gives back."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w")  # noqa: SIM115  for as long as the process lives

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


def work_through(asked: Any, answers: Any, path: str) -> None:
    """Do jobs until one fails, for what a kernel did to this process's context would meet the next one."""
    turn = Turn(path)
    with contextlib.suppress(queue.Empty):
        while True:
            job = asked.get(timeout=1)
            try:
                answers.put(measured(job, turn))
            except Exception as error:
                line = f"{job.case} {WORKS[job.work]} {tuple(job.shape)}: {type(error).__name__}: {error}"
                answers.put(line.splitlines()[0])
                return


def ranking(rows: list[store.Row]) -> str:
    """A table a case: shapes from the fastest on, with a star at the one that is chosen."""
    from nbloss.cuda import choices
    from nbloss.problem import GRADIENT, LOSS_ONLY

    device = _device()
    lines = []
    for case, (work, form) in itertools.product(CASES, {VALUE: LOSS_ONLY, VALUE_AND_GRAD: GRADIENT}.items()):
        chosen = tuple(choices.row_shape(case.shape[1], CODES[case.dtype], form, bool(case.variant), *device))
        lines.append(f"{case} {WORKS[work]}")
        this = case.size, case.dtype, case.variant, work
        own = [row for row in rows if (row["shape"], row["dtype"], row.get("variant", ""), row["work"]) == this]
        for row in sorted(own, key=lambda row: float(row["best"])):
            star = "*" if row["library"] == str(chosen) else " "
            figures = f"{row['best'] * 1e3:.4f} ms {row['gbs']:.0f} GB/s, off by {row['error']:.0e}"
            lines.append(f"{star} {row['library']:<28} {figures}{' (host)' if 'late' in row else ''}")
    return "\n".join(lines)


def main() -> None:
    run = {"date": time.strftime("%Y-%m-%d"), "command": "python -m bench.shapes", "quick": False}
    run["versions"] = machine.versions("cuda")
    results = store.Store(machine.describe("cuda"), run, print)
    todo, done, start = jobs(), 0, time.perf_counter()
    # Not forked: a process that has CUDA under way cannot be.
    context = multiprocessing.get_context("spawn")
    asked, answers = context.Queue(), context.Queue()
    for job in todo:
        asked.put(job)
    workers: list[Any] = []
    most = min(PROCESSES, max((os.cpu_count() or 2) - 2, 1))
    with tempfile.NamedTemporaryFile() as turn:
        while done < len(todo):
            workers = [worker for worker in workers if worker.is_alive()]
            if not workers and asked.empty() and answers.empty():
                break  # some died without an answer
            while len(workers) < most and not asked.empty():
                workers.append(context.Process(target=work_through, args=(asked, answers, turn.name), daemon=True))
                workers[-1].start()
            with contextlib.suppress(queue.Empty):
                answer = answers.get(timeout=1)
                done += 1
                if isinstance(answer, str):
                    print(f"[{done}/{len(todo)}] {answer}", flush=True)
                else:
                    results.add([answer])
                    print(f"[{done}/{len(todo)}] {time.perf_counter() - start:.0f} s", end="\r", flush=True)
    print(ranking(results.new_rows()))
    if done < len(todo):
        sys.exit(f"{len(todo) - done} of {len(todo)} were not measured: a process died")


if __name__ == "__main__":
    main()
