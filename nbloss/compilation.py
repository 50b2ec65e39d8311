"""What makes Numba compile sooner, for both backends."""

import contextlib
import gc
from collections.abc import Iterator
from copy import copy
from functools import cache
from types import BuiltinFunctionType
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
