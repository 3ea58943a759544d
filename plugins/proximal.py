"""FedProx: local training is held near what was received."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherlight.plugins.received import Received, check_strength


class Proximal(Received):
    """Add μ/2 · ‖w − w_received‖² to the local loss, w all parameters that train (FedProx, arXiv 1812.06127).

    It holds a copy of these parameters; a client in a smaller module (PriSM's) is held near that module's own. Nothing more travels. It is
    made for federations; under a Trainer, through ``PluginCallback``, w_received are the weights with which the epoch began.

    Args:
        mu: μ; 0 is as without the method. (The paper tries 0.001 to 1.)

    Raises:
        ValueError: ``mu`` below 0.
    """

    def __init__(self, mu: float = 0.01) -> None:
        check_strength("mu", mu)
        self.mu = mu

    def compares(self) -> bool:
        return self.mu > 0

    def extra_loss(self, model: nn.Module, batch: Any) -> Tensor | None:
        if not self._received:
            return None
        return _Distance.apply(self.mu, list(self._received.values()), *(model.get_parameter(name) for name in self._received))


class _Distance(torch.autograd.Function):
    """μ/2 · Σ‖w − w₀‖², of which nothing but w and w₀ is kept for backward."""

    @staticmethod
    def forward(ctx: Any, mu: float, start: list[Tensor], *now: Tensor) -> Tensor:
        ctx.mu, ctx.start = mu, start
        ctx.save_for_backward(*now)
        total = now[0].new_zeros((), dtype=torch.float32)
        for value, before in zip(now, start):
            total += (value - before).float().square().sum()
        return total * (mu / 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale = grads[0] * ctx.mu
        return None, None, *((value - before) * scale.to(value.dtype) for value, before in zip(ctx.saved_tensors, ctx.start))
