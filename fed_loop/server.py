"""Server optimizers: what the server does with the mean of what came up (Reddi et al., arXiv 2003.00295)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Average:
    """The new value is the mean (FedAvg), or a part of the way to it.

    Args:
        lr: 1 takes the mean; below 1, ``old + lr · (mean − old)``.
    """

    def __init__(self, lr: float = 1.0) -> None:
        _positive("lr", lr)
        self.lr = lr

    def step(self, name: str, old: Tensor, mean: Tensor) -> Tensor:
        """The new value of one entry, float64; ``old`` as the server has it, ``mean`` float64, of one shape."""
        return mean if self.lr == 1.0 else old + self.lr * (mean - old)

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


class Momentum(Average):
    """FedAvgM: ``m ← β·m + (mean − old)``, ``new = old + lr·m`` (arXiv 1909.06335).

    Args:
        lr: server learning rate.
        momentum: β.
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__(lr)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: give 0 <= momentum < 1")
        self.momentum = momentum
        self._m: dict[str, Tensor] = {}

    def step(self, name: str, old: Tensor, mean: Tensor) -> Tensor:
        change = mean - old
        self._m[name] = change if name not in self._m else self.momentum * self._m[name] + change
        return old + self.lr * self._m[name]

    def state_dict(self) -> dict[str, Any]:
        return {"m": dict(self._m)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._m = dict(state["m"])


class Adam(Average):
    """FedAdam: ``m ← β₁m + (1−β₁)Δ``, ``v ← β₂v + (1−β₂)Δ²``, ``new = old + lr·m/(√v + ε)``, Δ = mean − old, no bias correction
    (arXiv 2003.00295, algorithm 2).

    Args:
        lr: server learning rate.
        betas: β₁, β₂.
        eps: ε, the paper's τ: how adaptive the step is.
    """

    def __init__(self, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3) -> None:
        super().__init__(lr)
        _positive("eps", eps)
        self.betas = tuple(betas)
        self.eps = eps
        self._m: dict[str, Tensor] = {}
        self._v: dict[str, Tensor] = {}

    def step(self, name: str, old: Tensor, mean: Tensor) -> Tensor:
        change = mean - old
        first, second = self.betas
        zero = torch.zeros_like(change)
        self._m[name] = first * self._m.get(name, zero) + (1 - first) * change
        self._v[name] = second * self._v.get(name, zero) + (1 - second) * change.square()
        return old + self.lr * self._m[name] / (self._v[name].sqrt() + self.eps)

    def state_dict(self) -> dict[str, Any]:
        return {"m": dict(self._m), "v": dict(self._v)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._m, self._v = dict(state["m"]), dict(state["v"])


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}: give a positive number")
