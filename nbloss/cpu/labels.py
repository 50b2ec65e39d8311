"""Class indices of a vector of rows, one a lane."""

import llvmlite.ir as ir
import numpy as np
from numba.core import types

from nbloss.cpu.arithmetic import Mask, Vec, compiled, compiled_raw, in_all_lanes, ints, llvm_vector, vector_of_ints
from nbloss.cpu.lanes import lanes
from nbloss.cpu.memory import pointer_to

IGNORED, OUTSIDE = -1, -2  # what stands for a label that is ignore_index, or no class


def load_labels(t, k, classes, ignore, like):
    """The labels at k, … of a unit-stride array of integers, in the bits of a vector of like's type."""
    label = np.asarray(t[k : k + lanes(like)]).astype(np.int64)
    inside = (label >= 0) & (label < classes)
    return np.where(label == ignore, IGNORED, np.where(inside, label, OUTSIDE))


@compiled_raw(load_labels, lambda t, k, classes, ignore, like: Vec(like))
def _(context, builder, sig, args):
    vt = llvm_vector(sig.return_type)
    dtype = sig.args[0].dtype
    i64 = ir.IntType(64)
    wide = ir.VectorType(i64, vt.count)
    stored = ir.VectorType(ir.IntType(dtype.bitwidth), vt.count)
    label = builder.load(pointer_to(context, builder, sig, args, stored))
    label.align = 1
    if dtype.bitwidth < 64:
        label = builder.sext(label, wide) if dtype.signed else builder.zext(label, wide)
    classes, ignore = (context.cast(builder, args[i], sig.args[i], types.int64) for i in (2, 3))
    ignored, outside = (ir.Constant(wide, [value] * vt.count) for value in (IGNORED, OUTSIDE))
    code = builder.select(builder.icmp_unsigned("<", label, in_all_lanes(builder, classes, wide)), label, outside)
    code = builder.select(builder.icmp_signed("==", label, in_all_lanes(builder, ignore, wide)), ignored, code)
    narrow = vector_of_ints(vt)
    return builder.bitcast(code if narrow == wide else builder.trunc(code, narrow), vt)


def label_at(values, i):
    """The label that is stored at values[i], among those of a vector."""
    return np.int64(values[i])


@compiled_raw(label_at, lambda values, i: types.int64)
def _(context, builder, sig, args):
    narrow = ir.IntType(sig.args[0].dtype.bitwidth)
    label = builder.load(pointer_to(context, builder, sig, args, narrow))
    return builder.sext(label, ir.IntType(64)) if narrow.width < 64 else label


def labelled(labels, j):
    """The lanes whose label is j."""
    return labels == j


@compiled_raw(labelled, lambda labels, j: Mask(labels.lanes))
def _(context, builder, sig, args):
    vt = args[0].type
    narrow = vector_of_ints(vt)
    j = context.cast(builder, args[1], sig.args[1], types.int64)
    if narrow.element.width < 64:
        j = builder.trunc(j, narrow.element)
    return builder.icmp_signed("==", builder.bitcast(args[0], narrow), in_all_lanes(builder, j, narrow))


def without_class(labels):
    """The lanes whose label is no class."""
    return labels < 0


@compiled(without_class, lambda labels: Mask(labels.lanes))
def _(builder, labels):
    return builder.icmp_signed("<", builder.bitcast(labels, vector_of_ints(labels.type)), ints(labels.type, 0))
