"""What makes Numba compile sooner, for both backends."""

import contextlib
import gc
from collections.abc import Iterator
from copy import copy
from functools import cache
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

from numba.core import types


@contextlib.contextmanager
def garbage_waits() -> Iterator[None]:
    """Collect no garbage meanwhile: a compiler's many objects make that an eighth of the time, on a device a fourth."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@cache
def remembering(context: Any) -> Any:
    """A typing context of Numba's, but that it looks up once what an operator or a primitive gives for given types.

    Numba tries up to seventy templates for an operator, and asks for a primitive again in each round of a function's
    types: a first call took 1.05 times as long for operators, 1.1 times for primitives.
    """
    known: dict[tuple[Any, ...], Any] = {}

    def resolve(function: Any, args: Any, kws: Any) -> Any:
        key: tuple[Any, ...]
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


def run_alone(manager: Any, index: int, own: Any, state: Any) -> None:
    """Run a pass, as a method of Numba's pass managers, and nothing else.

    After each, they work out anew where variables live, and look for faults of Numba's own. Without that, a first call
    takes 0.95 of the time.
    """
    own.analysis = manager._analysis
    own.run_initialization(state)
    own.run_pass(state)
    own.run_finalizer(state)


def without_lifetimes(usual: Any, register_pass: Any) -> Any:
    """A pass of Numba's that does not work out anew where variables live: nothing asks for it before another does."""
    run = usual.run_pass
    nothing = SimpleNamespace(PostProcessor=lambda function: SimpleNamespace(run=lambda emit_dels: None))
    own = FunctionType(run.__code__, {**run.__globals__, "postproc": nothing})
    fields = {"run_pass": own, "_name": f"brief_{usual._name}"}
    return register_pass(mutates_CFG=True, analysis_only=False)(type(usual.__name__, (usual,), fields))


class Brief:
    """For a lowering of Numba's: what it does for every instruction, call and operator, without what nobody asks for.

    It prints each of them, and its types, into messages that it drops, and looks three times for what an operator does
    with constants, in vain, before it emits what does it. With `without_lifetimes`, a first call takes 0.9 of the time,
    on a device 0.85.
    """

    def lower_block(self: Any, block: Any) -> None:
        for instruction in block.body:
            self.loc = instruction.loc
            self.lower_inst(instruction)

    def lower_inst(self: Any, inst: Any) -> None:
        if type(inst).__name__ == "Assign":  # on a device, it is another class
            name = inst.target.name
            self.storevar(self.lower_assign(self.typeof(name), inst), name)
        else:
            super().lower_inst(inst)  # type: ignore[misc]

    def lower_binop(self: Any, resty: Any, expr: Any, op: Any) -> Any:
        signature = self.fndesc.calltypes[expr]
        operands = [
            self.context.cast(self.builder, self.loadvar(operand.name), self.typeof(operand.name), wanted)
            for operand, wanted in zip((expr.lhs, expr.rhs), signature.args, strict=True)
        ]
        function = self.context.typing_context.resolve_value_type(op)
        try:
            function.get_impl_key(signature)
        except KeyError:  # Numba asked an equal object for the types, and this one must know them, too
            function.get_call_type(self.context.typing_context, signature.args, {})
        return self._result(resty, function, signature, operands)

    def lower_call(self: Any, resty: Any, expr: Any) -> Any:
        function, signature = self.typeof(expr.func.name), self.fndesc.calltypes[expr]
        if signature.recvr or not isinstance(function, (types.Function, types.Dispatcher, types.NumberClass)):
            return super().lower_call(resty, expr)  # type: ignore[misc]
        operands = self.fold_call_args(function, signature, expr.args, expr.vararg, expr.kws)
        return self._result(resty, function, signature, operands)

    def _result(self: Any, resty: Any, function: Any, signature: Any, operands: Any) -> Any:
        value = self.context.get_function(function, signature)(self.builder, operands, self.loc)
        if signature.return_type == types.void:
            value = self.context.get_dummy_value()
        return self.context.cast(self.builder, value, signature.return_type, resty)
