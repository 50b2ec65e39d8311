"""The row-wise kernels: cross-entropy with every kind of target, softmax, log-softmax, log-sum-exp.

``rows`` and ``tiles`` find, for each row, the maximum m and r = sum exp(x - m) over all classes but one at the
maximum, and take it from there with nbloss.formulas; ``picks`` needs neither. Here are the loop over blocks that
they have in common, the choice among them, and what must be known of labels before anything is written.
"""

import numpy as np
from numba import from_dtype, prange
from numba.core import types

from nbloss.cpu.compile import LIKE, Kernel, array_type, compute_type
from nbloss.cpu.launch import launch
from nbloss.cpu.picks import picks
from nbloss.cpu.rows import dense_mass, rows
from nbloss.cpu.simd import VECTOR_BYTES, borrowed, lanes
from nbloss.cpu.targets import CLASS_INDEX
from nbloss.cpu.tiles import ROW_FACTS, tiles
from nbloss.problem import Array

WIDTH = 8  # vectors of rows in a tile
NEAR = 1 << 18  # bytes of a tile


def _driver(chunk):
    # x, q, out: (outer, classes, inner); t, upstream, loss: (outer, inner); weight: (classes,). Upstream is the
    # factor of each row's gradient. Absent: q is x, weight has no element, loss no column.
    def driver(
        x, t, q, weight, upstream, out, loss,
        kind, form, past, ignore, share, uniform, width, like,
        units, step, first_block, stop_block, part,
    ):  # fmt: skip
        mode = (kind, form, past, ignore, share, uniform)
        mass = 0.0
        if kind == CLASS_INDEX and uniform != 0.0:  # smoothing spreads the same mass over every row
            mass = dense_mass(weight, weight, mode, x.shape[1], like)
        for block in prange(first_block, stop_block):
            logits, masses, written = borrowed(x), borrowed(q), borrowed(out)
            operands = (logits, borrowed(t), masses, borrowed(weight), borrowed(upstream), written, borrowed(loss))
            # Room for blocks of (lanes, lanes), whatever the number of classes.
            tile = np.empty((x.shape[1] + lanes(like)) * width * lanes(like) if width else 0, weight.dtype)
            facts = np.zeros(ROW_FACTS * lanes(like), weight.dtype)
            labels = np.empty(lanes(like), np.int64)
            scratch = (borrowed(tile), borrowed(facts), borrowed(labels), width, mass)
            value_sum = 0.0
            for unit in range(block * step, min(units, block * step + step)):
                value_sum += chunk(operands, mode, unit, like, scratch)
            part[block, 0] = value_sum
            part[block, 1] = 0 * (tile.size + facts.size + labels.size)  # whose last use frees them

    return driver


def _signature(x, t, q):
    compute = compute_type(x)
    name = compute.name
    return (
        array_type(x, 3), array_type(t, 2), array_type(q, 3),
        types.Array(compute, 1, "C", readonly=True), array_type("f8", 2),
        array_type(x, 3, writable=True), array_type(name, 2, writable=True),
        types.intp, types.intp, types.intp, types.int64, compute, compute, types.intp, compute,
        *[types.intp] * 4, types.Array(types.float64, 2, "C"),
    )  # fmt: skip


KERNELS = {
    name: Kernel(name, _driver(chunk), _signature)
    for name, chunk in (("rows", rows), ("tiles", tiles), ("picks", picks))
}


def run(
    along: bool,
    normalized: bool,
    x: Array,
    t: Array,
    q: Array,
    weight: Array,
    upstream: Array,
    out: Array,
    loss: Array,
    kind: int,
    form: int,
    past: bool,
    ignore: int,
    smoothing: float,
) -> float:
    """Run one piece of a row-wise problem; the sum of its losses."""
    outer, classes, inner = x.shape
    like = LIKE[weight.dtype.char]
    step = VECTOR_BYTES // weight.itemsize
    share, uniform = 1.0 - smoothing, smoothing / classes
    if normalized:
        kernel, units, unit_elements, width = KERNELS["picks"], outer * inner, 1, 0
    elif along:
        kernel, units, unit_elements, width = KERNELS["rows"], outer, classes, 0
    else:
        # Rows side by side in memory are done several vectors at a time, if that many fit near the core.
        side_by_side = x.strides[2] == x.itemsize and inner > step and classes * WIDTH * VECTOR_BYTES <= NEAR
        width = WIDTH if side_by_side else 1
        lead = width * step
        kernel, units, unit_elements = KERNELS["tiles"], outer * -(-inner // lead), classes * lead
    args = (x, t, q, weight, upstream, out, loss, kind, form, past, ignore, share, uniform, width, like)
    return float(launch(kernel, (x.dtype.char, t.dtype.char, q.dtype.char), args, units, unit_elements)[0])


# --- labels -------------------------------------------------------------------------------------------------


def _scan_driver(labels, weight, classes, ignore):
    """(labels out of range, weight of the labels that count)."""
    bad = 0
    kept = 0
    for i in range(labels.shape[0]):
        label = np.int64(labels[i])
        bad += (label != ignore) & ((label < 0) | (label >= classes))
        kept += label != ignore
    weight_sum = float(kept)
    if weight.shape[0] and not bad:
        weight_sum = 0.0
        for i in range(labels.shape[0]):
            label = np.int64(labels[i])
            if label != ignore:
                weight_sum += weight[label]
    return bad, weight_sum


SCAN = Kernel(
    "scan",
    _scan_driver,
    lambda t, weight: (
        types.Array(from_dtype(np.dtype(t)), 1, "C", readonly=True),
        types.Array(from_dtype(np.dtype(weight)), 1, "C", readonly=True),
        types.int64,
        types.int64,
    ),
)


def scan_labels(labels: Array, weight: Array, classes: int, ignore: int) -> tuple[int, float]:
    """What must be known of the labels before anything is written: (how many are out of range, weight of the rest)."""
    flat = np.ascontiguousarray(labels).reshape(-1)
    found: tuple[int, float] = SCAN.variant(False, flat.dtype.char, weight.dtype.char)(flat, weight, classes, ignore)
    return found
