"""Leave a random part of the earlier blocks out of each epoch, or of each batch, under a Trainer."""

from __future__ import annotations

from typing import Any

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class DepthDropout(PluginCallback):
    """Leave a random part of the earlier blocks out of each epoch, or of each batch; a period is an epoch.

    Args:
        seed: of the method's draws; by default the one of ``seed_everything``, or 0.
        **kwargs: as for :class:`featherlight.plugins.DepthDropout`.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plugins.DepthDropout(**kwargs), seed)
