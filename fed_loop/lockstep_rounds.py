"""Rounds in which device and server take every step together, on one client after the other; then both parts are averaged over clients."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import torch

from featherlight.fed_loop.aggregate import Aggregate
from featherlight.fed_loop.cohort import steps_done
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import as_weights, refusal_told
from featherlight.fed_loop.lockstep import Lockstep, Refused
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.two_parts import device_plan, passes, server_plan
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Clock, Message, Partition, Visit
from featherlight.plugins.optimizer_state import clear
from featherlight.plugins.seeds import derive, seed_model
from featherlight.plugins.step_cost import count_samples
from featherlight.plugins.targets import follow


class LockstepRounds:
    """The work of such rounds, of one process.

    Args:
        own: the server's model, its plugins attached.
        local_epochs: passes over a client's data in a round.
    """

    def __init__(self, processes: Processes, own: Trainee, data: Any, local_epochs: int) -> None:
        self._own, self._data, self._local_epochs = own, data, local_epochs
        self._fabric = processes.fabric
        self._precision = processes.fabric.strategy.precision
        self._meters, self._server_meters = Meters(), Meters()
        self._lockstep: Lockstep | None = None

    def turns(
        self, partition: Partition, visits: Sequence[Visit], server: Message, ledger: Ledger, gone: Mapping[int, float]
    ) -> Iterator[tuple[Turn, Message]]:
        """Each client's turn and its new values: the front's as they arrived, the rear's as the server has them. A device in ``gone``
        takes some steps with the server, and both parts of what they made are lost."""
        for index, stream in groupby(self._data.client_batches(visits, self._local_epochs), key=itemgetter(0)):
            visit = visits[index]
            batches: Iterable[Any] = (batch for _, batch in stream)
            if visit.client in gone:
                batches = islice(batches, steps_done(gone[visit.client], self._data.steps_per_visit(visit.client, self._local_epochs)))
            yield self._turn(partition, visit, batches, server, ledger, arrives=visit.client not in gone)

    def together(self, partition: Partition, turns: list[Turn], round: int, seed: int, server: Message, mean: Aggregate) -> None:
        """Nothing is trained on several clients' data."""

    def settle(self, partition: Partition, everybody: Sequence[Turn], round: int) -> None:
        """Nothing is kept."""

    def _turn(
        self, partition: Partition, visit: Visit, batches: Iterable[Any], server: Message, ledger: Ledger, arrives: bool
    ) -> tuple[Turn, Message]:
        started = time.perf_counter()
        own = self._own
        plan = own.plan(visit)
        device = device_plan(plan, partition)
        turn = Turn(visit.client, kept=ledger.after(visit.client, device.received, device.sent))
        names = ledger.to_send(visit.client, device.received)
        down = pack({name: server[name] for name in names})
        received = unpack(down)
        with torch.no_grad():
            values = [received.get(name, server[name]) for name in plan.received]
            torch._foreach_copy_(list(plan.received.values()), values)
        follow(own.module, own.targets)
        clear([own.optimizer])
        bytes_down, bytes_up, samples, device_seconds = len(down), 0, 0, time.perf_counter() - started
        losses = torch.zeros((), device=self._fabric.device)
        seed_model(derive(visit.seed, visit.round, visit.client, "model"), self._fabric.device)
        for number, raw in enumerate(batches):
            batch = as_weights(self._data.on_after_batch_transfer(self._fabric.to_device(raw), 0), self._precision)
            size = count_samples(batch)
            lockstep = self._understood(partition, batch)
            samples += size
            cost = None
            if self._meters.wants(device.structure, number, size):
                cost = lockstep.device_cost(batch)
                self._meters.note(cost)
            counted = self._server_meters.wants(plan.structure, number, size)
            try:
                with refusal_told(own.module, visit.client, size):
                    step = lockstep(batch, Clock(visit.round, number), cost if counted else None)
            except Refused as refused:
                turn.reject(refused, "not_finite")
                break
            if counted and step.server is not None:
                self._server_meters.note(step.server)
            losses += step.loss
            bytes_up, bytes_down, device_seconds = bytes_up + step.bytes_up, bytes_down + step.bytes_down, device_seconds + step.seconds
            turn.steps += 1
        turn.loss = float(losses) / max(turn.steps, 1)
        if not bool(torch.isfinite(losses)):
            turn.reject("loss is not finite", "not_finite")
        if not arrives:
            turn.rejected, turn.dropped_out = "", True
        return turn, self._update(partition, plan, device, turn, samples, (bytes_down, bytes_up), device_seconds, started)

    def _update(
        self,
        partition: Partition,
        plan: Plan,
        device: Plan,
        turn: Turn,
        samples: int,
        traffic: tuple[int, int],
        seconds: float,
        started: float,
    ) -> Message:
        """Send the front, and put down what the turn cost."""
        bytes_down, bytes_up = traffic
        began = time.perf_counter()
        payload = b"" if turn.dropped_out else pack(device.sent)
        seconds += time.perf_counter() - began
        turn.cost = self._meters.turn_cost(device, samples, bytes_down, bytes_up + len(payload), seconds)
        if not turn.rejected:
            server_seconds = time.perf_counter() - started - seconds
            turn.server = self._server_meters.turn_cost(server_plan(plan, device), samples, 0, 0, server_seconds)
        if turn.dropped_out:
            return {}
        rear_values = {name: value.detach() for name, value in plan.sent.items() if name not in device.sent}
        return unpack(payload, len(payload)) | rear_values

    def _understood(self, partition: Partition, batch: Any) -> Lockstep:
        """The step, once it is known how the model's own goes through the front."""
        if self._lockstep is None:
            with torch.random.fork_rng(devices=[]):
                calls = passes(self._own.module, partition, batch)
            precision = self._precision
            self._lockstep = Lockstep(
                self._own, partition, calls, precision, self._fabric.backward, precision.optimizer_step, _over_the_wire
            )
        return self._lockstep


def _over_the_wire(message: Message) -> tuple[int, Message]:
    payload = pack(message)
    return len(payload), unpack(payload, len(payload))
