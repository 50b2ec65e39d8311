"""Threads, what this machine offers, and compiling ahead."""

from __future__ import annotations

import io
import operator
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TextIO

import numpy as np
from numpy.typing import DTypeLike

from nbloss.cuda import device
from nbloss.processes import undivided


def set_num_threads(n: SupportsIndex) -> None:
    """Let large computations use `n` threads, from 1 to the number that this process may use.

    It holds for the whole process, and leaves Numba's own setting alone. Results do not depend on it.

    Raises
    ------
    ValueError
        For n below 1 or above the number of threads that Numba can start here.
    TypeError
        For n that is not an integer.

    Examples
    --------
    >>> import nbloss
    >>> nbloss.set_num_threads(1)
    >>> nbloss.get_num_threads()
    1
    """
    launch = _launch()
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {n!r}") from None
    if not 1 <= count <= launch.max_threads():
        raise ValueError(
            f"n must be between 1 and {launch.max_threads()}, the threads this process may use, got {count}"
        )
    launch.set_num_threads(count)


def get_num_threads() -> int:
    """The number of threads that large computations use; 1 in a forked child, to which no worker thread came along.

    Examples
    --------
    >>> import nbloss
    >>> nbloss.get_num_threads() >= 1
    True
    """
    threads: int = _launch().get_num_threads()
    return threads


def _launch() -> Any:
    with undivided():
        from nbloss.cpu import launch
    return launch


def warmup(
    dtypes: DTypeLike | Sequence[DTypeLike] = ("float32",),
    losses: str | Sequence[str] | None = None,
    *,
    file: TextIO | None = None,
) -> None:
    """Compile the kernels of some losses ahead of their first use, showing progress.

    What is compiled stays in the cache for later processes.

    Parameters
    ----------
    dtypes : one or more of {"float16", "bfloat16", "float32", "float64"}
        Dtypes of the input, by these names or as NumPy's dtypes or scalar types. Targets are taken to be int64, or of
        the same dtype.
    losses : one or more names such as "cross_entropy" or "softmax", optional
        None means all.
    file : text stream, optional
        Where progress goes; None means standard error.

    Raises
    ------
    ValueError
        For a dtype or a loss that nbloss does not have, and for none of them.

    Examples
    --------
    >>> import nbloss, io
    >>> nbloss.warmup(losses=["mse_loss"], file=io.StringIO())
    """
    with undivided():
        from nbloss.cpu import ahead
    names: list[Any] = [d if isinstance(d, str) or d is None else np.dtype(d).name for d in _several(dtypes)]
    steps = ahead.kernels_of(names, None if losses is None else _several(losses))
    stream = file or sys.stderr or io.StringIO()
    begin = time.perf_counter()
    for done, (label, compile_it) in enumerate(steps, 1):
        print(f"[{done}/{len(steps)}] {label}", end=" ", file=stream, flush=True)
        start = time.perf_counter()
        compile_it()
        print(f"{time.perf_counter() - start:.2f} s", file=stream, flush=True)
    print(f"{len(steps)} kernels ready in {time.perf_counter() - begin:.1f} s", file=stream, flush=True)


def _several(asked: Any) -> list[Any]:
    """One, or one after the other."""
    return [asked] if isinstance(asked, str) or not isinstance(asked, Iterable) else list(asked)


def show_config(file: TextIO | None = None) -> None:
    """Print versions, processor, threads, cache folder, and why each backend is or is not usable.

    Examples
    --------
    >>> import nbloss, io
    >>> nbloss.show_config(io.StringIO())
    """
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for name, value in _config():  # a folder's name may be of other characters than the stream's
        print(f"{name:<18}{value}".encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _config() -> list[tuple[str, str]]:
    import platform

    launch = _launch()
    import llvmlite.binding as llvm
    import numba

    import nbloss
    from nbloss.cpu import compile as compiler

    slow = "usable, as plain Python and very slow: NUMBA_DISABLE_JIT is set"
    features = llvm.get_host_cpu_features()
    vectors = [f for f in ("avx512f", "avx2", "fma", "sse2", "neon", "sve") if features.get(f)]
    versions = f"numpy {np.__version__}, numba {numba.__version__}, python {platform.python_version()}"
    return [
        ("nbloss", f"{nbloss.__version__} ({versions}, {platform.system()} {platform.machine()})"),
        ("processor", f"{llvm.get_host_cpu_name()}: {', '.join(vectors) or 'no vector extensions known'}"),
        ("threads", f"{get_num_threads()} of {launch.max_threads()}, {os.cpu_count()} processors"),
        ("threading layer", launch.layer() or "none: one thread computes"),
        ("kernel cache", compiler.cache_folder() or "off"),
        ("bfloat16", _version_of("ml_dtypes")),
        ("backend cpu", slow if numba.config.DISABLE_JIT else "usable"),
        ("backend cuda", device.description()),
    ]


def _version_of(package: str) -> str:
    from importlib import metadata  # a third of this package's import time, for one line

    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
