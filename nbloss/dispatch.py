"""Which backend solves a problem, and the three entry points that every loss has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from numpy.typing import ArrayLike

from nbloss import problem as problems
from nbloss.cuda.arrays import delivered, on_device
from nbloss.problem import GRADIENT, LOSS_ONLY, Array, Pointwise, Rowwise

P = ParamSpec("P")
Problem = TypeVar("Problem", Pointwise, Rowwise)


def arrived(names: Iterable[str], values: Iterable[Any], stream: object) -> list[Any]:
    """Arguments with arrays on a device as views of their memory, and all others as they are."""
    return [
        _arrive(name, v, stream) if on_device(v) else v for v, name in zip(values, chain(names, repeat("argument")))
    ]


def _arrive(name: str, value: object, stream: object) -> Array:
    return cast("Array", _device().arrive(name, value, stream))


def choose(backend: str, stream: object, problem: Problem) -> Problem:
    """The problem, with where it is to be solved: "auto" is where its arrays are."""
    if backend not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', got {backend!r}")
    if problems.at_one_place(problem):
        if backend == "cpu":
            raise TypeError(
                "backend='cpu' takes arrays on the host, got arrays on a device: copy them, or leave it out"
            )
        problem.backend = "cuda"
    elif backend == "cuda":
        _device().require("backend='cuda'")
        problem.backend, problem.stream = "cuda", stream
    elif stream is not None:
        raise ValueError("stream applies to device arrays, and all arrays given are on the host")
    return problem


def solve(
    problem: Pointwise | Rowwise,
    *,
    value: bool,
    form: int = LOSS_ONLY,
    out: object = None,
    grad_output: ArrayLike | None = None,
) -> tuple[Any, Array | None]:
    """(the loss if `value`, the array that `form` asks for): nothing is computed before all arguments are checked."""
    factor = problems.upstream(problem, grad_output)
    written: Array | None = None
    in_place = False
    if form != LOSS_ONLY:
        written, in_place = problems.output(problem, out, grad_output)
    if problem.backend == "cuda":
        cuda = _cuda()
        on_its_device = cuda.run if problems.is_device_view(problem.x) else cuda.through_device
        return on_its_device(problem, value, form, written, in_place, factor), written
    cpu = _cpu()
    if isinstance(problem, Pointwise):
        return cpu.pointwise(problem, value, written, in_place, factor), written
    return cpu.rowwise(problem, value, form, written, factor), written


@functools.cache
def _cpu() -> Any:
    """The CPU backend. Numba is imported here, at the first computation."""
    from nbloss.cpu import solve as cpu

    return cpu


@functools.cache
def _device() -> Any:
    """Devices and what lies on them."""
    from nbloss.cuda import device

    return device


@functools.cache
def _cuda() -> Any:
    """The CUDA backend. CUDA is imported here, when it is asked for."""
    from nbloss.cuda import solve as cuda

    return cuda


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

    names = [*list(inspect.signature(define).parameters)[:2], "grad_output", "out"]

    def run(args: Sequence[Any], kwargs: dict[str, Any], value: bool, form: int) -> tuple[Any, Any]:
        if any(map(on_device, args)) or (kwargs and any(map(on_device, kwargs.values()))):
            stream = kwargs.get("stream")
            args = arrived(names, args, stream)
            arrays = {n: v for n, v in kwargs.items() if n in names or n in ("weight", "pos_weight")}
            kwargs |= dict(zip(arrays, arrived(arrays, arrays.values(), stream)))
        grad_output = out = None
        if form == GRADIENT:
            args, grad_output, out = _split(args, kwargs)
        problem = cast("Callable[..., Pointwise | Rowwise]", define)(*args, **kwargs)
        return solve(problem, value=value, form=form, out=out, grad_output=grad_output)

    @functools.wraps(define)
    def value(*args: P.args, **kwargs: P.kwargs) -> Any:
        return delivered(run(args, kwargs, True, LOSS_ONLY)[0])

    def value_and_grad(*args: Any, **kwargs: Any) -> tuple[Any, Array]:
        loss, gradient = run(args, kwargs, True, GRADIENT)
        return delivered(loss), delivered(gradient)

    def grad(*args: Any, **kwargs: Any) -> Array:
        return cast("Array", delivered(run(args, kwargs, False, GRADIENT)[1]))

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


def _split(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any, Any]:
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
