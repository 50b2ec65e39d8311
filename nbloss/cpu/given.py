"""What the row-wise kernels and their parts are given."""

from typing import Any, NamedTuple


class Operands(NamedTuple):
    """Arrays: x, q (class probabilities) and out are (outer, classes, inner); t, upstream and loss are (outer, inner).

    An absent q is x, other absent ones have no element.
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
    form: Any  # of what is written
    nontemporal: Any
    ignore: Any  # the label of rows that do not count
    share: Any  # 1 - smoothing
    uniform: Any  # smoothing / classes


class Scratch(NamedTuple):
    """Memory of a block of units, and numbers that a kernel needs besides."""

    memory: Any  # for a tile, a group or a row
    numbers: Any  # as many as a vector has
    labels: Any  # likewise
    per_unit: Any  # rows of a unit of work, in vectors of them where they lie side by side
    breadth: Any  # vectors of rows in a tile
    row_mass: Any  # dense target mass that every row has, from smoothing
    own_factor: Any  # what gradients of all rows are multiplied by
