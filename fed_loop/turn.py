"""One client's turn: receive, train, send. The same model, optimizer and loader serve every client; weights are swapped in place."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import LocalStep, refusal_told
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.optimizers import ClientOptimizer
from featherlight.fed_loop.plan import Plan, make_plan
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Chain, Clock, Message, Visit
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.optimizer_state import check_covered, clear
from featherlight.plugins.seeds import derive
from featherlight.plugins.targets import follow


@dataclass
class Turn:
    """What a process reports of one client's turn: plain data.

    Args:
        loss: mean over steps; kept: what the client keeps of what it received, with versions; rejected: why its update
            was not used, or nothing.
    """

    client: int
    steps: int = 0
    loss: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    rejected: str = ""
    cost: TurnCost = field(default_factory=TurnCost)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Turn:
        return cls(**{**data, "cost": TurnCost(**data["cost"])})


def count_samples(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor."""
    return next((value.shape[0] for value in tree_leaves(batch) if isinstance(value, Tensor) and value.ndim), 0)


class Clients:
    """Trains one client after the other on one device.

    Args:
        epochs: local epochs of a turn.
        clip: largest gradient norm, or None.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: nn.Module,
        optimizer: ClientOptimizer,
        chain: Chain,
        targets: dict[str, str],
        data: Any,
        epochs: int,
        clip: float | None = None,
    ) -> None:
        self._fabric = fabric
        self._raw = optimizer.optimizer
        self.module = module
        _, self._optimizer = fabric.setup(module, self._raw)
        self._chain = chain
        self._targets = targets
        self._data = data
        self._epochs = epochs
        limit = None if clip is None else partial(fabric.clip_gradients, max_norm=clip, error_if_nonfinite=False)
        self._step = LocalStep(chain, fabric.strategy.precision, fabric.backward, limit)
        self.meters = Meters()

    def begin_round(self) -> None:
        self._last: tuple[tuple[str, ...], int, Message] | None = None

    def train(self, visit: Visit, batches: Iterable[Any], server: Mapping[str, Tensor], ledger: Ledger) -> tuple[Turn, Message]:
        """Train the client of ``visit`` from the server's entries.

        Returns:
            The turn's report, and the client's update as it arrived at the server: new values, or, where plugins encode,
            what decoding gave.
        """
        started = time.perf_counter()
        plan = make_plan(self.module, self._chain, self._targets, visit)
        check_covered(self.module, [self._raw])
        bytes_down = self._receive(plan, visit.client, server, ledger)
        turn = Turn(visit.client, kept=ledger.after(visit.client, plan.received, plan.sent))
        before = {name: value.detach().clone() for name, value in plan.sent.items()} if self._chain.encodes else {}
        samples = self._steps(visit, batches, plan, turn)
        payload = self._send(plan, before, visit)
        update = unpack(payload, limit=len(payload))
        if self._chain.decodes:
            update = dict(self._chain.decode(update, visit))
        turn.cost = self.meters.turn_cost(plan, samples, bytes_down, len(payload), time.perf_counter() - started)
        return turn, update

    def _receive(self, plan: Plan, client: int, server: Mapping[str, Tensor], ledger: Ledger) -> int:
        """Load what the client still holds and what it is sent; returns the length of the message."""
        names = tuple(ledger.to_send(client, plan.received))
        if self._last is None or self._last[0] != names:  # the same message for one client after the other is made and read once
            payload = pack({name: server[name] for name in names})
            self._last = names, len(payload), unpack(payload)
        _, length, received = self._last
        with torch.no_grad():
            torch._foreach_copy_(list(plan.received.values()), [received.get(name, server[name]) for name in plan.received])
        follow(self.module, self._targets)
        return length

    def _steps(self, visit: Visit, batches: Iterable[Any], plan: Plan, turn: Turn) -> int:
        """All local steps of one turn; returns the number of samples."""
        torch.manual_seed(derive(visit.seed, visit.round, visit.client, "model"))  # the model's own dropout has no other source
        clear([self._raw])
        self.module.zero_grad()  # the client before left them
        losses = torch.zeros((), device=self._fabric.device)
        samples = 0
        for step, raw in enumerate(batches):
            batch = self._data.on_after_batch_transfer(self._fabric.to_device(raw), 0)
            clock = Clock(visit.round, step)
            size = count_samples(batch)
            samples += size
            with refusal_told(self.module, visit.client, size):
                if self.meters.wants(plan.structure, step, size):
                    loss, cost = self._step.metered(self.module, self._optimizer, batch, clock)
                    self.meters.note(cost)
                else:
                    loss = self._step(self.module, self._optimizer, batch, clock)
            losses += loss
            turn.steps += 1
        turn.loss = float(losses) / max(turn.steps, 1)
        if not bool(torch.isfinite(losses)):
            turn.rejected = "loss is not finite"
        return samples

    def _send(self, plan: Plan, before: Mapping[str, Tensor], visit: Visit) -> bytes:
        """New values as they are, or, where plugins encode, what they make of the differences."""
        if not before:
            return pack(plan.sent)
        return pack(self._chain.encode({name: value.detach() - before[name] for name, value in plan.sent.items()}, visit))
