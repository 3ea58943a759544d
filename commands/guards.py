"""What a Trainer run must not do unnoticed: go on, and save, after its loss or its weights have stopped being numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class FiniteGuard(pl.Callback):
    """Stop training at the first loss that is not finite, and never save weights that are not.

    The first bad step is noted on the loss's own device; the host looks at it every ``log_every_n_steps`` steps, at an epoch's end
    and before a checkpoint is written, so that no step waits for the device.

    Raises:
        ValueError: the loss, or a weight that is about to be saved, is not finite.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_bad = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            bad = ~torch.isfinite(loss.detach()).all()
            before = self._first_bad if self._first_bad is not None else torch.full((), -1, device=loss.device)
            self._first_bad = torch.where(bad & (before < 0), batch_idx + 1, before)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            self._check_loss(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_loss(trainer)
        self._first_bad = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_loss(trainer)
        for name, value in checkpoint["state_dict"].items():
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
                raise ValueError(f"weight {name} is not finite at {where}; {_advice(trainer)}")

    def _check_loss(self, trainer: pl.Trainer) -> None:
        if self._first_bad is not None and (step := int(self._first_bad)) >= 0:
            raise ValueError(f"loss is not finite at epoch {trainer.current_epoch}, step {step}; {_advice(trainer)}")


def _advice(trainer: pl.Trainer) -> str:
    saved = [
        getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks
    ]
    good = next((path for path in saved if path and Path(path).exists()), None)
    left = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return f"start anew with a lower learning rate, a warm-up, or clipped gradients (--trainer.gradient_clip_val 1); {left}"
