"""The pointwise kernels: one text for all losses, each a formula of nbloss.formulas."""

from numba.core import types

from nbloss import formulas
from nbloss.cpu import lines
from nbloss.cpu.compile import Kernel, array_type, compute_type, like_of
from nbloss.cpu.launch import Launch
from nbloss.cpu.operands import LAYOUT, Address, layout_of
from nbloss.cpu.pointwise_driver import driver_of
from nbloss.cpu.simd import allocated, unallocated
from nbloss.problem import Array

DIMS = 3  # of the operands: more axes, which memory does not let merge, are looped over in Python
SUMMAND = formulas.summand.__name__  # as a loss, of which weights are summed


def _signature(x, t, weight, pos_weight):
    compute = compute_type(x)
    written = array_type(x, DIMS, writable=True), array_type(compute.name, DIMS, writable=True)
    arrays = (*(array_type(dtype, DIMS) for dtype in (x, t, weight, pos_weight, compute.name)), *written)
    return (*[types.intp] * 4, LAYOUT, compute, *map(Address, arrays))


def _kernels(kind, *parts):
    # By all passes, loops of BCE with logits are 1.05 times as fast.
    return {
        name: Kernel(f"{name}{kind}", driver_of(formula, *parts), _signature, few_passes=False)
        for name, formula in {**formulas.POINTWISE, SUMMAND: formulas.summand}.items()
    }


# Two of each: where a block has memory of its own, gradients of BCE take 1.08 times as long, by LLVM's choice of
# registers.
KERNELS = _kernels("", unallocated, lines.piece)
SHORT = _kernels(" of short lines", allocated, lines.several)


def prepare(name: str, views: tuple[Array, ...], want: int) -> Launch:
    """One loss over (far, outer, inner) operands that lie as `views` do.

    A call takes the operands and gives (sum of weighted losses, more than 0 if inputs lie outside the domain).
    """
    x, upstream = views[0], views[4]
    far, outer, inner = x.shape
    dtypes = tuple(view.dtype.char for view in views[:4])
    rows, per_line, like = lines.lines_to_a_unit(views), -(-inner // lines.SEGMENT), like_of(x.dtype.char)
    if rows > 1:
        room = 3 * ((lines.SPAN + lines.BEYOND) * upstream.itemsize // 8)
        constants = (layout_of(views, want, rows, room), like)
        return Launch(SHORT[name], dtypes, constants, -(-outer // rows), rows * inner)
    constants = (layout_of(views, want, per_line, 0), like)
    return Launch(KERNELS[name], dtypes, constants, far * outer * per_line, min(inner, lines.SEGMENT))
