"""The server's half of a client's turn: what the client is sent, and what is made of the update that comes back."""

from __future__ import annotations

from typing import NamedTuple

from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.trainees import Trainee, Trainees
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Message, Visit


class Offer(NamedTuple):
    """What one client is sent.

    Args:
        payload: the message; received: what it reads as.
        kept: what the client keeps once it has trained, with versions.
    """

    payload: bytes
    received: Message
    kept: dict[str, int]


class Serving:
    """Makes offers and reads updates, with the server's own plugins."""

    def __init__(self, trainees: Trainees) -> None:
        self._trainees = trainees
        self.begin_round()

    def begin_round(self) -> None:
        self._last: tuple[tuple[str, ...], bytes, Message] | None = None

    def offer(self, trainee: Trainee, plan: Plan, visit: Visit, server: Message, ledger: Ledger) -> Offer:
        """What the client of ``visit``, which trains ``trainee``'s module, lacks of the server's entries."""
        served = self._trainees.serve(trainee, server, plan, visit, ledger.kept(visit.client))
        kept = ledger.after(visit.client, served.lasting, plan.sent, server.keys())
        names = tuple(ledger.to_send(visit.client, served.wanted, served.made))
        if served.made or self._last is None or self._last[0] != names:  # the same message for several clients is made and read once
            payload = pack({name: served.entries[name] for name in names})
            self._last = names, payload, unpack(payload)
        return Offer(self._last[1], self._last[2], kept)

    def read(self, payload: bytes, limit: int, visit: Visit, turn: Turn) -> Message:
        """The update as the server reads it: new values, or, where plugins change what travels, differences as decoding gave them. One
        that it cannot read is rejected."""
        chain = self._trainees.own.chain
        try:
            update = unpack(payload, limit=limit)
            return dict(chain.decode(update, visit)) if chain.decodes else update
        except ValueError as error:
            turn.rejected = turn.rejected or str(error)
            return {}
