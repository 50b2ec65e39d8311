"""What the row-wise kernels and their parts are given."""

from typing import Any, NamedTuple


class Operands(NamedTuple):
    """Arrays: x, q (class probabilities) and out are (outer, classes, inner); t, upstream and loss are (outer, inner).

    A driver has `far` of them, one axis more. An absent q is x, other absent ones have no element.
    """

    x: Any
    t: Any
    q: Any
    weight: Any  # (classes,)
    upstream: Any  # what the gradient of each row is multiplied by
    out: Any
    loss: Any


class Mode(NamedTuple):
    """What is to be done: the same for every row."""

    kind: Any  # of target
    value: Any  # whether losses, or their sum, are asked for
    form: Any  # of what is written
    nontemporal: Any  # 0, or results are written past the caches
    ignore: Any  # the label of rows that do not count
    share: Any  # 1 - smoothing
    uniform: Any  # smoothing / classes


class Numbers(NamedTuple):
    """The integers that follow how a driver's operands lie: most of Mode and Scratch, and how labels are scanned."""

    kind: Any
    value: Any
    form: Any
    nontemporal: Any
    ignore: Any
    scan: Any  # 0, UNCHECKED or CHECKED (see ``rowwise_driver``)
    scanned: Any  # pieces of labels to be scanned
    mean: Any  # whether gradients are those of a mean
    per_unit: Any
    breadth: Any
    room: Any  # elements of a block's memory
    fold: Any
    cuts: Any
    pieces: Any


class Summed(NamedTuple):
    """What the result of a row is made of, once it has been summed."""

    m: Any  # its maximum
    r: Any  # the sum of exp(x - m) but for one at the maximum
    log_norm: Any
    scale: Any  # for `scaled_exp`
    exps: Any  # holds its exponentials if `kept`
    kept: Any
    factor: Any  # that the gradient is multiplied by
    a: Any  # its target's mass
    slope: Any  # a / the sum of its exponentials
    shift: Any  # what smoothing takes from every class
    exp_max: Any  # scaled_exp of m
    inverse: Any  # 1 / exp_max
    target: Any  # an index, or -1
    at_target: Any  # what is written there


class Beside(NamedTuple):
    """What is done beside the sum of a row's chunk."""

    other: Any  # of its elements, `offset` further than those that are summed, the maximum is found
    offset: Any
    q: Any  # is fetched `far` elements ahead, x `near` ones
    near: Any
    far: Any
    earlier: Any  # the row that was summed before, which is written to out[place]
    out: Any
    place: Any


class Turn(NamedTuple):
    """What is done beside the sums of a vector of rows of a tile, of as many vectors as classes: those of one class of
    the other tile are moved.
    """

    x: Any  # that class of x is copied from row `source` on, to the other tile, from `to` on
    source: Any
    to: Any
    writes: Any  # whether the results that lie there go to that class of `out` first, from row `place` on
    out: Any
    place: Any


class Column(NamedTuple):
    """A vector of rows, one lane for each."""

    i: Any  # where it is: row k and `count` - 1 after it
    k: Any
    count: Any
    labels: Any
    m: Any  # maxima
    scale: Any  # for `scaled_exp`
    exp_max: Any  # scaled_exp of m
    inverse: Any  # 1 / exp_max


class Scratch(NamedTuple):
    """Memory of a block of units, and numbers that a kernel needs besides."""

    memory: Any  # for a tile, a group, a block or a row
    numbers: Any  # as many as a vector has lanes
    labels: Any  # likewise
    kept: Any  # what `streams` keeps of pieces
    first: Any  # the unit that `kept` begins with, counted from the first one of this plane: it may lie in one before
    per_unit: Any  # rows of a unit of work; in `tiles`, vectors of rows; in `streams`, lines of a block
    breadth: Any  # vectors of rows in a tile or a block
    fold: Any  # classes of a line of `streams`
    cuts: Any  # pieces that its lines are in
    pieces: Any  # and all of them, with one of the classes that no line holds
    row_mass: Any  # dense target mass that every row has, from smoothing
    own_factor: Any  # what gradients of all rows are multiplied by
