"""Layer-wise training: one group of blocks trains, those below it are frozen, those above do not exist yet."""

from __future__ import annotations

from featherlight.plugins.base import Clock
from featherlight.plugins.staged import Staged


class LayerFreezing(Staged):
    """Train the blocks of a model one stage after the other, each frozen when its stage is over.

    In stage s group s trains, with everything after the blocks (final norm, heads); the stem trains in stage 1 only. The frozen
    prefix stores nothing for backward, its norms are in eval mode, and it does not travel. (Federated Layer-wise Learning, arXiv
    2309.05213; LW-FedSSL, arXiv 2401.11647.) With ``grow=False`` the whole depth stays in the forward pass and stage s trains
    group s and all above it: freezing of a growing prefix.

    Args: as for :class:`~featherlight.plugins.staged.Staged`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> plugin = LayerFreezing(blocks=["1", "2"], periods_per_stage=5)
        >>> plugin.attach(model)
        >>> change = plugin.advance(Clock(period=5))
        >>> [p.requires_grad for p in (model[0].weight, model[1].weight, model[2].weight)]
        [False, False, True]
    """

    def trains(self, group: int, stage: int, clock: Clock) -> bool:
        return group == stage or (not self.grow and group > stage)
