"""Which backend solves a problem, and the three entry points that every loss has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from nbloss import arguments, output
from nbloss.cuda.arrays import on_device
from nbloss.errors import shown
from nbloss.plans import FACTORS, WEIGHTS, Given, Key, keep, key_of, replay, with_factor
from nbloss.problem import GRADIENT, LOSS_ONLY, Array, Backend, Pointwise, Rowwise, is_device_view
from nbloss.processes import undivided

P = ParamSpec("P")
Problem = TypeVar("Problem", Pointwise, Rowwise)


def results(
    entry: str, solve: Callable[[list[Any]], tuple[Any, Any]], names: Sequence[str], values: list[Any]
) -> tuple[Any, Any]:
    """Call `solve` with arguments of these names, arrays on a device as views of their memory."""
    there = [k for k, v in enumerate(values) if on_device(v) and names[k] not in _NO_ARRAYS]
    if not there:
        return solve(values)
    return cast("tuple[Any, Any]", _plans_for(names[there[0]]).call(entry, solve, names, values, there))


_NO_ARRAYS = {"axis", "ignore_index", "label_smoothing", "reduction", "backend", "stream", "check"}


def plain_array(name: str, value: Any) -> Any:
    """An array of another library on the host, or a subclass, as NumPy's; a class index as a 0-d one; else the same."""
    if type(value) is np.ndarray or isinstance(value, (float, np.floating)):
        return value
    if name == "target" and type(value) is int:
        return np.asarray(value)
    if hasattr(type(value), "__cuda_array_interface__") and not getattr(value, "is_cpu", False):
        return value  # its DLPack, which is asked later on, takes 2 µs to say where it is
    return arguments.as_array(name, value) if hasattr(value, "__array__") and not on_device(value) else value


def choose(backend: Backend, stream: object, problem: Problem) -> Problem:
    """The problem, with where it is to be solved: "auto" is where its arrays are."""
    if not isinstance(backend, str) or backend not in get_args(Backend):
        raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', got {shown(backend)}")
    if output.are_on_device(problem):
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
    out: Any = None,
    grad_output: ArrayLike | None = None,
    key: Key | None,
    given: Given,
) -> tuple[Any, Array | None]:
    """(the loss if `value`, the array that `form` asks for): nothing is computed before all arguments are checked.

    How it is done is kept for calls of the same `key`, where the arrays `given` (x, target, options) could be used as
    they are.
    """
    factor = output.upstream(problem, grad_output)
    written: Array | None = None
    in_place = False
    if form != LOSS_ONLY:
        written, in_place = output.array_for(problem, out, grad_output, given)
        problem.into_new = out is None
    if problem.backend == "cuda":
        cuda = _cuda()
        on_its_device = cuda.run if is_device_view(problem.x) else cuda.through_device
        return on_its_device(problem, value, form, written, in_place, factor), written if out is None else out
    plan, lasting = _cpu().plan(problem, value, form, written, in_place, factor)
    if key is not None and lasting:
        keep(key, plan, problem, given, factor if factor is not grad_output else None)
    weights = {n: a for n in WEIGHTS if (a := getattr(problem, n, None)) is not None}
    found = plan(problem.x, problem.target, written, factor if factor.ndim else float(factor), **weights)
    return found, written if out is None else out


@functools.cache
def _cpu() -> Any:
    """The CPU backend. Numba is imported here, at the first computation."""
    with undivided():
        from nbloss.cpu import solve as cpu
    return cpu


@functools.cache
def _device() -> Any:
    """Devices and what lies on them."""
    from nbloss.cuda import device

    return device


@functools.cache
def _plans_for(argument: str) -> Any:
    """Calls on device arrays, of which this argument is one. CUDA is imported here too."""
    _device().require(f"{argument} is a device array, and the CUDA backend")
    with undivided():
        from nbloss.cuda import plans
    return plans


@functools.cache
def _cuda() -> Any:
    """The CUDA backend. CUDA is imported here, when it is asked for."""
    with undivided():
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

    name = define.__name__
    names = list(inspect.signature(define).parameters)[:2]

    def entry(called: str, value: bool, form: int, part: int | None) -> Callable[..., Any]:
        """What users call: a function that gives a part of (loss, gradient), or both."""

        def call(*args: Any, **kwargs: Any) -> Any:
            grad_output = out = key = None
            if form == GRADIENT:
                if kwargs:
                    grad_output, out = kwargs.pop("grad_output", None), kwargs.pop("out", None)
                if len(args) > 2:
                    args, grad_output, out = _split(args, grad_output, out)
            if kwargs:
                while len(args) < 2 and names[len(args)] in kwargs:
                    args = (*args, kwargs.pop(names[len(args)]))
            if type(grad_output) is int and -(2**63) <= grad_output < 2**63:
                grad_output = float(grad_output)
            known = None
            if len(args) == 2 and (grad_output is None or type(grad_output) in FACTORS):
                x, target = args
                key = key_of(called, x, target, out, kwargs)
                if key is None and (plain := _plain(names, args, kwargs)):
                    more = () if form == LOSS_ONLY else (grad_output, out)
                    return call(*plain[0], *more, **plain[1])
                factor = 1.0
                if grad_output is not None:
                    key, factor = with_factor(key, grad_output, out)
                known = replay(key, x, target, form, out, factor, kwargs)
            if known is None:
                known = afresh(args, kwargs, grad_output, out, called, key, value, form)
            return known if part is None else known[part]

        return call

    # Apart from `call`, in which it would make cells of variables: 0.1 µs of a small call.
    def afresh(
        args: Sequence[Any],
        kwargs: dict[str, Any],
        grad_output: Any,
        out: Any,
        entry: str,
        key: Any,
        value: bool,
        form: int,
    ) -> tuple[Any, Any]:
        def solved(values: list[Any]) -> tuple[Any, Any]:
            *given, grad_output, out = values[: len(args) + 2]
            given.append(dict(zip(kwargs, values[len(args) + 2 :])))
            problem = cast("Callable[..., Pointwise | Rowwise]", define)(*given[:-1], **given[-1])
            return solve(problem, value=value, form=form, out=out, grad_output=grad_output, key=key, given=tuple(given))

        called = [*names[: len(args)], *["argument"] * (len(args) - 2), "grad_output", "out", *kwargs]
        return results(entry, solved, called, [*args, grad_output, out, *kwargs.values()])

    value = functools.wraps(define)(entry(name, True, LOSS_ONLY, 0))
    value.__annotations__ = {**define.__annotations__, "return": "Any"}
    setattr(value, "__signature__", inspect.signature(define).replace(return_annotation="Any"))  # noqa: B010

    for short, returns, result, both in (
        ("value_and_grad", "The loss and its gradient", "tuple[Any, Array]", True),
        ("grad", "The gradient", "Array", False),
    ):
        method = entry(f"{name}.{short}", both, GRADIENT, None if both else 1)
        method.__name__, method.__qualname__, method.__module__ = short, f"{name}.{short}", define.__module__
        method.__annotations__["return"] = result
        setattr(method, "__signature__", _with_gradient_arguments(define, result))  # noqa: B010
        method.__doc__ = f"""{returns} of `{name}`, with the same arguments and two more.

        grad_output is the upstream gradient: a scalar, or with ``reduction="none"`` an array of the loss's shape; None
        means 1. The gradient is that of ``sum(grad_output * loss)`` with respect to the first argument, in its shape
        and dtype. `out` receives it: a writable array of that shape and dtype and of any strides, which may be the
        first argument itself; another dtype is a TypeError, another shape, a read-only array or any other overlap with
        an argument a ValueError. A call that raises has changed no input, in place included, unless Ctrl-C ends it on
        its way; any other `out` may hold anything then.
        """
        setattr(value, short, method)
    return cast("Loss[P]", value)


def _plain(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """Arguments with NumPy's arrays, for which there are plans, for those of other libraries; None if all are as given.

    A call with PyTorch's tensors took 38 µs without a plan, and takes 5 with one.
    """
    arrays = [plain_array(name, value) for name, value in zip(names, args)]
    if kwargs:
        weights = {name: plain_array(name, kwargs[name]) for name in WEIGHTS if name in kwargs}
        if any(weights[name] is not kwargs[name] for name in weights):
            return arrays, {**kwargs, **weights}
    return (arrays, kwargs) if arrays[0] is not args[0] or arrays[1] is not args[1] else None


def _split(args: tuple[Any, ...], grad_output: Any, out: Any) -> tuple[tuple[Any, ...], Any, Any]:
    """The arguments of a loss without grad_output and out, third and fourth, which were not given by name too."""
    extra = args[2:]
    if len(extra) > 2:
        raise TypeError("too many positional arguments: options are given by name")
    for name, twice in (("grad_output", grad_output), ("out", out if len(extra) == 2 else None)):
        if twice is not None:
            raise TypeError(f"got multiple values for argument {name!r}")
    return args[:2], extra[0], extra[1] if len(extra) == 2 else out


def _with_gradient_arguments(define: Callable[..., object], returns: str) -> inspect.Signature:
    signature = inspect.signature(define)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    added = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in ("grad_output", "out")
    ]
    return signature.replace(parameters=[*positional, *added, *options], return_annotation=returns)
