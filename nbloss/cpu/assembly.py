"""How Numba compiles a kernel of its parts (see ``parts``).

What Numba makes of a parallel loop, a function and two wrappers around it, are parts here too: each of them used to be
optimised and made machine code, with all that it calls (a first call of two threads took 1.5 times as long).
"""

import contextlib
import sys
from functools import cache
from importlib import import_module

import llvmlite.binding as llvm
from numba.core import config
from numba.core.callconv import CPUCallConv
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.cpu import CPUContext
from numba.core.lowering import Lower
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.typed_passes import NativeLowering, NativeParforLowering
from numba.parfors.parfor_lowering import ParforLower

from nbloss.cpu.arithmetic import VECTOR_BYTES
from nbloss.cpu.lowering import Undebugged
from nbloss.cpu.parts import OwnCompiler, PartLibrary

# Modules of Numba that implement what kernels are made of.
IMPLEMENTATIONS = (
    "cpython.builtins",
    "cpython.numbers",
    "cpython.rangeobj",
    "cpython.slicing",
    "cpython.tupleobj",
    "core.optional",
    "misc.literal",
    "np.arrayobj",
)


@contextlib.contextmanager
def few_imports():
    """Have Numba import no other implementations than these for a compilation, where nothing has been compiled yet.

    All of them take a tenth of a first call, most of that for scipy.linalg, which is asked for BLAS. Compilations for
    others wait for the end of this, and import the rest themselves. Where they came first, Numba registers intrinsics
    among the rest, so that kernels need it too.
    """
    if "numba.np.arraymath" in sys.modules:
        yield
        return
    context = cpu_target.target_context

    def load():
        rtsys.initialize(context)
        for name in IMPLEMENTATIONS:
            import_module(f"numba.{name}")

    with global_compiler_lock:
        context.load_additional_registries = load
        try:
            yield
        finally:
            del context.load_additional_registries


class _KernelLibrary(JITCodeLibrary):
    few_passes = True

    def add_linking_library(self, library):
        super().add_linking_library(library)
        if isinstance(library, PartLibrary):  # which has linked nothing itself
            for needed in library._linking_libraries:
                self.add_linking_library(needed)

    def finalize(self):
        # Callers first: LLVM links a function once, and drops it where nothing that is linked calls it yet.
        self._linking_libraries.sort(key=lambda library: getattr(library, "number", 0), reverse=True)
        super().finalize()

    def _optimize_final_module(self):
        """LLVM's passes once, without unrolling: a first call of rows is a tenth shorter.

        Numba runs them twice, to find pairs of reference counts, of which a kernel has a handful.
        """
        if not self.few_passes:
            super()._optimize_final_module()
            return
        options = llvm.create_pipeline_tuning_options(speed_level=int(config.OPT))
        options.loop_unrolling = False
        builder = llvm.create_pass_builder(self._codegen._tm, options)
        builder.getModulePassManager().run(self._final_module, builder)


class _KernelCodegen:
    """Numba's code generator, but for the functions that it makes of a parallel loop: those are parts.

    It knows them by the word in their names; under another one they would be compiled as they used to be.
    """

    def __init__(self, codegen):
        self._codegen = codegen

    def __getattr__(self, name):
        return getattr(self._codegen, name)

    def create_library(self, name, **kwargs):
        kind = PartLibrary if "gufunc" in name.lower() else JITCodeLibrary
        return kind(self._codegen, name, **kwargs)


class _KernelCalls(CPUCallConv):
    def decorate_function(self, fn, args, fe_argtypes, noalias=False):
        """Let a function keep vectors at multiples of their size on the stack, and `out` be the input itself.

        Of vectors for which there is no register, every second one, with AVX-512 each, may else lie across two cache
        lines, unless something else needs the alignment (gradients of binary_cross_entropy took 1.1 times as long with
        AVX2). And Numba tells LLVM that arguments share no memory where it sees no two arrays in a parallel loop that
        could, and of addresses it sees none: what was read of the input came behind what was written (log_softmax in
        place, of rows done in groups).
        """
        super().decorate_function(fn, args, fe_argtypes)
        fn.attributes.alignstack = VECTOR_BYTES
        # Without another attribute, llvmlite leaves the alignment out of its text; unwind tables there are in any case.
        fn.attributes.add("uwtable")


class _KernelContext(CPUContext):
    call_conv = property(_KernelCalls)

    def get_executable(self, library, fndesc, env):
        # Nobody calls a part; see ``parts`` for what stands for it.
        return library.__sizeof__ if isinstance(library, PartLibrary) else super().get_executable(library, fndesc, env)


@cache
def kernel_compiler(parallel, few_passes):
    """Numba's compiler for a kernel, serial or parallel; few_passes: see `_KernelLibrary`."""
    usual_lowering = NativeParforLowering if parallel else NativeLowering

    class KernelLower(Undebugged, ParforLower if parallel else Lower):
        pass

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(usual_lowering):
        _name = "kernel_lowering"
        lowering_class = KernelLower

        def run_pass(self, state):
            usual = state.targetctx
            state.library = _KernelLibrary(usual.codegen(), state.func_id.func_qualname)
            state.library.few_passes = few_passes
            state.library.enable_object_caching()
            codegen = _KernelCodegen(usual.codegen())
            state.targetctx = usual.subtarget(__class__=_KernelContext, _internal_codegen=codegen)
            done = super().run_pass(state)
            state.targetctx = usual
            return done

    class KernelCompiler(OwnCompiler):
        def define_pipelines(self):
            (pipeline,) = super().define_pipelines()
            pipeline.passes = [(Lowering if own is usual_lowering else own, text) for own, text in pipeline.passes]
            pipeline.finalize()
            return [pipeline]

    return KernelCompiler
