"""How Numba compiles parts of kernels: what it does beyond need is left out, for the sake of a first call.

Parts are functions that are inlined wherever they are called, and never stand alone. Numba makes each jitted function
executable by itself (optimised, as machine code, with wrappers for Python and C) before it looks at the caller, where
LLVM does most of that again. For the thirty parts of a kernel this took half the time of its first call. A part stops
at LLVM text, which its caller links, inlines and optimises; it cannot be called from Python.

Its text is short, for most of the time that is left is Python's, which writes it: a part counts no references (arrays
that it gives back own nothing), is called with arrays and tuples as they are, does not raise, and tells a debugger
nothing. With all this, a kernel had 1.7 times as much text, and a first call took 1.15 times as long.
"""

from itertools import count

import llvmlite.ir as ir
from numba import njit
from numba.core import types
from numba.core.callconv import CPUCallConv
from numba.core.cgutils import alloca_once, get_or_insert_function
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.cpu import CPUContext
from numba.core.lowering import Lower
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

from nbloss.compilation import remembering

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


class _PartCalls(CPUCallConv):
    """How a part takes its arguments and gives its result: as they are, for LLVM inlines it. It does not raise.

    Numba takes arrays and tuples apart, up to a hundred arguments, and asks after each call whether it has raised.
    """

    def decode_arguments(self, builder, argtypes, func):
        return func.args

    def return_value(self, builder, retval):
        builder.ret(retval)

    def return_user_exc(self, builder, *args, **kwargs):  # for a range of step 0, say
        builder.unreachable()

    def return_status_propagate(self, builder, status):
        builder.unreachable()


def _emit_field(context, builder, typ, value, attr):
    return context.data_model_manager[typ].get(builder, value, attr)


class _PartContext(CPUContext):
    """Numba's, but for calls, and for fields of arrays, to which its way is a dozen instructions through memory."""

    call_conv = property(_PartCalls)

    def get_return_value(self, builder, ty, val):
        return val

    def get_getattr(self, typ, attr):
        if isinstance(typ, types.Array) and attr in ("shape", "strides", "itemsize"):
            return _emit_field
        return super().get_getattr(typ, attr)


def _declared(context, module, fndesc):
    """The LLVM function of a part, in a module that defines or calls it."""
    result, *arguments = map(context.get_value_type, (fndesc.restype, *fndesc.argtypes))
    function = get_or_insert_function(module, ir.FunctionType(result, arguments), fndesc.mangled_name)
    function.attributes.add("alwaysinline")
    return function


def _call_of(fndesc, libraries):
    """What emits a call of the part."""

    def emit(context, builder, sig, args):
        return builder.call(_declared(context, builder.module, fndesc), args)

    emit.libs = tuple(libraries)
    return emit


class Undebugged:
    """For a debugger's sake, Numba asks LLVM for the size of each variable, as a module of its own."""

    def alloca_lltype(self, name, lltype, datamodel=None):
        return alloca_once(self.builder, lltype, name=name)


class _PartLower(Undebugged, Lower):
    """Numba's lowering without reference counts.

    For them it loads a variable before each store, to give back what it held, and stores zero after its last use.
    """

    def setup_function(self, fndesc):
        self.function = _declared(self.context, self.module, fndesc)
        self.function.linkage = "linkonce_odr"  # as it is linked: without it, Numba changes a copy
        self.entry_block = self.function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self.entry_block)
        self.call_helper = self.call_conv.init_call_helper(self.builder)

    def storevar(self, value, name, argidx=None):
        self._alloca_var(name, self.typeof(name))
        if name in self._singly_assigned_vars and not self._disable_sroa_like_opt:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))

    def delvar(self, name):
        pass


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    _name = "part_lowering"
    lowering_class = _PartLower

    def run_pass(self, state):
        state.library = library = PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        usual = state.targetctx
        state.targetctx = usual.subtarget(__class__=_PartContext, enable_nrt=False)
        super().run_pass(state)
        state.targetctx = usual
        key = library.__sizeof__  # what callers know the part by; Numba wants a builtin, and one of its own
        libraries = dict.fromkeys([library, *library._linking_libraries])
        fndesc = state["cr"].fndesc
        usual.insert_func_defn([(_call_of(fndesc, libraries), key, fndesc.argtypes)])
        state["cr"] = state["cr"]._replace(cfunc=key)
        return True


class OwnCompiler(Compiler):
    """Numba's compiler with the context of `remembering`."""

    def __init__(self, typing_context, *args, **kwargs):
        super().__init__(remembering(typing_context), *args, **kwargs)


class _PartPasses(PassManager):
    """Passes alone. After each, Numba works out anew where variables live, and looks for faults of its own.

    Without that, a first call takes 0.95 of the time.
    """

    def _runPass(self, index, own, state):
        own.analysis = self._analysis
        own.run_initialization(state)
        own.run_pass(state)
        own.run_finalizer(state)


class _PartCompiler(OwnCompiler):
    # Half of Numba's: a part has no closures, array expressions, inlined overloads, literals to unroll, with blocks or
    # illegal statements (a first call is an eighth shorter).
    passes = (
        TranslateByteCode,
        FixupArgs,
        RewriteSemanticConstants,
        DeadBranchPrune,
        GenericRewrites,
        ReconstructSSA,
        NopythonTypeInference,
        PreLowerStripPhis,
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
