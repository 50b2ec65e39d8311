"""Which machine and which versions figures come from."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

from bench import peers, peers_cuda

DISTRIBUTIONS = ("nbloss", "numpy", "numba", "llvmlite", "scipy", "torch", "jax", "optax", "scikit-learn", "numexpr")
DEVICE_DISTRIBUTIONS = (
    *("nbloss", "numpy", "numba", "numba-cuda", "cuda-core", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x"),
    *("liger-kernel", "quack-kernels", "nvidia-cutlass-dsl"),
)


def cpu_model() -> str:
    """The processor's name as its maker writes it, and its family where a virtual machine hides the rest."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
        name = told["model name"]
        if "cpu family" not in told or re.search(r"\d", name):
            return name
        return f"{name}, family {told['cpu family']}, model {told['model']}"
    except (OSError, KeyError):
        pass
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def vectors() -> str | None:
    """The widest vector instructions that kernels are compiled for, of an x86 processor."""
    from nbloss.cpu.arithmetic import processor_has

    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    return next((name for feature, name in known.items() if processor_has(feature)), None)


def describe(device: str) -> dict[str, object]:
    """What identifies the machine; its `slug` names the results file."""
    name = cpu_model()
    threads = peers.available_threads()
    slug = f"{name} {threads} threads"
    if device == "cuda":
        name = slug = peers_cuda.device_name()
    found = vectors() if device == "cpu" else None
    return {
        "slug": re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-"),
        "name": name,
        **({"vectors": found} if found else {}),
        "device": device,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(device: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS if device == "cpu" else DEVICE_DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
