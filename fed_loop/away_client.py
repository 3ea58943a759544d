"""A client in a process of its own: it has its data and what it kept, and knows of the server what it is sent."""

from __future__ import annotations

import math
import time
from collections import ChainMap
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from featherlight.fed_loop.aggregate import Mean
from featherlight.fed_loop.away import Belongings, Reply, Request
from featherlight.fed_loop.cohort import steps_done
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.trainees import Trainees
from featherlight.fed_loop.turn import NOT_FINITE, Taking, Turn
from featherlight.fed_loop.weighing import FixedMean
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Chain, Clock, Message, Plugin, Visit, find_targets

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation


class AwayClient:
    """Takes turns on request.

    Args:
        settings: the federation's; its server's part is not looked at.
        module: the model as every client makes it, before any round.
        data: has this client's batches, under its number.
        plugins: as the server's.

    Raises:
        ValueError: plugins and model do not fit together.
    """

    def __init__(self, settings: Federation, module: nn.Module, data: Any, plugins: Sequence[Plugin] = ()) -> None:
        self._settings, self._data = settings, data
        self._processes = Processes(**{**settings.compute, "devices": 1, "num_nodes": 1})
        self._processes.launch()
        self._chain = Chain(plugins)
        targets, blank = find_targets(module), self._chain.anew()
        self._chain.attach(module)
        self._trainees = Trainees.on(self._processes.fabric, module, self._chain, blank, targets, settings.clip)
        self._own = self._trainees.own
        self._first = {name: value.detach().to("cpu", copy=True) for name, value in self._own.live.items()} if self._chain.rebuilds else {}
        self._taking = Taking(self._processes.fabric, data)

    def take(self, request: Request, own: Belongings) -> tuple[Reply, Belongings]:
        """One turn.

        Args:
            own: what the client has of earlier turns.

        Returns:
            The reply, and what the client has now.
        """
        started, visit = time.perf_counter(), request.visit
        if any(own.versions.get(name) != version for name, version in request.holds.items()) or not _remembers(own, request.memory):
            return Reply(Turn(visit.client), lost=True, round=visit.round), Belongings()
        self._own.begin(Clock(visit.round, 0))
        self._chain.hear(request.told, visit)
        trainee = self._trainees.of(visit)
        like = self._trainees.travels([visit]) if request.weight is not None else {}
        plan = trainee.plan(visit)
        message = unpack(request.payload)
        if trainee.chain.rebuilds:
            before = self._first | own.received
            entries = trainee.chain.rebuild(message, before, visit)
            received = {name: before[name] for name in self._first} | entries
        else:
            entries, received = trainee.chain.decode_down(message, visit), {}
        if missing := [name for name in plan.received if name not in entries and name not in own.kept]:
            raise ValueError(f"{missing[0]} and {len(missing) - 1} more did not come and are not kept: is the server's model another?")
        turn = Turn(visit.client, dropped_out=request.progress is not None)
        turn.cost.bytes_down = len(request.payload)
        payload, memory = self._taking.take(
            trainee, plan, visit, self._batches(request), ChainMap(entries, own.kept), own.memories.get(request.memory, {}), turn
        )
        if request.weight is not None and not turn.dropped_out:
            payload = self._whole(payload, request.weight, like, visit, turn)
        turn.cost.seconds = time.perf_counter() - started
        had = {name: value if name in trainee.names else value.new_zeros(0) for name, value in {**own.kept, **message}.items()}
        keeps = {name: had[name] for name in request.keeps}  # of what is no entry of the model, the name alone
        memories = {round: kept for round, kept in own.memories.items() if round == request.memory}
        if self._chain.remembers and not turn.dropped_out:
            memories[visit.round] = memory
        return Reply(turn, payload, round=visit.round), Belongings(keeps, dict(request.keeps), received, memories)

    def _whole(self, payload: bytes, weight: float, like: Message, visit: Visit, turn: Turn) -> bytes:
        """An update as whole numbers, read and checked as the server, which will not see it, would have done."""
        if not math.isfinite(turn.loss):
            turn.reject(NOT_FINITE, "not_finite")
        mean = FixedMean(like, round(1 / weight)) if self._chain.counts_alike else Mean(like, self._chain.decodes)
        try:
            update = unpack(payload) if not turn.rejected else {}
            mean.add(self._chain.decode(update, visit) if self._chain.decodes and update else update, weight)
        except ValueError as error:
            turn.reject(error)
        return b"" if turn.rejected else pack({"whole": mean.whole()})

    def _batches(self, request: Request) -> Iterable[Any]:
        visit, epochs = request.visit, self._settings.local_epochs
        batches = (batch for _, batch in self._data.client_batches([visit], epochs))
        if request.progress is None:
            return batches
        return islice(batches, steps_done(request.progress, self._data.steps_per_visit(visit.client, epochs)))

    def close(self) -> None:
        """Leave an ordinary model behind, and give the process back its threads."""
        self._chain.detach()
        self._processes.close()


def _remembers(own: Belongings, round: int) -> bool:
    return round < 0 or round in own.memories
