"""What a user pays around the kernels: small calls, import, the first call, memory, and disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench import peers
from bench.cases import SMALL
from bench.child import FIRST, IMPORTS, MEMORY
from bench.params import over

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {"nbloss": "nbloss", "torch": "torch", "jax": "optax", "sklearn": "scikit-learn"}
COMPILING = ("nbloss", "torch", "torch.compile", "jax", "sklearn")


@over(SMALL)
def test_small_call(case, work, contest):
    contest(case, work)


def _python(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}", pytrace=False)
    return done.stdout.strip().splitlines()[-1]


def _needs(library: str, libraries: list[str]) -> None:
    reason = "not among --libraries" if library not in libraries else peers.why_missing(library)
    if reason:
        pytest.skip(f"{library}: {reason}")


def _row(library: str, work: str, **figures: object) -> dict[str, object]:
    return {"test": "overhead", "work": work, "library": library, **figures}


@pytest.mark.parametrize("library", IMPORTS)
def test_import(library, libraries, quick, report):
    _needs(library, libraries)
    code = f"import time; s = time.perf_counter(); import {IMPORTS[library]}; print(time.perf_counter() - s)"
    seconds = min(float(_python(["-c", code])) for _ in range(2 if quick else 6))
    report(f"import {IMPORTS[library]}: {seconds:.3f} s", [_row(library, "import", best=round(seconds, 4))])


@pytest.mark.parametrize(
    "library", [pytest.param(n, marks=() if n == "nbloss" else pytest.mark.full) for n in COMPILING]
)
def test_first_call(library, libraries, quick, report, tmp_path):
    """With an empty cache, then in a second process with what the first one left there."""
    _needs(library, libraries)
    caches = {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    cold, cached = (json.loads(_python(["-m", "bench.child", "first-call", library], **caches)) for _ in range(2))
    rows = [
        _row(library, f"first call, {state}", shape=FIRST.size, best=float(f"{seconds:.3g}"))
        for state, seconds in (("cold", cold), ("cached", cached))
    ]
    report(f"first call of {library} at {FIRST.size}: {cold:.3g} s with an empty cache, {cached:.3g} s cached", rows)


@pytest.mark.full
@pytest.mark.parametrize("library", ["nbloss", "numpy", "torch", "torch.compile", "jax", "sklearn"])
def test_peak_memory(library, libraries, report):
    _needs(library, libraries)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    figures = json.loads(_python(["-m", "bench.child", "peak-memory", library]))
    extra, given = figures["extra"] / 1e6, figures["input"] / 1e6
    row = _row(library, "peak extra memory", shape=MEMORY.size, megabytes=round(extra, 1), input=round(given, 1))
    report(f"value + gradient of {library} at {MEMORY.size}: {extra:.0f} MB beside {given:.0f} MB of logits", [row])


@pytest.mark.parametrize("library", DISTRIBUTIONS)
def test_installed_size(library, libraries, report):
    """The package itself, and with all that it requires."""
    _needs(library, libraries)
    name = DISTRIBUTIONS[library]
    own = _size(name)
    everything = sum(_size(n) for n in _closure(name))
    row = _row(library, "installed size", megabytes=round(own / 1e6, 2), with_requirements=round(everything / 1e6, 1))
    report(f"installed size of {name}: {own / 1e6:.2f} MB, {everything / 1e6:.0f} MB with what it requires", [row])


def _closure(name: str) -> set[str]:
    """A distribution and all that it requires, extras left out."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop().lower().replace("_", "-")
        if current in found:
            continue
        try:
            requirements = importlib.metadata.requires(current) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(current)
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def _size(name: str) -> int:
    if name == "nbloss":  # may be an editable install, whose list of files holds none of them
        import nbloss

        files = Path(nbloss.__file__).parent.rglob("*")
        return sum(f.stat().st_size for f in files if f.is_file() and "__pycache__" not in f.parts)
    listed = importlib.metadata.files(name) or []
    paths = (Path(str(f.locate())) for f in listed)
    return sum(p.stat().st_size for p in paths if p.is_file())
