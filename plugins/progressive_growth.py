"""Progressive growth: the model starts shallow and gains blocks; all that is there trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from featherlight.plugins.base import Clock
from featherlight.plugins.staged import Staged


class ProgressiveGrowth(Staged):
    """Grow a model block by block while all of it trains (ProgFed, ICML 2022; Prog-FedSSL, arXiv 2401.11647).

    Args:
        blocks: as for :class:`~featherlight.plugins.staged.Staged`, like all that is not explained here.
        warmup_periods: at each growth, train only the newest group and what follows the blocks for this many
            periods (ProgFed: 25 rounds); where that is a whole stage, earlier blocks do not train in it.
    """

    def __init__(
        self,
        blocks: str | Sequence[str] = "auto",
        blocks_per_stage: int | Sequence[int] = 1,
        periods_per_stage: int | Sequence[int] = 1,
        warmup_periods: int = 0,
        init: Literal["random", "copy_previous"] = "random",
        adapters: Literal["auto", "none"] = "auto",
        stem: Sequence[str] | None = None,
        tail: Sequence[str] | None = None,
        targets: Literal["auto"] | dict[str, str] = "auto",
        share_prefix: bool = True,
        periods: int | None = None,
    ) -> None:
        super().__init__(blocks, blocks_per_stage, periods_per_stage, init, True, adapters, stem, tail, targets, share_prefix, periods)
        if warmup_periods < 0:
            raise ValueError(f"warmup_periods={warmup_periods}: give 0 or more periods")
        self.warmup_periods = warmup_periods

    def trains(self, group: int, stage: int, clock: Clock) -> bool:
        warming_up = stage > 0 and clock.period < self._starts[stage] + self.warmup_periods
        return group == stage if warming_up else group <= stage
