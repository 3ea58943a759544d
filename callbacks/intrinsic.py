"""Train in a random subspace of the parameters, under a Trainer."""

from __future__ import annotations

from typing import Any

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class IntrinsicProjection(PluginCallback):
    """Train in a subspace of ``dim`` dimensions, whatever the optimizer; a period is an epoch.

    The smallest ``dim`` that reaches nine tenths of the full model's accuracy is the task's intrinsic dimension (arXiv 1804.08838).

    Args:
        seed: of the subspaces; by default the one of ``seed_everything``, or 0.
        **kwargs: as for :class:`featherlight.plugins.IntrinsicProjection`.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plugins.IntrinsicProjection(**kwargs).in_place(), seed)
