"""Lightning's count of epochs, put right where a run goes on from a checkpoint of an epoch's end.

It begins the next epoch then without counting it. Nothing of that is seen but in the checkpoints that follow: whoever goes on from one of
those trains an epoch twice, or one too many (lightning 2.6).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def count_epoch(trainer: pl.Trainer) -> None:
    """As a batch starts: an epoch is under way, so that one more has begun than has ended."""
    progress: Any = trainer.fit_loop.epoch_progress
    for counts in (progress.total, progress.current):
        if counts.started <= counts.processed:
            counts.ready = counts.started = counts.processed + 1
