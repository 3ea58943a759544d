"""The server's half of a client's turn: what the client is sent, and what is made of the update that comes back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch

from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.trainees import Trainee, Trainees
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.wire import Payload, pack_here, unpack
from featherlight.plugins import Message, Visit
from featherlight.plugins.rejection import Rejection


class Offer(NamedTuple):
    """What one client is sent.

    Args:
        payload: the message; received: what it reads as.
        kept: what the client keeps once it has trained, with versions.
    """

    payload: Payload
    received: Message
    kept: dict[str, int]


class Serving:
    """Makes offers and reads updates, with the server's own plugins."""

    def __init__(self, trainees: Trainees) -> None:
        self._trainees = trainees
        self.begin_round()

    def begin_round(self) -> None:
        self._last: tuple[tuple[str, ...], Payload, Message] | None = None
        self._due: dict[Hashable, dict[str, tuple[torch.Size, torch.dtype]]] = {}

    def offer(self, trainee: Trainee, plan: Plan, visit: Visit, server: Message, ledger: Ledger) -> Offer:
        """What the client of ``visit``, which trains ``trainee``'s module, lacks of the server's entries."""
        served = self._trainees.serve(trainee, server, plan, visit, ledger.kept(visit.client))
        kept = ledger.after(visit.client, served.lasting, plan.sent, server.keys())
        names = tuple(ledger.to_send(visit.client, served.wanted, served.made))
        if served.made or self._last is None or self._last[0] != names:  # the same message for several clients is made and read once
            payload = pack_here({name: served.entries[name] for name in names})
            self._last = names, payload, unpack(payload)
        return Offer(self._last[1], self._last[2], kept)

    def read(self, payload: Payload, limit: int, trainee: Trainee, plan: Plan, visit: Visit, turn: Turn) -> Message:
        """The update as the server reads it: new values, or, where plugins change what travels, differences as decoding gave them. One
        that it cannot read is rejected, as is one with other entries than this client was to train, or with some of them missing."""
        if turn.rejected:  # what a client makes of a turn that failed need not even be a message
            return {}
        chain, expected = self._trainees.own.chain, self._expected(trainee, plan, visit)
        try:
            update = unpack(payload, limit=limit)
            read = dict(chain.decode(update, visit)) if chain.decodes else update
            self._check(read, expected)
        except Rejection as error:
            turn.reject(error)
        except Exception as error:  # whatever a decoder makes of a message that no client of ours would send
            turn.reject(f"its message cannot be read: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}", "unreadable")
        else:
            return read
        return {}

    def _expected(self, trainee: Trainee, plan: Plan, visit: Visit) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """What is read of a client that has trained what ``plan`` says: found out, once a round, by sending zeros."""
        key = id(trainee), tuple(plan.sent)
        if key not in self._due:
            chain = self._trainees.own.chain
            entries: Mapping[str, Any] = {name: value.detach() for name, value in plan.sent.items()}
            if chain.by_differences:
                entries = trainee.chain.encode({name: torch.zeros_like(value) for name, value in entries.items()}, visit)
            if chain.decodes:
                entries = chain.decode(dict(entries), visit)
            values = {name: entry[0] if isinstance(entry, tuple) else entry for name, entry in entries.items()}
            self._due[key] = {name: (value.shape, value.dtype) for name, value in values.items()}
        return self._due[key]

    @staticmethod
    def _check(read: Mapping[str, Any], due: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        """Refuse what is not ``due``.

        Raises:
            Rejection: a name too many or too few, another shape, another dtype.
        """
        if more := [name for name in read if name not in due]:
            raise Rejection("names", f'entry "{more[0]}" is not among the {len(due)} that this client was to train')
        if missing := [name for name in due if name not in read]:
            raise Rejection("names", f'entry "{missing[0]}" and {len(missing) - 1} more of {len(due)} did not come')
        for name, entry in read.items():
            value, (shape, dtype) = entry[0] if isinstance(entry, tuple) else entry, due[name]
            if value.shape != shape:
                raise Rejection("shape", f'entry "{name}" has shape {tuple(value.shape)}, expected {tuple(shape)}')
            if value.dtype != dtype:
                raise Rejection("dtype", f'entry "{name}" is of {value.dtype}, expected {dtype}')
