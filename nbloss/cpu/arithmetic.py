"""The vector type and its masks, how a primitive is registered with Numba, and arithmetic."""

import operator

import llvmlite.ir as ir
import numpy as np
from numba.core import config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, register_model

VECTOR_BYTES = 64


def processor_has(feature):
    """Whether the processor that kernels are compiled for has a feature, by LLVM's name for it."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return f"+{feature}" in features.split(",")


HAS_AVX, HAS_AVX512 = processor_has("avx"), processor_has("avx512f")


class Vec(types.Type):
    """A vector of float32 or float64 lanes; of two `registers`, it is a pair (see lanes.py)."""

    def __init__(self, dtype, registers=1):
        self.dtype = dtype
        self.lanes = registers * VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vec({dtype} x {self.lanes})")


class Mask(types.Type):
    """One truth value a lane."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"Mask({lanes})")


FLOAT = {32: ir.FloatType(), 64: ir.DoubleType()}


def llvm_vector(vec):
    return ir.VectorType(FLOAT[vec.dtype.bitwidth], vec.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, llvm_vector(vec))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask):
        super().__init__(manager, mask, ir.VectorType(ir.IntType(1), mask.lanes))


# --- registration -------------------------------------------------------------------------------------------


def _vector_of(*args):
    """The Vec among the argument types (scalars are broadcast to it); None where there is none."""
    vecs = {a for a in args if isinstance(a, Vec)}
    fits = all(isinstance(a, (Vec, Mask, types.Number)) for a in args)
    return vecs.pop() if len(vecs) == 1 and fits else None


def _mask_of(*args):
    vec = _vector_of(*args)
    return vec and Mask(vec.lanes)


def nothing(*args):
    return types.void


def shuffled(builder, places, x, y=None):
    """The lanes at these places of x and y, one after the other."""
    y = ir.Constant(x.type, ir.Undefined) if y is None else y
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places)))


def registers(builder, x):
    """The vectors of which x is one or a pair: LLVM splits its own operations, but no instruction of one machine."""
    n = VECTOR_BYTES // (4 if x.type.element in (FLOAT[32], ir.IntType(32)) else 8)
    return [shuffled(builder, range(k, k + n), x) for k in range(0, x.type.count, n)]


def of_registers(builder, parts):
    """The vector, or the pair, of which these are the registers."""
    return parts[0] if len(parts) == 1 else shuffled(builder, range(2 * parts[0].type.count), *parts)


def opaque(builder, number):
    """The same int64, of which the compiler knows nothing any more.

    It works out whatever it can ahead of a loop, also for a branch that is not taken within: the addresses of sixteen
    lanes of an array of other strides, for one, which took rows of 10 classes a tenth of their time.
    """
    kind = ir.FunctionType(number.type, [number.type])
    return builder.call(ir.InlineAsm(kind, "", "=r,0", side_effect=True), [number])


def in_all_lanes(builder, value, vt):
    one = builder.insert_element(ir.Constant(vt, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return shuffled(builder, [0] * vt.count, one)


def broadcast_value(context, builder, value, ty, vec):
    if not isinstance(ty, types.Number):
        return value
    return in_all_lanes(builder, context.cast(builder, value, ty, vec.dtype), llvm_vector(vec))


def _register(fn, result, lower, *overloads):
    class Template(AbstractTemplate):
        key = fn

        def generic(self, args, kws):
            ty = None if kws else result(*args)
            return None if ty is None else signature(ty, *args)

    Template.metadata = {"target": "cpu"}  # tried before NumPy's operators: a first call is 5% shorter
    infer_global(fn)(Template)
    for types_of_args in overloads or [(types.VarArg(types.Any),)]:
        lower_builtin(fn, *types_of_args)(lower)


def compiled(fn, result=_vector_of, *overloads):
    """Decorator: the LLVM of the elementwise primitive `fn`, all arguments broadcast to one vector type."""

    def register(emit):
        def lower(context, builder, sig, args):
            vec = _vector_of(*sig.args)
            wide = [broadcast_value(context, builder, v, t, vec) for v, t in zip(args, sig.args)]
            return emit(builder, *wide)

        _register(fn, result, lower, *overloads)
        return emit

    return register


def compiled_raw(fn, result):
    """Decorator: the LLVM of a primitive that wants the Numba types of its arguments (loads, stores)."""

    def register(lower):
        _register(fn, result, lower)
        return lower

    return register


def call(builder, name, result, *args):
    """A call of a function that LLVM knows by its name."""
    module = builder.module
    fn = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(fn, args)


def _call(builder, name, vt, *args):
    return call(builder, f"{name}.v{vt.count}" + {"float": "f32", "double": "f64"}[str(vt.element)], vt, *args)


def avx512(builder, name, result, *args):
    """A call of an instruction that AVX-512 alone has."""
    return call(builder, f"llvm.x86.avx512.{name}.512", result, *args)


def vector_of_ints(vt):
    return ir.VectorType(ir.IntType(32 if vt.element == FLOAT[32] else 64), vt.count)


def ints(vt, value):
    it = vector_of_ints(vt)
    return ir.Constant(it, [value] * it.count)


# --- arithmetic ---------------------------------------------------------------------------------------------

_BINARY = [(Vec, Vec), (Vec, types.Number), (types.Number, Vec)]

for _op, _emit in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    compiled(_op, _vector_of, *_BINARY)(lambda b, x, y, _emit=_emit: getattr(b, _emit)(x, y))
for _op, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    compiled(_op, _mask_of, *_BINARY)(lambda b, x, y, _sign=_sign: b.fcmp_ordered(_sign, x, y))
compiled(operator.neg, _vector_of, (Vec,))(lambda b, x: b.fneg(x))


def fma(a, b, c):
    """a·b + c, rounded once where the machine can."""
    return a * b + c


@compiled(fma)
def _(builder, a, b, c):
    return _call(builder, "llvm.fmuladd", a.type, a, b, c)


def where(mask, a, b):
    """a in the lanes where `mask` holds, b in the others."""
    return np.where(mask, a, b)


@compiled(where)
def _(builder, mask, a, b):
    return builder.select(mask, a, b)


def maximum(a, b):
    """The larger of a and b; b where either is NaN. One instruction, unlike a maximum that keeps every NaN."""
    return np.where(a > b, a, b)


@compiled(maximum)
def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def absolute(x):
    return np.abs(x)


@compiled(absolute)
def _(builder, x):
    return _call(builder, "llvm.fabs", x.type, x)


def is_single(x):
    """Whether x holds float32 (known when a kernel is compiled: the other branch is dropped)."""
    return x.dtype == np.float32


@compiled_raw(is_single, lambda x: types.boolean)
def _(context, builder, sig, args):
    return ir.Constant(ir.IntType(1), sig.args[0].dtype.bitwidth == 32)
