"""What a host does to optimizers when a plugin freezes or thaws: nothing may move what is frozen, nothing that trains may be forgotten."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from featherlight.plugins.base import Change
from featherlight.plugins.present import held


def release(optimizers: Iterable[Optimizer], change: Change) -> None:
    """Drop gradient and optimizer state of what froze: a zero or stale gradient still moves it under momentum and weight decay."""
    for parameter in change.froze:
        parameter.grad = None
    for optimizer in optimizers:
        for parameter in change.froze:
            optimizer.state.pop(parameter, None)


def clear(optimizers: Iterable[Optimizer]) -> None:
    """Make optimizers as new: no momentum, no moments, no step counts."""
    for optimizer in optimizers:
        optimizer.state.clear()


def check_covered(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Raise where a parameter that is to train is in no optimizer.

    Raises:
        ValueError: names the parameters and says what to do.
    """
    known = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    entries = held(model).items()
    missing = [name for name, value in entries if isinstance(value, nn.Parameter) and value.requires_grad and id(value) not in known]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{shown} should train now but is in no optimizer; give configure_optimizers every parameter from the start, "
            "without a filter on requires_grad"
        )
