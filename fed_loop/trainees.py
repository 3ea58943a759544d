"""The modules that clients train: the server's own, and smaller ones that a plugin makes for some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from featherlight.fed_loop.local_step import LocalStep
from featherlight.fed_loop.optimizers import ClientOptimizer
from featherlight.fed_loop.plan import Plan, make_plan, may_travel, shareable
from featherlight.plugins import Chain, Clock, Message, Visit, find_targets
from featherlight.plugins.optimizer_state import check_covered, release


def local_steps(fabric: Fabric, clip: float | None) -> Callable[[Chain], LocalStep]:
    """What makes a local step for a chain."""
    precision = fabric.strategy.precision  # of one device and no wrapper, Fabric's own do nothing else
    backward = partial(precision.backward, model=None)
    return partial(LocalStep, precision=precision, backward=backward, clip=clip, update=precision.optimizer_step)


def _setup(fabric: Fabric, module: nn.Module, optimizer: Optimizer) -> None:
    fabric.setup(module, optimizer)


class Served(NamedTuple):
    """What a client is to have before it trains.

    Args:
        entries: by name; wanted: the names among them that this client needs; made: those made for it alone, which it need not keep.
    """

    entries: Message
    wanted: tuple[str, ...]
    made: frozenset[str]

    @property
    def lasting(self) -> list[str]:
        """What the client may keep."""
        return [name for name in self.wanted if name not in self.made]


class Trainee:
    """One module that clients train, with the plugins attached to it and its optimizer.

    Args:
        chain: attached to ``module``.
        targets: its momentum copies.
        step: makes a local step for a chain.
        setup: brings a module and its optimizer to the device.
    """

    def __init__(
        self,
        module: nn.Module,
        chain: Chain,
        targets: dict[str, str],
        step: Callable[[Chain], LocalStep],
        setup: Callable[[nn.Module, Optimizer], object],
    ) -> None:
        self.module, self.chain, self.targets = module, chain, targets
        self.schedule = ClientOptimizer(module)
        self.optimizer = self.schedule.optimizer
        setup(module, self.optimizer)
        self.live = shareable(module, targets)
        self.names = frozenset(module.state_dict(keep_vars=True))
        self.step = step(chain)
        self._begun = -1
        self._plan: Plan | None = None

    def begin(self, clock: Clock) -> None:
        """Bring the module to where ``clock`` says it is; a second call in the same round does nothing."""
        if self._begun == clock.period:
            return
        self._begun, self._plan = clock.period, None
        self.module.train()
        release([self.optimizer], self.chain.advance(clock))
        self.schedule.go_to(clock.period)

    def plan(self, visit: Visit) -> Plan:
        """Begin ``visit`` and read off what it takes: the same of each in a round that no plugin makes differ."""
        if self._plan is None or self.chain.visits:
            self._plan = make_plan(self.module, self.chain, self.targets, visit)
            check_covered(self._plan.sent, [self.optimizer])
        return self._plan


class Trainees:
    """The server's own module, and one more for each that :meth:`Plugin.narrow` gave.

    Args:
        own: the server's, its plugins attached.
        blank: the same plugins, attached to nothing.
    """

    def __init__(
        self, own: Trainee, blank: Chain, step: Callable[[Chain], LocalStep], setup: Callable[[nn.Module, Optimizer], object]
    ) -> None:
        self.own, self._blank, self._step, self._setup = own, blank, step, setup
        self._smaller: dict[int, Trainee] = {}

    @classmethod
    def on(cls, fabric: Fabric, module: nn.Module, chain: Chain, blank: Chain, targets: dict[str, str], clip: float | None) -> Trainees:
        """Of ``module``, to which ``chain`` is attached, on the device of ``fabric``."""
        step, setup = local_steps(fabric, clip), partial(_setup, fabric)
        return cls(Trainee(module, chain, targets, step, setup), blank, step, setup)

    def of(self, visit: Visit) -> Trainee:
        """What the client of ``visit`` trains, brought to its round."""
        module = self.own.chain.narrow(visit)
        if module is None:
            return self.own
        if id(module) not in self._smaller:
            chain = self._blank.anew()
            targets = find_targets(module)
            chain.attach(module)
            self._smaller[id(module)] = Trainee(module, chain, targets, self._step, self._setup)
        trainee = self._smaller[id(module)]
        trainee.begin(Clock(visit.round, 0))
        return trainee

    def serve(self, trainee: Trainee, server: Message, plan: Plan, visit: Visit, kept: Collection[str]) -> Served:
        """The server's entries as the client of ``visit`` gets them, ``kept`` being the names of what it still has."""
        chain = self.own.chain
        if not chain.encodes_down:
            return Served(server, tuple(plan.received), frozenset())
        entries = chain.encode_down(server, visit, kept)
        made = frozenset(name for name, value in entries.items() if name in plan.received and value is not server.get(name))
        new = (name for name in entries if name not in trainee.names and name not in server)
        return Served(entries, (*(name for name in plan.received if name in entries), *new), made)

    def travels(self, visits: Iterable[Visit]) -> Message:
        """Entries as they may reach the server from ``visits``, for their names and shapes."""
        like: Message = {}
        seen: set[int] = set()
        for visit in visits:
            trainee = self.of(visit)
            if id(trainee) in seen:
                continue
            seen.add(id(trainee))
            entries: Mapping[str, Any] = {name: value.detach() for name, value in may_travel(trainee.module, trainee.live).items()}
            chain = self.own.chain
            if chain.by_differences:
                entries = trainee.chain.encode({name: torch.zeros_like(value) for name, value in entries.items()}, visit)
            if chain.decodes:
                entries = chain.decode(dict(entries), visit)
            like |= {name: value[0] if isinstance(value, tuple) else value for name, value in entries.items()}
        return like
