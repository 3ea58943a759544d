"""The client's half of a turn: receive, train, send. One model and optimizer may serve several clients; weights are swapped in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from featherlight.fed_loop.local_step import LocalStep, refusal_told
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.wire import pack
from featherlight.plugins import Chain, Clock, Message, Visit
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.optimizer_state import clear
from featherlight.plugins.rejection import REASONS, Reason, Rejection
from featherlight.plugins.seeds import derive, seed_model
from featherlight.plugins.step_cost import count_samples
from featherlight.plugins.targets import follow

NOT_FINITE = "loss is not finite"


@dataclass
class Turn:
    """What a process reports of one client's turn: plain data.

    Args:
        loss: mean over steps; kept: what the client keeps of what it received, with versions; rejected: why its update
            was not used, or nothing; reason: the same, to count by; stray: of a client that was not asked, or has answered already,
            so that nothing but its being rejected counts; dropped_out: no update came; server: what the server computed in this
            client's place, where it did.
    """

    client: int
    steps: int = 0
    loss: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    rejected: str = ""
    reason: Reason = "other"
    stray: bool = False
    dropped_out: bool = False
    cost: TurnCost = field(default_factory=TurnCost)
    server: TurnCost | None = None

    @property
    def counts(self) -> bool:
        """Whether its update is one of the round's."""
        return not (self.rejected or self.dropped_out)

    def reject(self, why: str | Exception, reason: Reason = "other") -> None:
        """Its update will not be used; what was said first stays."""
        if not self.rejected:
            self.rejected = str(why) or type(why).__name__
            self.reason = why.reason if isinstance(why, Rejection) else reason

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Turn:
        """From :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError: it cannot have come from there.
        """
        server = data["server"] and TurnCost(**data["server"])
        turn = cls(**{**data, "cost": TurnCost(**data["cost"]), "server": server})
        costs = [value for cost in (turn.cost, server) if cost for value in asdict(cost).values()]
        if not all(type(value) is bool for value in (turn.stray, turn.dropped_out)) or not all(type(v) in (int, float) for v in costs):
            raise TypeError("a turn's flags are true or false, its costs numbers")
        if type(turn.client) is not int or type(turn.steps) is not int or turn.steps < 0 or type(turn.loss) not in (int, float):
            raise TypeError("a turn's client and steps are whole numbers, its loss is a number")
        if not isinstance(turn.rejected, str) or turn.reason not in REASONS:
            raise TypeError(f"a turn's rejection is text, its reason one of {', '.join(REASONS)}")
        return turn


def model_seed(visit: Visit) -> int:
    """Of a model's own dropout, which has no other source."""
    return derive(visit.seed, visit.round, visit.client, "model")


def everybodys(turns: list[Turn], processes: Processes) -> list[Turn]:
    """All processes' turns, in the order of clients."""
    if processes.size > 1:
        turns = [Turn.from_json(item) for share in processes.gather([turn.to_json() for turn in turns]) for item in share]
    return sorted(turns, key=lambda turn: turn.client)


class LocalTraining:
    """All local steps of one turn, a client's or the server's own."""

    def __init__(self, fabric: Fabric, data: Any) -> None:
        self._fabric, self._data = fabric, data

    def steps(self, trainee: Trainee, step: LocalStep, meters: Meters, visit: Visit, batches: Iterable[Any], plan: Plan, turn: Turn) -> int:
        """Step through ``batches``, and put loss and number of steps down in ``turn``; returns the number of samples."""
        seed_model(model_seed(visit), self._fabric.device)
        clear([trainee.optimizer])
        losses = torch.zeros((), device=self._fabric.device)
        samples = 0
        for number, raw in enumerate(batches):
            batch = self.ready(raw)
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
        if not math.isfinite(float(losses)):
            turn.reject(NOT_FINITE, "not_finite")
        return samples

    def ready(self, raw: Any) -> Any:
        """A batch of a client's data as the model takes it, on the device."""
        here = self._fabric.device.type == "cpu"  # where batches are made
        return self._data.on_after_batch_transfer(raw if here else self._fabric.to_device(raw), 0)


class Taking:
    """The client's half of a turn: load what came, train, make the update. It knows no server."""

    def __init__(self, fabric: Fabric, data: Any) -> None:
        self.fabric = fabric
        self.training = LocalTraining(fabric, data)
        self.meters = Meters()

    def take(
        self, trainee: Trainee, plan: Plan, visit: Visit, batches: Iterable[Any], values: Mapping[str, Tensor], memory: Message, turn: Turn
    ) -> tuple[bytes, Message]:
        """Train the client of ``visit``.

        Args:
            values: of all that ``plan`` says is received: what came, decoded, and what the client has kept.
            memory: what plugins kept at the end of the client's last turn.
            turn: is told of the turn, and says what has come down, and since when; where the client drops out, it makes no update.

        Returns:
            The update, serialised: new values, or what plugins made of differences; and what plugins keep for the client's next turn.
        """
        chain = trainee.chain
        self.recall(chain, memory, visit)
        with torch.no_grad():
            torch._foreach_copy_(list(plan.received.values()), [values[name] for name in plan.received])
        follow(trainee.module, trainee.targets)
        before = {name: value.detach().clone() for name, value in plan.sent.items()} if chain.by_differences else {}
        chain.receive(visit)
        plan = plan.beside(chain.copies())
        samples = self.training.steps(trainee, trainee.step, self.meters, visit, batches, plan, turn)
        payload, kept = self.end(chain, plan.sent, before, visit, turn)
        turn.cost = self.meters.turn_cost(plan, samples, turn.cost.bytes_down, len(payload))
        return payload, kept

    def recall(self, chain: Chain, memory: Message, visit: Visit) -> None:
        """Give plugins what they kept at the end of the client's last turn."""
        chain.recall({name: value.to(self.fabric.device) for name, value in memory.items()}, visit)

    def end(
        self, chain: Chain, sent: Mapping[str, Tensor], before: Mapping[str, Tensor], visit: Visit, turn: Turn
    ) -> tuple[bytes, Message]:
        """The update, serialised, and what plugins keep: new values as they are, or, where plugins change what travels and so there is a
        ``before``, what they make of the differences. Nothing of a client that drops out."""
        if turn.dropped_out:
            turn.rejected = ""
            return b"", Message()
        update = chain.encode({name: value.detach() - before[name] for name, value in sent.items()}, visit) if before else sent
        payload = pack(update)
        return payload, {name: value.detach().to("cpu", copy=True) for name, value in chain.remember(visit).items()}
