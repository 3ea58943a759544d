"""Grow a model block by block while all of it trains, under a Trainer."""

from __future__ import annotations

from typing import Any

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class ProgressiveGrowth(PluginCallback):
    """Grow a model block by block while all of it trains; a period is an epoch.

    Args:
        seed: of the method's draws; by default the one of ``seed_everything``, or 0.
        **kwargs: as for :class:`featherlight.plugins.ProgressiveGrowth`.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plugins.ProgressiveGrowth(**kwargs), seed)
