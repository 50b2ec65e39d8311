"""What a unit of a pointwise loss is made of: a piece of a line of its (far, outer, inner) operands, or several lines.

Short lines that lie one after the other in memory are one line. Weights that do not, a weight a column or a row, are
spread over it in memory of a block's own: line by line, losses took 7 times as long as without weights where lines have
10 elements, and 30 times where they have 2.
"""

from nbloss.cpu.lanes import lanes
from nbloss.cpu.memory import load, load_one, store
from nbloss.cpu.parts import inline
from nbloss.cpu.strided import read
from nbloss.cpu.views import lent_line, lent_to, line_at, plane_of
from nbloss.problem import Array

SEGMENT = 4096  # elements of a line to a unit
SPAN = 2048  # elements of several lines to a unit
BEYOND = 64  # what is written past the last of them
PERIOD = 256  # elements of equal lines that are written one by one, before whole vectors repeat them


def lines_to_a_unit(views: tuple[Array, ...]) -> int:
    """How many lines of the operands may be done as one: 1 where they do not lie one after the other."""
    if len(views[0]) > 1:
        return 1
    x, t, weight, pos_weight, upstream, gradient, loss = (view[0] for view in views)
    outer, inner = x.shape
    if outer == 1 or inner > SPAN // 2:
        return 1
    if any(a.size and a.strides != (inner * a.itemsize, a.itemsize) for a in (x, t, gradient, loss)):
        return 1
    if any(a.strides[0] != inner * a.strides[1] and a.dtype != upstream.dtype for a in (weight, pos_weight)):
        return 1
    return SPAN // inner


@inline
def _line(a, f, i):
    return plane_of(plane_of(a, f), i)


@inline
def piece(arrays, unit, per_line, is_first, memory, like):
    """A piece of a line, of which there are so many: the line of each array, and from where to where."""
    x, t, weight, pos_weight, upstream, gradient, loss = arrays
    i = unit // per_line
    start = (unit - i * per_line) * SEGMENT
    stop = min(x.shape[2], start + SEGMENT)
    f = i // x.shape[1]
    i -= f * x.shape[1]
    line = (
        _line(x, f, i), _line(t, f, i), _line(weight, f, i), _line(pos_weight, f, i), _line(upstream, f, i),
        _line(gradient, f, i), _line(loss, f, i),
    )  # fmt: skip
    return line, start, stop


@inline
def _spread(a, i, rows, inner, memory, at, is_first, like):
    """Rows i to i + rows of `a` as one line: where they are, or in memory[at:], which equal rows fill once."""
    count = rows * inner
    if a.strides[0] == inner * a.strides[1]:
        return line_at(a, i, count)
    step = lanes(like)
    values = lent_to(a, memory, at, count + BEYOND)
    if a.strides[1] == 0:
        for r in range(rows):
            same = load_one(line_at(a, i + r, inner), 0, like)
            for k in range(r * inner, r * inner + inner, step):
                store(values, k, same)
    elif is_first or a.strides[0]:
        apart = rows if a.strides[0] else min(rows, PERIOD // inner + 1)
        for r in range(apart):
            line = line_at(a, i + r, inner)
            for j in range(0, inner, step):
                store(values, r * inner + j, read(line, j, min(step, inner - j), 0.0, like))
        for k in range(apart * inner, count, step):
            store(values, k, load(values, k - apart * inner, like))
    return lent_line(a, memory, at, count)


@inline
def several(arrays, unit, rows, is_first, memory, like):
    """The same of so many lines as one, `far` being 1; each block has `memory`, with room for three."""
    x, t, weight, pos_weight, upstream, gradient, loss = arrays
    x, t, gradient, loss = plane_of(x, 0), plane_of(t, 0), plane_of(gradient, 0), plane_of(loss, 0)
    weight, pos_weight, upstream = plane_of(weight, 0), plane_of(pos_weight, 0), plane_of(upstream, 0)
    outer, inner = x.shape
    i = unit * rows
    n = min(rows, outer - i)
    count, room = n * inner, memory.shape[0] // 3
    w = _spread(weight, i, n, inner, memory, 0, is_first, like)
    p = _spread(pos_weight, i, n, inner, memory, room, is_first, like)
    u = _spread(upstream, i, n, inner, memory, 2 * room, is_first, like)
    xs, ts = line_at(x, i, count), line_at(t, i, count)
    gradients, losses = line_at(gradient, i, count), line_at(loss, i, count)
    return (xs, ts, w, p, u, gradients, losses), 0, count
