"""What rounds will cost in which device and server each have a part of the model: the same passes and messages, on tensors without data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import Precision
from torch import Tensor

from featherlight.fed_loop.cohort import asked, steps_done
from featherlight.fed_loop.divided_batch import DividedBatch, encoded, heading
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import as_weights, refusal_told, take_step
from featherlight.fed_loop.lockstep import Lockstep
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.round_kinds import gone_of
from featherlight.fed_loop.stored_rounds import replay_cohort
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.two_parts import (
    Rear,
    device_plan,
    forward_only_metered,
    front_flops,
    give_views,
    passes,
    rear_only,
    server_batch,
    server_plan,
)
from featherlight.fed_loop.wire import packed_length
from featherlight.plugins import Clock, Message, Partition, Visit
from featherlight.plugins.cost_table import CostTable, TurnCost
from featherlight.plugins.optimizer_state import clear
from featherlight.plugins.replay_buffer import fitting

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation


class DividedPrediction:
    """Adds such rounds to a table."""

    def __init__(self, settings: Federation, own: Trainee, data: Any, precision: Precision, ledger: Ledger, table: CostTable) -> None:
        self._settings, self._own, self._data, self._precision = settings, own, data, precision
        self._ledger, self._table = ledger, table
        self._meters, self._server_meters = Meters(), Meters()
        self._lockstep: Lockstep | None = None
        self._lengths: dict[Any, tuple[int, int]] = {}

    def round(self, partition: Partition, round: int) -> None:
        """Price one round."""
        settings = self._settings
        if partition.buffer is not None and not partition.devices_work:
            cohort = replay_cohort(partition, settings.cohort, settings.seed, round)
        else:
            cohort = asked(settings, self._data.num_clients, round)
        gone = gone_of(partition, settings, cohort, round)
        stay = [client for client in cohort if client not in gone]
        stored: dict[int, int] = {}
        for client in cohort:
            visit = Visit(round, client, settings.seed)
            plan = self._own.plan(visit)
            device = device_plan(plan, partition)
            clear([self._own.optimizer])
            with _unlogged():
                if partition.buffer is None:
                    self._together(partition, visit, plan, device, gone.get(client))
                elif client in gone:
                    self._vanished(partition, visit, device, gone[client])
                else:
                    self._apart(partition, visit, plan, device, stay, stored)
        if partition.buffer is not None:
            for client in fitting(stored, partition.buffer.limit):
                partition.buffer.note(client, round, stored[client])
        changed = [name for name in self._own.live if not partition.cut.has(name) or partition.buffer is None]
        self._ledger.changed(changed, round)

    # -- step by step -------------------------------------------------------------------------------------------------
    def _together(self, partition: Partition, visit: Visit, plan: Plan, device: Plan, gone: float | None) -> None:
        sizes = _done(self._data.batch_sizes(visit.client, self._settings.local_epochs), gone)
        down = self._down(visit, device, device.sent)
        up = packed_length(device.sent) if gone is None else 0
        for number, size in enumerate(sizes):
            if number < 2 or size not in self._lengths:
                batch = as_weights(self._data.example_batch(size), self._precision)
                lockstep = self._understood(partition, batch)
                with refusal_told(self._own.module, visit.client, size):
                    self._meter(lockstep, plan, device, batch, visit, number, size)
            more_up, more_down = self._lengths[size]
            up, down = up + more_up, down + more_down
        self._add(plan, device, visit, sum(sizes), down, up)

    def _meter(self, lockstep: Lockstep, plan: Plan, device: Plan, batch: Any, visit: Visit, number: int, size: int) -> None:
        cost = None
        if self._meters.wants(device.structure, number, size):
            if number and not self._own.optimizer.state:  # the first step was known already: what it leaves in the optimizer is not
                lockstep(batch, Clock(visit.round, 0))
            cost = lockstep.device_cost(batch)
            self._meters.note(cost)
        counted = self._server_meters.wants(plan.structure, number, size)
        if counted or size not in self._lengths:
            step = lockstep(batch, Clock(visit.round, number), cost if counted else None)
            self._lengths[size] = step.bytes_up, step.bytes_down
            if counted and step.server is not None:
                self._server_meters.note(step.server)

    def _understood(self, partition: Partition, batch: Any) -> Lockstep:
        if self._lockstep is None:
            calls = passes(self._own.module, partition, batch)
            self._lockstep = Lockstep(self._own, partition, calls, self._precision, Tensor.backward, take_step, _length)
        return self._lockstep

    # -- what is kept ---------------------------------------------------------------------------------------------------
    def _apart(self, partition: Partition, visit: Visit, plan: Plan, device: Plan, cohort: Sequence[int], stored: dict[int, int]) -> None:
        """A turn that comes to its end; ``stored`` gets the length of its message."""
        assert partition.buffer is not None
        sizes = self._data.batch_sizes(visit.client, 1)
        stage = self._own.chain.stage(visit.round)
        if partition.devices_work:
            up = self._stored_length(partition, sizes)
            partition.buffer.check(visit.client, up)
            stored[visit.client] = up
            self._forward(partition, visit, device, [*sizes] * partition.draws, up)
        else:
            self._table.add(stage, visit.round, TurnCost(params_held=device.params_held))
        if not partition.joint:
            self._rear(partition, visit, plan, device, sizes)
        elif visit.client == cohort[0]:
            of_all = [self._data.batch_sizes(client, 1) for client in cohort]
            longest = max(map(len, of_all))
            self._rear(partition, visit, plan, device, [sum(own[step] for own in of_all if step < len(own)) for step in range(longest)])

    def _vanished(self, partition: Partition, visit: Visit, device: Plan, gone: float) -> None:
        """A device that gets no further than some batch."""
        sizes = [*self._data.batch_sizes(visit.client, 1)] * partition.draws
        self._forward(partition, visit, device, _done(sizes, gone), 0)

    def _forward(self, partition: Partition, visit: Visit, device: Plan, sizes: Sequence[int], up: int) -> None:
        """A device's passes through the front, in batches of ``sizes``."""
        for number, size in enumerate(sizes[:2]):
            if self._meters.wants(device.structure, number, size):
                views = DividedBatch.of(self._data.example_batch(size)).views
                _, cost = forward_only_metered(partition, views, self._precision)
                self._meters.note(cost)
        down = self._down(visit, device, ())
        self._table.add(self._own.chain.stage(visit.round), visit.round, self._meters.turn_cost(device, sum(sizes), down, up))

    def _rear(self, partition: Partition, visit: Visit, plan: Plan, device: Plan, sizes: Sequence[int]) -> None:
        rear: Any = Rear(self._own.module, partition)
        sizes = [*sizes] * self._settings.local_epochs
        for number, size in enumerate(sizes[:2]):
            if self._server_meters.wants(plan.structure, number, size):
                divided = DividedBatch.of(self._data.example_batch(size))
                activations, _ = forward_only_metered(partition, divided.views, self._precision)
                shapes = [tuple(view.shape) for view in divided.views]
                batch = server_batch(shapes, divided.single, divided.labels(partition.labels), self._precision)
                rear.give = give_views(activations)
                with refusal_told(self._own.module, visit.client, size):
                    _, whole = self._own.step.metered(rear, self._own.optimizer, batch, Clock(visit.round, number))
                shape = divided.views[0].shape[1:]
                self._server_meters.note(rear_only(whole, rear, lambda shape=shape: front_flops(partition, shape, self._precision)))  # type: ignore[misc]
        self._add_server(plan, device, visit, sum(sizes))

    def _stored_length(self, partition: Partition, sizes: Sequence[int]) -> int:
        """The length of a client's message, worked out once for clients whose batches have the same sizes."""
        key = tuple(sizes)
        if key not in self._lengths:
            message: Message = {}
            for step, size in enumerate(sizes):
                if step == 0 or size != sizes[step - 1]:
                    divided = DividedBatch.of(self._data.example_batch(size))
                    activations, _ = forward_only_metered(partition, divided.views, self._precision)
                    labels = divided.labels(partition.labels)
                    one = encoded("", activations, labels, partition.codec)
                message |= {f"{draw}.{step}{name}": value for name, value in one.items() for draw in range(partition.draws)}
                if step == 0:
                    message |= heading(divided, activations)
            self._lengths[key] = packed_length(message), 0
        return self._lengths[key][0]

    # -- the table ------------------------------------------------------------------------------------------------------
    def _down(self, visit: Visit, device: Plan, trained: Any) -> int:
        """Bytes of the front's weights that go to the device."""
        names = self._ledger.to_send(visit.client, device.received)
        kept = self._ledger.after(visit.client, device.received, trained)
        self._ledger.visited(visit.client, kept)
        return packed_length({name: device.received[name] for name in names}) if names else 0

    def _add(self, plan: Plan, device: Plan, visit: Visit, samples: int, down: int, up: int) -> None:
        stage = self._own.chain.stage(visit.round)
        self._table.add(stage, visit.round, self._meters.turn_cost(device, samples, down, up))
        self._add_server(plan, device, visit, samples)

    def _add_server(self, plan: Plan, device: Plan, visit: Visit, samples: int) -> None:
        cost = self._server_meters.turn_cost(server_plan(plan, device), samples, 0, 0)
        self._table.add_server(self._own.chain.stage(visit.round), visit.round, cost)


def _done(sizes: Sequence[int], gone: float | None) -> Sequence[int]:
    """The batches that a device gets to."""
    return sizes if gone is None else sizes[: steps_done(gone, len(sizes))]


def _length(message: Message) -> tuple[int, Message]:
    return packed_length(message), message


@contextmanager
def _unlogged() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.log.*")  # nothing is logged of a step that is only counted
        yield
