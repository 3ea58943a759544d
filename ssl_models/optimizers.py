"""Optimizers by name, with weight decay where it belongs, and a learning rate that is a function of the period."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

Schedule = Callable[[int], float]
"""From the period (an epoch, or a round of a federation) to a factor on the learning rate."""


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    """The optimizer ``name`` over two groups: matrices and kernels decay, biases and norms do not.

    All parameters are taken, frozen ones too: which of them train changes later, and an optimizer skips those without gradient.

    Args:
        name: one of :data:`OPTIMIZERS`.
        parameters: of the model.
        lr: learning rate.
        weight_decay: of the first group.
        momentum: of ``sgd`` and ``lars``; ``adamw`` has its own and ignores it.

    Raises:
        ValueError: no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f'optimizer "{name}" not found; there are {", ".join(OPTIMIZERS)}')
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name](groups, lr, momentum)


def make_schedule(name: str, periods: int | None, warmup_periods: int = 0) -> Schedule:
    """The schedule ``name`` as a function of the period: the same whether periods are epochs or rounds.

    Args:
        name: ``constant`` or ``cosine`` (to a thousandth of the learning rate, reached after the last period).
        periods: length of the schedule; ``cosine`` needs it.
        warmup_periods: periods over which the factor rises linearly to 1, reached in the last of them.

    Raises:
        ValueError: no such schedule, or lengths that do not fit.
    """
    if name not in ("constant", "cosine"):
        raise ValueError(f'schedule "{name}" not found; there are constant, cosine')
    if name == "constant":
        return partial(_constant, warmup_periods)
    if periods is None or not 0 <= warmup_periods < periods:
        raise ValueError(
            f"schedule cosine needs periods (epochs, or rounds) greater than warmup_periods; "
            f"got periods={periods}, warmup_periods={warmup_periods}"
        )
    return partial(_cosine, periods, warmup_periods)


# Functions at module level, bound by `partial`: a scheduler that holds them can be pickled, and puts nothing of them in a checkpoint.
def _constant(warmup_periods: int, period: int) -> float:
    return min(1.0, (period + 1) / warmup_periods) if warmup_periods else 1.0


def _cosine(periods: int, warmup_periods: int, period: int) -> float:
    from lightly.utils.scheduler import cosine_warmup_schedule

    # lightly reaches the end value in the last step; with one step more, the last period still trains.
    return cosine_warmup_schedule(min(period, periods), periods + 1, 1.0, 0.001, warmup_periods, 0.0)


def _adamw(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr)


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def _lars(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    from lightly.utils.lars import LARS

    return LARS(groups, lr=lr, momentum=momentum)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lars": _lars,
}
