"""The contestants: ``PEERS[loss][library]`` is a setup that gives a zero-argument callable.

Everything in a setup lies outside the timing: imports, conversion to the library's own arrays, buffers. Every library
is used its normal way, as its users would write it, with the same number of threads.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.cases import HALF, OUT, ROW_FUNCTIONS, VALUE, Array, Case, Inputs
from bench.oracle import Result


class Absent(Exception):
    """A library takes no part, and why."""


@dataclass(frozen=True)
class Contestant:
    """`run` is what is timed; `read` turns what it returned into NumPy for the comparison of results."""

    run: Callable[[], Any]
    read: Callable[[Any], Result]


Setup = Callable[[Case, Inputs, str], Contestant]

MODULES = {
    "nbloss": "nbloss",
    "numpy": "scipy",
    "torch": "torch",
    "torch.compile": "torch",
    "jax": "optax",
    "sklearn": "sklearn",
    "numexpr": "numexpr",
}
LABELS = {
    "nbloss": "nbloss",
    "numpy": "NumPy/SciPy",
    "torch": "torch",
    "torch.compile": "torch.compile",
    "jax": "jax.jit + optax",
    "sklearn": "scikit-learn",
    "numexpr": "numexpr",
    "cupy": "CuPy",
    "liger": "Liger",
    "quack": "QuACK",
}

_threads = 0


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Let the contestants that are set up from now on use `count` threads (JAX always takes all)."""
    global _threads
    _threads = count


def threads() -> int:
    return _threads or available_threads()


def why_missing(library: str) -> str | None:
    """Why a library cannot be imported, or None."""
    if importlib.util.find_spec(MODULES[library]) is None:
        return f"{MODULES[library]} is not installed"
    try:
        importlib.import_module(MODULES[library])
    except Exception as error:  # a library broken in any way is not there
        return f"{MODULES[library]} cannot be imported: {error}".splitlines()[0]
    return None


def _pair(result: Any) -> Result:
    return float(result[0]), np.asarray(result[1])


def _array(result: Any) -> Result:
    return None, np.asarray(result)


def _value(result: Any) -> Result:
    return float(result), None


def _reader(case: Case, work: str) -> Callable[[Any], Result]:
    if case.loss in ROW_FUNCTIONS or work == OUT:
        return _array
    return _value if work == VALUE else _pair


# --- nbloss -------------------------------------------------------------------------------------------------


def _nbloss(case: Case, data: Inputs, work: str) -> Contestant:
    import nbloss

    nbloss.set_num_threads(threads())
    function = getattr(nbloss, case.loss)
    buffer = np.empty_like(data.x) if work == OUT else None
    read = _reader(case, work)
    x = data.x
    if case.loss in ROW_FUNCTIONS:
        return Contestant(lambda: function(x, out=buffer), read)
    options: dict[str, Any] = {}
    if data.weight is not None:
        options["weight" if case.loss == "cross_entropy" else "pos_weight"] = data.weight
    if data.smoothing:
        options["label_smoothing"] = data.smoothing
    target = data.target
    if work == VALUE:
        return Contestant(lambda: function(x, target, **options), read)
    if work == OUT:
        return Contestant(lambda: function.grad(x, target, out=buffer, **options), read)
    return Contestant(lambda: function.value_and_grad(x, target, **options), read)


# --- NumPy and SciPy ----------------------------------------------------------------------------------------


def _numpy_rows(case: Case, data: Inputs, work: str) -> Contestant:
    """Softmax and log-softmax along the last axis."""
    x, log = data.x, case.loss == "log_softmax"
    buffer = np.empty_like(x) if work == OUT else None

    def run() -> Array:
        shifted = np.subtract(x, x.max(axis=-1, keepdims=True), out=buffer)
        if log:
            shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
            return shifted
        np.exp(shifted, out=shifted)
        shifted /= shifted.sum(axis=-1, keepdims=True)
        return shifted

    return Contestant(run, _array)


def _numpy_nll(case: Case, data: Inputs, work: str) -> Contestant:
    x, target = data.x, data.target
    assert target is not None
    rows, buffer = np.arange(len(x)), np.empty_like(x)

    def gradient() -> Array:
        result = buffer if work == OUT else np.empty_like(x)
        result.fill(0)
        result[rows, target] = -1 / len(x)
        return result

    def run() -> Any:
        if work == OUT:
            return gradient()
        value = -x[rows, target].mean()
        return value if work == VALUE else (value, gradient())

    return Contestant(run, _reader(case, work))


def _numpy_cross_entropy(case: Case, data: Inputs, work: str) -> Contestant:
    target, weight = data.target, data.weight
    assert target is not None
    if case.variant == "ignored":
        raise Absent("has no ignore_index")
    classes, half = data.x.shape[1], case.dtype in HALF
    labels = None if case.variant == "probabilities" else np.expand_dims(target, 1)
    mass = np.asarray(target, np.float32) if labels is None and half else target
    buffer = np.empty_like(data.x) if work == OUT and not half else None
    if work == OUT and half:
        raise Absent("computes half precision in float32 arrays")
    if weight is not None:
        row_weight = weight[target]
        count = row_weight.sum()
    else:
        row_weight, count = None, np.float32(data.x.size / classes)

    def run() -> Any:
        x = data.x.astype(np.float32) if half else data.x  # ufuncs on half precision are slow and lose digits
        shifted = np.subtract(x, x.max(axis=1, keepdims=True), out=buffer)
        if labels is not None:
            picked = np.take_along_axis(shifted, labels, 1)
            if data.smoothing:
                mean = shifted.mean(axis=1, keepdims=True)
                picked = (1 - data.smoothing) * picked + data.smoothing * mean
        else:
            picked = np.einsum("nc,nc->n", mass, shifted)[:, None]
        e = np.exp(shifted, out=shifted)
        total = e.sum(axis=1, keepdims=True)
        value: Any = None
        if work != OUT:
            losses = np.log(total) - picked
            value = losses.mean() if row_weight is None else (losses[:, 0] * row_weight).sum() / count
            if work == VALUE:
                return value
        if row_weight is None:
            e /= total * count
        else:
            e *= (row_weight / count)[:, None] / total
        if labels is None:
            e -= mass / count
        else:
            if data.smoothing:
                e -= np.float32(data.smoothing / classes / count)
            entry = np.take_along_axis(e, labels, 1)
            entry -= (1 - data.smoothing) / count if row_weight is None else (row_weight / count)[:, None]
            np.put_along_axis(e, labels, entry, 1)
        gradient = e.astype(data.x.dtype) if half else e
        return gradient if work == OUT else (value, gradient)

    return Contestant(run, _reader(case, work))


def _numpy_pointwise(case: Case, data: Inputs, work: str) -> Contestant:
    from scipy import special

    x, target, weight, half = data.x, data.target, data.weight, case.dtype in HALF
    assert target is not None
    if half:
        if work == OUT:
            raise Absent("computes half precision in float32 arrays")
        target = target.astype(np.float32)
    buffer = np.empty_like(x) if work == OUT else None

    def value(x: Array, t: Array) -> Any:
        if weight is not None:
            return ((1 - t) * x - (1 + (weight - 1) * t) * special.log_expit(x)).mean()
        if case.loss == "binary_cross_entropy_with_logits":
            return ((1 - t) * x - special.log_expit(x)).mean()
        if case.loss == "binary_cross_entropy":
            return -(special.xlogy(t, x) + special.xlog1py(1 - t, -x)).mean()
        return np.square(x - t).mean() if case.loss == "mse_loss" else np.abs(x - t).mean()

    def gradient(x: Array, t: Array) -> Array:
        if case.loss == "binary_cross_entropy_with_logits":
            result = special.expit(x, out=buffer)
            if weight is not None:
                result *= 1 + (weight - 1) * t
                t = weight * t
            result -= t
        else:
            result = np.subtract(x, t, out=buffer)
            if case.loss == "binary_cross_entropy":
                result /= x * (1 - x)
            if case.loss == "l1_loss":
                np.sign(result, out=result)
        result *= (2 if case.loss == "mse_loss" else 1) / x.size
        return result

    def run() -> Any:
        wide = x.astype(np.float32) if half else x
        t = target.astype(np.float32) if case.variant == "labels" else target  # beside integers it computes in float64
        if work == VALUE:
            return value(wide, t)
        if work == OUT:
            return gradient(wide, t)
        return value(wide, t), gradient(wide, t).astype(x.dtype, copy=False)

    return Contestant(run, _reader(case, work))


# --- torch --------------------------------------------------------------------------------------------------


def _tensor(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_tensor(tensor: Any) -> Array:
    import torch

    return tensor.detach().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().numpy()


def torch_loss(case: Case, target: Any, weight: Any, smoothing: float) -> Callable[[Any], Any]:
    """The loss as a function of the logits alone; tensors of any device."""
    import torch
    from torch.nn import functional

    if case.loss in ROW_FUNCTIONS:
        return lambda x: getattr(torch, case.loss)(x, -1)
    if case.loss == "cross_entropy":
        return lambda x: functional.cross_entropy(x, target, weight=weight, label_smoothing=smoothing)
    if case.variant:  # BCE with logits takes floating targets only
        return lambda x: functional.binary_cross_entropy_with_logits(x, target.to(x.dtype), pos_weight=weight)
    return lambda x: getattr(functional, case.loss)(x, target)


def _torch(case: Case, data: Inputs, work: str) -> Contestant:
    import torch

    torch.set_num_threads(threads())
    x, target = _tensor(data.x), None if data.target is None else _tensor(data.target)
    loss = torch_loss(case, target, None if data.weight is None else _tensor(data.weight), data.smoothing)
    if work == OUT:
        return Contestant(_torch_into_buffer(case, x, target), lambda r: (None, _from_tensor(r)))
    return _torch_contestant(case, x, work, loss)


def _torch_contestant(case: Case, x: Any, work: str, loss: Callable[[Any], Any]) -> Contestant:
    import torch

    if case.loss in ROW_FUNCTIONS:
        return Contestant(lambda: loss(x), lambda r: (None, _from_tensor(r)))
    if work == VALUE:
        return Contestant(lambda: loss(x), lambda r: (float(r), None))
    x.requires_grad_()

    def run() -> Any:
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)  # not into x.grad, whose last value would be freed on the clock
        return value, gradient

    return Contestant(run, lambda r: (float(r[0]), _from_tensor(r[1])))


def _torch_into_buffer(case: Case, x: Any, target: Any) -> Callable[[], Any]:
    """Autograd allocates; these are the formulas that torch can write into a tensor that exists."""
    import torch

    buffer = torch.empty_like(x)
    if case.loss in ROW_FUNCTIONS:
        return lambda: getattr(torch, case.loss)(x, -1, out=buffer)
    if case.loss == "cross_entropy" and not case.variant:
        labels, rows = target.unsqueeze(1), target.numel()
        minus_one = torch.full(labels.shape, -1, dtype=x.dtype)
        return lambda: torch.softmax(x, 1, out=buffer).scatter_add_(1, labels, minus_one).mul_(1 / rows)
    if case.loss == "nll_loss":
        labels, share = target.unsqueeze(1), -1 / target.numel()
        return lambda: buffer.zero_().scatter_(1, labels, share)
    if case.loss == "binary_cross_entropy_with_logits" and case.variant != "weights":
        return lambda: torch.sigmoid(x, out=buffer).sub_(target).mul_(1 / x.numel())
    if case.loss == "mse_loss":
        return lambda: torch.sub(x, target, out=buffer).mul_(2 / x.numel())
    if case.loss == "l1_loss":
        return lambda: torch.sub(x, target, out=buffer).sign_().mul_(1 / x.numel())
    raise Absent("has no form that writes into a buffer")


def _torch_compile(case: Case, data: Inputs, work: str) -> Contestant:
    import torch

    torch.set_num_threads(threads())
    torch._dynamo.reset()  # all cases share one code object, and torch stops compiling it after a few shapes
    x, target = _tensor(data.x), None if data.target is None else _tensor(data.target)
    loss = torch_loss(case, target, None if data.weight is None else _tensor(data.weight), data.smoothing)
    if work != OUT:
        return _torch_contestant(case, x, work, torch.compile(loss, dynamic=False))
    buffer = torch.empty_like(x)
    wanted = loss if case.loss in ROW_FUNCTIONS else torch.func.grad(loss)
    into = torch.compile(lambda x, buffer: buffer.copy_(wanted(x)), dynamic=False)
    return Contestant(lambda: into(x, buffer), lambda r: (None, _from_tensor(buffer)))


# --- JAX and optax ------------------------------------------------------------------------------------------


def _jax(case: Case, data: Inputs, work: str) -> Contestant:
    import jax
    import optax
    from jax import numpy as jnp

    if work == OUT:
        raise Absent("has immutable arrays: nothing to write into")
    jax.config.update("jax_enable_x64", True)
    x = jnp.asarray(data.x)
    if case.loss in ROW_FUNCTIONS:
        rows = jax.jit(getattr(jax.nn, case.loss))
        return Contestant(lambda: rows(x).block_until_ready(), _array)
    assert data.target is not None
    labels = data.target.dtype.kind == "i"
    of_classes = labels and case.loss in ("cross_entropy", "nll_loss")
    target = jnp.asarray(data.target.astype(np.int32) if of_classes else data.target)
    weight = None if data.weight is None else jnp.asarray(data.weight)

    def loss(x: Any, target: Any) -> Any:
        if case.loss == "binary_cross_entropy_with_logits" and weight is not None:  # which optax does not take
            below = jax.nn.log_sigmoid(-x)
            return -(weight * target * jax.nn.log_sigmoid(x) + (1 - target) * below).mean()
        if case.loss == "binary_cross_entropy_with_logits":
            return optax.sigmoid_binary_cross_entropy(x, target.astype(x.dtype)).mean()
        if case.loss == "mse_loss":
            return optax.squared_error(x, target).mean()
        if case.loss == "l1_loss":
            return jnp.abs(x - target).mean()
        if case.loss == "binary_cross_entropy":  # optax has it on logits only
            log, log1p = jnp.log(x), jnp.log1p(-x)
            return -(target * log + (1 - target) * log1p).mean()
        if data.smoothing:
            smooth = optax.smooth_labels(jax.nn.one_hot(target, x.shape[1], dtype=x.dtype), data.smoothing)
            return optax.softmax_cross_entropy(x, smooth).mean()
        if not labels:
            return optax.softmax_cross_entropy(x, target).mean()
        if case.loss == "nll_loss":
            return -jnp.take_along_axis(x, target[:, None], 1).mean()
        if case.variant == "ignored":
            losses = optax.softmax_cross_entropy_with_integer_labels(x, jnp.maximum(target, 0))
            return losses.mean(where=target >= 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(x, target, axis=1)
        if weight is not None:
            return (losses * weight[target]).sum() / weight[target].sum()
        return losses.mean()

    if work == VALUE:
        value = jax.jit(loss)
        return Contestant(lambda: value(x, target).block_until_ready(), _value)
    both = jax.jit(jax.value_and_grad(loss))
    return Contestant(lambda: jax.block_until_ready(both(x, target)), _pair)


# --- scikit-learn -------------------------------------------------------------------------------------------


def _sklearn(case: Case, data: Inputs, work: str) -> Contestant:
    from sklearn._loss import HalfBinomialLoss, HalfMultinomialLoss

    if case.dtype in HALF:
        raise Absent("takes float32 and float64 only")
    if case.loss != "cross_entropy" and len(case.shape) > 1:
        raise Absent("takes one logit a row only")
    if case.variant in ("probabilities", "smoothing", "ignored") or len(case.shape) > 2:
        raise Absent("takes class indices of (rows, classes) only, and all of them")
    assert data.target is not None
    x, count = data.x, threads()
    target = data.target.astype(x.dtype)  # class indices too are floating here
    rows = HalfMultinomialLoss(n_classes=x.shape[1]) if case.loss == "cross_entropy" else HalfBinomialLoss()
    weight = None if data.weight is None else data.weight[data.target]
    total = x.shape[0] if weight is None else float(weight.sum())
    # It knows one loss a row and no mean: the division of the gradient by the number of rows is left to its user.
    if work == VALUE:
        return Contestant(lambda: rows.loss(target, x, weight, n_threads=count).sum() / total, _value)
    if work == OUT:
        buffer = np.empty_like(x)
        return Contestant(
            lambda: rows.gradient(target, x, weight, gradient_out=buffer, n_threads=count), lambda r: (None, r / total)
        )

    def run() -> tuple[Any, Array]:
        losses, gradient = rows.loss_gradient(target, x, weight, n_threads=count)
        return losses.sum() / total, gradient

    return Contestant(run, lambda r: (float(r[0]), r[1] / total))


# --- numexpr ------------------------------------------------------------------------------------------------

_EXPRESSIONS = {
    "binary_cross_entropy": ("-(t * log(x) + (1 - t) * log1p(-x))", "(x - t) / (x * (1 - x)) * scale"),
    "binary_cross_entropy_with_logits": (
        "where(x > 0, x, zero) - x * t + log1p(exp(-abs(x)))",
        "(one / (one + exp(-x)) - t) * scale",
    ),
    "weights": (
        "(one - t) * x + (one + (w - one) * t) * (where(x < 0, -x, zero) + log1p(exp(-abs(x))))",
        "((one - t + w * t) / (one + exp(-x)) - w * t) * scale",
    ),
    "mse_loss": ("(x - t) ** 2", "(x - t) * (scale + scale)"),
    "l1_loss": ("abs(x - t)", "where(x > t, scale, where(x < t, -scale, zero))"),
}


def _numexpr(case: Case, data: Inputs, work: str) -> Contestant:
    import numexpr

    if case.dtype in HALF or case.variant == "labels":
        raise Absent("takes float32 and float64 only, beside integers float64")
    numexpr.set_num_threads(threads())
    value, gradient = _EXPRESSIONS[case.variant or case.loss]
    real = data.x.dtype.type
    names = {"w": data.weight} if case.variant else {}
    names |= {"x": data.x, "t": data.target, "zero": real(0), "one": real(1), "scale": real(1 / data.x.size)}
    if work == VALUE:
        return Contestant(lambda: numexpr.evaluate(value, names).mean(), _value)
    if work == OUT:
        buffer = np.empty_like(data.x)
        return Contestant(lambda: numexpr.evaluate(gradient, names, out=buffer), _array)
    return Contestant(lambda: (numexpr.evaluate(value, names).mean(), numexpr.evaluate(gradient, names)), _pair)


_EVERYWHERE: dict[str, Setup] = {"nbloss": _nbloss, "torch": _torch, "torch.compile": _torch_compile, "jax": _jax}
_ROWS = {**_EVERYWHERE, "numpy": _numpy_rows}
_POINTWISE = {**_EVERYWHERE, "numpy": _numpy_pointwise, "numexpr": _numexpr}

PEERS: dict[str, dict[str, Setup]] = {
    "cross_entropy": {**_EVERYWHERE, "numpy": _numpy_cross_entropy, "sklearn": _sklearn},
    "nll_loss": {**_EVERYWHERE, "numpy": _numpy_nll},
    "log_softmax": _ROWS,
    "softmax": _ROWS,
    **dict.fromkeys(("binary_cross_entropy", "mse_loss", "l1_loss"), _POINTWISE),
    "binary_cross_entropy_with_logits": {**_POINTWISE, "sklearn": _sklearn},
}


def set_up(library: str, case: Case, data: Inputs, work: str) -> Contestant:
    """A contestant, or Absent with the reason why there is none."""
    setup = PEERS[case.loss].get(library)
    if setup is None:
        raise Absent(f"has no {case.loss}")
    reason = why_missing(library)
    if reason:
        raise Absent(reason)
    return setup(case, data, work)
