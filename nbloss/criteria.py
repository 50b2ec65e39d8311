"""Criterion objects, for people who come from torch.nn: frozen dataclasses that hold a loss's options.

>>> import nbloss
>>> criterion = nbloss.CrossEntropyLoss(label_smoothing=0.1)
>>> print(round(criterion([[2.0, 1.0, 0.1]], [0]), 6))
0.513697
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, SupportsIndex

from numpy.typing import ArrayLike

from nbloss import losses
from nbloss.dispatch import Loss
from nbloss.problem import Array, Backend, Reduction


@dataclass(frozen=True, kw_only=True, eq=False)
class _Criterion:
    """A loss with its options."""

    reduction: Reduction = "mean"
    backend: Backend = "auto"
    stream: object = None
    check: bool = True
    _loss: ClassVar[Loss[...]]

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _options_of(type(self))}  # type: ignore[arg-type]  # a class is hashable

    def __call__(self, x: ArrayLike, target: ArrayLike) -> Any:
        """The loss."""
        return type(self)._loss(x, target, **self._options())

    def value_and_grad(
        self, x: ArrayLike, target: ArrayLike, grad_output: ArrayLike | None = None, out: object = None
    ) -> tuple[Any, Array]:
        """(loss, gradient); see the loss's function."""
        return type(self)._loss.value_and_grad(x, target, grad_output, out, **self._options())

    def grad(self, x: ArrayLike, target: ArrayLike, grad_output: ArrayLike | None = None, out: object = None) -> Array:
        """The gradient with respect to x; see the loss's function."""
        return type(self)._loss.grad(x, target, grad_output, out, **self._options())


@cache
def _options_of(criterion: type[_Criterion]) -> list[str]:
    """What its loss takes: a criterion of a user's own may have more fields."""
    return [p.name for p in inspect.signature(criterion._loss).parameters.values() if p.kind is p.KEYWORD_ONLY]


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropyLoss(_Criterion):
    """Cross-entropy of logits and a target: `cross_entropy` with its options, and its errors.

    >>> import nbloss
    >>> criterion = nbloss.CrossEntropyLoss(label_smoothing=0.1)
    >>> print(round(float(criterion([[2.0, 1.0, 0.1]], [0])), 6))
    0.513697
    """

    _loss = losses.cross_entropy
    weight: ArrayLike | None = None
    ignore_index: SupportsIndex = -100
    label_smoothing: float = 0.0
    axis: SupportsIndex = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class NLLLoss(_Criterion):
    """Negative log-likelihood of log-probabilities and class indices: `nll_loss` with its options, and its errors.

    >>> import nbloss
    >>> criterion = nbloss.NLLLoss(reduction="sum")
    >>> print(round(float(criterion([[-0.5, -0.9]], [0])), 6))
    0.5
    """

    _loss = losses.nll_loss
    weight: ArrayLike | None = None
    ignore_index: SupportsIndex = -100
    axis: SupportsIndex = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class BCELoss(_Criterion):
    """Binary cross-entropy of probabilities and targets: `binary_cross_entropy` with its options, and its errors.

    >>> import nbloss
    >>> criterion = nbloss.BCELoss()
    >>> print(round(float(criterion([0.5], [1.0])), 6))
    0.693147
    """

    _loss = losses.binary_cross_entropy
    weight: ArrayLike | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BCEWithLogitsLoss(_Criterion):
    """Binary cross-entropy of logits: `binary_cross_entropy_with_logits` with its options, and its errors.

    >>> import nbloss
    >>> criterion = nbloss.BCEWithLogitsLoss(pos_weight=3.0)
    >>> print(round(float(criterion([0.0], [1.0])), 6))
    2.079442
    """

    _loss = losses.binary_cross_entropy_with_logits
    weight: ArrayLike | None = None
    pos_weight: ArrayLike | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class MSELoss(_Criterion):
    """Squared error: `mse_loss` with its options, and its errors.

    >>> import nbloss
    >>> criterion = nbloss.MSELoss()
    >>> print(round(float(criterion([3.0], [1.0])), 6))
    4.0
    """

    _loss = losses.mse_loss
    weight: ArrayLike | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class L1Loss(_Criterion):
    """Absolute error: `l1_loss` with its options, and its errors.

    >>> import nbloss
    >>> criterion = nbloss.L1Loss()
    >>> print(round(float(criterion([3.0], [1.0])), 6))
    2.0
    """

    _loss = losses.l1_loss
    weight: ArrayLike | None = None
