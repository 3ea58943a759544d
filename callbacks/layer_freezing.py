"""Train a model's blocks one stage after the other, under a Trainer."""

from __future__ import annotations

from typing import Any

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class LayerFreezing(PluginCallback):
    """Train a model's blocks one stage after the other; a period is an epoch.

    Args:
        seed: of the method's draws; by default the one of ``seed_everything``, or 0.
        **kwargs: as for :class:`featherlight.plugins.LayerFreezing`.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plugins.LayerFreezing(**kwargs), seed)
