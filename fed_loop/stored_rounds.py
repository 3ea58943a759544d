"""Rounds in which devices send activations once, or rest, and the server trains on what it holds of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from featherlight.fed_loop.aggregate import Aggregate
from featherlight.fed_loop.cohort import sample, steps_done
from featherlight.fed_loop.divided_batch import DividedBatch, StoredBatches, encoded, heading
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import as_weights, refusal_told
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.turn import Turn, everybodys
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
from featherlight.plugins.replay_buffer import ReplayBuffer, fitting
from featherlight.plugins.seeds import derive, seed_model
from featherlight.plugins.step_cost import count_samples
from featherlight.plugins.targets import follow

FAR = 10.0
"""How many times larger than the median client's largest activation a client's must be to be left out, where training on all failed."""


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
        self._blameless: set[int] = set()

    def turns(
        self, partition: Partition, visits: Sequence[Visit], server: Message, ledger: Ledger, gone: Mapping[int, float]
    ) -> Iterator[tuple[Turn, Message]]:
        """Each client's turn and what it makes of the rear: its new values. Of a device in ``gone`` nothing comes."""
        buffer = _buffer(partition)
        buffer.begin_round()
        self._blameless = set()
        if not partition.devices_work:
            for visit in visits:
                plan = self._own.plan(visit)
                turn = Turn(visit.client, cost=TurnCost(params_held=device_plan(plan, partition).params_held))
                turn.kept = ledger.after(visit.client, (), ())
                yield turn, self._alone(partition, visit, buffer.get(visit.client), server, turn)
            return
        for index, stream in groupby(self._data.client_batches(visits, partition.draws), key=itemgetter(0)):
            visit = visits[index]
            batches: Iterable[Any] = (batch for _, batch in stream)
            if visit.client in gone:
                batches = islice(batches, steps_done(gone[visit.client], self._data.steps_per_visit(visit.client, partition.draws)))
            turn, message = self._device(partition, visit, batches, server, ledger, arrives=visit.client not in gone)
            yield turn, {} if turn.rejected or turn.dropped_out else self._alone(partition, visit, message, server, turn)
            if not (turn.rejected or turn.dropped_out):  # by now we know whether its update was taken
                buffer.set_aside(visit.client, message, bounded=not partition.joint)

    def together(self, partition: Partition, turns: list[Turn], round: int, seed: int, server: Message, mean: Aggregate) -> None:
        """Where one rear trains on everybody's batches: the first process trains it. To be called once all turns are over."""
        if partition.devices_work:
            self._share(partition)
        if not partition.joint:
            return
        everybody = everybodys(turns, self._processes)
        clients = sorted(turn.client for turn in everybody if not (turn.rejected or turn.dropped_out))
        whole = Turn(-1)
        far: dict[str, str] = {}
        with self._processes.together():
            if self._processes.rank == 0 and clients:
                far = self._jointly(partition, clients, Visit(round, clients[0], seed), server, mean, whole)
        told = self._processes.gather({"loss": whole.loss, "rejected": whole.rejected, "far": far})[0]
        for place, turn in enumerate(turns):
            if not (turn.rejected or turn.dropped_out):
                turn.loss = told["loss"]
                if why := told["far"].get(str(turn.client), told["rejected"]):
                    turn.reject(why, "norm" if str(turn.client) in told["far"] else "not_finite")
            if place == 0 and self._processes.rank == 0:
                turn.server = whole.server
        if told["rejected"]:  # of all together, which says nothing against any one of their messages
            self._blameless = {client for client in clients if str(client) not in told["far"]}

    def settle(self, partition: Partition, everybody: Sequence[Turn], round: int) -> None:
        """What came in this round replaces what was there of the same clients; what could not be trained on goes. The same in every
        process."""
        buffer = _buffer(partition)
        refused = {turn.client for turn in everybody if turn.rejected} - self._blameless
        if partition.devices_work:
            buffer.keep_aside([client for client in buffer.aside if client not in refused])
            buffer.commit(round)
        elif len(refused) < len(everybody) or len(everybody) == 1:  # where all of several fail, it is not for what they sent
            for client in refused:
                buffer.drop(client)

    def _share(self, partition: Partition) -> None:
        """What is set aside in any process, one message after the other, as far as the limit has room: a rear that is trained jointly
        needs all."""
        if self._processes.size == 1:
            return
        buffer = _buffer(partition)
        own = {str(client): size for client, size in buffer.aside.items()}
        told = self._processes.gather([buffer.no_room_up_to, own])
        no_room = max(up_to for up_to, _ in told)
        sizes = {int(client): size for _, share in told for client, size in share.items() if int(client) > no_room}
        wanted = sorted(sizes) if partition.joint else fitting(sizes, buffer.limit)
        buffer.keep_aside(wanted)
        for client in wanted:
            mine = client in buffer.aside
            name = str(client)
            message = {name: torch.frombuffer(bytearray(buffer.get_aside(client)), dtype=torch.uint8)} if mine else {}
            arrived = self._processes.share(message)
            if not mine:
                buffer.set_aside(client, arrived[name].numpy().tobytes(), bounded=False)

    def _jointly(
        self, partition: Partition, clients: list[int], first: Visit, server: Message, mean: Aggregate, whole: Turn
    ) -> dict[str, str]:
        """One rear on all clients' activations. Where that fails, once more without those that are far beyond the others'.

        Returns:
            The clients whose activations were, and what is wrong with them.
        """
        buffer = _buffer(partition)
        stored = {c: self._read(partition, buffer.get_aside(c) if c in buffer.aside else buffer.get(c)) for c in clients}
        draw = 0 if partition.devices_work else first.round - min(buffer.round_of(client) for client in clients)
        self._try(partition, first, [*stored.values()], draw, server, mean, whole)
        if not whole.rejected:
            return {}
        sizes = {client: own.magnitude() for client, own in stored.items()}
        usual = sorted(sizes.values())[(len(sizes) - 1) // 2]
        far = {
            str(client): f"activations of a magnitude of {size:.3g}, where half of the clients' are at most {usual:.3g}: {whole.rejected}"
            for client, size in sizes.items()
            if size > FAR * usual
        }
        left = [client for client in clients if str(client) not in far]
        if far and left:
            spent, whole.rejected, whole.steps = whole.server, "", 0
            self._try(partition, first._replace(client=left[0]), [stored[client] for client in left], draw, server, mean, whole)
            if spent is not None and whole.server is not None:
                whole.server = spent.and_then(whole.server)
        return far

    def _try(
        self, partition: Partition, visit: Visit, stored: Sequence[StoredBatches], age: int, server: Message, mean: Aggregate, whole: Turn
    ) -> None:
        """Train one rear, and add it to ``mean`` or note why not."""
        update = self._train(partition, visit, stored, age, server, whole)
        try:
            mean.add({} if whole.rejected else update, 1.0)
        except ValueError as error:
            whole.reject(error)

    # -- the device -------------------------------------------------------------------------------------------------
    def _device(
        self, partition: Partition, visit: Visit, batches: Iterable[Any], server: Message, ledger: Ledger, arrives: bool
    ) -> tuple[Turn, bytes]:
        """All of one client's data through the front, and the message that it sends; of one that drops out none arrives."""
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
                turn.reject(error, "not_finite")
            for value in () if turn.rejected else activations:
                partition.codec.check_sign(value)
            message |= encoded("{}.{}".format(*divmod(place, per_draw)), activations, divided.labels(partition.labels), partition.codec)
            if place == 0:
                message |= heading(divided, activations)
        if not arrives:
            turn.rejected, turn.dropped_out = "", True
        up = b"" if turn.rejected or turn.dropped_out else pack(message)
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
        buffer = _buffer(partition)
        if len(message) > buffer.limit:
            turn.reject(f"its activations take {len(message)} bytes, and all there is for them is buffer_bytes={buffer.limit}")
            return {}
        try:
            stored = self._read(partition, message)
        except ValueError as error:
            turn.reject(error, "unreadable")
            return {}
        age = 0 if partition.devices_work else visit.round - buffer.round_of(visit.client)
        return {} if partition.joint else self._train(partition, visit, [stored], age, server, turn)

    def _read(self, partition: Partition, message: bytes) -> StoredBatches:
        return StoredBatches(unpack(message, _buffer(partition).limit), partition.codec)

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
        seed_model(derive(visit.seed, visit.round, visit.client, "model"), self._fabric.device)
        clear([own.optimizer])
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
            turn.reject("loss is not finite", "not_finite")
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
    there = _buffer(partition).clients
    size = len(there) if size is None else min(size, len(there))
    return [there[place] for place in sample(len(there), size, seed, round)] if there else []


def _buffer(partition: Partition) -> ReplayBuffer:
    assert partition.buffer is not None
    return partition.buffer


def steps_of(stored: Sequence[StoredBatches], turn: int) -> Iterator[list[tuple[StoredBatches, int, int]]]:
    """For each step of a pass, the batches that it is made of: one of every client that has so many."""
    draws = [turn % own.draws for own in stored]
    for step in range(max(own.steps(draw) for own, draw in zip(stored, draws))):
        yield [(own, draw, step) for own, draw in zip(stored, draws) if step < own.steps(draw)]
