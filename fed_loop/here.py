"""Turns that this process takes itself, one client after the other on one device: the server's half and the client's in one place."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Iterable
from typing import Any

from lightning.fabric import Fabric

from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.serving import Serving
from featherlight.fed_loop.trainees import Trainees
from featherlight.fed_loop.turn import Taking, Turn
from featherlight.plugins import Message, Visit


class Clients:
    """Trains one client after the other on one device."""

    def __init__(self, fabric: Fabric, trainees: Trainees, data: Any) -> None:
        self._trainees = trainees
        self._serving, self._taking = Serving(trainees), Taking(fabric, data)

    def begin_round(self) -> None:
        self._serving.begin_round()

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
        plan = trainee.plan(visit)
        offer = self._serving.offer(trainee, plan, visit, server, ledger)
        turn = Turn(visit.client, kept=offer.kept, dropped_out=not arrives)
        turn.cost.bytes_down = len(offer.payload)
        values = ChainMap(trainee.chain.decode_down(offer.received, visit), server)  # what the client has kept is the server's
        payload, kept = self._taking.take(trainee, plan, visit, batches, values, memory, turn)
        update = self._serving.read(payload, len(payload), trainee, plan, visit, turn) if arrives else {}
        turn.cost.seconds = time.perf_counter() - started
        return turn, update, kept
