"""Compilation of kernels, and a disk cache for them that cannot hurt.

A kernel is compiled when it is first needed, for one signature. Its machine code is kept in a file of its own,
named by a hash of everything that it depends on: all sources of this package's kernels, signature, options,
Python, Numba, LLVM and the processor. Numba's own cache knows neither the callees nor the options, shares one index
file among processes, and raises where a folder is missing or a file is damaged; this one treats any trouble as a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import njit
from numba.core import config, types
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from nbloss import processes
from nbloss.compilation import garbage_waits
from nbloss.cpu.assembly import few_imports, kernel_compiler

_IN_EVERY_PROCESS = "nbloss compiles its kernels in every process"
_ADVICE = "let NUMBA_CACHE_DIR name a folder of your own"


def array_type(dtype: str, ndim: int, writable: bool = False) -> types.Array:
    """Numba's type of an argument: strides are left open, so that one compilation serves every layout."""
    return types.Array(numba.from_dtype(np.dtype(dtype)), ndim, "A", readonly=not writable)


def like_of(stored: str) -> Any:
    """A scalar of the type that a kernel computes in; compiled ones know it, and take a float 60 ns sooner."""
    return np.dtype(compute_type(stored).name).type(0) if config.DISABLE_JIT else 0.0


def compute_type(stored: str) -> types.Float:
    """What is computed with: float64 for float64, else float32 (half precision lies in 16-bit integers)."""
    return types.float64 if stored == "d" else types.float32


class Kernel:
    """A driver over blocks, compiled on demand for element types, serial or parallel.

    `driver` is written with ``prange``, which is ``range`` where a kernel is compiled serially; `signature` maps
    the element types of a call, as NumPy's one-letter codes, to the driver's argument types; `few_passes` tells
    whether LLVM's short pipeline (see ``assembly``) makes its code as fast as Numba's does.
    """

    def __init__(
        self,
        name: str,
        driver: Callable[..., Any],
        signature: Callable[..., tuple[types.Type, ...]],
        few_passes: bool = True,
    ) -> None:
        self.name = name
        self._few_passes = few_passes
        self._driver = driver
        self._signature = signature
        self._variants: dict[tuple[bool, tuple[str, ...]], Callable[..., Any]] = {}

    def variant(self, parallel: bool, *dtypes: str) -> Callable[..., Any]:
        """The compiled driver for these element types."""
        try:
            return self._variants[parallel, dtypes]
        except KeyError:
            pass
        with processes.lock:
            if (parallel, dtypes) not in self._variants:
                if config.DISABLE_JIT:
                    compiled = self._driver
                else:
                    # Past the dispatcher, which would look at the type of each argument: they are right by design.
                    (overload,) = self.dispatcher(parallel, *dtypes).overloads.values()
                    compiled = overload.entry_point
                self._variants[parallel, dtypes] = compiled
        return self._variants[parallel, dtypes]

    def dispatcher(self, parallel: bool, *dtypes: str) -> Any:
        """Numba's dispatcher of one variant, from the cache or compiled anew."""
        argument_types = self._signature(*dtypes)
        options = {"nogil": True, "error_model": "numpy", "parallel": parallel}
        dispatcher = njit(**options, pipeline_class=kernel_compiler(parallel, self._few_passes))(self._driver)
        cached = cache_folder() is not None
        dispatcher._cache = _DiskCache(f"{self.name} {options} {argument_types}") if cached else NullCache()
        with processes.undivided(), garbage_waits(), few_imports():
            dispatcher.compile(tuple(argument_types))
        dispatcher.disable_compile()
        return dispatcher


# --- the disk cache -----------------------------------------------------------------------------------------


class _DiskCache(NullCache):  # type: ignore[misc]
    """One file for one compiled kernel: a digest of its key and content, then the content."""

    def __init__(self, key: str) -> None:
        self._key = key

    def _file(self, target_context: Any) -> tuple[bytes, Path]:
        machine = target_context.codegen().magic_tuple()
        key = f"{self._key} {machine} {_versions()} {_settings()} {_sources()}".encode()
        return key, Path(cache_folder() or "") / f"{hashlib.sha256(key).hexdigest()[:32]}.kernel"

    def load_overload(self, sig: object, target_context: Any) -> Any:
        # Machine code calls nothing else of Numba's. What a compilation looks up in took half of a first call.
        rtsys.initialize(target_context)
        try:
            key, path = self._file(target_context)
            content = path.read_bytes()
            digest, payload = content[:32], content[32:]
            if digest != hashlib.sha256(key + payload).digest():
                return None
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # absent or damaged: it is compiled anew, and overwritten
            return None

    def save_overload(self, sig: object, compiled: Any) -> None:
        try:
            key, path = self._file(compiled.target_context)
            payload = dumps(compiled._reduce())
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(key + payload).digest() + payload)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:  # without the name of a file, by which each warning would be another one
            reason = error.strerror or type(error).__name__
            warn_once(
                f"nbloss does not keep the kernels that it compiles: {cache_folder()} cannot be written ({reason})"
            )
        except Exception:  # it cannot be kept, and is compiled anew
            return


@cache
def warn_once(message: str) -> None:
    with contextlib.suppress(Warning):  # where warnings are errors, a call must work all the same
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@cache
def _versions() -> tuple[str, ...]:
    return sys.version, numba.__version__, llvmlite.__version__


def _settings() -> list[object]:
    """What users may tell Numba of how to compile."""
    names = ("OPT", "DEBUGINFO_DEFAULT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE")
    return [getattr(config, name, None) for name in names]


@cache
def _sources() -> str | None:
    """A hash of every file that a kernel is made of: the CPU backend and what stands above it.

    They may lie in a zip archive, or compiled beside no source; None where they cannot be read, as in some frozen
    programs.
    """
    try:
        files = [file for package in ("nbloss", "nbloss.cpu") for file in resources.files(package).iterdir()]
        contents = sorted((file.name, file.read_bytes()) for file in files if file.name.endswith((".py", ".pyc")))
    except Exception:  # whatever an importer raises
        return None
    digest = hashlib.sha256()
    for _, content in contents:
        digest.update(content)
    return digest.hexdigest() if contents else None


@cache
def cache_folder() -> str | None:
    """Where compiled kernels are kept; None where others than this user and root could write, or nobody can.

    ``NUMBA_CACHE_DIR`` is honoured, ``NBLOSS_CACHE=0`` turns the cache off.
    """
    if os.environ.get("NBLOSS_CACHE") == "0":
        return None
    if _sources() is None:
        warn_once(f"{_IN_EVERY_PROCESS}: its own files cannot be read, by which it would know when they change")
        return None
    try:
        # Absolute: it stays where it was looked at, whatever folder the process goes to.
        folder = (Path(config.CACHE_DIR) if config.CACHE_DIR else _user_cache()).absolute() / "nbloss"
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
        if os.name == "posix":
            status = folder.stat()
            if status.st_uid not in (0, os.getuid()):
                warn_once(f"nbloss does not cache kernels in {folder}: it belongs to another user; {_ADVICE}")
                return None
            if status.st_mode & 0o022:
                warn_once(f"nbloss does not cache kernels in {folder}: others can write to it; {_ADVICE}")
                return None
        return str(folder)
    except (OSError, RuntimeError) as error:
        warn_once(f"{_IN_EVERY_PROCESS}: no cache folder ({error}); {_ADVICE}")
        return None


def _user_cache() -> Path:
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home())
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"
