"""What a host does to optimizers when a plugin freezes or thaws: nothing may move what is frozen, nothing that trains may be forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from featherlight.plugins.base import Change
from featherlight.plugins.present import held


def release(optimizers: Iterable[Optimizer], change: Change) -> None:
    """Drop gradient and optimizer state of what froze (a zero or stale gradient still moves it under momentum and weight decay), and
    of what begins anew."""
    gone = (*change.froze, *change.renewed)
    for parameter in gone:
        parameter.grad = None
    for optimizer in optimizers:
        for parameter in gone:
            optimizer.state.pop(parameter, None)


def clear(optimizers: Iterable[Optimizer]) -> None:
    """Make optimizers as new: no momentum, no moments, no step counts."""
    for optimizer in optimizers:
        optimizer.state.clear()


def hand_over_decay(configured: Any) -> None:
    """Take parameters whose weight decay a plugin works out itself from the optimizer's decay.

    A plugin marks them with an attribute ``_own_decay``; here it becomes the rate that the optimizer had for them. They move to a group
    of their own, which schedulers learn of; hence before the first step and before any state is loaded.

    Args:
        configured: what ``configure_optimizers`` returned, in any of Lightning's forms.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[LRScheduler] = []
    _collect(configured, optimizers, schedulers)
    for optimizer in optimizers:
        for index, group in enumerate(list(optimizer.param_groups)):
            own = [parameter for parameter in group["params"] if hasattr(parameter, "_own_decay")]
            if not own or "weight_decay" not in group:
                continue
            for parameter in own:
                parameter._own_decay = group["weight_decay"]
            group["params"] = [parameter for parameter in group["params"] if not hasattr(parameter, "_own_decay")]
            optimizer.param_groups.append({**group, "params": own, "weight_decay": 0.0})
            for scheduler in schedulers:
                if scheduler.optimizer is optimizer:
                    for name in ("base_lrs", "lr_lambdas", "_last_lr", "max_lrs", "min_lrs"):
                        if hasattr(scheduler, name):
                            setattr(scheduler, name, [*getattr(scheduler, name), getattr(scheduler, name)[index]])


def _collect(configured: Any, optimizers: list[Optimizer], schedulers: list[LRScheduler]) -> None:
    if isinstance(configured, Optimizer):
        optimizers.append(configured)
    elif isinstance(configured, LRScheduler):
        schedulers.append(configured)
        _collect(getattr(configured, "_schedulers", ()), optimizers, schedulers)  # those that one chains or takes turns with
    elif isinstance(configured, Mapping):
        _collect(list(configured.values()), optimizers, schedulers)
    elif isinstance(configured, list | tuple):
        for item in configured:
            _collect(item, optimizers, schedulers)


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
