"""What a federation will cost, without training it: the same plans, the same meters, on tensors that have shapes and no data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import Precision
from torch import nn
from torch._subclasses import DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.optim import Optimizer

from featherlight.fed_loop.cohort import absent, asked, steps_done
from featherlight.fed_loop.federation import Federation
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import LocalStep, refusal_told
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan, may_travel
from featherlight.fed_loop.predict_divided import DividedPrediction
from featherlight.fed_loop.round_kinds import check_partition
from featherlight.fed_loop.server_training import ServerTraining
from featherlight.fed_loop.trainees import Served, Trainee, Trainees
from featherlight.fed_loop.wire import packed_length
from featherlight.plugins import Chain, Clock, Message, Plugin, Visit, find_targets
from featherlight.plugins.cost_table import CostTable
from featherlight.plugins.optimizer_state import clear


class Traffic(NamedTuple):
    """What tensors of a round's messages take, without their names: bytes, summed over the cohort.

    Args:
        whole: of all that clients must have; down: of what they are sent; up: of what they send.
    """

    whole: int = 0
    down: int = 0
    up: int = 0

    @property
    def compression(self) -> tuple[float, float, float]:
        """How many times less than all of it goes down, up, and both ways: 2 / (1/up + 1/down)."""
        down, up, both = (sent / self.whole for sent in (self.down, self.up, (self.down + self.up) / 2))
        return 1 / down if down else inf, 1 / up if up else inf, 1 / both if both else inf


Parts = Mapping[str, tuple[int, int]]
"""Tensors' bytes down and up by part of the model, a name's first component, of a client in every round, over the run."""


def predict(
    settings: Federation,
    make_module: Callable[[], nn.Module],
    data: Any,
    plugins: Sequence[Plugin] = (),
    progress: Callable[[int], None] = lambda round: None,
    last_traffic: Callable[[Traffic], None] = lambda traffic: None,
    parts: Callable[[Parts], None] = lambda parts: None,
) -> CostTable:
    """The cost table that ``settings.run`` would measure, but for seconds.

    Args:
        make_module: builds the LightningModule; called where its tensors get no memory.
        data: as for ``run``; besides, ``batch_sizes(client, epochs)`` gives the samples of each step of a turn, and ``example_batch(n)`` a
            batch of n samples, as ``training_step`` takes it.
        progress: told the number of each round done.
        last_traffic: told what travels in the last round, when what clients are sent at first is behind them.
        parts: told what travels of each part of the model, where clients train all that they hold.
    """
    _ = data.num_clients, data.example_batch(2)  # whatever data read on first use, they read now and not as fakes
    try:
        with torch.device("meta"):  # some constructors read values of helper tensors, which fake tensors have not; meta parameters do
            module = precision_of(settings).convert_module(make_module())
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _predict(settings, with_memory(module), data, plugins, progress, last_traffic, parts)
    except (DynamicOutputShapeException, DataDependentOutputException, NotImplementedError) as error:
        warnings.warn(
            f"something's shape depends on values ({error}), so real steps are metered, which takes time and memory", stacklevel=2
        )
        module = precision_of(settings).convert_module(make_module())
        return _predict(settings, module, data, plugins, progress, last_traffic, parts)


def with_memory(module: nn.Module) -> nn.Module:
    """``module`` off the meta device. What was one tensor under several names is so again: moving gives each name its own."""
    homes: dict[int, list[tuple[dict[str, Any], str]]] = {}
    kept: list[Any] = []  # alive, so that an id stands for one tensor
    for owner in module.modules():
        for own in (owner._parameters, owner._buffers):
            for name, value in own.items():
                if value is not None:
                    kept.append(value)
                    homes.setdefault(id(value), []).append((own, name))
    module.to_empty(device="cpu")
    for (first, name), *others in homes.values():
        for own, alias in others:
            own[alias] = first[name]
    return module


def precision_of(settings: Federation) -> Precision:
    return Fabric(accelerator="cpu", devices=1, precision=settings.compute["precision"]).strategy.precision


def _predict(
    settings: Federation,
    module: nn.Module,
    data: Any,
    plugins: Sequence[Plugin],
    progress: Callable[[int], None],
    last_traffic: Callable[[Traffic], None],
    parts: Callable[[Parts], None],
) -> CostTable:
    chain = Chain(plugins)
    blank = chain.anew()
    targets = find_targets(module)
    chain.attach(module)
    try:
        check_partition(settings, chain.partition(Clock(0, 0)), module, data)
        prediction = _Prediction(settings, module, data, chain, blank, targets)
        table = prediction.rounds(progress)
        last_traffic(prediction.traffic)
        parts({part: (round(down), round(up)) for part, (down, up) in prediction.parts.items()})
        return table
    finally:
        chain.detach()


def _as_it_is(module: nn.Module, optimizer: Optimizer) -> Optimizer:
    return optimizer


class _Prediction:
    def __init__(self, settings: Federation, module: nn.Module, data: Any, chain: Chain, blank: Chain, targets: dict[str, str]) -> None:
        self.settings, self.data, self.chain = settings, data, chain
        step = partial(LocalStep, precision=precision_of(settings), clip=settings.clip)
        self.own = Trainee(module, chain, targets, step, _as_it_is)
        self.trainees = Trainees(self.own, blank, step, _as_it_is)
        self.on_server = ServerTraining(self.own, step(Chain()), data, settings.seed)
        self.on_server.check()
        self.ledger = Ledger(settings.resend)
        self.meters = Meters()
        self.table = CostTable()
        self.divided = DividedPrediction(settings, self.own, data, precision_of(settings), self.ledger, self.table)
        self.traffic = Traffic()
        self.parts: dict[str, tuple[float, float]] = {}
        self._lengths: dict[Any, _Length] = {}
        self._lengths_up: dict[Any, _Length] = {}
        self._served: dict[Any, Served] = {}
        self._memories: dict[int, Message] = {}
        self._arrived: dict[Any, Plan] = {}
        self._remembered: dict[Any, Message] = {}

    def rounds(self, progress: Callable[[int], None]) -> CostTable:
        settings = self.settings
        for round in range(settings.rounds):
            self.own.begin(Clock(round, 0))
            self.on_server.begin(Clock(round, 0))
            if (partition := self.chain.partition(Clock(round, 0))) is not None:
                self.divided.round(partition, round)
                progress(round + 1)
                continue
            changed: set[str] = set()
            kept: dict[int, dict[str, int]] = {}
            self.traffic = Traffic()
            cohort = asked(settings, self.data.num_clients, round)
            gone = absent(settings, cohort, round)
            for client in cohort:
                visit = Visit(round, client, settings.seed)
                trainee = self.trainees.of(visit)
                plan = trainee.plan(visit)
                served = self._serve(trainee, plan, visit)
                kept[client] = self.ledger.after(client, served.lasting, plan.sent, self.own.live.keys())
                self._turn(trainee, plan, visit, served, gone.get(client), len(cohort))
                changed |= plan.sent.keys() if client not in gone else set()
            for client, entries in kept.items():
                self.ledger.visited(client, entries)
            if self.chain.counts_alike:  # by noise, which is on what nobody sent, too
                changed |= may_travel(self.own.module, self.own.live).keys()
            if not cohort:  # as a run does, which looks at what might travel
                self._encoded(self.own, may_travel(self.own.module, self.own.live), Visit(round, 0, settings.seed))
            arrived = [Visit(round, client, settings.seed) for client in cohort if client not in gone]
            self.chain.arrive(arrived, self._noise_on(len(arrived)))
            if self.on_server.plan is not None:
                self.table.add_server(self.chain.stage(round), round, self.on_server.predict(round))
                changed |= self.on_server.plan.sent.keys()
            self.ledger.changed(changed, round)
            progress(round + 1)
        return self.table

    def _serve(self, trainee: Trainee, plan: Plan, visit: Visit) -> Served:
        """What goes down, in shapes: worked out once for all visits that have the same entries, where it consists of the model's."""
        key = id(trainee), tuple(plan.received)
        known = self._served.get(key)
        if known is None:
            known = self.trainees.serve(trainee, self.own.live, plan, visit, self.ledger.kept(visit.client))
            if plan.received.keys() >= set(known.wanted):  # others have a content, and depend on what the client has
                self._served[key] = known
        return known

    def _turn(self, trainee: Trainee, plan: Plan, visit: Visit, served: Served, gone: float | None, clients: int) -> None:
        """Price a client's turn, of which it has done the part ``gone`` where it drops out."""
        sizes = self.data.batch_sizes(visit.client, self.settings.local_epochs)
        if gone is not None:
            sizes = sizes[: steps_done(gone, len(sizes))]
        clear([trainee.optimizer])
        memory = self._memories.get(visit.client, {})
        key = id(trainee), tuple(plan.received), tuple(plan.sent), tuple(memory)
        arrived = key not in self._arrived
        if arrived:
            _arrive(trainee, visit, memory)
            self._arrived[key] = plan.beside(trainee.chain.copies())
        plan = self._arrived[key]
        model, first_is_taken = (trainee.module, trainee.optimizer), False
        for step, samples in enumerate(sizes[:2]):
            if not self.meters.wants(plan.structure, step, samples):
                continue
            if not arrived:
                _arrive(trainee, visit, memory)
                arrived = True
            with warnings.catch_warnings(), refusal_told(trainee.module, visit.client, samples):
                warnings.filterwarnings("ignore", message=".*self.log.*")  # nothing is logged of a step that is only counted
                if step and not first_is_taken:  # the second step finds what the first leaves
                    trainee.step(*model, self.data.example_batch(sizes[0]), Clock(visit.round, 0))
                _, of_step = trainee.step.metered(*model, self.data.example_batch(samples), Clock(visit.round, step))
            first_is_taken = True
            self.meters.note(of_step)
        names = self.ledger.to_send(visit.client, served.wanted, served.made)
        down = self._length({name: served.entries[name] for name in names})
        up = self._length_up(trainee, plan, visit) if gone is None else _Length(0, 0, {})
        if self.chain.remembers and gone is None:
            if key not in self._remembered:
                self._remembered[key] = {name: value.detach().clone() for name, value in trainee.chain.remember(visit).items()}
            self._memories[visit.client] = self._remembered[key]
        whole = sum(value.numel() * value.element_size() for value in plan.received.values())
        self.traffic = Traffic(*(total + part for total, part in zip(self.traffic, (whole, down.content, up.content))))
        for part in down.parts.keys() | up.parts.keys():
            before = self.parts.get(part, (0.0, 0.0))
            self.parts[part] = before[0] + down.parts.get(part, 0) / clients, before[1] + up.parts.get(part, 0) / clients
        cost = self.meters.turn_cost(plan, sum(sizes), down.packed, up.packed)
        self.table.add(self.chain.stage(visit.round), visit.round, cost)

    def _length_up(self, trainee: Trainee, plan: Plan, visit: Visit) -> _Length:
        """The length of an update, worked out once for all visits whose modules are one and whose entries have the same names."""
        key = id(trainee), tuple(plan.sent)
        if key not in self._lengths_up:
            self._lengths_up[key] = _length(self._encoded(trainee, plan.sent, visit))
        return self._lengths_up[key]

    def _encoded(self, trainee: Trainee, sent: Message, visit: Visit) -> Message:
        """What goes up of ``sent``."""
        if not self.chain.by_differences:
            return sent
        return trainee.chain.encode({name: torch.zeros_like(value) for name, value in sent.items()}, visit)

    def _noise_on(self, arrived: int) -> bool:
        """Whether a sum of so many updates is given noise."""
        mechanism = self.chain.mechanism()
        return mechanism is not None and mechanism.noise_multiplier > 0 and mechanism.lacking(arrived) > 0

    def _length(self, message: Message) -> _Length:
        """:func:`_length`, worked out once for messages of the same names and shapes."""
        key = tuple((name, value.shape) for name, value in message.items())
        if key not in self._lengths:
            self._lengths[key] = _length(message)
        return self._lengths[key]


def _arrive(trainee: Trainee, visit: Visit, memory: Message) -> None:
    """A turn begins, as a client's does that has received the model."""
    trainee.chain.recall(memory, visit)
    trainee.chain.receive(visit)


class _Length(NamedTuple):
    """Bytes of a message as serialised, of its tensors alone, and of these by part of the model."""

    packed: int
    content: int
    parts: dict[str, int]


def _length(message: Message) -> _Length:
    parts: dict[str, int] = {}
    for name, value in message.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + value.numel() * value.element_size()
    return _Length(packed_length(message), sum(parts.values()), parts)
