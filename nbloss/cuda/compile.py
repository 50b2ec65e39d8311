"""How Numba compiles kernels for a device."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba.cuda import compiler, lowering
from numba.cuda.core.compiler_machinery import PassManager, register_pass
from numba.cuda.cudadrv import nvvm

from nbloss.compilation import Brief, garbage_waits, remembering, run_alone, without_lifetimes

if not hasattr(np, "row_stack"):
    # NumPy 2.5 has no row_stack; numba-cuda 0.30 asks for it where it imports this, which it does with a first kernel.
    np.row_stack = np.vstack  # noqa: NPY201
    try:
        importlib.import_module("numba.cuda.np.arrayobj")
    finally:
        del np.row_stack  # noqa: NPY201

# Of Numba's passes, those that find nothing to do in a kernel: it has no closures, overloads to inline, array
# expressions, literals to unroll or propagate, with blocks or exceptions. Without them it has the same instructions.
NEEDLESS = {
    "IRProcessing",
    "WithLifting",
    "InlineClosureLikes",
    "RewriteDynamicRaises",
    "MakeFunctionToJitFunction",
    "InlineInlinables",
    "FindLiterallyCalls",
    "LiteralUnroll",
    "LiteralPropagationSubPipelinePass",
    "InlineOverloads",
    "NopythonRewrites",
    "AnnotateTypes",
}

_compiling = threading.Lock()


# Unlike on the CPU, variables are set to zero after their last use: otherwise arrays lie in memory, not in registers.
class _Lower(Brief, lowering.CUDALower):  # type: ignore[misc]
    pass


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(compiler.CUDANativeLowering):  # type: ignore[misc]
    _name = "brief_lowering"
    lowering_class = _Lower


class _Passes(PassManager):  # type: ignore[misc]
    _runPass = run_alone


# In place of Numba's, by name.
_OWN = {
    "ReconstructSSA": without_lifetimes(compiler.ReconstructSSA, register_pass),
    "PreLowerStripPhis": without_lifetimes(compiler.PreLowerStripPhis, register_pass),
    "CUDANativeLowering": _Lowering,
}


class _Compiler(compiler.CUDACompiler):  # type: ignore[misc]
    """Numba's compiler without the passes and the questions that it can do without."""

    def __init__(self, typing_context: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(remembering(typing_context), *args, **kwargs)

    def define_pipelines(self) -> list[Any]:
        (usual,) = super().define_pipelines()
        if self.state.flags.debuginfo:
            return [usual]
        short = _Passes(usual.pipeline_name)
        for implementation, description in usual.passes:
            name = implementation.__name__
            if name not in NEEDLESS:
                short.add_pass(_OWN.get(name, implementation), description)
        short.finalize()
        return [short]


@contextlib.contextmanager
def own_way() -> Iterator[None]:
    """Have kernels compiled that round each product before it is added to something, but where they call `fma`.

    NVVM fuses what it likes, and Numba has no option to tell it not to: a loss would have other bits where its gradient
    is computed too, and u w - w u need not be 0. They are compiled in half of the time besides. What other threads
    compile meanwhile is left alone.
    """
    with _compiling, garbage_waits():
        compile_ir, usual, thread = nvvm.compile_ir, compiler.CUDACompiler, threading.get_ident()

        def unfused_here(ir: Any, **options: Any) -> Any:
            return compile_ir(ir, **({"fma": 0, **options} if threading.get_ident() == thread else options))

        def shorter_here(*args: Any, **kwargs: Any) -> Any:
            return (_Compiler if threading.get_ident() == thread else usual)(*args, **kwargs)

        nvvm.compile_ir, compiler.CUDACompiler = unfused_here, shorter_here
        try:
            yield
        finally:
            nvvm.compile_ir, compiler.CUDACompiler = compile_ir, usual
