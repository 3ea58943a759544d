"""Epochs that begin as a federated client's turn does, so that a Trainer run and a one-client federation can be compared bit for bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from featherlight.callbacks.host import common_seed
from featherlight.plugins import optimizer_state, targets
from featherlight.plugins.seeds import derive


class FreshStart(pl.Callback):
    """Begin every epoch with empty optimizer state, targets copied from their online branches, and torch's generator reseeded.

    It acts at an epoch's first batch: when plugins have brought the model to the epoch and the loader has made its draws. The
    generator's state is in the checkpoint, so that dropout goes on as it was when a run is resumed within an epoch.

    Args:
        seed: as for :class:`~featherlight.callbacks.PluginCallback`; by default the run's.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._targets: dict[str, str] = {}
        self._random: torch.Tensor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._targets = targets.find_targets(pl_module)  # now: layers are there, and nothing is frozen yet

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            optimizer_state.clear(trainer.optimizers)
            targets.follow(pl_module, self._targets)
            seed = common_seed(trainer) if self.seed is None else self.seed
            torch.manual_seed(derive(seed, trainer.current_epoch, 0, "model"))
        elif self._random is not None:
            torch.set_rng_state(self._random)
        self._random = None

    def state_dict(self) -> dict[str, Any]:
        return {"random": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]
