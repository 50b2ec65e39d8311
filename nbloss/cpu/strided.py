"""Vectors to and from arrays of any stride, and vectors of which a part only is there."""

import llvmlite.ir as ir
import numpy as np
from numba.core import types

from nbloss.cpu.arithmetic import (
    HAS_AVX512,
    Vec,
    compiled_raw,
    in_all_lanes,
    ints,
    llvm_vector,
    nothing,
    opaque,
    vector_of_ints,
)
from nbloss.cpu.lanes import lanes
from nbloss.cpu.memory import Fields, aligned_at, decode, encode, load, storage, store, stream
from nbloss.cpu.partial import first_lanes, load_first, masked, store_first
from nbloss.cpu.parts import inline
from nbloss.half import decoded, encoded


def gather(a, i, count, like):
    """a[i], a[i + 1], …, of any stride; lanes from `count` on repeat one of them."""
    return decoded(np.asarray(a[np.minimum(np.arange(i, i + lanes(like)), i + count - 1)])).astype(type(like))


def _at_once(a):
    """Whether an instruction reads and writes elements that lie apart."""
    return HAS_AVX512 and storage(a)[1] >= 4


def _pointers(context, builder, sig, args, count):
    """The address of each lane's element, from args[1] on of the strided array args[0]."""
    wide = ir.VectorType(ir.IntType(64), count)
    (stride,) = Fields(context, builder, sig.args[0], args[0]).strides
    stride = in_all_lanes(builder, stride, wide)
    first = _strided_pointer(context, builder, sig, args, ir.Constant(ir.IntType(64), 0))
    start = in_all_lanes(builder, builder.ptrtoint(first, ir.IntType(64)), wide)
    places = builder.add(start, builder.mul(stride, ir.Constant(wide, list(range(count)))))
    return first, builder.inttoptr(places, ir.VectorType(first.type, count))


@compiled_raw(gather, lambda a, i, count, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    element, _ = storage(sig.args[0])
    if _at_once(sig.args[0]):
        stored = ir.VectorType(element, vt.count)
        first, pointers = _pointers(context, builder, sig, args, vt.count)
        item = builder.load(first)
        item.align = 1
        mask = first_lanes(context, builder, vt.count, context.cast(builder, args[2], sig.args[2], types.int64))
        raw = masked(builder, "gather", stored, [pointers, mask, in_all_lanes(builder, item, stored)], stored)
        return decode(builder, sig.args[0].dtype, raw, vt)
    raw = ir.Constant(ir.VectorType(element, vt.count), ir.Undefined)
    for k, place in _places(context, builder, sig, args, range(vt.count)):
        item = builder.load(place)
        item.align = 1
        raw = builder.insert_element(raw, item, k)
    return decode(builder, sig.args[0].dtype, raw, vt)


def _places(context, builder, sig, args, lanes):
    """(lane, address of its element), lane by lane; past the first args[2] of them, that of the last one."""
    count = opaque(builder, context.cast(builder, args[2], sig.args[2], types.intp))
    last = builder.sub(count, ir.Constant(ir.IntType(64), 1))
    for lane in lanes:
        k = ir.Constant(ir.IntType(64), lane)
        clipped = builder.select(builder.icmp_signed("<", k, last), k, last)
        yield ir.Constant(ir.IntType(32), lane), _strided_pointer(context, builder, sig, args, clipped)


def _strided_pointer(context, builder, sig, args, k):
    """Address of element args[1] + k of the strided array args[0]."""
    array = Fields(context, builder, sig.args[0], args[0])
    i = builder.add(context.cast(builder, args[1], sig.args[1], types.intp), k)
    return builder.bitcast(array.address((i, *array.strides)), storage(sig.args[0])[0].as_pointer())


def scatter(a, i, count, value):
    """Store the first `count` lanes into a[i], a[i + 1], …, of any stride."""
    a[i : i + count] = encoded(value, a.dtype)[:count]


@compiled_raw(scatter, nothing)
def _(context, builder, sig, args):
    value = encode(builder, sig.args[0].dtype, args[3])
    if _at_once(sig.args[0]):
        _, pointers = _pointers(context, builder, sig, args, value.type.count)
        count = context.cast(builder, args[2], sig.args[2], types.int64)
        mask = first_lanes(context, builder, value.type.count, count)
        masked(builder, "scatter", value.type, [value, pointers, mask], ir.VoidType())
        return context.get_dummy_value()
    # Downwards: lanes past `count` land on the last element before its own value does.
    for k, place in _places(context, builder, sig, args, reversed(range(value.type.count))):
        builder.store(builder.extract_element(value, k), place).align = 1
    return context.get_dummy_value()


def gather_classes(a, labels, k, count, like):
    """a[label, k], a[label, k + 1], … of (classes, rows), each lane's label its own; anything where it is no class."""
    label, row = np.asarray(labels[:count]).astype(np.int64), np.arange(k, k + count)
    values = np.zeros(lanes(like), type(like))
    values[:count] = decoded(np.asarray(a[np.maximum(label, 0), row]))
    return values


def scatter_classes(a, labels, k, count, value):
    """Store lanes into a[label, k], a[label, k + 1], …, but where the label is no class."""
    label = np.asarray(labels[:count]).astype(np.int64)
    inside = np.flatnonzero(label >= 0)
    a[label[inside], k + inside] = encoded(value[:count][inside], a.dtype)


def _places_of_classes(context, builder, sig, args, vt):
    """(the addresses of the lanes' elements of args[0], which lanes have one), of labels, their place and their count.

    Where there is none, the address is that of an element.
    """
    array, i64 = Fields(context, builder, sig.args[0], args[0]), ir.IntType(64)
    of_class, of_row = array.strides
    k, count = (context.cast(builder, args[i], sig.args[i], types.int64) for i in (2, 3))
    labels = builder.bitcast(args[1], vector_of_ints(vt))
    mask = builder.and_(builder.icmp_signed(">=", labels, ints(vt, 0)), first_lanes(context, builder, vt.count, count))
    labels = builder.select(mask, labels, ints(vt, 0))
    start = builder.add(builder.ptrtoint(array.data, i64), builder.mul(k, of_row))
    pointer, wide = storage(sig.args[0])[0].as_pointer(), ir.VectorType(i64, vt.count)
    pointers = ir.VectorType(pointer, vt.count)
    if HAS_AVX512:  # 0.75 to 0.85 of the time that 8192 rows take one by one
        labels = builder.sext(labels, wide) if labels.type != wide else labels
        rows = builder.mul(in_all_lanes(builder, of_row, wide), ir.Constant(wide, list(range(vt.count))))
        rows = builder.select(mask, rows, ir.Constant(wide, [0] * vt.count))
        places = builder.add(rows, builder.mul(labels, in_all_lanes(builder, of_class, wide)))
        return builder.inttoptr(builder.add(places, in_all_lanes(builder, start, wide)), pointers), mask
    places = ir.Constant(pointers, ir.Undefined)
    for lane in range(vt.count):  # AVX2 cannot multiply integers of 64 bits
        number = ir.Constant(ir.IntType(32), lane)
        label = builder.extract_element(labels, number)
        row = builder.select(builder.icmp_signed(">", count, i64(lane)), builder.mul(of_row, i64(lane)), i64(0))
        label = builder.sext(label, i64) if label.type != i64 else label
        place = builder.add(builder.add(start, row), builder.mul(label, of_class))
        places = builder.insert_element(places, builder.inttoptr(place, pointer), number)
    return places, mask


@compiled_raw(gather_classes, lambda a, labels, k, count, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    stored = ir.VectorType(storage(sig.args[0])[0], vt.count)
    pointers, mask = _places_of_classes(context, builder, sig, args, vt)
    raw = ir.Constant(stored, ir.Undefined)
    if _at_once(sig.args[0]):
        raw = masked(builder, "gather", stored, [pointers, mask, ir.Constant(stored, [0] * vt.count)], stored)
    else:
        for lane in map(ir.IntType(32), range(vt.count)):
            element = builder.load(builder.extract_element(pointers, lane))
            element.align = 1
            raw = builder.insert_element(raw, element, lane)
    return decode(builder, sig.args[0].dtype, raw, vt)


@compiled_raw(scatter_classes, nothing)
def _(context, builder, sig, args):
    pointers, mask = _places_of_classes(context, builder, sig, args, args[4].type)
    value = encode(builder, sig.args[0].dtype, args[4])
    masked(builder, "scatter", value.type, [value, pointers, mask], ir.VoidType())
    return context.get_dummy_value()


@inline
def take(a, i, count, fill, like):
    """The first `count` lanes at i of a unit-stride array, `fill` in the others."""
    if count == lanes(like):
        return load(a, i, like)
    return load_first(a, i, count, fill, like)


@inline
def put(a, i, count, value, like):
    """Store the first `count` lanes into a unit-stride array."""
    if count == lanes(like):
        store(a, i, value)
    else:
        store_first(a, i, count, value)


@inline
def read(a, i, count, fill, like):
    """As `take`, for any stride; the lanes past `count` hold `fill` or the last one read."""
    return take(a, i, count, fill, like) if a.strides[0] == a.itemsize else gather(a, i, count, like)


@inline
def write(a, i, count, value, like):
    """As `put`, for any stride."""
    if a.strides[0] == a.itemsize:
        put(a, i, count, value, like)
    else:
        scatter(a, i, count, value)


@inline
def read_into(values, at, a, start, stop, like):
    """values[at:] = a[start:stop], for any stride."""
    step = lanes(like)
    at -= start
    whole = start
    if a.strides[0] == a.itemsize:
        whole += (stop - start) // step * step
        for k in range(start, whole, step):
            store(values, at + k, load(a, k, like))
    for k in range(whole, stop, step):
        store(values, at + k, read(a, k, min(step, stop - k), 0.0, like))


@inline
def _write_side_by_side(values, at, out, start, stop, nontemporal, like):
    """`write_from` for the unit stride."""
    step = lanes(like)
    at -= start
    i = start
    aligned = aligned_at(out, like) if nontemporal else -1
    if aligned >= 0:
        count = min((aligned - start) % step, stop - start)
        if count:
            store_first(out, i, count, load_first(values, at + i, count, 0.0, like))
            i += count
    whole = i + (stop - i) // step * step
    if aligned >= 0:
        for k in range(i, whole, step):
            stream(out, k, load(values, at + k, like))
    else:
        for k in range(i, whole, step):
            store(out, k, load(values, at + k, like))
    if whole < stop:
        store_first(out, whole, stop - whole, load_first(values, at + whole, stop - whole, 0.0, like))


@inline
def write_from(values, at, out, start, stop, nontemporal, like):
    """out[start:stop] = values[at:], past the caches where whole vectors of `out` are aligned for it."""
    if out.strides[0] == out.itemsize:
        _write_side_by_side(values, at, out, start, stop, nontemporal, like)
    else:
        for k in range(start, stop, lanes(like)):
            count = min(lanes(like), stop - k)
            scatter(out, k, count, take(values, at - start + k, count, 0.0, like))


@inline
def line_before(out, i, like):
    """The last index up to i from which on vectors of `out` may go past the caches, where there is one."""
    return i - (i - aligned_at(out, like)) % lanes(like)


@inline
def write_lines(values, out, start, stop, more, like):
    """out[start:stop] = values, past the caches; but what is left of the last line, if there is `more` to come.

    That is put at the front of `values`. Returns how far `out`, whose elements lie side by side, is written. There is a
    vector or more to write; what follows it in `values` may be read.
    """
    if more:
        stop = line_before(out, stop, like)
    _write_side_by_side(values, np.int64(0), out, start, stop, True, like)
    store(values, 0, load(values, stop - start, like))
    return stop
