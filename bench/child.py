"""What can only be measured in a process of its own: ``python -m bench.child WHAT LIBRARY`` prints JSON.

first-call   seconds from the import of the library to the end of the first call, what else it imports included
peak-memory  bytes by which one call raises the process's memory, after a small call has brought up the library
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from bench import peers
from bench.cases import VALUE_AND_GRAD, Case, inputs_of

FIRST = Case("cross_entropy", (256, 100))
MEMORY = Case("cross_entropy", (16384, 1000))
IMPORTS = {"nbloss": "nbloss", "numpy": "numpy", "torch": "torch", "jax": "jax, optax", "sklearn": "sklearn._loss"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def first_call(library: str) -> float:
    data = inputs_of(FIRST)
    for module in IMPORTS[library.partition(".")[0]].split(", "):
        importlib.import_module(module)
    start = time.perf_counter()
    peers.set_up(library, FIRST, data, VALUE_AND_GRAD).run()
    return time.perf_counter() - start


def peak_memory(library: str) -> dict[str, float]:
    small = Case(
        MEMORY.loss, (1024, *MEMORY.shape[1:])
    )  # large enough for several threads, as the one that is measured
    warm = peers.set_up(library, small, inputs_of(small), VALUE_AND_GRAD).run
    warm()
    data = inputs_of(MEMORY)
    contestant = peers.set_up(library, MEMORY, data, VALUE_AND_GRAD)
    if library == "jax":  # which compiles for each shape
        contestant.run()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    result = contestant.run()
    peak = _status("VmHWM")
    del result
    return {"extra": peak - before, "input": data.x.nbytes}


if __name__ == "__main__":
    what, library = sys.argv[1:]
    print(json.dumps({"first-call": first_call, "peak-memory": peak_memory}[what](library)))
