"""python -m nbloss: a short demonstration; python -m nbloss info; python -m nbloss warmup."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import numpy as np

import nbloss
from nbloss.problem import Array


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nbloss",
        description="Losses and their gradients on plain arrays; without a command, a demonstration.",
    )
    parser.add_argument("--version", action="version", version=f"nbloss {nbloss.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{info,warmup}")
    commands.add_parser("info", help="print versions, processor, threads, cache and backends")
    warm = commands.add_parser("warmup", help="compile kernels ahead")
    warm.add_argument(
        "--dtypes", nargs="+", default=["float32"], help="any of float16, bfloat16, float32, float64 (default: float32)"
    )
    warm.add_argument("--losses", nargs="+", default=None, help="cross_entropy softmax ...; all if left out")
    arguments = parser.parse_args()
    if arguments.command == "info":
        nbloss.show_config()
    elif arguments.command == "warmup":
        try:
            nbloss.warmup(_names(arguments.dtypes), arguments.losses and _names(arguments.losses))
        except ValueError as error:
            parser.error(str(error))
    elif os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        parser.error("the demonstration would take hours with NUMBA_DISABLE_JIT set")
    else:
        demonstrate()


def _names(words: list[str]) -> list[str]:
    """Names with spaces or commas between them."""
    return [name for word in words for name in word.split(",") if name]


def demonstrate() -> None:
    """Values beside plain float64 NumPy, and time beside plain float32 NumPy, at real sizes."""
    nbloss.show_config()
    print("\nloading kernels, or compiling them (once for this machine)", flush=True)
    nbloss.warmup(losses=["cross_entropy", "binary_cross_entropy_with_logits"])
    rng = np.random.default_rng(0)
    print(f"\n{'loss and gradient, float32':<34}{'loss':>14}{'error':>10}{'NumPy':>11}{'nbloss':>11}{'':>12}")

    logits = rng.standard_normal((8192, 1000), dtype=np.float32)
    labels = rng.integers(0, 1000, 8192)
    _report(
        "cross_entropy 8192 x 1000",
        logits,
        lambda x: _numpy_cross_entropy(x, labels),
        lambda out: nbloss.cross_entropy.value_and_grad(logits, labels, out=out),
        moved=2 * logits.nbytes + labels.nbytes,
    )
    scores = rng.standard_normal(1 << 22, dtype=np.float32) * 4
    truth = (rng.random(1 << 22) < 0.5).astype(np.float32)
    _report(
        "bce with logits 4,194,304",
        scores,
        lambda x: _numpy_bce_with_logits(x, truth.astype(x.dtype)),
        lambda out: nbloss.binary_cross_entropy_with_logits.value_and_grad(scores, truth, out=out),
        moved=2 * scores.nbytes + truth.nbytes,
    )


def _report(
    title: str,
    x: Array,
    plain: Callable[[Array], tuple[float, Array]],
    ours: Callable[[Array], tuple[float, Array]],
    moved: int,
) -> None:
    out = np.empty_like(x)
    loss, gradient = ours(out)
    expected, expected_gradient = plain(x.astype(np.float64))
    error = abs(float(loss) - expected) / expected
    off = np.abs(gradient - expected_gradient).max() / np.abs(expected_gradient).max()
    if not (error < 1e-6 and off < 1e-6):
        raise SystemExit(f"{title}: the loss is off by {error:.0e}, the gradient by {off:.0e} of float64 NumPy's")
    slow, fast = _best(lambda: plain(x), 3), _best(lambda: ours(out), 20)
    bandwidth = moved / fast / 1e9
    times = f"{slow * 1e3:>8.1f} ms{fast * 1e3:>8.2f} ms{bandwidth:>7.0f} GB/s"
    print(f"{title:<34}{loss:>14.8f}{error:>10.0e}{times}  {slow / fast:.0f} times faster", flush=True)


def _best(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _numpy_cross_entropy(x: Array, labels: Array) -> tuple[float, Array]:
    rows = np.arange(len(x))
    shifted = x - x.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    sums = exps.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(sums[:, 0]) - shifted[rows, labels]))
    gradient = exps / sums
    gradient[rows, labels] -= 1
    gradient /= len(x)
    return loss, gradient


def _numpy_bce_with_logits(x: Array, truth: Array) -> tuple[float, Array]:
    loss = float(np.mean(np.maximum(x, 0) - x * truth + np.log1p(np.exp(-np.abs(x)))))
    return loss, (1 / (1 + np.exp(-x)) - truth) / x.size


if __name__ == "__main__":
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except BrokenPipeError:  # nobody reads on; Python would say so once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
