"""How Numba compiles parts of kernels: what it does beyond need is left out, for the sake of a first call.

Parts are functions that are inlined wherever they are called, and never stand alone. Numba makes each jitted function
executable by itself (optimised, as machine code, with wrappers for Python and C) before it looks at the caller, where
LLVM does most of that again. For the thirty parts of a kernel this took half the time of its first call. A part stops
at LLVM text, which its caller links, inlines and optimises; it cannot be called from Python.

Its text is short, for most of the time that is left is Python's, which writes it: a part counts no references (arrays
that it gives back own nothing), is called with arrays and tuples as they are, does not raise, and tells a debugger
nothing: see ``lowering``. With all this, a kernel had 1.7 times as much text, and a first call took 1.15 times as
long.
"""

from itertools import count

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import (
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    GenericRewrites,
    ReconstructSSA,
    RewriteSemanticConstants,
    TranslateByteCode,
)

from nbloss.compilation import remembering, run_alone, without_lifetimes
from nbloss.cpu.lowering import PartLower, call_of, part_context

_numbers = count(1)


class PartLibrary(JITCodeLibrary):
    _has_module = False

    def add_llvm_module(self, module):
        """Keep the text of a part as it is; what Numba makes of a parallel loop comes in two.

        Numba links it into an empty module, and runs passes for what it only declares too.
        """
        module.data_layout = self._codegen._data_layout
        passes, builder = self._codegen._function_pass_manager()
        for function in module.functions:
            if not function.is_declaration:
                passes.run(function, builder)
        if self._has_module:
            self._final_module.link_in(module)
        else:
            self._final_module, self._has_module = module, True

    def finalize(self):
        self._finalized = True
        self.number = next(_numbers)  # parts are made after those that they call


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    _name = "part_lowering"
    lowering_class = PartLower

    def run_pass(self, state):
        state.library = library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        usual = state.targetctx
        state.targetctx = part_context()
        super().run_pass(state)
        state.targetctx = usual
        key = library.__sizeof__  # what callers know the part by; Numba wants a builtin, and one of its own
        libraries = dict.fromkeys([library, *library._linking_libraries])
        fndesc = state["cr"].fndesc
        usual.insert_func_defn([(call_of(fndesc, libraries), key, fndesc.argtypes)])
        state["cr"] = state["cr"]._replace(cfunc=key)
        return True


class OwnCompiler(Compiler):
    """Numba's compiler with the context of `remembering`."""

    def __init__(self, typing_context, *args, **kwargs):
        super().__init__(remembering(typing_context), *args, **kwargs)


class _PartPasses(PassManager):
    _runPass = run_alone


class _PartCompiler(OwnCompiler):
    # Half of Numba's: a part has no closures, array expressions, inlined overloads, literals to unroll, with blocks or
    # illegal statements (a first call is an eighth shorter).
    passes = (
        TranslateByteCode,
        FixupArgs,
        RewriteSemanticConstants,
        DeadBranchPrune,
        GenericRewrites,
        without_lifetimes(ReconstructSSA, register_pass),
        NopythonTypeInference,
        without_lifetimes(PreLowerStripPhis, register_pass),
        _PartLowering,
        NoPythonBackend,
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        flags = self.state.flags
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True

    def define_pipelines(self):
        pipeline = _PartPasses("part")
        for own in self.passes:
            pipeline.add_pass(own, own._name)
        pipeline.finalize()
        return [pipeline]


inline = njit(error_model="numpy", forceinline=True, pipeline_class=_PartCompiler)
