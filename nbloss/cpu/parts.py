"""How Numba compiles kernels and their parts: what it does beyond need is left out, for the sake of a first call.

Parts of kernels are functions that are inlined wherever they are called, and never stand alone. Numba makes each jitted
function executable by itself (optimised, as machine code, with wrappers for Python and C) before it looks at the
caller, where LLVM does most of that again. For the thirty parts of a kernel this took half the time of its first call.
A part stops at LLVM text, which its caller links, inlines and optimises; it cannot be called from Python. It counts no
references either, an eighth of that text: arrays that it gives back own nothing.

What Numba makes of a parallel loop, a function and two wrappers around it, are parts here too: each of them used to be
optimised and made machine code, with all that it calls (a first call of two threads took 1.5 times as long).
"""

from copy import copy
from functools import cache
from itertools import count
from types import BuiltinFunctionType
from typing import ClassVar

import llvmlite.binding as llvm
from numba import njit
from numba.core import config, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import (
    InlineOverloads,
    IRLegalization,
    NativeLowering,
    NativeParforLowering,
    NopythonRewrites,
)
from numba.core.untyped_passes import InlineClosureLikes, InlineInlinables

from nbloss.cpu.arithmetic import VECTOR_BYTES

_numbers = count(1)


class _PartLibrary(JITCodeLibrary):
    def finalize(self):
        self._finalized = True
        self.number = next(_numbers)  # parts are made after those that they call


@cache
def _remembering(context):
    """Numba's typing context, but that it looks up once what an operator or a primitive gives for given types.

    Numba tries up to seventy templates for an operator, and asks for a primitive again in each round of a function's
    types: a first call took 1.05 times as long for operators, 1.1 times for primitives.
    """
    known = {}

    def resolve(function, args, kws):
        if isinstance(function, types.Function) and not kws:
            key = function, args
        elif (function is bool or isinstance(function, BuiltinFunctionType)) and not kws:
            # Numba's type of the function is another object once another template is registered.
            key = function, context._lookup_global(function), args
        else:
            return context.resolve_function_type(function, args, kws)
        if key not in known:
            known[key] = context.resolve_function_type(function, args, kws)
        return known[key]

    own = copy(context)  # shares all that it knows
    own.resolve_function_type = resolve
    return own


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


class _OwnCompiler(Compiler):
    """Numba's compiler with another pass, or none, in place of some of its own."""

    instead_of: ClassVar[dict[type, type | None]] = {}

    def __init__(self, typing_context, *args, **kwargs):
        super().__init__(_remembering(typing_context), *args, **kwargs)

    def define_pipelines(self):
        (pipeline,) = super().define_pipelines()
        passes = [(self.instead_of.get(own, own), text) for own, text in pipeline.passes]
        pipeline.passes = [(own, text) for own, text in passes if own is not None]
        pipeline.finalize()
        return [pipeline]


class _PartCompiler(_OwnCompiler):
    # Parts have no closures, array expressions, inlined overloads or illegal statements: a first call is a tenth
    # shorter.
    instead_of: ClassVar = {
        NativeLowering: _PartLowering,
        NopythonRewrites: None,
        InlineOverloads: None,
        InlineClosureLikes: None,
        InlineInlinables: None,
        IRLegalization: None,
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        flags = self.state.flags
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True


inline = njit(error_model="numpy", forceinline=True, pipeline_class=_PartCompiler)


class _KernelLibrary(JITCodeLibrary):
    few_passes = True

    def add_linking_library(self, library):
        super().add_linking_library(library)
        if isinstance(library, _PartLibrary):  # which has linked nothing itself
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
        kind = _PartLibrary if "gufunc" in name.lower() else JITCodeLibrary
        return kind(self._codegen, name, **kwargs)


def _align_stack(function):
    """Let a function keep vectors for which it has no register at multiples of their size on the stack.

    LLVM does so by itself only where something else needs it; elsewhere every second of them may lie across two cache
    lines, with AVX-512 each (gradients of binary_cross_entropy took 1.1 times as long with AVX2).
    """
    function.attributes.alignstack = VECTOR_BYTES
    # Without another attribute, llvmlite leaves the alignment out of its text; unwind tables there are in any case.
    function.attributes.add("uwtable")


@cache
def kernel_compiler(parallel, few_passes):
    """Numba's compiler for a kernel, serial or parallel; few_passes: see `_KernelLibrary`."""
    usual_lowering = NativeParforLowering if parallel else NativeLowering

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(usual_lowering):
        _name = "kernel_lowering"

        def run_pass(self, state):
            usual = state.targetctx
            state.library = _KernelLibrary(usual.codegen(), state.func_id.func_qualname)
            state.library.few_passes = few_passes
            state.library.enable_object_caching()
            state.targetctx = usual.subtarget(_internal_codegen=_KernelCodegen(usual.codegen()))
            # Nobody calls a part; see _PartLowering for what stands for it.
            state.targetctx.get_executable = lambda library, fndesc, env: (
                library.__sizeof__ if isinstance(library, _PartLibrary) else usual.get_executable(library, fndesc, env)
            )

            def apply_target_attributes(function, *types):
                usual.apply_target_attributes(function, *types)
                _align_stack(function)

            state.targetctx.apply_target_attributes = apply_target_attributes
            done = super().run_pass(state)
            state.targetctx = usual
            return done

    class KernelCompiler(_OwnCompiler):
        instead_of: ClassVar = {usual_lowering: Lowering}

    return KernelCompiler
