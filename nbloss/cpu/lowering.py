"""How Numba writes the LLVM text of a part (see ``parts``): it counts no references, calls plainly, does not raise."""

from functools import cache

import llvmlite.ir as ir
from numba.core import types
from numba.core.callconv import CPUCallConv, create_error_model
from numba.core.cgutils import alloca_once, get_or_insert_function
from numba.core.cpu import CPUContext
from numba.core.lowering import Lower
from numba.core.registry import cpu_target

from nbloss.compilation import Brief


class Undebugged:
    """For a debugger's sake, Numba asks LLVM for the size of each variable, as a module of its own."""

    def alloca_lltype(self, name, lltype, datamodel=None):
        return alloca_once(self.builder, lltype, name=name)


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


@cache
def part_context():
    """The context of all parts; what a function or an operator is for given types is looked up once."""
    usual = cpu_target.target_context
    errors = create_error_model("numpy", usual)
    own = usual.subtarget(__class__=_PartContext, enable_nrt=False, error_model=errors)
    own.get_function = cache(own.get_function)
    return own


def _declared(context, module, fndesc):
    """The LLVM function of a part, in a module that defines or calls it."""
    result, *arguments = map(context.get_value_type, (fndesc.restype, *fndesc.argtypes))
    function = get_or_insert_function(module, ir.FunctionType(result, arguments), fndesc.mangled_name)
    function.attributes.add("alwaysinline")
    return function


def call_of(fndesc, libraries):
    """What emits a call of the part."""

    def emit(context, builder, sig, args):
        return builder.call(_declared(context, builder.module, fndesc), args)

    emit.libs = tuple(libraries)
    return emit


class PartLower(Brief, Undebugged, Lower):
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
