"""The backends that every numerical test runs on."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from nbloss.cpu import launch

# A few thousand cases in all; `--hypothesis-profile=long` tries a hundred times as many.
settings.register_profile("default", deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", deadline=None, max_examples=25_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(params=["cpu-serial", "cpu-parallel"])
def backend(request, monkeypatch):
    """Many small blocks, on one thread or on all."""
    if request.param == "cpu-parallel" and launch.max_threads() < 2:
        pytest.skip("one processor")
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(launch, "PARALLEL", 0 if request.param == "cpu-parallel" else 1 << 60)
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20261123)


TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 1e-13}


def close(actual, expected, dtype="float64", scale=1.0):
    """Compare with the oracle, to the precision of a dtype."""
    tolerance = TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance * scale)
