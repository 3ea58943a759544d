"""Rounds in which devices send activations once, or rest, and the server trains on what it holds of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from featherlight.fed_loop.aggregate import Mean
from featherlight.fed_loop.cohort import sample
from featherlight.fed_loop.divided_batch import DividedBatch, StoredBatches, encoded, heading
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import as_weights, refusal_told
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.two_parts import (
    Rear,
    device_plan,
    forward_only,
    forward_only_metered,
    front_flops,
    give_views,
    passes,
    rear_only,
    server_batch,
    server_plan,
)
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Clock, Message, Partition, Visit
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.optimizer_state import clear
from featherlight.plugins.seeds import derive
from featherlight.plugins.step_cost import count_samples
from featherlight.plugins.targets import follow


class StoredRounds:
    """The work of such rounds, of one process.

    Args:
        own: the server's model, its plugins attached.
        local_epochs: passes over a client's activations in a round.
    """

    def __init__(self, processes: Processes, own: Trainee, data: Any, local_epochs: int) -> None:
        self._processes, self._own, self._data, self._local_epochs = processes, own, data, local_epochs
        self._fabric = processes.fabric
        self._precision = processes.fabric.strategy.precision
        self.meters, self.server_meters = Meters(), Meters()
        self._understood = False
        self._arrived: dict[int, bytes] = {}

    def cohort(self, partition: Partition, size: int | None, seed: int, round: int) -> list[int]:
        """Who takes part: of all clients where devices work, else of those who have something in the buffer."""
        if partition.devices_work:
            return sample(self._data.num_clients, size, seed, round)
        return replay_cohort(partition, size, seed, round)

    def turns(self, partition: Partition, visits: Sequence[Visit], server: Message, ledger: Ledger) -> Iterator[tuple[Turn, Message]]:
        """Each client's turn and what it makes of the rear: its new values."""
        self._arrived = {}
        assert partition.buffer is not None
        if not partition.devices_work:
            for visit in visits:
                plan = self._own.plan(visit)
                turn = Turn(visit.client, cost=TurnCost(params_held=device_plan(plan, partition).params_held))
                turn.kept = ledger.after(visit.client, (), ())
                yield turn, self._alone(partition, visit, partition.buffer.get(visit.client), server, turn)
            return
        for index, stream in groupby(self._data.client_batches(visits, partition.draws), key=itemgetter(0)):
            visit = visits[index]
            turn, message = self._device(partition, visit, (batch for _, batch in stream), server, ledger)
            yield turn, {} if turn.rejected else self._alone(partition, visit, message, server, turn)

    def together(self, partition: Partition, turns: list[Turn], round: int, seed: int, server: Message, mean: Mean) -> None:
        """Where one rear trains on everybody's batches: the first process trains it. To be called once all turns are over."""
        assert partition.buffer is not None
        if self._processes.size > 1 and partition.devices_work:
            own = {str(client): torch.frombuffer(bytearray(message), dtype=torch.uint8) for client, message in self._arrived.items()}
            self._arrived = {int(client): value.numpy().tobytes() for client, value in self._processes.share(own).items()}
        if not partition.joint:
            return
        everybody = [Turn.from_json(item) for share in self._processes.gather([turn.to_json() for turn in turns]) for item in share]
        clients = sorted(turn.client for turn in everybody if not turn.rejected)
        told: dict[str, Any] = {"loss": 0.0, "rejected": ""}
        whole = Turn(-1)
        if self._processes.rank == 0 and clients:
            stored = [self._read(partition, self._arrived.get(client) or partition.buffer.get(client)) for client in clients]
            first = Visit(round, clients[0], seed)
            draw = 0 if partition.devices_work else round - min(partition.buffer.round_of(client) for client in clients)
            update = self._train(partition, first, stored, draw, server, whole)
            try:
                mean.add({} if whole.rejected else update, 1.0)
            except ValueError as error:
                whole.rejected = str(error)
            told = {"loss": whole.loss, "rejected": whole.rejected}
        told = self._processes.gather(told)[0]
        for place, turn in enumerate(turns):
            turn.loss, turn.rejected = told["loss"], turn.rejected or told["rejected"]
            if place == 0 and self._processes.rank == 0:
                turn.server = whole.server

    def settle(self, partition: Partition, round: int) -> None:
        """What came in this round replaces what was there of the same clients; the same in every process."""
        assert partition.buffer is not None
        for client, message in sorted(self._arrived.items()):
            partition.buffer.put(client, round, message)
        self._arrived = {}

    # -- the device -------------------------------------------------------------------------------------------------
    def _device(self, partition: Partition, visit: Visit, batches: Iterable[Any], server: Message, ledger: Ledger) -> tuple[Turn, bytes]:
        """All of one client's data through the front, and the message that it sends."""
        started = time.perf_counter()
        plan = device_plan(self._own.plan(visit), partition)
        turn = Turn(visit.client, kept=ledger.after(visit.client, plan.received, ()))
        names = ledger.to_send(visit.client, plan.received)
        down = pack({name: server[name] for name in names}) if names else b""
        message: Message = {}
        samples, learned = 0, 0.0
        per_draw = self._data.steps_per_visit(visit.client, 1)
        for place, raw in enumerate(batches):
            batch = self._data.on_after_batch_transfer(self._fabric.to_device(raw), 0)
            learned += self._understand(partition, batch)
            divided, size = DividedBatch.of(batch), count_samples(batch)
            samples += size
            if self.meters.wants(plan.structure, place, size):
                activations, cost = forward_only_metered(partition, divided.views, self._precision)
                self.meters.note(cost)
            else:
                activations = forward_only(partition, divided.views, self._precision)
            try:
                for value in activations:
                    partition.codec.check(value)
            except ValueError as error:
                turn.rejected = turn.rejected or str(error)
            for value in () if turn.rejected else activations:
                partition.codec.check_sign(value)
            message |= encoded("{}.{}".format(*divmod(place, per_draw)), activations, divided.labels(partition.labels), partition.codec)
            if place == 0:
                message |= heading(divided, activations)
        up = b"" if turn.rejected else pack(message)
        turn.cost = self.meters.turn_cost(plan, samples, len(down), len(up), time.perf_counter() - started - learned)
        return turn, up

    def _understand(self, partition: Partition, batch: Any) -> float:
        """Once: does the model's training step go through the front as we take it to? Returns the seconds that took."""
        if self._understood:
            return 0.0
        started = time.perf_counter()
        passes(self._own.module, partition, as_weights(batch, self._precision))
        self._understood = True
        return time.perf_counter() - started

    # -- the server -------------------------------------------------------------------------------------------------
    def _alone(self, partition: Partition, visit: Visit, message: bytes, server: Message, turn: Turn) -> Message:
        """A copy of the rear, trained on one client's activations; nothing where all train one."""
        assert partition.buffer is not None
        if len(message) > partition.buffer.limit:
            turn.rejected = f"its activations take {len(message)} bytes, and all there is for them is buffer_bytes={partition.buffer.limit}"
            return {}
        try:
            stored = self._read(partition, message)
        except ValueError as error:
            turn.rejected = str(error)
            return {}
        age = 0
        if partition.devices_work:
            self._arrived[visit.client] = message
        else:
            age = visit.round - partition.buffer.round_of(visit.client)
        return {} if partition.joint else self._train(partition, visit, [stored], age, server, turn)

    def _read(self, partition: Partition, message: bytes) -> StoredBatches:
        assert partition.buffer is not None
        return StoredBatches(unpack(message, partition.buffer.limit), partition.codec)

    def _train(self, partition: Partition, visit: Visit, stored: Sequence[StoredBatches], age: int, server: Message, turn: Turn) -> Message:
        """The rear's new values after ``local_epochs`` passes from the server's; several clients' batches make one.

        Args:
            age: rounds since the activations came, by which passes take turns with the draws.
        """
        started = time.perf_counter()
        own = self._own
        plan = own.plan(visit)
        with torch.no_grad():
            torch._foreach_copy_(list(plan.received.values()), [server[name] for name in plan.received])
        follow(own.module, own.targets)
        torch.manual_seed(derive(visit.seed, visit.round, visit.client, "model"))
        clear([own.raw_optimizer])
        own.module.zero_grad()
        rear = Rear(own.module, partition)
        losses, samples = torch.zeros((), device=self._fabric.device), 0
        for epoch in range(self._local_epochs):
            for step in steps_of(stored, age * self._local_epochs + epoch):
                batch, activations = self._batch(step)
                size = len(activations[0])
                rear.give = give_views(activations)
                clock = Clock(visit.round, turn.steps)
                with refusal_told(own.module, visit.client, size):
                    losses += self._step(partition, rear, plan, batch, clock, size)
                samples += size
                turn.steps += 1
        turn.loss = float(losses) / max(turn.steps, 1)
        if not bool(torch.isfinite(losses)):
            turn.rejected = "loss is not finite"
        rear_plan = server_plan(plan, device_plan(plan, partition))
        turn.server = self.server_meters.turn_cost(rear_plan, samples, 0, 0, time.perf_counter() - started)
        return {name: value.detach() for name, value in plan.sent.items()}

    def _batch(self, parts: Sequence[tuple[StoredBatches, int, int]]) -> tuple[Any, list[Tensor]]:
        """One step's batch and its activations."""
        to = self._fabric.to_device
        read = [(stored.activations(draw, step), *stored.batch(draw, step)) for stored, draw, step in parts]
        activations = [torch.cat([own[view] for own, _, _ in read]) for view in range(len(read[0][0]))]
        labels = [torch.cat([own[place] for *_, own in read]) for place in range(len(read[0][2]))]
        shapes = [(len(value), *shape[1:]) for value, shape in zip(activations, read[0][1])]
        batch = server_batch(shapes, parts[0][0].single, [to(value) for value in labels], self._precision)
        return batch, [as_weights(to(value), self._precision) for value in activations]

    def _step(self, partition: Partition, rear: Rear, plan: Plan, batch: Any, clock: Clock, size: int) -> Tensor:
        own = self._own
        module: Any = rear
        if not self.server_meters.wants(plan.structure, clock.step, size):
            return own.step(module, own.optimizer, batch, clock)
        loss, cost = own.step.metered(module, own.optimizer, batch, clock)
        views = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        self.server_meters.note(rear_only(cost, rear, lambda: front_flops(partition, views[0].shape[1:], self._precision)))
        return loss


def replay_cohort(partition: Partition, size: int | None, seed: int, round: int) -> list[int]:
    """The clients of a round in which devices rest, ascending: as many of those in the buffer as a cohort has."""
    assert partition.buffer is not None
    there = partition.buffer.clients
    size = len(there) if size is None else min(size, len(there))
    return [there[place] for place in sample(len(there), size, seed, round)] if there else []


def steps_of(stored: Sequence[StoredBatches], turn: int) -> Iterator[list[tuple[StoredBatches, int, int]]]:
    """For each step of a pass, the batches that it is made of: one of every client that has so many."""
    draws = [turn % own.draws for own in stored]
    for step in range(max(own.steps(draw) for own, draw in zip(stored, draws))):
        yield [(own, draw, step) for own, draw in zip(stored, draws) if step < own.steps(draw)]
