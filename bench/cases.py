"""What is measured: losses, shapes, dtypes and options, their inputs, and the bytes that each work has to move."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

VALUE, VALUE_AND_GRAD, OUT = "value", "value_and_grad", "out"
WORKS = {VALUE: "value", VALUE_AND_GRAD: "value + gradient", OUT: "into a buffer"}
ROW_FUNCTIONS = ("softmax", "log_softmax")
HALF = ("float16", "bfloat16")
IGNORED = 0.85  # of the rows of a case, as where a masked language model is trained


@dataclass(frozen=True)
class Case:
    """One loss on one input."""

    loss: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    variant: str = ""  # or "probabilities", "smoothing", "weights", "ignored"; of BCE with logits "labels", "weights"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def works(self) -> tuple[str, ...]:
        return (VALUE, OUT) if self.loss in ROW_FUNCTIONS else (VALUE, VALUE_AND_GRAD, OUT)

    @property
    def read(self) -> float:
        """Share of the input that has to be read."""
        return 1 / self.shape[1] if self.loss == "nll_loss" else 1 - IGNORED if self.variant == "ignored" else 1.0

    def writes(self, work: str) -> bool:
        """Whether an array of the input's size is written."""
        return work != VALUE or self.loss in ROW_FUNCTIONS

    def row(self, test: str, work: str, library: str) -> dict[str, Any]:
        """What a stored row says of whose time it is."""
        row = {"test": test, "loss": self.loss, "shape": self.size, "dtype": self.dtype}
        return row | ({"variant": self.variant} if self.variant else {}) | {"work": work, "library": library}

    def __str__(self) -> str:
        return "-".join(filter(None, (self.loss, self.size, self.dtype, self.variant)))


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case; `smoothing` is the one option that is a number.

    `weight` is one a class; of BCE with logits it is the `pos_weight`.
    """

    x: Array
    target: Array | None
    weight: Array | None
    smoothing: float


def useful_bytes(x: Any, target: Any, writes: bool, read: float = 1.0) -> int:
    """Input, or this share of it, and target read once, and the array that is asked for written once."""
    return int(x.nbytes * (read + writes) + (0 if target is None else target.nbytes))


def numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@lru_cache(maxsize=1)
def inputs_of(case: Case) -> Inputs:
    """The same arrays in every run: logits of a spread like a network's, targets of every class."""
    rng = np.random.default_rng(20)
    dtype = numpy_dtype(case.dtype)
    working = np.float64 if case.dtype == "float64" else np.float32
    if case.loss == "binary_cross_entropy":
        x = rng.uniform(0.02, 0.98, case.shape).astype(dtype)
    else:
        x = (2 * rng.standard_normal(case.shape, working)).astype(dtype)
    if case.loss in ROW_FUNCTIONS:
        return Inputs(x, None, None, 0.0)
    if case.loss == "nll_loss":
        x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    classes = case.shape[1] if len(case.shape) > 1 else 1
    rows = (case.shape[0], *case.shape[2:])
    if case.variant == "labels":
        target = rng.integers(0, 2, case.shape)
    elif case.loss not in ("cross_entropy", "nll_loss"):
        target = rng.random(case.shape, working).astype(dtype)
    elif case.variant == "probabilities":
        target = rng.random(case.shape, working)
        target = (target / target.sum(axis=1, keepdims=True)).astype(dtype)
    else:
        target = rng.integers(0, classes, rows)
        if case.variant == "ignored":
            target[rng.random(rows) < IGNORED] = -100
    weight = rng.uniform(0.5, 1.5, classes).astype(working) if case.variant == "weights" else None
    return Inputs(x, target, weight, 0.1 if case.variant == "smoothing" else 0.0)


ROWWISE = [
    Case("cross_entropy", (65536, 10)),
    Case("cross_entropy", (16384, 100)),
    Case("cross_entropy", (8192, 1000)),
    Case("cross_entropy", (1024, 32768)),
    Case("cross_entropy", (512, 128256)),
    Case("cross_entropy", (16, 21, 256, 256)),
    Case("cross_entropy", (1, 32000, 512)),
    Case("cross_entropy", (1, 100000, 8)),
    Case("cross_entropy", (8192, 1000), variant="probabilities"),
    Case("cross_entropy", (8192, 1000), variant="smoothing"),
    Case("cross_entropy", (8192, 1000), variant="weights"),
    Case("cross_entropy", (8192, 1000), variant="ignored"),
    Case("cross_entropy", (8192, 1000), "float64"),
    Case("cross_entropy", (4096, 1000), "float16"),  # with 8192 rows torch's mean overflows: inf
    Case("cross_entropy", (8192, 1000), "bfloat16"),
    Case("nll_loss", (8192, 1000)),
    Case("log_softmax", (8192, 1000)),
    Case("softmax", (8192, 1000)),
    Case("softmax", (1024, 32768)),
]
POINTWISE = [
    Case("binary_cross_entropy", (1 << 24,)),
    Case("binary_cross_entropy_with_logits", (1 << 24,)),
    Case("binary_cross_entropy_with_logits", (1 << 24,), "float64"),
    Case("binary_cross_entropy_with_logits", (1 << 24,), "bfloat16"),
    Case("binary_cross_entropy_with_logits", (131072, 80), variant="labels"),
    Case("binary_cross_entropy_with_logits", (131072, 80), variant="weights"),
    Case("mse_loss", (1 << 24,)),
    Case("l1_loss", (1 << 24,)),
]
SMALL = [Case("cross_entropy", shape) for shape in ((1, 10), (32, 10), (256, 100))]
ROWS = [Case("cross_entropy", (rows, 1000)) for rows in (16, 64, 256, 1024, 4096, 16384, 65536)]
CLASSES = [
    Case("cross_entropy", ((1 << 23) // classes, classes)) for classes in (4, 16, 64, 256, 1024, 8192, 65536, 262144)
]
THREADS = [Case("cross_entropy", (8192, 1000)), Case("binary_cross_entropy_with_logits", (1 << 24,))]

QUICK = {ROWWISE[0], ROWWISE[2], POINTWISE[1], *SMALL[1:2], *ROWS[1:4:2], *CLASSES[3:5]}
KNOWN = [*ROWWISE, *POINTWISE, *SMALL, *ROWS, *CLASSES]
