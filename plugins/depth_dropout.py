"""Depth dropout: a random part of the earlier blocks is left out of each turn, or of each step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from random import Random
from typing import Literal

from torch import nn

from featherlight.plugins.adapters import keeps_shape
from featherlight.plugins.base import Change, Clock, Plugin, Visit
from featherlight.plugins.blocks import Tower, find_blocks
from featherlight.plugins.bypass import is_absent, make_bypassable, restore, set_absent, set_bypassed
from featherlight.plugins.seeds import derive
from featherlight.plugins.targets import find_targets

OWNER = "depth dropout"


class DepthDropout(Plugin):
    """Replace a random subset of the earlier blocks by identity while training (Federated Depth Dropout, arXiv 2309.05213).

    Never left out: the active blocks (the newest stage's; the last block where nothing is staged), the stem, the head, and
    blocks that do not keep their input's shape. Evaluation runs all blocks. A momentum copy leaves out the same ones.

    Args:
        blocks: as for :class:`~featherlight.plugins.staged.Staged`.
        rate: share of the earlier blocks to leave out. Exactly ``round(rate · n)`` of ``n`` are drawn (halves round up), so
            that what a client needs is known in advance (a choice of this project).
        max_kept: keep at most this many blocks, active ones included (LW-FedSSL's tables: 6 of 12); where active blocks and those that
            cannot be left out are more already, those stay, and a warning says so.
        every: draw per client and ``"round"`` (saves memory, compute and download), or per ``"batch"`` (saves compute).
        scale: divide what a kept earlier block adds by the share kept, as stochastic depth does.
        targets: as for :class:`~featherlight.plugins.staged.Staged`.

    Raises:
        ValueError: a rate outside [0, 1), ``max_kept`` below 1, or (on attach) no block that identity could replace.
    """

    def __init__(
        self,
        blocks: str | Sequence[str] = "auto",
        rate: float = 0.5,
        max_kept: int | None = None,
        every: Literal["round", "batch"] = "round",
        scale: bool = False,
        targets: Literal["auto"] | dict[str, str] = "auto",
    ) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"rate={rate} is not a share of blocks to leave out; give 0 <= rate < 1")
        if max_kept is not None and (not isinstance(max_kept, int) or isinstance(max_kept, bool) or max_kept < 1):
            raise ValueError(f"max_kept={max_kept!r}: at least the active block is kept; give a whole number of 1 or more, or leave it out")
        if every not in ("round", "batch"):
            raise ValueError(f"every={every!r} is not known; use 'round' or 'batch'")
        self.blocks = blocks
        self.rate = rate
        self.max_kept = max_kept
        self.every = every
        self.scale = scale
        self.targets = targets
        self._dropped: tuple[int, ...] = ()
        self._told: set[int] = set()

    @property
    def sends_parts(self) -> bool:
        return self.every == "round"

    def attach(self, model: nn.Module) -> None:
        self._tower = find_blocks(model, self.blocks)
        targets = find_targets(model) if self.targets == "auto" else dict(self.targets)
        followers = [self._tower.moved(online, target) for target, online in targets.items()]
        self._towers: list[Tower] = [self._tower, *(tower for tower in followers if tower is not None)]
        self._droppable = [index for index, block in enumerate(self._tower.blocks) if keeps_shape(block)]
        if not self._droppable:
            raise ValueError(
                f"none of the blocks {', '.join(self._tower.paths)} keeps its input's shape, so none can be left out; "
                "name finer blocks, such as 'backbone.layer*.*' for the residual blocks of a ResNet"
            )
        for tower in self._towers:
            for block in tower.blocks:
                make_bypassable(block)

    def advance(self, clock: Clock) -> Change:
        self._release()  # a period begins with every block there: what is left out is a turn's own
        return Change()

    def visit(self, visit: Visit) -> None:
        self._visit = visit
        self._release()
        if self.every == "round":
            self._draw()
            self._mark_absent(True)

    def before_forward(self, clock: Clock) -> None:
        if self.every == "batch":
            self._draw(clock.step)
        for tower in self._towers:
            blocks = tower.blocks
            for index in self._dropped:
                set_bypassed(blocks[index], OWNER, True)
            if self.scale:
                earlier, _ = self._earlier()
                for index in set(earlier) - set(self._dropped):
                    blocks[index]._residual_scale = len(earlier) / (len(earlier) - len(self._dropped))  # type: ignore[assignment]

    def after_step(self, clock: Clock) -> None:
        for tower in self._towers:
            for block in tower.blocks:
                set_bypassed(block, OWNER, False)
                if self.scale:
                    block._residual_scale = 1.0  # type: ignore[assignment]

    def detach(self) -> None:
        self._release()
        for tower in self._towers:
            for block in tower.blocks:
                restore(block)

    def _earlier(self) -> tuple[list[int], int]:
        """Indices of the blocks that may be left out, and how many blocks are there at all."""
        around = [self._tower.enclosing(index) for index in range(len(self._tower.paths))]
        there = [index for index, modules in enumerate(around) if not any(is_absent(module, but=OWNER) for module in modules)]
        staged = any(hasattr(module, "_active") for modules in around for module in modules)
        active = {index for index in there if any(getattr(module, "_active", False) for module in around[index])} if staged else {there[-1]}
        return [index for index in there if index in self._droppable and index not in active], len(there)

    def _draw(self, *purpose: int) -> None:
        earlier, present = self._earlier()
        count = int(self.rate * len(earlier) + 0.5)
        if self.max_kept is not None:
            count = max(count, present - self.max_kept)
        if count > len(earlier):
            self._tell(present - len(earlier))
        count = min(count, len(earlier))
        random = Random(derive(self._visit.seed, self._visit.round, self._visit.client, *purpose, OWNER))
        self._dropped = tuple(sorted(random.sample(earlier, count)))

    def _tell(self, stay: int) -> None:
        if stay not in self._told:
            self._told.add(stay)
            warnings.warn(
                f"max_kept={self.max_kept}, but {stay} blocks are active or change their input's shape, and stay: name finer blocks, train "
                "fewer a stage, or give more",
                stacklevel=2,
            )

    def _mark_absent(self, on: bool) -> None:
        for tower in self._towers:
            blocks = tower.blocks
            for index in self._dropped:
                set_absent(blocks[index], OWNER, on)

    def _release(self) -> None:
        self._mark_absent(False)
        self.after_step(Clock(0))
        self._dropped = ()
