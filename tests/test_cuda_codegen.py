"""Every CUDA kernel, compiled for two generations of devices and held to what makes it fast. No GPU is needed."""

import importlib.util

import pytest
from conftest import SIMULATED

if SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
    pytest.skip("numba-cuda and its compilers are not installed", allow_module_level=True)

import codegen

REGISTERS = 65536  # of a multiprocessor: a block that needs more cannot start

# Most instructions for each value that a pointwise kernel may take on its straight path, in float32 and in 16 bits. The
# time that memory takes for loss and gradient would do for 115 and 57.
PATHS = {
    "binary_cross_entropy_with_logits": (65, 68),
    "binary_cross_entropy": (115, 122),
    "mse_loss": (17, 24),
    "l1_loss": (21, 28),
}


def chosen():
    """All kernels for sm_90; for sm_80 the largest of each kind, which come nearest to every limit."""
    for variant in codegen.variants():
        name, code, *_ = variant
        largest = "rows" not in name or "rows 512" in name
        for target in codegen.TARGETS:
            if target == (9, 0) or (largest and code == "f"):
                yield pytest.param(variant, target, id=f"{name}-{codegen.DTYPES[code]}-sm_{target[0]}{target[1]}")


@pytest.mark.parametrize(("variant", "target"), list(chosen()))
def test_kernel(variant, target):
    name, code, (factory, options), signature, threads, values = variant
    ptx, log = codegen.compiled(factory, options, signature, target)
    assert codegen.parameters(ptx) == codegen.flat(signature)  # as nbloss.cuda.driver.launch gives them
    found = codegen.figures(ptx, log)
    assert found["spills"] == 0
    assert found["stack"] == 0  # the values of a thread lie in registers
    assert found["registers"] * threads <= REGISTERS
    single_precision = code != "d" and not name.startswith(("sum", "scan", "convert"))
    assert not (single_precision and found["float64"])
    if name.startswith(("rows", "planes wide", "binary", "mse", "l1")):
        assert found["wide loads"] >= 1
        assert ("gradient" not in name and "log-softmax" not in name) or found["wide stores"] >= 1
    if name.partition(",")[0] in PATHS and code != "d":
        assert codegen.round_trip(ptx) / values <= PATHS[name.partition(",")[0]][code != "f"]
