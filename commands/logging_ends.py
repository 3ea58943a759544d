"""A logger's own run ends with ours, so that another run in the same process begins another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch.loggers import Logger, WandbLogger


@contextmanager
def ended(loggers: Sequence[Logger]) -> Iterator[None]:
    """While entered, ``loggers`` may log; afterwards what they have begun is over, for better or worse.

    ``WandbLogger`` goes on with whatever run the process has begun before, so several runs compared would be drawn as one.
    """
    code = 1
    try:
        yield
        code = 0
    finally:
        if any(isinstance(logger, WandbLogger) for logger in loggers):
            import wandb

            wandb.finish(exit_code=code)
