"""A LightningModule's own ``configure_optimizers``, read for a federation: one optimizer, and a schedule over rounds."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from featherlight.plugins.optimizer_state import hand_over_decay


class ClientOptimizer:
    """The optimizer every client starts anew, and its learning rate over rounds.

    Args:
        module: whose ``configure_optimizers()`` returns an optimizer, with or without a scheduler, in any of Lightning's forms.
            A scheduler steps once a round, as it does once an epoch under a Trainer.

    Raises:
        ValueError: none or several optimizers, or a scheduler that steps by batches.
    """

    def __init__(self, module: nn.Module) -> None:
        configured = module.configure_optimizers()  # type: ignore[operator]
        hand_over_decay(configured)
        optimizers, schedulers = _parse(configured)
        if len(optimizers) != 1:
            raise ValueError(
                f"{type(module).__name__}.configure_optimizers gives {len(optimizers)} optimizers; "
                "a federation's clients train with exactly one"
            )
        self.optimizer = optimizers[0]
        self._schedulers = []
        for entry in schedulers:
            config = entry if isinstance(entry, dict) else {"scheduler": entry}
            if config.get("interval", "epoch") != "epoch":
                raise ValueError(
                    f"the scheduler {type(config['scheduler']).__name__} steps every {config['interval']}; in a federation the learning "
                    "rate follows rounds: use interval='epoch'"
                )
            if isinstance(config["scheduler"], ReduceLROnPlateau):
                raise ValueError(
                    "ReduceLROnPlateau follows a metric; in a federation the learning rate follows rounds: use another scheduler"
                )
            self._schedulers.append((config["scheduler"], int(config.get("frequency", 1))))
        self._round = 0

    def go_to(self, round: int) -> None:
        """Set the learning rate of ``round``; rounds only go forward."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step\\(\\).*")
            while self._round < round:
                self._round += 1
                for scheduler, frequency in self._schedulers:
                    if self._round % frequency == 0:
                        scheduler.step()


def _parse(configured: Any) -> tuple[list[Optimizer], list[Any]]:
    if isinstance(configured, Optimizer):
        return [configured], []
    if isinstance(configured, dict):
        return [configured["optimizer"]], [configured["lr_scheduler"]] if "lr_scheduler" in configured else []
    if isinstance(configured, tuple | list) and configured:
        if len(configured) == 2 and all(isinstance(part, tuple | list) for part in configured):
            return list(configured[0]), list(configured[1])
        if all(isinstance(part, dict) for part in configured):
            parts = [_parse(part) for part in configured]
            return [optimizer for part, _ in parts for optimizer in part], [scheduler for _, part in parts for scheduler in part]
        return list(configured), []
    return [], []
