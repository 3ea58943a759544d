"""One client's turn: receive, train, send. The same model, optimizer and loader serve every client; weights are swapped in place."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import LocalStep, refusal_told
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.trainees import Served, Trainee, Trainees
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Clock, Message, Visit
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.optimizer_state import clear
from featherlight.plugins.seeds import derive
from featherlight.plugins.step_cost import count_samples
from featherlight.plugins.targets import follow


@dataclass
class Turn:
    """What a process reports of one client's turn: plain data.

    Args:
        loss: mean over steps; kept: what the client keeps of what it received, with versions; rejected: why its update
            was not used, or nothing; dropped_out: no update came; server: what the server computed in this client's place, where it did.
    """

    client: int
    steps: int = 0
    loss: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    rejected: str = ""
    dropped_out: bool = False
    cost: TurnCost = field(default_factory=TurnCost)
    server: TurnCost | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Turn:
        server = data["server"] and TurnCost(**data["server"])
        return cls(**{**data, "cost": TurnCost(**data["cost"]), "server": server})


class LocalTraining:
    """All local steps of one turn, a client's or the server's own."""

    def __init__(self, fabric: Fabric, data: Any) -> None:
        self._fabric, self._data = fabric, data

    def steps(self, trainee: Trainee, step: LocalStep, meters: Meters, visit: Visit, batches: Iterable[Any], plan: Plan, turn: Turn) -> int:
        """Step through ``batches``, and put loss and number of steps down in ``turn``; returns the number of samples."""
        torch.manual_seed(derive(visit.seed, visit.round, visit.client, "model"))  # the model's own dropout has no other source
        clear([trainee.raw_optimizer])
        trainee.module.zero_grad()  # the client before left them
        losses = torch.zeros((), device=self._fabric.device)
        samples = 0
        for number, raw in enumerate(batches):
            batch = self._data.on_after_batch_transfer(self._fabric.to_device(raw), 0)
            clock = Clock(visit.round, number)
            size = count_samples(batch)
            samples += size
            with refusal_told(trainee.module, visit.client, size):
                if meters.wants(plan.structure, number, size):
                    loss, cost = step.metered(trainee.module, trainee.optimizer, batch, clock)
                    meters.note(cost)
                else:
                    loss = step(trainee.module, trainee.optimizer, batch, clock)
            losses += loss
            turn.steps += 1
        turn.loss = float(losses) / max(turn.steps, 1)
        if not bool(torch.isfinite(losses)):
            turn.rejected = "loss is not finite"
        return samples


class Clients:
    """Trains one client after the other on one device."""

    def __init__(self, fabric: Fabric, trainees: Trainees, data: Any) -> None:
        self._fabric, self._trainees = fabric, trainees
        self._training = LocalTraining(fabric, data)
        self.meters = Meters()

    def begin_round(self) -> None:
        self._last: tuple[tuple[str, ...], int, Message] | None = None

    def train(
        self, visit: Visit, batches: Iterable[Any], server: Message, ledger: Ledger, memory: Message, arrives: bool = True
    ) -> tuple[Turn, Message, Message]:
        """Train the client of ``visit`` from the server's entries.

        Args:
            memory: what plugins kept at the end of the client's last turn.
            arrives: whether its update does, or the client drops out after ``batches``.

        Returns:
            The turn's report; the client's update as it arrived at the server: new values, or, where plugins change what travels,
            differences as decoding gave them; and what plugins keep for the client's next turn.
        """
        started = time.perf_counter()
        trainee = self._trainees.of(visit)
        chain = self._trainees.own.chain
        plan = trainee.plan(visit)
        trainee.chain.recall({name: value.to(self._fabric.device) for name, value in memory.items()}, visit)
        served = self._trainees.serve(trainee, server, plan, visit, ledger.kept(visit.client))
        turn = Turn(visit.client, kept=ledger.after(visit.client, served.lasting, plan.sent, server.keys()))
        bytes_down = self._receive(trainee, plan, visit, served, server, ledger)
        before = {name: value.detach().clone() for name, value in plan.sent.items()} if chain.by_differences else {}
        trainee.chain.receive(visit)
        plan = plan.beside(trainee.chain.copies())
        samples = self._training.steps(trainee, trainee.step, self.meters, visit, batches, plan, turn)
        if not arrives:
            turn.rejected, turn.dropped_out = "", True
            turn.cost = self.meters.turn_cost(plan, samples, bytes_down, 0, time.perf_counter() - started)
            return turn, {}, {}
        payload = self._send(trainee, plan, before, visit)
        update = unpack(payload, limit=len(payload))
        kept = {name: value.detach().to("cpu", copy=True) for name, value in trainee.chain.remember(visit).items()}
        if chain.decodes:
            update = self._decode(turn, update, visit)
        turn.cost = self.meters.turn_cost(plan, samples, bytes_down, len(payload), time.perf_counter() - started)
        return turn, update, kept

    def _decode(self, turn: Turn, update: Message, visit: Visit) -> Message:
        """The update as the server reads it; one that it cannot read is rejected."""
        try:
            return dict(self._trainees.own.chain.decode(update, visit))
        except ValueError as error:
            turn.rejected = turn.rejected or str(error)
            return {}

    def _receive(self, trainee: Trainee, plan: Plan, visit: Visit, served: Served, server: Message, ledger: Ledger) -> int:
        """Load what the client still holds and what it is sent; returns the length of the message."""
        names = tuple(ledger.to_send(visit.client, served.wanted, served.made))
        if served.made or self._last is None or self._last[0] != names:  # the same message for several clients is made and read once
            payload = pack({name: served.entries[name] for name in names})
            self._last = names, len(payload), unpack(payload)
        _, length, received = self._last
        received = trainee.chain.decode_down(received, visit)
        with torch.no_grad():
            values = [received[name] if name in received else server[name] for name in plan.received]
            torch._foreach_copy_(list(plan.received.values()), values)
        follow(trainee.module, trainee.targets)
        return length

    def _send(self, trainee: Trainee, plan: Plan, before: Mapping[str, Tensor], visit: Visit) -> bytes:
        """New values as they are, or, where plugins change what travels, what they make of the differences."""
        if not before:
            return pack(plan.sent)
        return pack(trainee.chain.encode({name: value.detach() - before[name] for name, value in plan.sent.items()}, visit))
