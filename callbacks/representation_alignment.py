"""Keep representations near those of the model that the epoch began with, under a Trainer."""

from __future__ import annotations

from typing import Any

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class RepresentationAlignment(PluginCallback):
    """Add to the loss how far the model's representations are from those of the model that the epoch began with; a period is an epoch.

    Args:
        seed: of the run's draws; by default the one of ``seed_everything``, or 0.
        **kwargs: as for :class:`featherlight.plugins.RepresentationAlignment`.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plugins.RepresentationAlignment(**kwargs), seed)
