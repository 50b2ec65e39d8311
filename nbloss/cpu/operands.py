"""Arrays as kernels take them: an address each, and one array of integers that says how all of them lie.

Numba makes an array of a Python argument in 37 ns, mostly for a reference count that no kernel needs; an address takes
2 ns, needs no view of another shape, and how arrays lie is worked out once for all calls that are alike. So are other
integers, 10 ns each as arguments, which follow in the same array.
"""

import llvmlite.ir as ir
import numpy as np
from numba.core import config, types
from numba.extending import NativeValue, models, register_model, unbox

from nbloss.cpu.arithmetic import compiled_raw
from nbloss.cpu.memory import BYTES
from nbloss.cpu.views import view

INT = ir.IntType(64)


class Address(types.Type):
    """Where the elements of a NumPy array begin, to be seen as an array of type `array`."""

    def __init__(self, array):
        self.array = array
        super().__init__(f"Address({array})")


@register_model(Address)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, BYTES)


@unbox(Address)
def _(typ, obj, c):
    # NumPy's binary interface, PyArrayObject_fields: the head of every object, and then the address.
    start = c.builder.bitcast(obj, BYTES)
    field = c.builder.gep(start, [ir.Constant(INT, object.__basicsize__)])
    return NativeValue(c.builder.load(c.builder.bitcast(field, BYTES.as_pointer())))


LAYOUT = Address(types.Array(types.int64, 1, "C", readonly=True))


def layout_of(views, *more):
    """How arrays lie, for `arrays_at`, and `more` integers, for `numbers_at`."""
    if config.DISABLE_JIT:
        return [*((a.dtype, a.shape, a.strides) for a in views), *more]
    numbers = []
    for a in views:
        numbers += a.shape
        numbers += a.strides
    return np.array([*numbers, *more], np.int64)


def arrays_at(addresses, layout):
    """Arrays that begin where the given ones do, without a reference count: those must outlive them."""
    as_strided = np.lib.stride_tricks.as_strided
    return [as_strided(a.view(dtype), shape, strides) for a, (dtype, shape, strides) in zip(addresses, layout)]


@compiled_raw(arrays_at, lambda addresses, layout: types.containers.Tuple([a.array for a in addresses]))
def _(context, builder, sig, args):
    place = builder.bitcast(args[1], INT.as_pointer())
    arrays = []
    for k, array_type in enumerate(sig.return_type):
        numbers = []
        for _ in range(2 * array_type.ndim):
            numbers.append(builder.load(place))
            place = builder.gep(place, [ir.Constant(INT, 1)])
        data = builder.extract_value(args[0], k)
        arrays.append(view(context, builder, array_type, data, numbers[: array_type.ndim], numbers[array_type.ndim :]))
    return context.make_tuple(builder, sig.return_type, arrays)


def numbers_at(addresses, layout, example):
    """As many integers as `example` has, which follow how the arrays at the addresses lie."""
    return layout[len(addresses) : len(addresses) + len(example)]


@compiled_raw(numbers_at, lambda addresses, layout, example: example)
def _(context, builder, sig, args):
    place = builder.bitcast(args[1], INT.as_pointer())
    skipped = sum(2 * a.array.ndim for a in sig.args[0])
    numbers = [builder.load(builder.gep(place, [ir.Constant(INT, skipped + k)])) for k in range(len(sig.return_type))]
    return context.make_tuple(builder, sig.return_type, numbers)
