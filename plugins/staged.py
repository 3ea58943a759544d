"""What layer freezing and progressive growth share: training that goes through a chain of blocks stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from featherlight.plugins.adapters import make_adapters
from featherlight.plugins.base import Change, Clock, Plugin
from featherlight.plugins.blocks import Tower, find_blocks
from featherlight.plugins.bypass import make_bypassable, restore, set_absent, set_bypassed
from featherlight.plugins.shared_prefix import SharedPrefix
from featherlight.plugins.targets import copy_member, find_targets

ADAPTERS = "width_adapters"


class Staged(Plugin):
    """A chain of blocks, cut into groups; stage s is the span of periods in which group s is the newest.

    Args:
        blocks: module paths in forward order, one pattern (``"backbone.layer*"``), or ``"auto"``.
        blocks_per_stage: how many blocks each stage adds, or a list of counts that add up to the number of blocks.
        periods_per_stage: epochs (Trainer) or rounds (federation) of each stage, or a list with one entry a stage; the last
            stage goes on to the end of training.
        periods: in place of ``periods_per_stage``, epochs or rounds of all stages together, which share them evenly, however many
            they are; earlier ones get no fewer.
        init: what a new block starts from: its own ``"random"`` values, or a copy of the block before (``"copy_previous"``).
        grow: leave the blocks above the stage out of the model.
        adapters: a linear layer from the newest block's width to the last block's, for stages where they differ:
            ``"auto"``, or ``"none"`` where what follows the blocks takes any width.
        stem: what comes before the blocks (paths of modules or parameters); by default what their parent registers before them.
        tail: what comes after the blocks, where their parent registers some of it before them; it always trains.
        targets: momentum copies that follow the online branch: ``"auto"``, or ``{target path: online path}``.
        share_prefix: run the frozen prefix that online branch and momentum copies have alike once a view, for all of them. It is done where
            the copies' blocks hold the same weights and are given the same values, and gives the same gradients. Switch it off where
            frozen blocks in eval mode draw random numbers.

    Raises:
        ValueError: on attach, when blocks are not found, stages and blocks do not add up, or another plugin stages these blocks.
    """

    at_once = True

    def __init__(
        self,
        blocks: str | Sequence[str] = "auto",
        blocks_per_stage: int | Sequence[int] = 1,
        periods_per_stage: int | Sequence[int] = 1,
        init: Literal["random", "copy_previous"] = "random",
        grow: bool = True,
        adapters: Literal["auto", "none"] = "auto",
        stem: Sequence[str] | None = None,
        tail: Sequence[str] | None = None,
        targets: Literal["auto"] | dict[str, str] = "auto",
        share_prefix: bool = True,
        periods: int | None = None,
    ) -> None:
        for name, value in (("blocks_per_stage", blocks_per_stage), ("periods_per_stage", periods_per_stage)):
            counts = [value] if isinstance(value, int | float) else list(value)
            if not counts or any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
                raise ValueError(f"{name}={value!r}: give a count of at least 1, or a list of such counts")
        if periods is not None and (not isinstance(periods, int) or isinstance(periods, bool) or periods < 1):
            raise ValueError(f"periods={periods!r}: give a count of at least 1, or leave it out")
        if periods is not None and periods_per_stage != 1:
            raise ValueError(f"periods={periods} and periods_per_stage={periods_per_stage!r} both say how long stages are: leave one out")
        if init not in ("random", "copy_previous"):
            raise ValueError(f"init={init!r} is not known; use 'random' or 'copy_previous'")
        if adapters not in ("auto", "none"):
            raise ValueError(f"adapters={adapters!r} is not known; use 'auto' or 'none'")
        self.blocks = blocks
        self.blocks_per_stage = blocks_per_stage
        self.periods_per_stage = periods_per_stage
        self.init = init
        self.grow = grow
        self.adapters = adapters
        self.stem = [stem] if isinstance(stem, str) else stem
        self.tail = [tail] if isinstance(tail, str) else tail
        self.targets = targets
        self.share_prefix = share_prefix
        self.periods = periods
        self._frozen: list[nn.Module] = []
        self._shared: list[SharedPrefix] = []
        self._alike: tuple[int, bool] = (-1, False)

    # -- the schedule ---------------------------------------------------------------------------------------------
    def stage(self, period: int) -> int:
        """The stage, counted from 0, that ``period`` belongs to."""
        return sum(period >= start for start in self._starts) - 1

    def trains(self, group: int, stage: int, clock: Clock) -> bool:
        """Whether the blocks of ``group`` train in ``stage``; group 0 brings the stem along."""
        raise NotImplementedError(f"{type(self).__name__} must say which groups train in a stage")

    @property
    def moves(self) -> bool:
        return self.init != "random"

    # -- the verbs ------------------------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._tower = find_blocks(model, self.blocks, self.stem, self.tail)
        self._refuse_a_second()
        targets = find_targets(model) if self.targets == "auto" else dict(self.targets)
        pairs = [(self._tower.moved(online, online), self._tower.moved(online, target)) for target, online in targets.items()]
        self._pairs = [(leader, follower) for leader, follower in pairs if leader is not None and follower is not None]
        self._followers = [follower for _, follower in self._pairs]
        self._groups = self._cut(len(self._tower.paths))
        self._starts = self._begin(len(self._groups))
        self._trainable = {id(p) for p in model.parameters() if p.requires_grad}
        self._adapters = nn.ModuleDict()
        for tower in (self._tower, *self._followers):
            for block in tower.blocks:
                make_bypassable(block, skippable=self.grow)
                block._staged = type(self).__name__  # type: ignore[assignment]
        if self.grow and self.adapters == "auto":
            newest = [tower_blocks[-1] for tower_blocks in self._by_group(self._tower)]
            self._adapters = make_adapters(newest)
            if len(self._adapters):
                if hasattr(model, ADAPTERS):
                    raise ValueError(f"the model has {ADAPTERS} already; only one plugin may grow it")
                self._trainable |= {id(p) for p in self._adapters.parameters()}
                like, own = next(self._tower.blocks[0].parameters()), next(self._adapters.parameters())
                if (like.device, like.dtype) != (own.device, own.dtype):  # tensors without data cannot be moved, even to where they are
                    self._adapters.to(like)
                model.add_module(ADAPTERS, self._adapters)

    def advance(self, clock: Clock) -> Change:
        stage = self.stage(clock.period)
        if clock == Clock(self._starts[stage], 0):
            self._begin_stage(stage)
        before = {id(p): p.requires_grad for p in self._own_parameters()}
        self._frozen = []
        for tower in (self._tower, *self._followers):
            self._arrange(tower, stage, clock)
        for name, adapter in self._adapters.items():
            self._train(adapter, name == str(stage))
            set_absent(adapter, "stage", name != str(stage))
        self._shared, self._alike = self._prefixes() if self.share_prefix else [], (-1, False)
        self._put_to_rest()
        changed = [p for p in self._own_parameters() if p.requires_grad != before[id(p)]]
        return Change(tuple(p for p in changed if not p.requires_grad), tuple(p for p in changed if p.requires_grad))

    def before_forward(self, clock: Clock) -> None:
        self._put_to_rest()
        if clock.step == 0 or self._alike[0] != clock.period:  # afterwards, averages of equals stay equal
            self._alike = clock.period, all(prefix.equal() for prefix in self._shared)
        for prefix in self._shared if self._alike[1] else ():
            prefix.enter()

    def after_step(self, clock: Clock) -> None:
        for prefix in self._shared:
            prefix.leave()

    def detach(self) -> None:
        for tower in (self._tower, *self._followers):
            for block in tower.blocks:
                restore(block)
        for parameter in self._own_parameters():
            parameter.requires_grad_(id(parameter) in self._trainable)
        for module in self._frozen:
            module.train(self._model.training)
        if len(self._adapters):
            delattr(self._model, ADAPTERS)
        self._frozen, self._shared = [], []

    # -- helpers --------------------------------------------------------------------------------------------------
    def _put_to_rest(self) -> None:
        for module in self._frozen:  # a host's model.train() wakes frozen norms and dropout: put them back
            if module.training:
                module.eval()

    def _prefixes(self) -> list[SharedPrefix]:
        """The frozen prefix of the online branch, with those of its copies."""
        blocks = self._tower.blocks
        size = next((place for place, block in enumerate(blocks) if not block._frozen), len(blocks))  # type: ignore[union-attr]
        copies = [follower for _, follower in self._pairs]
        return [SharedPrefix([tower.blocks[:size] for tower in (self._tower, *copies)])] if size and copies else []

    def _refuse_a_second(self) -> None:
        """Of two schedules over the same blocks the later one would win in part."""
        for index, path in enumerate(self._tower.paths):
            around = [*self._tower.enclosing(index), *self._tower.blocks[index].modules()]
            if other := next((module._staged for module in around if "_staged" in vars(module)), None):
                raise ValueError(
                    f'{other} has a schedule for block "{path}" already, so {type(self).__name__} cannot have one: leave one out'
                )

    def _cut(self, n_blocks: int) -> list[int]:
        """Number of blocks of each group."""
        if isinstance(self.blocks_per_stage, int):
            size = self.blocks_per_stage
            if size > n_blocks:
                raise ValueError(f"blocks_per_stage={size}, but the model has {n_blocks} blocks: {', '.join(self._tower.paths)}")
            return [min(size, n_blocks - first) for first in range(0, n_blocks, size)]
        sizes = list(self.blocks_per_stage)
        if sum(sizes) != n_blocks:
            raise ValueError(f"blocks_per_stage={sizes} adds up to {sum(sizes)}, but the model has {n_blocks} blocks")
        return sizes

    def _begin(self, n_stages: int) -> list[int]:
        """First period of each stage."""
        if self.periods is not None:
            if self.periods < n_stages:
                raise ValueError(f"periods={self.periods} are too few for {n_stages} stages: give one for each, or more blocks_per_stage")
            return [-(-self.periods * stage // n_stages) for stage in range(n_stages)]
        if isinstance(self.periods_per_stage, int):
            return [self.periods_per_stage * stage for stage in range(n_stages)]
        lengths = list(self.periods_per_stage)
        if len(lengths) > n_stages:
            raise ValueError(
                f"periods_per_stage={lengths} makes {len(lengths)} stages, but {len(self._tower.paths)} blocks at "
                f"blocks_per_stage={self.blocks_per_stage} make {n_stages}: shorten the list or name finer blocks"
            )
        if len(lengths) < n_stages:
            raise ValueError(f"periods_per_stage={lengths} has {len(lengths)} entries for {n_stages} stages: give one for each")
        return [sum(lengths[:stage]) for stage in range(n_stages)]

    def _by_group(self, tower: Tower) -> list[tuple[nn.Module, ...]]:
        blocks, groups, first = tower.blocks, [], 0
        for size in self._groups:
            groups.append(blocks[first : first + size])
            first += size
        return groups

    def _own_parameters(self) -> list[nn.Parameter]:
        """Stem and blocks of the online branch, and the adapters; targets never train."""
        blocks = [p for block in self._tower.blocks for p in block.parameters()]
        return [*self._tower.stem_parameters(), *blocks, *self._adapters.parameters()]

    def _train(self, module: nn.Module, on: bool) -> None:
        for parameter in module.parameters():
            parameter.requires_grad_(on and id(parameter) in self._trainable)

    def _arrange(self, tower: Tower, stage: int, clock: Clock) -> None:
        """Bring one tower to ``stage``: what is absent, what trains, what is frozen."""
        online = tower is self._tower
        stem_trains = self.trains(0, stage, clock)
        for parameter in tower.stem_parameters():
            parameter.requires_grad_(online and stem_trains and id(parameter) in self._trainable)
        for module in tower.stem_modules():
            self._set_frozen(module, not stem_trains)
        for group, blocks in enumerate(self._by_group(tower)):
            missing = self.grow and group > stage
            trains = not missing and self.trains(group, stage, clock)
            for block in blocks:
                set_absent(block, "stage", missing)
                set_bypassed(block, "stage", missing)
                block._active = group == stage or (not self.grow and trains)  # type: ignore[assignment]
                block._frozen = not missing and not trains  # type: ignore[assignment]
                self._train(block, online and trains)
                self._set_frozen(block, not missing and not trains)
        last = tower.blocks[-1]
        last._instead = (self._adapters[str(stage)],) if str(stage) in self._adapters else ()  # type: ignore[assignment]

    def _set_frozen(self, module: nn.Module, on: bool) -> None:
        if on:
            self._frozen.append(module)
        elif not module.training and self._model.training:
            module.train()

    def _begin_stage(self, stage: int) -> None:
        """What happens to weights exactly once, at the first step of a stage; doing it again before any step changes nothing."""
        groups = self._by_group(self._tower)
        if stage and self.init == "copy_previous":
            for block in groups[stage]:
                previous = groups[stage - 1][-1]
                if _shapes(block) != _shapes(previous):
                    raise ValueError(
                        f"init='copy_previous' needs blocks of one shape, but stage {stage + 1} begins with a block "
                        "unlike the block before it; use init='random'"
                    )
                copy_member(previous, block)
        for leader, follower in self._pairs:
            for source, destination in zip(leader.blocks, follower.blocks):
                copy_member(source, destination)
            for path, moved in zip(leader.stem, follower.stem):
                copy_member(leader.member(path), follower.member(moved))


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in module.state_dict(keep_vars=True).values()]
