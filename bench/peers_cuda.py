"""The contestants on a CUDA device, timed with the device's own events.

Inputs are torch tensors on the device, which nbloss and CuPy take without a copy (DLPack). JAX is not here: it works on
a stream of its own, which these events do not see.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from bench.cases import ROW_FUNCTIONS, VALUE, VALUE_AND_GRAD, Case
from bench.peers import Absent, torch_loss

DTYPES = ("float32", "bfloat16")


def _in_both(shapes: list[tuple[str, tuple[int, ...]]]) -> list[Case]:
    return [Case(loss, shape, dtype) for loss, shape in shapes for dtype in DTYPES]


# Those of the README's table come first: a run that is cut short has measured them.
MAIN = _in_both(
    [
        ("cross_entropy", (32768, 1024)),
        ("cross_entropy", (32768, 8192)),
        ("cross_entropy", (8192, 32000)),
        ("cross_entropy", (8192, 50257)),  # a vocabulary whose rows begin off sixteen bytes
        ("cross_entropy", (8192, 128256)),
        ("softmax", (32768, 8192)),
        ("binary_cross_entropy_with_logits", (1 << 28,)),
    ]
)
CASES = MAIN + _in_both(
    [
        *(("cross_entropy", (32768, 1 << k)) for k in (8, 12, 14, 16)),
        ("cross_entropy", (8192, 262144)),
        *(("cross_entropy", (32768, 1 << k)) for k in (9, 11, 15)),
        ("cross_entropy", (16384, 131072)),
    ]
)
# What else there is, beside torch alone.
OTHERS = [
    *(Case("cross_entropy", (8192, 32000), variant=v) for v in ("weights", "smoothing", "probabilities")),
    Case("cross_entropy", (8192, 32000), "float16"),
    Case("cross_entropy", (8192, 32000), "float64"),
    Case("cross_entropy", (32, 21, 512, 512)),
    Case("log_softmax", (32768, 8192)),
    *(Case(loss, (1 << 28,)) for loss in ("binary_cross_entropy", "mse_loss", "l1_loss")),
]
COPY_BYTES = 1 << 32
CLEARED_BYTES = 1 << 28
LEAD = 2_000_000  # cycles, about a millisecond: longer than the host takes for any call
PART = 1 << 26  # elements that are worked on in float64 at a time


class Contestant(NamedTuple):
    """What is timed."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None  # what a call needs done first, off the clock
    scale: float = 1.0  # by which its gradient has to be multiplied


Setup = Callable[[Case, Any, Any, str], Contestant]  # (case, logits, target, work)


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
    if case.loss == "binary_cross_entropy":
        x = x.sigmoid_()
    if case.loss != "cross_entropy":
        return x, torch.rand(case.shape, generator=generator, device="cuda", dtype=x.dtype)
    if case.variant == "probabilities":
        return x, torch.rand(case.shape, generator=generator, device="cuda").softmax(1)
    return x, torch.randint(case.shape[1], (case.shape[0], *case.shape[2:]), generator=generator, device="cuda")


def options_on_device(case: Case) -> dict[str, Any]:
    """Options of a case, which torch and nbloss give the same names."""
    import torch

    if case.variant == "weights":
        return {"weight": torch.linspace(0.5, 1.5, case.shape[1], device="cuda")}
    return {"label_smoothing": 0.1} if case.variant == "smoothing" else {}


def _needs(module: str) -> Any:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Absent(f"{module} cannot be imported: {error}".splitlines()[0]) from None


def _nbloss(case: Case, x: Any, target: Any, work: str) -> Contestant:
    import nbloss

    function = getattr(nbloss, case.loss)
    function = function if work == VALUE else function.value_and_grad
    arrays = (x,) if target is None else (x, target)
    options = options_on_device(case) | ({} if target is None else {"check": False})
    try:
        function(*arrays, backend="cuda", **options)
    except RuntimeError as error:
        raise Absent(str(error)) from None
    return Contestant(lambda: function(*arrays, backend="cuda", **options))


def _with_autograd(loss: Callable[[Any], Any], x: Any, work: str) -> Callable[[], Any]:
    import torch

    if work == VALUE:
        return lambda: loss(x)
    leaf = x.detach().requires_grad_()

    def run() -> Any:
        value = loss(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return run


def _torch(case: Case, x: Any, target: Any, work: str) -> Contestant:
    options = options_on_device(case)
    loss = torch_loss(case, target, options.get("weight"), options.get("label_smoothing", 0.0))
    return Contestant(_with_autograd(loss, x, work))


def _torch_compile(case: Case, x: Any, target: Any, work: str) -> Contestant:
    import torch

    if case in OTHERS:
        raise Absent("is compared on the other cases")

    torch._dynamo.reset()
    return Contestant(_with_autograd(torch.compile(torch_loss(case, target, None, 0.0), dynamic=False), x, work))


def _only_cross_entropy(case: Case) -> None:
    if case.loss != "cross_entropy" or case in OTHERS:
        raise Absent("is compared on plain cross-entropy")


def _cupy(case: Case, x: Any, target: Any, work: str) -> Contestant:
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

    return Contestant(run)


def _liger(case: Case, x: Any, target: Any, work: str) -> Contestant:
    """It writes the gradient over its input, which is filled again before every call, and waits for the device."""
    _only_cross_entropy(case)
    loss = _needs("liger_kernel.transformers").LigerCrossEntropyLoss()
    if work == VALUE:
        return Contestant(lambda: loss(x, target))
    logits = x.clone()
    return Contestant(_with_autograd(lambda leaf: loss(leaf, target), logits, work), lambda: logits.copy_(x))


def _quack(case: Case, x: Any, target: Any, work: str) -> Contestant:
    """Its one kernel for value and gradient gives each row's own, so the gradient is that of the sum."""
    if case.loss == "softmax":
        softmax = _needs("quack.softmax").softmax_fwd
        return Contestant(lambda: softmax(x))
    _only_cross_entropy(case)
    forward = _needs("quack.cross_entropy").cross_entropy_fwd
    if work == VALUE:
        return Contestant(lambda: forward(x, target).mean())

    def run() -> Any:
        losses, gradient = forward(x, target, return_dx=True)
        return losses.mean(), gradient

    return Contestant(run, scale=1 / len(x))


PEERS: dict[str, Setup] = {
    "nbloss": _nbloss,
    "torch": _torch,
    "torch.compile": _torch_compile,
    "cupy": _cupy,
    "liger": _liger,
    "quack": _quack,
}


def _step(x: Any) -> int:
    """From one row, or element, of the sample to the next; an odd one meets every row of a block."""
    return -(-x.numel() // PART) | 1


def reference(case: Case, x: Any, target: Any, work: str) -> tuple[float, Any]:
    """(mean loss, a sample of its gradient or of the row function) in float64; what the work does not ask for is 0."""
    import torch
    from torch.nn import functional

    if case.loss in ROW_FUNCTIONS:
        return 0.0, getattr(torch, case.loss)(x[:: _step(x)].double(), -1)

    options = {n: v.double() if n == "weight" else v for n, v in options_on_device(case).items()}
    count = len(x) if target.is_floating_point() else target.numel()
    divisor = float(options["weight"][target].sum()) if "weight" in options else count

    def loss(logits: Any, of: Any) -> Any:
        of = of.double() if of.is_floating_point() else of
        return getattr(functional, case.loss)(logits, of, reduction="sum", **options) / divisor

    rows = max(PART * len(x) // x.numel(), 1)
    mean = sum(float(loss(some.double(), of)) for some, of in zip(x.split(rows), target.split(rows)))
    if work == VALUE:
        return mean, 0
    logits = x[:: _step(x)].double().requires_grad_()
    return mean, torch.autograd.grad(loss(logits, target[:: _step(x)]), logits)[0]


def error_of(case: Case, work: str, result: Any, scale: float, expected: tuple[float, Any]) -> float:
    """Relative error of a result: the value's, and that of the worst row of the sample."""
    import torch

    value, array = result if work == VALUE_AND_GRAD else (None, result) if case.writes(work) else (result, None)
    mean, sample = expected
    error = 0.0 if value is None else abs(float(value) - mean) / mean
    if array is None:
        return error
    array = torch.from_dlpack(array)
    off = array[:: _step(array)].double().mul_(scale).sub_(sample).abs_().sum(-1)
    return error + float((off / sample.abs().sum(-1)).max())


@cache
def _scratch() -> Any:
    import torch

    return torch.empty(CLEARED_BYTES, dtype=torch.int8, device="cuda")


def seconds(contestant: Contestant) -> tuple[float, bool]:
    """One call between two events of the device, and whether the device had to wait for the host.

    First 256 MB are written, as triton.testing.do_bench does, and nothing of the input is left in the L2 cache. Then
    the device sleeps, and the host is through with the call before the first event is reached: what is measured is the
    device's work and no launch. A call that waits for the device cannot be ahead of it, and its time holds the host's.
    """
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if contestant.before:
        contestant.before()
    _scratch().zero_()
    torch.cuda._sleep(LEAD)
    start.record()
    result = contestant.run()
    late = start.query()
    stop.record()
    stop.synchronize()
    del result  # freeing it is no part of the call
    return float(start.elapsed_time(stop)) / 1e3, late


def ceiling(writes: bool) -> float:
    """Bytes a second of a large device copy (read and written), or of reading: the better of a sum and a maximum."""
    import torch

    source = torch.randn(COPY_BYTES // 8, device="cuda")
    target = torch.empty_like(source) if writes else None
    runs = [source.sum, source.amax] if target is None else [lambda: target.copy_(source)]
    best = min(seconds(Contestant(run))[0] for _ in range(15) for run in runs)
    return float(source.nbytes * (2 if writes else 1) / best)


def free() -> None:
    """Give the memory of a case back to the device."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    if "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
