"""The backends that every numerical test runs on."""

import importlib
import os
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from nbloss import dispatch, losses, plans
from nbloss.cpu import launch, rowwise

# A few thousand cases in all; `--hypothesis-profile=long` tries a hundred times as many.
settings.register_profile("default", deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", deadline=None, max_examples=25_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
CUDA = SIMULATED or os.environ.get("NBLOSS_TEST_CUDA") == "1"
DEVICE = "cuda-simulator" if SIMULATED else "cuda"

POINTWISE = ["binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss"]

if SIMULATED:
    simulator = importlib.import_module("simulator")
    simulator.install()
    settings.register_profile("simulator", deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
    settings.load_profile("simulator")


def few(n, most=12):
    """So many rows or elements; where a device is simulated, no more than it can do in a second."""
    return min(n, most) if SIMULATED else n


def bits(results):
    """Every bit of some results."""
    return [np.asarray(r).tobytes() for r in results]


def share(cases, k, of=5):
    """All cases; where a device is simulated, every `of`-th from the k-th on, so that several tests share them."""
    return cases[k % of :: of] if SIMULATED else cases


def pytest_collection_modifyitems(config, items):
    """With CUDA, what is about the CPU alone is left out."""
    for item in items if CUDA else []:
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="about the CPU backend alone"))
        if SIMULATED:  # a simulated float32 is a NumPy scalar, and warns
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(autouse=True)
def no_plans():
    """Tests change what plans were made with."""
    plans._plans.clear()
    if "nbloss.cuda.plans" in sys.modules:
        sys.modules["nbloss.cuda.plans"]._plans.clear()


@pytest.fixture(autouse=True)
def units_of_rows(monkeypatch):
    """Several long rows to a unit of work, though tests have few of them."""
    monkeypatch.setattr(rowwise, "FEW", 8)


BACKENDS = [DEVICE] if CUDA else ["cpu-serial", "cpu-parallel"]


def on_backends(dtypes):
    """A test on every backend and with every dtype, but that float16 is left to one thread, bfloat16 to several.

    Their kernels differ from those of float32 in how a vector is loaded and stored, which is compiled in the same way
    for one thread and for several; each takes the compiler some seconds.
    """
    left_out = {("cpu-parallel", "float16"), ("cpu-serial", "bfloat16")}
    pairs = [(b, d) for d in dtypes for b in BACKENDS if (b, np.dtype(d).name) not in left_out]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=str, indirect=["backend"])


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Many small blocks, on one thread or on all."""
    if CUDA:
        return request.param
    if request.param == "cpu-parallel" and launch.max_threads() < 2:
        pytest.skip("one processor")
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(launch, "PARALLEL", 0 if request.param == "cpu-parallel" else 1 << 60)
    return request.param


@pytest.fixture(autouse=CUDA, scope="session")
def on_the_device():
    """Let "auto" take host arrays to the device, so that the tests of the CPU hold for CUDA too."""
    if not CUDA:
        return
    from nbloss.cuda import choices

    as_asked = dispatch.choose

    def choose(backend, stream, problem):
        return as_asked("cuda" if backend == "auto" else backend, stream, problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "choose", choose)
        if SIMULATED:  # blocks of a few threads, with two to a warp, and spans that rows do not fit in
            patch.setattr(choices, "WARP", 2)
            shape = choices.RowShape
            shapes = (shape(2, 2, 16, 1), shape(4, 1, 16, 1), shape(4, 1, 64, 0))
            staged = (shape(4, 1, 16, 1, 448), shape(4, 1, 16, 2, 448))
            for name in ("ROWS", "VALUES", "OTHERS"):
                patch.setattr(choices, name, (*shapes[:-1], *staged, shapes[-1]))
            for name, threads in (
                ("PLANE_THREADS", 4),
                ("POINT_THREADS", 4),
                ("POINT_BLOCKS", 2),
                ("SUM_THREADS", 4),
                ("SUM_EACH", 4),
                ("SUM_ROUNDS", 2),
                ("SUM_PARTS", 2),
            ):
                patch.setattr(choices, name, threads)
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(20261123)


TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 1e-13}


def close(actual, expected, dtype="float64", scale=1.0):
    """Compare with the oracle, to the precision of a dtype."""
    tolerance = TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance * scale)
