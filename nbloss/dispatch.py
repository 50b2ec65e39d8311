"""Which backend solves a problem, and the three entry points that every loss has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, cast

from numpy.typing import ArrayLike

from nbloss import problem as problems
from nbloss.problem import GRADIENT, LOSS_ONLY, Array, Pointwise, Rowwise

P = ParamSpec("P")


def choose(backend: str, stream: object) -> None:
    """Raise unless the asked-for backend can be used. Host arrays run on the CPU; it is the only backend so far."""
    if backend == "cuda":
        raise RuntimeError(f"backend='cuda' cannot be used: {problems.NO_CUDA}")
    if backend not in ("auto", "cpu"):
        raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', got {backend!r}")
    if stream is not None:
        raise ValueError("stream applies to device arrays, and all arrays given are on the host")


def solve(
    problem: Pointwise | Rowwise,
    *,
    value: bool,
    form: int = LOSS_ONLY,
    out: object = None,
    grad_output: ArrayLike | None = None,
) -> tuple[Any, Array | None]:
    """(the loss if `value`, the array that `form` asks for): nothing is computed before all arguments are checked."""
    cpu = _cpu()
    factor = problems.upstream(problem, grad_output)
    written: Array | None = None
    in_place = False
    if form != LOSS_ONLY:
        written, in_place = problems.output(problem, out, grad_output)
    if isinstance(problem, Pointwise):
        return cpu.pointwise(problem, value, written, in_place, factor), written
    return cpu.rowwise(problem, value, form, written, factor), written


@functools.cache
def _cpu() -> Any:
    """The CPU backend. Numba is imported here, at the first computation."""
    from nbloss.cpu import solve as cpu

    return cpu


# --- losses ---------------------------------------------------------------------------------------------------


class Loss(Protocol[P]):
    """A loss: call it for its value, `value_and_grad` for both, `grad` for its gradient alone."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...

    @property
    def value_and_grad(self) -> Callable[..., tuple[Any, Array]]:
        """(loss, gradient), reading the input once."""

    @property
    def grad(self) -> Callable[..., Array]:
        """The gradient of sum(grad_output * loss) with respect to the first argument."""


def loss(define: Callable[P, Pointwise | Rowwise]) -> Loss[P]:
    """Make a loss of a function that has a loss's signature and docstring and returns its problem."""

    @functools.wraps(define)
    def value(*args: P.args, **kwargs: P.kwargs) -> Any:
        return solve(define(*args, **kwargs), value=True)[0]

    def value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, Array]:
        args, grad_output, out = _split(args, kwargs)
        return cast(
            "tuple[Any, Array]",
            solve(define(*args, **kwargs), value=True, form=GRADIENT, out=out, grad_output=grad_output),
        )

    def grad(*args: Any, **kwargs: Any) -> Array:
        args, grad_output, out = _split(args, kwargs)
        return cast(
            "Array", solve(define(*args, **kwargs), value=False, form=GRADIENT, out=out, grad_output=grad_output)[1]
        )

    name = define.__name__
    for method, returns in ((value_and_grad, "The loss and its gradient"), (grad, "The gradient")):
        method.__qualname__ = f"{name}.{method.__name__}"
        method.__module__ = define.__module__
        setattr(method, "__signature__", _with_gradient_arguments(define))  # noqa: B010
        method.__doc__ = f"""{returns} of `{name}`, whose other arguments it takes.

        grad_output is the upstream gradient: a scalar, or with ``reduction="none"`` an array of the loss's shape; None
        means 1. The gradient is that of ``sum(grad_output * loss)`` with respect to the first argument, in its shape
        and dtype. `out` receives it: a writable array of any strides, which may be the first argument itself; any other
        overlap with an argument is a ValueError.
        """
        setattr(value, method.__name__, method)
    return cast("Loss[P]", value)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any, Any]:
    """Take grad_output and out, third and fourth or by name, from the arguments of a loss."""
    grad_output = kwargs.pop("grad_output", None)
    out = kwargs.pop("out", None)
    if len(args) > 2:
        extra = args[2:]
        if len(extra) > 2 or grad_output is not None or (len(extra) == 2 and out is not None):
            raise TypeError("too many positional arguments: options are given by name")
        grad_output = extra[0]
        out = extra[1] if len(extra) == 2 else out
    return args[:2], grad_output, out


def _with_gradient_arguments(define: Callable[..., object]) -> inspect.Signature:
    signature = inspect.signature(define)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    added = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in ("grad_output", "out")
    ]
    return signature.replace(parameters=[*positional, *added, *options])
