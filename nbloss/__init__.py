"""Losses and their gradients on plain arrays: Numba kernels, no deep-learning framework.

cross_entropy, nll_loss, binary_cross_entropy, binary_cross_entropy_with_logits, mse_loss, l1_loss
    Losses: call one for its value; its `.value_and_grad` and `.grad` give the gradient.
logsumexp, log_softmax, softmax
    Functions of rows.
CrossEntropyLoss, NLLLoss, BCELoss, BCEWithLogitsLoss, MSELoss, L1Loss
    Losses that hold their options.
warmup, show_config, set_num_threads, get_num_threads
    This machine.
"""

from nbloss.config import get_num_threads, set_num_threads, show_config, warmup
from nbloss.criteria import BCELoss, BCEWithLogitsLoss, CrossEntropyLoss, L1Loss, MSELoss, NLLLoss
from nbloss.losses import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    l1_loss,
    log_softmax,
    logsumexp,
    mse_loss,
    nll_loss,
    softmax,
)

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "get_num_threads",
    "l1_loss",
    "log_softmax",
    "logsumexp",
    "mse_loss",
    "nll_loss",
    "set_num_threads",
    "show_config",
    "softmax",
    "warmup",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
