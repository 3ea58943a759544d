"""What a host does to optimizers when a plugin freezes or thaws: nothing may move what is frozen, nothing that trains may be forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from featherlight.plugins.base import Change
from featherlight.plugins.present import held

VANISHING = 1e-30
"""A weight decay that changes no parameter and is not 0."""
DECOUPLED = ("AdamW", "NAdamW", "SGDW", "Adafactor", "Lion", "Muon")
"""Optimizers by name whose groups do not say that their decay is decoupled, though it is."""


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
    """Make optimizers as new: no momentum, no moments, no step counts, no gradient of what they move."""
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class OwnDecay:
    """Weight decay that a plugin works out itself: it sets this as attribute ``_own_decay`` of the parameters that it decays together.

    Args:
        gradients: those parameters, each with the gradient of half what is decayed (½‖u·v‖², say).
    """

    def __init__(self, gradients: Callable[[], Sequence[tuple[nn.Parameter, Tensor]]]) -> None:
        self.gradients = gradients
        self.rate = 0.0
        """The optimizer's weight decay for these parameters: :func:`hand_over_decay` sets it."""


def hand_over_decay(configured: Any) -> None:
    """Take parameters whose weight decay a plugin works out itself (:class:`OwnDecay`) from the optimizer's decay.

    They move to a group of their own, which schedulers learn of; hence before the first step and before any state is loaded.

    Args:
        configured: what ``configure_optimizers`` returned, in any of Lightning's forms.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[LRScheduler] = []
    _collect(configured, optimizers, schedulers)
    rates: dict[OwnDecay, float] = {}
    others = 0.0
    for optimizer in optimizers:
        for index, group in enumerate(list(optimizer.param_groups)):
            own = [parameter for parameter in group["params"] if hasattr(parameter, "_own_decay")]
            rate = group.get("weight_decay", 0.0)
            others = max(others, rate)
            rates |= {decay: max(rate, rates.get(decay, 0.0)) for decay in (_own(parameter) for parameter in own)}
            if not own or not rate:
                continue
            group["params"] = [parameter for parameter in group["params"] if not hasattr(parameter, "_own_decay")]
            # torch's optimizers do nothing else for a group without decay; LARS, say, would not scale its steps
            none = 0.0 if type(optimizer).__module__.startswith("torch.") else VANISHING
            optimizer.param_groups.append({**group, "params": own, "weight_decay": none})
            for scheduler in schedulers:
                if scheduler.optimizer is optimizer:
                    for name in ("base_lrs", "lr_lambdas", "_last_lr", "max_lrs", "min_lrs"):
                        if hasattr(scheduler, name):
                            setattr(scheduler, name, [*getattr(scheduler, name), getattr(scheduler, name)[index]])
    for decay, rate in rates.items():
        decay.rate = rate
    if rates and others and not any(rates.values()):
        warnings.warn(
            f"the optimizer decays some parameters (weight_decay={others:g}), but none of the factors u and v that took the place of "
            'weights: choose the parameters that decay by their dimensions (ndim > 1), not by the name "weight"',
            stacklevel=2,
        )


def decay(optimizer: Optimizer) -> None:
    """The decay that :func:`hand_over_decay` took from ``optimizer``, in the optimizer's own way, for the step that it is about to take.

    An optimizer whose decay does not go through its gradients (AdamW) takes lr·wd·gradient off the parameters; to others' gradients
    wd·gradient is added. What has no gradient is not decayed.

    Args:
        optimizer: itself, not a wrapper; gradients complete and unscaled.
    """
    done: set[OwnDecay] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = getattr(parameter, "_own_decay", None)
            if own is None or not own.rate or parameter.grad is None or own in done:
                continue
            done.add(own)
            with torch.no_grad():
                for value, gradient in own.gradients():
                    if _decoupled(optimizer, group):
                        value.sub_(gradient, alpha=float(group["lr"]) * own.rate)
                    else:
                        value.grad.add_(gradient, alpha=-own.rate if group.get("maximize") else own.rate)


def has_own_decay(optimizer: Optimizer) -> bool:
    """Whether :func:`decay` would do anything."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return any(hasattr(parameter, "_own_decay") and _own(parameter).rate for parameter in parameters)


def _own(parameter: nn.Parameter) -> OwnDecay:
    return parameter._own_decay  # type: ignore[attr-defined]


def _decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay shrinks parameters beside the step (arXiv 1711.05101), not through the gradient."""
    names = [kind.__name__ for kind in type(optimizer).__mro__]
    return bool(group.get("decoupled_weight_decay", any(known in name for name in names for known in DECOUPLED)))


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


def check_covered(model: nn.Module | Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Raise where a parameter that is to train is in no optimizer.

    Args:
        model: a model, or what is held of one, by name.

    Raises:
        ValueError: names the parameters and says what to do.
    """
    known = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    entries = held(model) if isinstance(model, nn.Module) else model
    training = {name: value for name, value in entries.items() if isinstance(value, nn.Parameter) and value.requires_grad}
    missing = [name for name, value in training.items() if id(value) not in known]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(
            f"{shown} should train now but is in no optimizer; give configure_optimizers every parameter from the start, "
            "without a filter on requires_grad"
        )
