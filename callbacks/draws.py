"""Torch's own generators in a Trainer's checkpoint: a run that goes on draws what it would have drawn, a module's dropout for one."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class Draws:
    """The generators' states of the checkpoint that a run goes on from, until they are set.

    At a run's start they are set for an epoch that begins; for one that goes on, once more at its first batch, when the loader has been
    opened. Of several processes a checkpoint has the first one's alone, and there nothing is set.
    """

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Of the CPU, and of the GPU in use, if any."""
        gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() and torch.cuda.is_initialized() else {}
        return {"cpu": torch.get_rng_state(), **gpu}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave; nothing of a checkpoint of an earlier version."""
        self._states = dict(state)

    def run_starts(self, trainer: pl.Trainer) -> None:
        """Behind ``on_train_start``."""
        if trainer.world_size > 1:
            self._states = {}
        self._set()

    def batch_starts(self, batch_idx: int) -> None:
        """At the start of each batch; from the second on there is nothing to do."""
        if batch_idx:
            self._set()
        self._states = {}

    def _set(self) -> None:
        if "cpu" in self._states:
            torch.set_rng_state(self._states["cpu"].cpu())
        if "cuda" in self._states and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._states["cuda"].cpu())
