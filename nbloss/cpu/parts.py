"""Parts of kernels: functions that are inlined wherever they are called, and never stand alone.

Numba makes each jitted function executable by itself (optimised, as machine code, with wrappers for Python and C)
before it looks at the caller, where LLVM does most of that again. For the thirty parts of a kernel this took half
the time of its first call. A part stops at LLVM text, which its caller links, inlines and optimises; it cannot be
called from Python. It counts no references either, an eighth of that text: arrays that it gives back own nothing.
"""

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import InlineOverloads, IRLegalization, NativeLowering, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes, InlineInlinables

# Parts have no closures, array expressions, inlined overloads or illegal statements: a first call is a tenth shorter.
NOT_FOR_PARTS = (
    NativeLowering,
    NopythonRewrites,
    InlineOverloads,
    InlineClosureLikes,
    InlineInlinables,
    IRLegalization,
)


class _PartLibrary(JITCodeLibrary):
    def finalize(self):
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    _name = "part_lowering"

    def run_pass(self, state):
        state.library = library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        counting = state.targetctx
        state.targetctx = counting.subtarget(enable_nrt=False)
        super().run_pass(state)
        state.targetctx = counting
        key = library.__sizeof__  # what callers know the part by; Numba wants a builtin, and one of its own
        libraries = dict.fromkeys([library, *library._linking_libraries])
        state.targetctx.insert_user_function(key, state["cr"].fndesc, libraries)
        state["cr"] = state["cr"]._replace(cfunc=key)
        return True


class _PartCompiler(Compiler):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        flags = self.state.flags
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True

    def define_pipelines(self):
        (pipeline,) = super().define_pipelines()
        pipeline.add_pass_after(_PartLowering, NativeLowering)
        pipeline.passes = [p for p in pipeline.passes if p[0] not in NOT_FOR_PARTS]
        pipeline.finalize()
        return [pipeline]


inline = njit(error_model="numpy", forceinline=True, pipeline_class=_PartCompiler)
