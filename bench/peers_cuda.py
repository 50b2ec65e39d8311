"""The contestants on a CUDA device, timed with the device's own events.

Inputs are torch tensors on the device, which nbloss and CuPy take without a copy (DLPack).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bench.cases import ROW_FUNCTIONS, VALUE, Case
from bench.peers import Absent, torch_loss

SHAPES = [
    *(("cross_entropy", (32768, 1 << k)) for k in range(8, 17)),
    ("cross_entropy", (16384, 131072)),
    ("cross_entropy", (8192, 32000)),
    ("cross_entropy", (8192, 50257)),  # a vocabulary whose rows begin off sixteen bytes
    ("cross_entropy", (8192, 128256)),
    ("cross_entropy", (8192, 262144)),
    ("softmax", (32768, 8192)),
    ("binary_cross_entropy_with_logits", (1 << 28,)),
]
CASES = [Case(loss, shape, dtype) for dtype in ("float32", "bfloat16") for loss, shape in SHAPES]
COPY_BYTES = 1 << 32

Setup = Callable[[Case, Any, Any, str], Callable[[], Any]]  # (case, logits, target, work)


def why_not() -> str | None:
    """Why no CUDA device can be used, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed, and it times the device and holds the inputs"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device that torch can use"
    return None


def device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def inputs_on_device(case: Case) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator("cuda").manual_seed(20)
    x = torch.randn(case.shape, generator=generator, device="cuda", dtype=getattr(torch, case.dtype)).mul_(2)
    if case.loss in ROW_FUNCTIONS:
        return x, None
    if case.loss != "cross_entropy":
        return x, torch.rand(case.shape, generator=generator, device="cuda", dtype=x.dtype)
    return x, torch.randint(case.shape[1], (case.shape[0],), generator=generator, device="cuda")


def _needs(module: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Absent(f"{module} cannot be imported: {error}".splitlines()[0]) from None


def _nbloss(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    import nbloss

    function = getattr(nbloss, case.loss)
    function = function if work == VALUE else function.value_and_grad
    arrays = (x,) if target is None else (x, target)
    options = {} if target is None else {"check": False}
    try:
        function(*arrays, backend="cuda", **options)
    except RuntimeError as error:
        raise Absent(str(error)) from None
    return lambda: function(*arrays, backend="cuda", **options)


def _with_autograd(loss: Callable[[Any], Any], x: Any, work: str) -> Callable[[], Any]:
    if work == VALUE:
        return lambda: loss(x)
    leaf = x.detach().requires_grad_()

    def run() -> Any:
        leaf.grad = None
        value = loss(leaf)
        value.backward()
        return value, leaf.grad

    return run


def _torch(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    return _with_autograd(torch_loss(case, target, None, 0.0), x, work)


def _torch_compile(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    import torch

    torch._dynamo.reset()
    return _with_autograd(torch.compile(torch_loss(case, target, None, 0.0), dynamic=False), x, work)


def _only_cross_entropy(case: Case) -> None:
    if case.loss != "cross_entropy":
        raise Absent("is compared on cross-entropy")


def _cupy(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    cupy = _needs("cupy")
    _only_cross_entropy(case)
    if case.dtype == "bfloat16":
        raise Absent("has no bfloat16")
    import torch

    logits, labels = cupy.asarray(x), cupy.asarray(target)
    rows = cupy.arange(logits.shape[0])

    def run() -> Any:
        # CuPy works on a stream of its own; the events are on torch's.
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            shifted = logits - logits.max(axis=1, keepdims=True)
            picked = shifted[rows, labels]
            e = cupy.exp(shifted, out=shifted)
            total = e.sum(axis=1, keepdims=True)
            value = (cupy.log(total[:, 0]) - picked).mean()
            if work == VALUE:
                return value
            e /= total * logits.shape[0]
            e[rows, labels] -= 1 / logits.shape[0]
            return value, e

    return run


def _liger(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    _only_cross_entropy(case)
    # It writes the gradient over its input, so every call gets a copy, whose time is part of its normal use.
    loss = _needs("liger_kernel.transformers").LigerCrossEntropyLoss()
    return _with_autograd(lambda leaf: loss(leaf.clone(), target), x, work)


def _quack(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    if case.loss == "softmax":
        softmax = _needs("quack.softmax").softmax
        return lambda: softmax(x)
    _only_cross_entropy(case)
    cross_entropy = _needs("quack.cross_entropy").cross_entropy
    return _with_autograd(lambda leaf: cross_entropy(leaf, target, reduction="mean"), x, work)


PEERS: dict[str, Setup] = {
    "nbloss": _nbloss,
    "torch": _torch,
    "torch.compile": _torch_compile,
    "cupy": _cupy,
    "liger": _liger,
    "quack": _quack,
}


def reference(case: Case, x: Any, target: Any) -> tuple[float, Any]:
    """(mean loss or 0, its gradient or the row function), in float64, some rows at a time."""
    import torch
    from torch.nn import functional

    total, parts = 0.0, []
    if case.loss == "softmax":
        return 0.0, torch.cat([torch.softmax(some.double(), -1).to(x.dtype) for some in x.split(1024)])
    if case.loss == "binary_cross_entropy_with_logits":
        for some, t in zip(x.split(1 << 24), target.split(1 << 24)):
            wide = some.double()
            total += float(functional.binary_cross_entropy_with_logits(wide, t.double(), reduction="sum"))
            parts.append(((torch.sigmoid(wide) - t) / len(x)).to(x.dtype))
        return total / len(x), torch.cat(parts)
    for start in range(0, len(x), 1024):
        log_p = torch.log_softmax(x[start : start + 1024].double(), 1)
        labels = target[start : start + 1024, None]
        total -= float(log_p.gather(1, labels).sum())
        parts.append((log_p.exp_().scatter_add_(1, labels, -torch.ones_like(log_p[:, :1])) / len(x)).to(x.dtype))
    return total / len(x), torch.cat(parts)


def seconds(run: Callable[[], Any]) -> float:
    """One call between two events of the device."""
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def ceiling(writes: bool, rounds: int = 20) -> float:
    """Bytes a second of a large device copy (read and written), or of a read-only sum."""
    import torch

    source = torch.zeros(COPY_BYTES // 8, device="cuda")
    target = torch.empty_like(source) if writes else None
    run = (lambda: target.copy_(source)) if target is not None else source.sum
    best = min(seconds(run) for _ in range(rounds))
    return source.nbytes * (2 if writes else 1) / best
