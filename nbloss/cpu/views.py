"""Memory for a kernel; and arrays seen in other ways, without a reference count: what they show must outlive them."""

from functools import reduce

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils, types

from nbloss.cpu.arithmetic import VECTOR_BYTES, compiled_raw
from nbloss.cpu.memory import BYTES, Fields, pointer_to


def allocated(count):
    """Room for `count` float64 numbers, from a vector's boundary on.

    Numba compiles three functions for np.empty: a first call took 1.04 times as long.
    """
    return np.empty(count)


@compiled_raw(allocated, lambda count: types.Array(types.float64, 1, "C"))
def _(context, builder, sig, args):
    count, item = context.cast(builder, args[0], sig.args[0], types.intp), ir.Constant(ir.IntType(64), 8)
    owner = context.nrt.meminfo_alloc_aligned(builder, builder.mul(count, item), VECTOR_BYTES)
    data = context.nrt.meminfo_data(builder, owner)
    return view(context, builder, sig.return_type, data, [count], [item], owner)


def unallocated(count):
    """In place of `allocated` where no room is needed."""
    return np.empty(0)


@compiled_raw(unallocated, lambda count: types.Array(types.float64, 1, "C"))
def _(context, builder, sig, args):
    zero, item = (ir.Constant(ir.IntType(64), n) for n in (0, 8))
    nowhere = ir.Constant(ir.DoubleType().as_pointer(), None)
    return view(context, builder, sig.return_type, nowhere, [zero], [item])


def line_from(a, f, i, k, count):
    """`count` elements that lie side by side from a[f, i, k] on; borrowed."""
    return np.lib.stride_tricks.as_strided(a[f, i, k:], (count,), (a.itemsize,))


@compiled_raw(line_from, lambda a, f, i, k, count: types.Array(a.dtype, 1, "C", readonly=not a.mutable))
def _(context, builder, sig, args):
    array = Fields(context, builder, sig.args[0], args[0])
    *place, count = (context.cast(builder, args[n], sig.args[n], types.intp) for n in range(1, 5))
    data = array.address(*zip(place, array.strides))
    item = ir.Constant(ir.IntType(64), sig.args[0].dtype.bitwidth // 8)
    return view(context, builder, sig.return_type, data, [count], [item])


def row_of(a, i, k):
    """a[i, :, k], whose elements lie side by side; borrowed."""
    return a[i, :, k]


@compiled_raw(row_of, lambda a, i, k: types.Array(a.dtype, 1, "C", readonly=not a.mutable))
def _(context, builder, sig, args):
    # Numba's own slices look for negative indices, and for all strides: 30 instructions for each.
    array = Fields(context, builder, sig.args[0], args[0])
    outer, item, inner = array.strides
    i, k = (context.cast(builder, args[n], sig.args[n], types.intp) for n in (1, 2))
    data = array.address((i, outer), (k, inner))
    return view(context, builder, sig.return_type, data, [array.shape[1]], [item])


def plane_of(a, f):
    """a[f], or of an array without any, none; borrowed."""
    return a[f : f + 1].reshape(a.shape[1:])


@compiled_raw(plane_of, lambda a, f: types.Array(a.dtype, a.ndim - 1, "A", readonly=not a.mutable))
def _(context, builder, sig, args):
    array = Fields(context, builder, sig.args[0], args[0])
    step, *strides = array.strides
    f = context.cast(builder, args[1], sig.args[1], types.intp)
    return view(context, builder, sig.return_type, array.address((f, step)), array.shape[1:], strides)


def folded(a, first, lines, fold):
    """Classes `first`, … of a, (outer, classes, inner), `fold` of them to a line, where they lie at equal distances."""
    outer, step, item = a.strides
    shape = (a.shape[0], lines, a.shape[2] * fold)
    strides = (outer, step * fold, step // max(a.shape[2], 1) if fold > 1 else item)
    return np.lib.stride_tricks.as_strided(a[:, first:], shape, strides)


@compiled_raw(folded, lambda a, first, lines, fold: a)
def _(context, builder, sig, args):
    array = Fields(context, builder, sig.args[0], args[0])
    first, lines, fold = (context.cast(builder, args[n], sig.args[n], types.intp) for n in (1, 2, 3))
    outer, _, inner = array.shape
    of_outer, step, item = array.strides
    one = ir.Constant(lines.type, 1)
    apart = builder.sdiv(step, builder.select(builder.icmp_signed(">", inner, one), inner, one))
    item = builder.select(builder.icmp_signed(">", fold, one), apart, item)
    data = array.address((first, step))
    shape, strides = [outer, lines, builder.mul(inner, fold)], [of_outer, builder.mul(step, fold), item]
    return view(context, builder, sig.return_type, data, shape, strides)


def line_at(a, i, count):
    """a[i] and what follows it, `count` elements, but of an array without any; borrowed."""
    return np.lib.stride_tricks.as_strided(a[i:], (count if a.shape[1] else 0,), a.strides[1:])


def _line_type(a):
    return types.Array(a.dtype, 1, "A", readonly=not a.mutable)


@compiled_raw(line_at, lambda a, i, count: _line_type(a))
def _(context, builder, sig, args):
    array = Fields(context, builder, sig.args[0], args[0])
    outer, inner = array.strides
    i, count = (context.cast(builder, args[n], sig.args[n], types.intp) for n in (1, 2))
    data = array.address((i, outer))
    length, none = array.shape[1], ir.Constant(count.type, 0)
    count = builder.select(builder.icmp_signed("==", length, none), none, count)
    return view(context, builder, sig.return_type, data, [count], [inner])


def lent_line(a, values, at, count):
    """As `lent_to`, but of the type that `line_at` gives of an array."""
    return lent_to(a, values, at, count)


def lent_to(like, values, at, count):
    """The place of values[at:] as `count` elements of like's type (a scalar's or an array's)."""
    return values[at:].view(like.dtype)[:count]


def as_rows(line, classes):
    """Rows that lie one after the other, as (classes, rows)."""
    return line.reshape(-1, classes).T


def as_line(rows):
    """The way back: (classes, rows), each row side by side, one after the other, as one line."""
    return rows.T.reshape(-1)


def view(context, builder, ty, data, shape, strides, owner=None):
    """An array of type `ty` in LLVM, without an owner where none is given."""
    model = context.data_model_manager[ty]
    fields = {
        "meminfo": ir.Constant(BYTES, None) if owner is None else owner,
        "parent": ir.Constant(BYTES, None),
        "nitems": reduce(builder.mul, shape),
        "itemsize": ir.Constant(ir.IntType(64), ty.dtype.bitwidth // 8),
        "data": builder.bitcast(data, context.get_data_type(ty.dtype).as_pointer()),
        "shape": cgutils.pack_array(builder, shape),
        "strides": cgutils.pack_array(builder, strides),
    }
    array = ir.Constant(model.get_value_type(), ir.Undefined)
    for name, value in fields.items():
        array = model.set(builder, array, value, name)
    return array


def _line_of(like, *more):
    return types.Array(like.dtype if isinstance(like, types.Array) else like, 1, "C")


@compiled_raw(lent_line, lambda a, values, at, count: _line_type(a))
@compiled_raw(lent_to, _line_of)
def _(context, builder, sig, args):
    data = pointer_to(context, builder, sig, args, ir.IntType(8), 1)
    count = context.cast(builder, args[3], sig.args[3], types.intp)
    item = ir.Constant(ir.IntType(64), sig.return_type.dtype.bitwidth // 8)
    return view(context, builder, sig.return_type, data, [count], [item])


@compiled_raw(as_rows, lambda line, classes: types.Array(line.dtype, 2, "A"))
def _(context, builder, sig, args):
    line = Fields(context, builder, sig.args[0], args[0])
    classes = context.cast(builder, args[1], sig.args[1], types.intp)
    (count,), (item,) = line.shape, line.strides
    strides = [item, builder.mul(classes, item)]
    return view(context, builder, sig.return_type, line.data, [classes, builder.sdiv(count, classes)], strides)


@compiled_raw(as_line, lambda rows: types.Array(rows.dtype, 1, "A"))
def _(context, builder, sig, args):
    rows = Fields(context, builder, sig.args[0], args[0])
    return view(context, builder, sig.return_type, rows.data, [builder.mul(*rows.shape)], [rows.strides[0]])
