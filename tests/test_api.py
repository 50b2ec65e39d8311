"""The public surface: names, signatures, documentation, and what an import costs."""

import importlib.util
import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest

import nbloss

pytestmark = pytest.mark.cpu

CALLABLES = [getattr(nbloss, name) for name in nbloss.__all__ if not inspect.isclass(getattr(nbloss, name))]
LOSSES = [f for f in CALLABLES if hasattr(f, "grad")]


def test_all_is_the_truth():
    public = {n for n, v in vars(nbloss).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(nbloss.__all__)
    assert nbloss.__all__ == sorted(nbloss.__all__)


@pytest.mark.parametrize("function", CALLABLES, ids=lambda f: f.__name__)
def test_docstrings(function):
    doc = inspect.getdoc(function)
    first = doc.split("\n\n")[0]
    assert first.endswith(".")
    assert ">>>" in doc
    if "target" in inspect.signature(function).parameters or "axis" in inspect.signature(function).parameters:
        for section in ("Parameters", "Returns", "Raises", "Notes", "Examples"):
            assert f"\n{section}\n" in doc, section
    documented = (
        set(re.findall(r"\w+", doc.split("Parameters\n")[1].split("Returns\n")[0])) if "Parameters\n" in doc else set()
    )
    if documented:
        missing = set(inspect.signature(function).parameters) - documented
        assert not missing


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_entry_points(loss):
    assert inspect.isfunction(loss)
    parameters = list(inspect.signature(loss).parameters.values())
    assert [p.kind for p in parameters[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert [p.name for p in parameters[-3:]] == ["backend", "stream", "check"]
    for entry in (loss.value_and_grad, loss.grad):
        names = list(inspect.signature(entry).parameters)
        assert names == [p.name for p in parameters[:2]] + ["grad_output", "out"] + [p.name for p in parameters[2:]]
        returns = {"value_and_grad": "tuple[Any, Array]", "grad": "Array"}[entry.__name__]
        assert inspect.signature(entry).return_annotation == returns
        assert entry.__qualname__ == f"{loss.__name__}.{entry.__name__}"
        assert loss.__name__ in entry.__doc__
    assert inspect.signature(loss).return_annotation == loss.__annotations__["return"] == "Any"
    assert f"{loss.__name__}.value_and_grad" in loss.__doc__
    assert pickle.loads(pickle.dumps(loss)) is loss


def test_arguments_by_name():
    x, t = np.array([[1.0, 2.0]]), np.array([1])
    value, gradient = nbloss.cross_entropy.value_and_grad(logits=x, target=t, grad_output=2.0)
    assert value == nbloss.cross_entropy(target=t, logits=x)
    np.testing.assert_array_equal(gradient, nbloss.cross_entropy.grad(x, t, 2.0))
    np.testing.assert_array_equal(gradient, nbloss.cross_entropy.grad(x, target=t, grad_output=2.0))


def test_criteria_have_their_losses_options_and_docstrings():
    for criterion, loss in (
        (nbloss.CrossEntropyLoss, nbloss.cross_entropy),
        (nbloss.NLLLoss, nbloss.nll_loss),
        (nbloss.BCELoss, nbloss.binary_cross_entropy),
        (nbloss.BCEWithLogitsLoss, nbloss.binary_cross_entropy_with_logits),
        (nbloss.MSELoss, nbloss.mse_loss),
        (nbloss.L1Loss, nbloss.l1_loss),
    ):
        doc = inspect.getdoc(criterion)
        assert f"`{loss.__name__}`" in doc
        assert ">>>" in doc
        options = {n: p.default for n, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert {n: p.default for n, p in inspect.signature(criterion).parameters.items()} == options


def test_a_criterion_of_ones_own():
    """It may have fields that its loss knows nothing of."""

    @dataclass(frozen=True, kw_only=True)
    class Tempered(nbloss.CrossEntropyLoss):
        temperature: float = 2.0

        def __call__(self, x, target):
            return super().__call__(x / self.temperature, target)

    x, t = np.array([[1.0, 2.0]]), np.array([1])
    assert Tempered(reduction="sum")(x, t) == nbloss.cross_entropy(x / 2, t, reduction="sum")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def test_import_is_light(tmp_path, monkeypatch):
    """Under 30 ms after NumPy, with neither Numba nor SciPy, from bytecode as an installed package has it."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = """
import time, sys, warnings, numpy, numpy.typing
start = time.perf_counter(); import nbloss; took = time.perf_counter() - start
names = {"numba", "numba_cuda", "cuda", "llvmlite", "scipy", "ml_dtypes", "torch"}
heavy = names & {m.split(".")[0] for m in sys.modules}
print(round(took * 1e3, 1), sorted(heavy))
"""
    took, heavy = zip(*(run(code).split(" ", 1) for _ in range(10)))
    assert set(heavy) == {"[]"}
    assert min(map(float, took)) < 30


def test_what_is_missing_for_cuda(monkeypatch):
    """One line that says what to install, whichever part is absent."""
    from nbloss.cuda import device

    why_not = device.why_not.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert why_not() == f"numba-cuda is not installed: {device.INSTALL}"
    built_in, core = types.ModuleType("numba.cuda"), types.ModuleType("cuda.core")
    core.Device = None
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: True)
        patch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        patch.setitem(sys.modules, "cuda.core", core)
        patch.setattr("numba.cuda", built_in, raising=False)
        patch.setitem(sys.modules, "numba.cuda", built_in)
        assert "built-in CUDA target is deprecated" in why_not()
        built_in.implementation = "NVIDIA"
        assert why_not().startswith("no usable CUDA device or driver (")
        patch.delitem(sys.modules, "cuda.core")
        assert why_not().endswith(device.INSTALL)


def test_module_commands():
    info = subprocess.run([sys.executable, "-m", "nbloss", "info"], capture_output=True, text=True, check=True).stdout
    for line in ("processor", "threads", "threading layer", "kernel cache", "backend cpu", "backend cuda"):
        assert line in info
    warm = [sys.executable, "-m", "nbloss", "warmup", "--losses", "mse_loss"]
    progress = subprocess.run(warm, capture_output=True, text=True, check=True).stderr
    assert re.search(r"\[1/4\] mse_loss float32 \d", progress)
    wrong = subprocess.run([*warm[:-1], "hinge"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "unknown loss 'hinge'" in wrong.stderr
    nothing = subprocess.run([*warm[:-1], ","], capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert "no loss to warm up" in nothing.stderr
    several = subprocess.run([*warm[:-1], "mse_loss,l1_loss"], capture_output=True, text=True, check=True).stderr
    assert "6 kernels ready" in several  # and the sum of their weights
    version = subprocess.run([*warm[:3], "--version"], capture_output=True, text=True, check=True).stdout
    assert version == f"nbloss {nbloss.__version__}\n"
    without = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    refused = subprocess.run(warm[:3], capture_output=True, text=True, check=False, env=without)
    assert refused.returncode == 2
    assert "NUMBA_DISABLE_JIT" in refused.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes and signals")
def test_commands_that_are_cut_short(tmp_path):
    """One line or none, where nobody reads their output and after Ctrl-C."""
    program = [sys.executable, "-m", "nbloss", "info"]
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "-", *program], capture_output=True, check=True)
    assert closed.stderr == b""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "NUMBA_CACHE_DIR": str(tmp_path / "é")}
    info = subprocess.run(program, env=ascii_only, capture_output=True, check=True)
    assert b"\\xe9" in info.stdout
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as info:
        info.stdout.close()
        assert info.stderr.read() == b""
    assert info.returncode == 0
    code = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
sys.argv = ["nbloss", "warmup"]
runpy.run_module("nbloss", run_name="__main__")
"""
    uncached = {**os.environ, "NBLOSS_CACHE": "0"}
    with subprocess.Popen([sys.executable, "-u", "-c", code], stderr=subprocess.PIPE, text=True, env=uncached) as warm:
        try:
            assert warm.stderr.read(1) == "["
            warm.send_signal(signal.SIGINT)
            rest = warm.communicate(timeout=60)[1]
        finally:
            warm.kill()
    assert warm.returncode == 1
    assert rest.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in rest
