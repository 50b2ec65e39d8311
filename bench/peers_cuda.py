"""The contestants on a CUDA device, timed with the device's own events.

Inputs are torch tensors on the device, which nbloss and CuPy take without a copy (DLPack).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from bench.cases import VALUE, Case
from bench.peers import Absent, torch_loss

CASES = [
    Case("cross_entropy", shape, dtype)
    for dtype in ("float32", "bfloat16")
    for shape in (
        *((32768, 1 << k) for k in range(8, 17)),
        (16384, 131072),
        (8192, 32000),
        (8192, 128256),
        (8192, 262144),
    )
]
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

    function = nbloss.cross_entropy if work == VALUE else nbloss.cross_entropy.value_and_grad
    try:
        function(x, target, backend="cuda", check=False)
    except RuntimeError as error:
        raise Absent(str(error)) from None
    return lambda: function(x, target, backend="cuda", check=False)


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


def _cupy(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
    cupy = _needs("cupy")
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
    # It writes the gradient over its input, so every call gets a copy, whose time is part of its normal use.
    loss = _needs("liger_kernel.transformers").LigerCrossEntropyLoss()
    return _with_autograd(lambda leaf: loss(leaf.clone(), target), x, work)


def _quack(case: Case, x: Any, target: Any, work: str) -> Callable[[], Any]:
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


def reference(x: Any, target: Any) -> tuple[float, Any]:
    """(mean loss, its gradient), row by row in float64."""
    import torch

    total, parts = 0.0, []
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
