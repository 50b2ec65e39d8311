"""Every kind of CUDA kernel, compiled for two kinds of devices and held to what makes it fast. No GPU is needed."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SIMULATED

if SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
    pytest.skip("numba-cuda and its compilers are not installed", allow_module_level=True)

import codegen
import numpy as np
from numba import cuda

from nbloss.cuda import choices
from nbloss.cuda.compile import own_way
from nbloss.cuda.intrinsics import store
from nbloss.problem import GRADIENT, LOSS_ONLY

REGISTERS = 65536  # of a multiprocessor: a block that needs more cannot start

# Bytes that gradients may spill where more threads than there are registers for were faster on a device than fewer
# without spills (nbloss.cuda.choices): by threads of a multiprocessor, and whether rows are odd.
SPILLS = {(1024, False): 40, (1024, True): 130}

# Most instructions for each value that a pointwise kernel may take on its straight path, in float32 and in 16 bits. The
# time that memory takes for loss and gradient would do for 115 and 57. Products that are rounded before they are added
# cost 1 of the first, and 8 of the second in the library's logarithm.
PATHS = {
    "binary_cross_entropy_with_logits": (59, 61),
    "binary_cross_entropy": (87, 94),
    "mse_loss": (12, 19),
    "l1_loss": (16, 23),
}


def chosen():
    """Every kind of kernel for sm_90; of those for sm_80, the ones of float32 that come nearest to the limits."""
    for target in codegen.TARGETS:
        for variant in codegen.variants(target, alike=False):
            name, code, *_ = variant
            if target == (9, 0) or (code == "f" and ("rows" not in name or name.startswith(("rows 256", "rows 512")))):
                yield pytest.param(variant, target, id=f"{name}-{codegen.DTYPES[code]}-sm_{target[0]}{target[1]}")


@pytest.mark.parametrize(("variant", "target"), list(chosen()))
def test_kernel(variant, target):
    name, code, (factory, options), signature, bounds, values = variant
    ptx, log = codegen.compiled(factory, options, signature, target, bounds)
    assert codegen.parameters(ptx) == codegen.flat(signature)  # as nbloss.cuda.driver.Launch gives them
    assert "griddepcontrol.wait" not in ptx or not codegen.before_waiting(ptx)
    found = codegen.figures(ptx, log)
    threads, blocks = bounds
    staged = " staged" in name
    crowded = "value" not in name and not staged and (name.startswith(("rows 512", "rows 1024")) or " parts" in name)
    assert found["spills"] <= (SPILLS.get((threads * blocks, " odd" in name), 0) if crowded else 0)
    assert found["stack"] <= found["spills"]  # the values of a thread lie in registers
    assert not staged or 0 < found["shared"] <= choices.KEPT_SHARED
    assert found["registers"] * threads * max(blocks, 1) <= REGISTERS
    sums = name.startswith(("sum", "scan", "convert")) or (factory is codegen.pointwise.pointwise and "value" in name)
    single_precision = code != "d" and not sums
    assert not (single_precision and found["float64"])
    if name.startswith(("rows", "planes wide", "binary", "mse", "l1")):
        assert found["wide loads"] >= 1
        assert not staged or found["wide copies"] >= 1
        assert ("gradient" not in name and "log-softmax" not in name) or found["wide stores"] >= 1
    if name.startswith("rows") and code != "d" and not staged and " again" not in name and "dense" not in name:
        assert found["loads first"]
    if name.partition(",")[0] in PATHS and code != "d":
        assert codegen.round_trip(ptx, 2 + ("gradient" in name)) / values <= PATHS[name.partition(",")[0]][code != "f"]


def product_and_sum():
    def kernel(a, b, c, out):
        store(out, a * b + c, np.float32(0))

    return kernel


def test_products_are_rounded_before_they_are_added():
    ptx, _ = codegen.compiled(product_and_sum, (), [*[codegen.types.float32] * 3, codegen.I64], (9, 0))
    assert "mul.rn.f32" in ptx
    assert "add.rn.f32" in ptx
    assert "fma" not in ptx.partition(".entry")[2]


def test_what_other_threads_compile_is_left_alone():
    def kernel(a, x):
        x[0] = a * x[1] + x[2]

    signature = codegen.types.void(codegen.types.float32, codegen.types.float32[::1])
    with own_way(), ThreadPoolExecutor(1) as pool:
        ptx, _ = pool.submit(cuda.compile_ptx, kernel, signature, cc=(9, 0)).result()
    assert "fma.rn.f32" in ptx


# What an H100 can issue, 132 multiprocessors x 128 lanes x 1.7 GHz, over the values that 3.0 TB/s bring, an element
# read and for the gradient one written.
@pytest.mark.parametrize("room", [0, choices.THIRD], ids=["registers", "staged"])
@pytest.mark.parametrize(
    ("code", "form", "most"), [("f", LOSS_ONLY, 37), ("f", GRADIENT, 79), ("h", LOSS_ONLY, 18), ("h", GRADIENT, 39)]
)
def test_a_value_takes_few_instructions(code, form, most, room):
    assert codegen.instructions_a_value(code, form, room) <= most
