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
from nbloss.cpu.simd import VECTOR_BYTES, borrowed, inline, lanes
from nbloss.cpu.targets import CLASS_INDEX
from nbloss.cpu.tiles import tiles
from nbloss.problem import Array

UNCHECKED, CHECKED = 1, 2  # how a call scans its labels: CHECKED does nothing if one is out of range
# Vectors of rows in a unit of work. Rows side by side share a tile, and long lines suit memory: up to WIDEST vectors in
# NEAR bytes (beyond, malloc asks the operating system each time), else USUAL ones (1.9 times faster than one for 1000
# classes) in FAR bytes. Other rows are LINED_UP, with a tile of one vector each.
WIDEST, USUAL, LINED_UP = 32, 8, 8
NEAR, FAR = (1 << 17) - 1, 1 << 22


def _driver(chunk):
    # x, q, out: (outer, classes, inner); t, upstream, loss: (outer, inner); weight: (classes,). The gradient of a
    # row is multiplied by its upstream, or by factor; of all rows, where mean, divided by the weight of the labels.
    # Absent: q is x, the others have no element. found: (labels out of range, weight of the rest), for scan.
    def driver(
        x, t, q, weight, upstream, out, loss, found,
        kind, form, past, ignore, share, uniform, factor, scan, mean, width, near, like,
        units, step, first_block, stop_block, part,
    ):  # fmt: skip
        mode = (kind, form, past, ignore, share, uniform)
        if scan and first_block == 0:  # labels out of range must be known before anything is written
            found[0], found[1] = _scan(t, weight, x.shape[1], ignore)
        if scan == CHECKED and found[0] > 0:
            stop_block = first_block
        scale = factor / found[1] if mean else factor
        mass = 0.0
        if kind == CLASS_INDEX and uniform != 0.0:  # smoothing spreads the same mass over every row
            mass = dense_mass(q[0, :, 0], weight, mode, x.shape[1], like)
        for block in prange(first_block, stop_block):
            logits, masses, written = borrowed(x), borrowed(q), borrowed(out)
            operands = (logits, borrowed(t), masses, borrowed(weight), borrowed(upstream), written, borrowed(loss))
            # Room for blocks of (lanes, lanes), whatever the number of classes.
            tile = np.empty((x.shape[1] + lanes(like)) * near * lanes(like), weight.dtype)
            facts = np.empty(lanes(like), weight.dtype)
            labels = np.empty(lanes(like), np.int64)
            scratch = (borrowed(tile), borrowed(facts), borrowed(labels), width, near, mass, scale)
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
        array_type(x, 3, writable=True), array_type(name, 2, writable=True), types.Array(types.float64, 1, "C"),
        types.intp, types.intp, types.intp, types.int64, compute, compute, types.float64, *[types.intp] * 4, compute,
        *[types.intp] * 4, types.Array(types.float64, 2, "C"),
    )  # fmt: skip


ROWS, TILES, PICKS = (
    Kernel(name, _driver(chunk), _signature) for name, chunk in (("rows", rows), ("tiles", tiles), ("picks", picks))
)
# Stand-ins for operands that a call does without.
NO_LABELS = np.empty((0, 0), np.int64)
NO_ROWS = {code: np.empty((0, 0), code) for code in "fd"}
NO_OUT = {code: np.empty((0, 0, 0), code) for code in "fdHh"}


def run(
    along: bool,
    normalized: bool,
    x: Array,
    t: Array | None,
    q: Array | None,
    weight: Array,
    upstream: Array | None,
    out: Array | None,
    loss: Array | None,
    found: Array,
    kind: int,
    form: int,
    past: bool,
    ignore: int,
    smoothing: float,
    factor: float,
    scan: int,
    mean: bool,
) -> float:
    """Run one piece of a row-wise problem; the sum of its losses."""
    outer, classes, inner = x.shape
    code, stored = weight.dtype.char, x.dtype.char
    width = near = 0
    if normalized:
        kernel, units, unit_elements = PICKS, outer * inner, 1
    elif along:
        kernel, units, unit_elements = ROWS, outer, classes
    else:
        step = VECTOR_BYTES // weight.itemsize
        width, near = LINED_UP, 1
        if x.strides[2] == x.itemsize and inner > step:
            vector = (classes + step) * VECTOR_BYTES
            width = near = max(min(WIDEST, NEAR // vector), min(USUAL, FAR // vector), 1)
        lead = width * step
        kernel, units, unit_elements = TILES, outer * -(-inner // lead), classes * lead
    t = NO_LABELS if t is None else t
    q = x if q is None else q
    args = (
        x, t, q, weight,
        NO_ROWS["d"] if upstream is None else upstream,
        NO_OUT[stored] if out is None else out,
        NO_ROWS[code] if loss is None else loss,
        found, kind, form, past, ignore, 1.0 - smoothing, smoothing / classes, factor, scan, mean,
        width, near, LIKE[code],
    )  # fmt: skip
    return float(launch(kernel, (stored, t.dtype.char, q.dtype.char), args, units, unit_elements)[0])


# --- labels -------------------------------------------------------------------------------------------------


@inline
def _scan_line(line, weight, classes, ignore):
    """(labels out of range, labels that count, their weight) of labels in one dimension."""
    bad = 0
    kept = 0
    for k in range(line.shape[0]):
        label = np.int64(line[k])
        bad += (label != ignore) & ((label < 0) | (label >= classes))
        kept += label != ignore
    weight_sum = 0.0
    if weight.shape[0]:
        for k in range(line.shape[0]):
            label = np.int64(line[k])
            if label != ignore and 0 <= label < classes:
                weight_sum += weight[label]
    return bad, kept, weight_sum


@inline
def _scan(labels, weight, classes, ignore):
    """(labels out of range, weight of the labels that count) of labels in two dimensions."""
    bad = 0
    kept = 0
    weight_sum = 0.0
    column = labels.shape[1] == 1
    for i in range(1 if column else labels.shape[0]):
        b, k, w = _scan_line(labels[:, 0] if column else labels[i], weight, classes, ignore)
        bad += b
        kept += k
        weight_sum += w
    return float(bad), weight_sum if weight.shape[0] else float(kept)


def _scan_driver(labels, weight, classes, ignore):
    bad, kept, weight_sum = _scan_line(labels, weight, classes, ignore)
    return float(bad), weight_sum if weight.shape[0] else float(kept)


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


def scan_labels(labels: Array, weight: Array, classes: int, ignore: int) -> tuple[float, float]:
    """What must be known of the labels before anything is written: (how many are out of range, weight of the rest)."""
    flat = np.ascontiguousarray(labels).reshape(-1)
    found: tuple[float, float] = SCAN.variant(False, flat.dtype.char, weight.dtype.char)(flat, weight, classes, ignore)
    return found
