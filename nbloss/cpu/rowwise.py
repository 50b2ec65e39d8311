"""The row-wise kernels: cross-entropy with every kind of target, softmax, log-softmax, log-sum-exp.

``rows``, ``groups``, ``tiles`` and ``streams`` find, for each row, the maximum m and the sum of exp(x - m) over all
classes but the target, or else one at the maximum, and take it from there with nbloss.formulas; ``picks`` needs
neither. Here is the choice among them, and how work is cut.
"""

from typing import NamedTuple

import numpy as np
from numba.core import types

from nbloss.cpu.compile import Kernel, array_type, compute_type, like_of
from nbloss.cpu.given import Numbers, Operands
from nbloss.cpu.group_rows import room_of_group
from nbloss.cpu.groups import groups
from nbloss.cpu.launch import Launch
from nbloss.cpu.operands import LAYOUT, Address, layout_of
from nbloss.cpu.picks import picks
from nbloss.cpu.rows import rows
from nbloss.cpu.rowwise_driver import driver_of
from nbloss.cpu.scanning import pieces_of
from nbloss.cpu.simd import HAS_AVX512, LINE, VECTOR_BYTES
from nbloss.cpu.streams import KEPT, conclude, room_of_stream, sum_piece, write_piece
from nbloss.cpu.targets import CLASS_INDEX, PROBABILITIES
from nbloss.cpu.tiles import FACTS, are_aliased, room_of_tile, tiles
from nbloss.cpu.unwritten import SHORT, room_of_row
from nbloss.layout import are_side_by_side
from nbloss.problem import GRADIENT, LOSS_ONLY, Array

# Rows that lie side by side share a tile of vectors of rows: as wide as TILE_BYTES allow, up to WIDEST vectors, for
# long lines suit memory (of classes that are aliased, twice that; see ``tiles``). More bytes, malloc may ask the
# operating system for each time. Of many classes, it is USUAL vectors wide all the same (1000: 1.9 times faster than
# one). A unit is TILES_A_UNIT of them, which write whole lines (16 x 21 x 256 x 256: 0.85 of the time of one); fewer
# where units would be too FEW. From FEWEST classes on, up to twice WIDEST, tiles that are moved by vectors are as wide
# as there are classes, and TURNS_A_UNIT of them a unit, whose first one is copied in a burst (16 x 21 x 256 x 256: 0.95
# of the time of 8 of them, with the gradient 0.85).
WIDEST, TILE_BYTES, USUAL, TILES_A_UNIT, FEWEST, TURNS_A_UNIT = 16, (1 << 17) - 1, 8, 8, 8, 48
# Of so many classes that a vector of rows takes more than TALLEST bytes, they are streamed: units as wide as lines are,
# or WIDEST_STREAM vectors (512 rows of 32000: 0.8 of the time of half of that), SPAN vectors or LEAST lines to a block.
# Tiles took 4 times as long for 512 rows of 32000, and 30 for 8 rows of 1000000; of 3000 classes, gradients are faster
# in tiles. Values of rows side by side are streamed from a quarter of TALLEST on (2000 classes of 500 rows: 0.78 of the
# time, with class probabilities 0.22; of 600 classes 1.2), and so are gradients of class probabilities in long lines
# (0.6; in lines of 64 rows 1.2), but not in half precision (1.05 to 1.7). Few rows of FOLDED_FROM classes or more are
# folded into vectors, and streamed (a row of 1000 in reverse: 0.3 of the time of a tile). Units are cut into pieces of
# a PIECE of elements or more, for there to be PIECES of them.
TALLEST, WIDEST_STREAM, SPAN, LEAST = 1 << 18, 32, 256, 16
FOLDED_FROM, PIECE, PIECES = 400, 1 << 16, 32
# Other rows go through a tile of one vector. A unit is LINED_UP of them, or SHARED where other rows lie between, which
# are in the same lines of memory and come next (100000 x 10 x 8: 0.6 of the time, 0.25 with the gradient).
LINED_UP, SHARED = 8, 2
# Rows whose classes lie side by side are done in groups from so many classes on, by bytes of an element in the type
# that is computed in. With AVX-512, 65 take 1.08 times as long as in tiles, but 72 take 0.93 of the time, 128 take 0.8,
# and 200 in float64 0.77. Without, there are too few registers to transpose tiles in: 20 take 1.02 of the time for
# values and 0.75 for gradients, 64 take 0.69 and 0.59. A group needs a vector of classes: 16 and 8.
GROUPS_FROM = {4: 72, 8: 36} if HAS_AVX512 else {4: 20, 8: 16}
# They are done one after the other from so many on. Without AVX-512, float32 is faster in groups up to 1000 (400 take
# 0.81 of the time, 700 take 0.93), but gradients that go past the caches are not, as they come in bursts (500 take
# 1.02 times as long, 700 take 1.13 times).
ROWS_FROM = {4: 400, 8: 400} if HAS_AVX512 else {4: 500, 8: 400}
# So many of their elements are a unit: a quarter of it, and 16384 x 100 took 1.04 times as long.
GROUPED = 1 << 15
# So many vectors of log-probabilities are a unit of nll_loss's value: of one, 8192 rows took 1.2 times as long.
PICKED = 16
# Rows that are done one after the other are HEIGHT to a unit, whose losses are computed together. Long ones are fewer
# where there would be fewer than FEW units for threads to share (with two threads, 1.01 times as long on average: the
# last row of a unit is not written beside a next one); short ones up to HIGHEST where there are MANY units all the same
# (8192 x 1000 takes 0.97 of the time: the maximum of a unit's first row takes a pass of its own).
HEIGHT, FEW = 8, 64
HIGHEST, MANY = 32, 256
MOST_OF_A_ROW = 1 << 22  # bytes of scratch


def _signature(x, t, q):
    compute = compute_type(x)
    name = compute.name
    arrays = (
        array_type(x, 4), array_type(t, 3), array_type(q, 4),
        types.Array(compute, 1, "C", readonly=True), array_type("f8", 3),
        array_type(x, 4, writable=True), array_type(name, 3, writable=True),
    )  # fmt: skip
    return (
        *[types.intp] * 4, LAYOUT, compute, compute, compute, *map(Address, arrays), types.float64, types.float64,
    )  # fmt: skip


ROWS, GROUPS, TILES, PICKS = (
    Kernel(chunk.__name__, driver_of(chunk), _signature) for chunk in (rows, groups, tiles, picks)
)
STREAMS = Kernel("streams", driver_of(conclude, sum_piece, write_piece, KEPT), _signature)
# Stand-ins for operands that a call does without.
NO_LABELS = np.empty((0, 0, 0), np.int64)
NO_ROWS = {code: np.empty((0, 0, 0), code) for code in "fd"}
NO_OUT = {code: np.empty((0, 0, 0, 0), code) for code in "fdHh"}
ROW_AXES = 3  # far, outer, inner: more of them, which memory does not let merge, are looped over in Python


def operands(
    x: Array,
    t: Array | None,
    q: Array | None,
    weight: Array,
    upstream: Array | None,
    out: Array | None,
    loss: Array | None,
) -> Operands:
    """The operands of a kernel, with stand-ins for those that are absent."""
    code, stored = weight.dtype.char, x.dtype.char
    return Operands(
        x,
        NO_LABELS if t is None else t,
        x if q is None else q,
        weight,
        NO_ROWS["d"] if upstream is None else upstream,
        NO_OUT[stored] if out is None else out,
        NO_ROWS[code] if loss is None else loss,
    )


def prepare(
    along: bool,
    normalized: bool,
    views: Operands,
    kind: int,
    value: bool,
    form: int,
    nontemporal: int,
    ignore: int,
    smoothing: float,
    scan: int,
    mean: bool,
) -> Launch:
    """One piece of a row-wise problem, for operands that lie as `views` do.

    A call takes the operands, what gradients are multiplied by and what a mean is divided by, and gives (sum of losses,
    labels out of range, weight of the rest): the last two where labels are scanned.
    """
    step = VECTOR_BYTES // views.weight.itemsize
    fold = 1
    if normalized and views.x.shape[3] == 1:
        views = _turned(views)
    if not along and not normalized and (not views.weight.size or (kind == CLASS_INDEX and smoothing == 0.0)):
        views, fold = _folded(views, step)
    x, t, q, weight = views[:4]
    far, _, classes, _ = x.shape
    if normalized:
        cut = _cut_for_picks(x, step, form)
    elif along:
        cut = _cut_for_rows(x, step, MOST_OF_A_ROW // weight.itemsize if form == GRADIENT else 0)
    elif classes >= GROUPS_FROM[weight.itemsize] and are_side_by_side(_per_class(views), 2):
        cut = _cut_for_groups(x, step)
    elif fold > 1 or classes * VECTOR_BYTES > _tallest(x, step, kind, form):
        cut = _cut_for_streams(x, step, fold)
    else:
        cut = _cut_for_tiles(x, step, kind == PROBABILITIES or smoothing > 0.0, nontemporal > 0)
    share, uniform, like = 1.0 - smoothing, smoothing / classes, like_of(weight.dtype.char)
    numbers = Numbers(
        kind, value, form, nontemporal, ignore, scan, pieces_of(t) if scan else 0, mean, cut.per_unit, cut.breadth,
        cut.room, fold, cut.cuts, cut.cuts + (classes % fold > 0),
    )  # fmt: skip
    constants = (layout_of(views, *numbers), share, uniform, like)
    return Launch(
        cut.kernel, (x.dtype.char, t.dtype.char, q.dtype.char), constants, cut.units, cut.unit_elements, far, cut.cuts
    )


class Cut(NamedTuple):
    """A kernel, and how its work is cut; the last four stand among Numbers."""

    kernel: Kernel
    units: int  # of each plane
    unit_elements: int
    per_unit: int
    breadth: int = 0
    room: int = 0
    cuts: int = 1


def _cut_for_picks(x: Array, step: int, form: int) -> Cut:
    _, outer, classes, inner = x.shape
    # All of a row is written, or a line of memory read.
    per_unit, a_row = (step, classes) if form == GRADIENT else (PICKED * step, LINE // x.itemsize)
    return Cut(PICKS, outer * -(-inner // per_unit), min(per_unit, inner) * a_row, per_unit)


def _cut_for_rows(x: Array, step: int, most: int) -> Cut:
    _, outer, classes, _ = x.shape
    if classes <= SHORT * step:
        per_unit = max(min(HIGHEST, outer // MANY), HEIGHT)
    else:
        per_unit = min(HEIGHT, -(-outer // FEW))
    return Cut(ROWS, -(-outer // per_unit), classes * per_unit, per_unit, room=room_of_row(classes, step, most))


def _cut_for_groups(x: Array, step: int) -> Cut:
    _, outer, classes, inner = x.shape
    per_unit = max(GROUPED // (classes * step), 1) * step
    units, elements = outer * -(-inner // per_unit), classes * min(per_unit, inner)
    return Cut(GROUPS, units, elements, per_unit, room=room_of_group(classes, step))


def _fill_lines(x: Array, step: int) -> bool:
    """Whether rows lie side by side, and are more than a vector of them."""
    return x.strides[3] == x.itemsize and x.shape[3] > step


def _whole(x: Array, step: int) -> int:
    """Rows that lie along inner, to whole vectors: one takes as long where some are missing."""
    return -(-x.shape[3] // step) * step


def _tallest(x: Array, step: int, kind: int, form: int) -> int:
    """Most bytes of a vector of rows that goes through a tile."""
    soon = form == LOSS_ONLY or (kind == PROBABILITIES and _whole(x, step) >= WIDEST * step)
    return TALLEST // 4 if soon and _fill_lines(x, step) and x.itemsize > 2 else TALLEST


def _cut_for_streams(x: Array, step: int, fold: int) -> Cut:
    _, outer, classes, _ = x.shape
    whole = _whole(x, step)
    groups = -(-whole // (step * WIDEST_STREAM)) if _fill_lines(x, step) else whole // step
    breadth = -(-whole // (step * groups))
    units, elements = outer * groups, classes // fold * min(breadth * step, whole)
    cuts = max(1, min(-(-PIECES // units), elements // PIECE))
    lines = max(SPAN // breadth, LEAST)
    return Cut(STREAMS, units, elements, lines, breadth, room_of_stream(lines, breadth, step), cuts)


def _cut_for_tiles(x: Array, step: int, dense: bool, past_caches: bool) -> Cut:
    _, outer, classes, inner = x.shape
    aliased = are_aliased(classes, x.strides[2])
    per_unit, breadth = SHARED if outer > 1 and abs(x.strides[1]) < abs(x.strides[3]) else LINED_UP, 1
    if _fill_lines(x, step):
        if FEWEST <= classes <= 2 * WIDEST and not dense:
            breadth, tiles_a_unit = classes, TURNS_A_UNIT
        else:
            vector = (classes + FACTS * TILES_A_UNIT) * VECTOR_BYTES
            # Even, so that classes, with a vector before each, lie an odd number of lines apart: in sets of the cache
            # of their own.
            breadth = max(min(2 * WIDEST if aliased else WIDEST, (TILE_BYTES // vector - 1) & -2), USUAL)
            tiles_a_unit = TILES_A_UNIT
        per_unit = breadth * max(min(tiles_a_unit, outer * -(-inner // (breadth * step)) // FEW), 1)
    units, elements = outer * -(-inner // (per_unit * step)), classes * min(per_unit * step, _whole(x, step))
    room = room_of_tile(dense, aliased, classes, per_unit, breadth, step, past_caches)
    return Cut(TILES, units, elements, per_unit, breadth, room)


def _per_class(views: Operands) -> list[Array]:
    return [a for a in (views.x, views.q, views.out) if a.size]


def _folded(views: Operands, step: int) -> tuple[Operands, int]:
    """(views, how many classes of all inner rows make a line that fills a vector), or 1 where they are not folded.

    Few rows are, of many classes that lie apart: those that, with their classes, are at equal distances, or else each
    one by itself.
    """
    _, outer, classes, inner = views.x.shape
    if classes < FOLDED_FROM or are_side_by_side(_per_class(views), 2):
        return views, 1
    turned = _turned(views)
    if 2 * inner <= step and _are_even(views):
        return views, step // inner
    if 2 * outer <= step and _are_even(turned) and (outer > 1 or 2 * inner <= step):
        return turned, step // outer
    return views, 1


def _turned(views: Operands) -> Operands:
    """The views with outer and inner rows in each other's place."""
    return Operands(*(a if a.ndim == 1 else a.swapaxes(1, -1) for a in views))


def _are_even(views: Operands) -> bool:
    """Whether classes, and the rows between them, are at equal distances."""
    inner = views.x.shape[3]
    return inner == 1 or all(a.strides[2] == inner * a.strides[3] for a in _per_class(views))
