"""Turns that this process takes itself, one client after the other on one device: the server's half and the client's in one place."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning.fabric import Fabric
from torch import Tensor

from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.serving import Serving
from featherlight.fed_loop.trainees import Trainee, Trainees
from featherlight.fed_loop.turn import Taking, Turn
from featherlight.plugins import Message, Visit


class Given(NamedTuple):
    """A client's turn before it is taken.

    Args:
        batches: of its data, as they are made; memory: what plugins kept at the end of the client's last turn.
        arrives: whether its update does, or the client drops out after ``batches``.
    """

    visit: Visit
    batches: Iterable[Any]
    memory: Message
    arrives: bool = True


class Clients:
    """Trains one client after the other on one device."""

    def __init__(self, fabric: Fabric, trainees: Trainees, data: Any) -> None:
        self.trainees = trainees
        self.serving, self.taking = Serving(trainees), Taking(fabric, data)

    def begin_round(self) -> None:
        self.serving.begin_round()

    def train(self, given: Given, server: Message, ledger: Ledger) -> tuple[Turn, Message, Message]:
        """Train a client from the server's entries.

        Returns:
            The turn's report; the client's update as it arrived at the server: new values, or, where plugins change what travels,
            differences as decoding gave them; and what plugins keep for the client's next turn.
        """
        started = time.perf_counter()
        visit = given.visit
        trainee = self.trainees.of(visit)
        plan = trainee.plan(visit)
        turn, values = self.begun(given, trainee, plan, server, ledger)
        payload, kept = self.taking.take(trainee, plan, visit, given.batches, values, given.memory, turn)
        update = self.serving.read(payload, len(payload), trainee, plan, visit, turn) if given.arrives else {}
        turn.cost.seconds = time.perf_counter() - started
        return turn, update, kept

    def begun(self, given: Given, trainee: Trainee, plan: Plan, server: Message, ledger: Ledger) -> tuple[Turn, Mapping[str, Tensor]]:
        """A turn of which the server's half has begun, and the values that the client has then."""
        offer = self.serving.offer(trainee, plan, given.visit, server, ledger)
        turn = Turn(given.visit.client, kept=offer.kept, dropped_out=not given.arrives)
        turn.cost.bytes_down = len(offer.payload)
        return turn, ChainMap(trainee.chain.decode_down(offer.received, given.visit), server)  # what the client has kept is the server's
