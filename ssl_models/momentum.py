"""Momentum copies: a target branch that follows the online branch, and makes what the online branch learns to predict."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from featherlight.ssl_models.ssl import SelfSupervised


class MomentumSSL(SelfSupervised):
    """An online branch (backbone, projector, predictor) and the momentum copy of its first two.

    A subclass has ``make_predictor`` and ``pair_loss``; the loss of two views is the sum over both ways of pairing them.

    Args:
        momentum: m of the target's update, target ← m · target + (1 − m) · online (0.99 in LW-FedSSL, arXiv 2401.11647).
    """

    def __init__(self, backbone: str, momentum: float = 0.99, hidden_dim: int = 512, output_dim: int = 256, **options: Any) -> None:
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        super().__init__(backbone, hidden_dim=hidden_dim, output_dim=output_dim, **options)
        self.momentum = momentum
        self.predictor = self.make_predictor(hidden_dim, output_dim)
        self.backbone_target = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projector_target = copy.deepcopy(self.projector).requires_grad_(False)
        self.targets = {"backbone_target": "backbone", "projector_target": "projector"}

    def make_predictor(self, hidden_dim: int, output_dim: int) -> nn.Module:
        """The predictor: ``(N, output_dim)`` to ``(N, output_dim)``."""
        raise NotImplementedError

    def pair_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of online predictions of one view against the targets of the other, both ``(N, output_dim)``: a scalar."""
        raise NotImplementedError

    def view_loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        self.check_images(x0)
        # A pass for each view, as in the papers' code: batch norm sees one view of each image at a time.
        with torch.no_grad():
            target0 = self.projector_target(self.backbone_target(x0))
            target1 = self.projector_target(self.backbone_target(x1))
        online0 = self.predictor(self.projector(self.features(x0)))
        online1 = self.predictor(self.projector(self.features(x1)))
        loss = self.pair_loss(online0, target1) + self.pair_loss(online1, target0)
        if self.training:
            self.keep(torch.cat([target0, target1]))
        return loss

    def keep(self, targets: Tensor) -> None:
        """What stays of a training batch's targets, ``(2N, output_dim)``, for later batches: nothing."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own step, then the target's: once an optimizer step, whatever is accumulated."""
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        """Move the target towards the online branch. A host without a Trainer calls it after each optimizer step.

        What does not train on the online side stays bitwise as it is; batch norm's running statistics are not averaged,
        the target keeps its own.
        """
        moving: list[Tensor] = []
        towards: list[Tensor] = []
        for target_path, online_path in self.targets.items():
            copies = dict(self.get_submodule(target_path).named_parameters())
            for name, online in self.get_submodule(online_path).named_parameters():
                if online.requires_grad:
                    moving.append(copies[name])
                    towards.append(online)
        if moving:
            with torch.no_grad():
                torch._foreach_lerp_(moving, towards, 1.0 - self.momentum)
