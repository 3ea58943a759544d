"""Turns that clients take elsewhere, each in a process of its own with data of its own: what goes there, what comes back, what stays.

How requests and replies travel is a :class:`Carrier`'s business; what they carry is the very bytes that are counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from featherlight.fed_loop.aggregate import Aggregate
from featherlight.fed_loop.cohort import absent, asked
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.serving import Serving
from featherlight.fed_loop.trainees import Trainees
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.weighing import Weighing
from featherlight.fed_loop.wire import pack, unpack
from featherlight.plugins import Chain, Message, Visit
from featherlight.plugins.base import overrides

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation

NONE_YET = -1
"""In place of a round, where a client remembers nothing."""


class Request(NamedTuple):
    """What a client is asked to do: one turn.

    Args:
        payload: the message down, as counted.
        holds: what the client still has, by the server's ledger, with versions; keeps: what it keeps behind its turn.
        memory: the round at whose end it made the memory that counts, or :data:`NONE_YET`.
        progress: how far it gets, from 0 to 1, if it is to drop out.
        told: what plugins tell of the schedule so far.
        weight: where the server is to see sums alone, what the update weighs among all.
    """

    visit: Visit
    payload: bytes
    holds: dict[str, int]
    keeps: dict[str, int]
    memory: int = NONE_YET
    progress: float | None = None
    told: dict[str, Any] = {}  # noqa: RUF012  never written to
    weight: float | None = None

    def header(self) -> str:
        """All but the payload, as JSON."""
        return json.dumps({name: value for name, value in self._asdict().items() if name != "payload"})

    @classmethod
    def of(cls, header: str, payload: bytes) -> Request:
        """From :meth:`header`."""
        told = json.loads(header)
        return cls(**{**told, "visit": Visit(*told["visit"]), "payload": payload})


class Reply(NamedTuple):
    """What comes back.

    Args:
        turn: the turn's report; payload: the update, as counted; where the request gives a weight, as whole numbers (:meth:`Mean.whole`).
        lost: the client has not what the request says that it holds (it was started anew), and has done nothing.
        round: of the request; a reply to an earlier one is not taken for it.
    """

    turn: Turn
    payload: bytes = b""
    lost: bool = False
    round: int = NONE_YET

    def header(self) -> str:
        """All but the payload, as JSON."""
        return json.dumps({"turn": self.turn.to_json(), "lost": self.lost, "round": self.round})

    @classmethod
    def of(cls, header: str, payload: bytes) -> Reply:
        """From :meth:`header`.

        Raises:
            ValueError: it is none.
        """
        try:
            told = json.loads(header)
            return cls(Turn.from_json(told["turn"]), payload, bool(told["lost"]), int(told["round"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"its reply's header cannot be read ({type(error).__name__}: {error})") from error

    @classmethod
    def failed(cls, client: int, why: str) -> Reply:
        """In place of one that will not come."""
        return cls(Turn(client, rejected=why or "its turn failed", reason="no_reply"))


@dataclass
class Belongings:
    """What a client has between its turns; it never leaves it.

    Args:
        kept: entries that the server need not send again, with ``versions``.
        received: the model as it came last, where a method counts on it, and what the method notes beside it.
        memories: what plugins remember, by the round at whose end: of the last turn, and of the last one before it that the server took.
    """

    kept: Message = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    received: Message = field(default_factory=dict)
    memories: dict[int, Message] = field(default_factory=dict)

    def packed(self) -> bytes:
        """As bytes."""
        named: Message = {f"kept/{self.versions[name]}/{name}": value for name, value in self.kept.items()}
        named |= {f"received//{name}": value for name, value in self.received.items()}
        for round, memory in self.memories.items():
            named |= {f"memory/{round}/{name}": value for name, value in memory.items()} | {f"memory/{round}/": torch.zeros(0)}
        return pack({name: value.clone() for name, value in named.items()})  # what came together may share memory

    @classmethod
    def unpacked(cls, data: bytes) -> Belongings:
        """From :meth:`packed`."""
        own = cls()
        for full, value in unpack(data).items():
            kind, number, name = full.split("/", 2)
            if kind == "received":
                own.received[name] = value
            elif kind == "kept":
                own.kept[name], own.versions[name] = value, int(number)
            else:
                memory = own.memories.setdefault(int(number), {})
                memory |= {name: value} if name else {}
        return own


@dataclass
class Sent:
    """What a client was sent in a round: bytes in all, and what it keeps of it."""

    length: int = 0
    keeps: dict[str, int] = field(default_factory=dict)


class Carrier(Protocol):
    """Takes requests to clients, and brings replies."""

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """A reply for every request, in any order; :meth:`Reply.failed` where none comes."""


@runtime_checkable
class SumCarrier(Protocol):
    """Takes requests to clients, and of what they answer brings the sum."""

    def summed(self, requests: Sequence[Request], size: int) -> tuple[list[Reply], Tensor | None]:
        """A reply for every request, in any order; and the sum, ``(size,)``, int64, modulo 2⁶⁴, of what those sent as whole numbers whose
        reply says that they count; None where there is none."""


def check_sums(settings: Federation, chain: Chain) -> None:
    """Refuse what needs clients' updates one by one.

    Raises:
        ValueError: it is asked for.
    """
    if settings.aggregate is not None:
        raise ValueError(f"aggregate={type(settings.aggregate).__name__} looks at each client's update, and the server sees sums alone")
    if settings.sampling == "poisson":
        raise ValueError(
            "sampling='poisson': a sum can be read only where enough clients came, so that it tells how many did, which ε does not count: "
            "draw cohorts of a fixed size"
        )
    if alone := [type(plugin).__name__ for plugin in chain.plugins if overrides(plugin, "narrow")]:
        raise ValueError(f"{alone[0]}: what a smaller module sends only the server can put in its place, and it sees sums alone")


def check_settings(settings: Federation) -> None:
    """Refuse what does not go with clients elsewhere.

    Raises:
        ValueError: it is asked for.
    """
    if settings.evaluate_clients:
        raise ValueError("evaluate_clients=True: clients in processes of their own are sent models to train, not to evaluate: leave it out")
    if settings.client_batch > 1:
        raise ValueError(f"client_batch={settings.client_batch} trains clients in this process, and here each has its own: leave it out")
    devices, nodes = settings.compute["devices"], settings.compute["num_nodes"]
    if devices not in (1, "1") or nodes > 1:
        raise ValueError(
            f"devices={devices}, num_nodes={nodes}: where clients are processes of their own, the server is one more: leave both at 1"
        )


def _stray(client: int, asked: bool) -> Turn:
    """In place of a reply that nobody waits for."""
    turn = Turn(client, stray=True)
    turn.reject("a second reply came of it" if asked else "it was not asked", "duplicate")
    return turn


class AwayRounds:
    """Rounds of which clients take their turns elsewhere: the server's half."""

    def __init__(self, settings: Federation, trainees: Trainees, data: Any, carrier: Carrier | SumCarrier) -> None:
        self._sum: Tensor | None = None
        self._forgotten: set[int] = set()  # clients that have lost what they remembered, and have had no turn since
        self._settings, self._trainees, self._data, self._carrier = settings, trainees, data, carrier
        self._serving = Serving(trainees)

    def cohort(self, round: int) -> list[int]:
        return asked(self._settings, self._data.num_clients, round)

    def turns(
        self, visits: Sequence[Visit], server: Message, ledger: Ledger, memories: Mapping[int, Message]
    ) -> Iterator[tuple[Turn, Message, Message]]:
        """As :meth:`RoundKind.turns`; of what clients remember the server knows the round at whose end they made it."""
        self._serving.begin_round()
        if isinstance(self._carrier, SumCarrier):
            remembered = {client: memory for client, memory in memories.items() if client not in self._forgotten}
            yield from self._turns_summed(self._carrier, visits, server, ledger, remembered)
            return
        by_client, remembered = {visit.client: visit for visit in visits}, dict(memories)
        limit = 2**20 + 2 * sum(value.numel() * value.element_size() for value in server.values())
        asked, sent = list(visits), {visit.client: Sent() for visit in visits}
        for attempt in range(2):
            again: list[Visit] = []
            waiting = {visit.client for visit in asked}
            requests = (self._request(visit, server, ledger, remembered, sent[visit.client]) for visit in asked)
            for reply in self._carrier.exchange(requests):
                turn = reply.turn
                if turn.client not in waiting:
                    yield _stray(turn.client, turn.client in by_client), {}, {}
                    continue
                visit = by_client[turn.client]
                waiting.remove(turn.client)
                if reply.round != visit.round and not turn.rejected:
                    turn.reject(f"it is of round {reply.round}", "stale")
                if reply.lost and not (attempt or turn.rejected):
                    ledger.visited(visit.client, {})
                    remembered.pop(visit.client, None)
                    again.append(visit)
                    continue
                if reply.lost:
                    turn.reject("it keeps nothing from one message to the next")
                yield self._arrived(reply, visit, sent[visit.client], limit)
            for client in sorted(waiting):
                yield self._arrived(Reply.failed(client, "no reply came"), by_client[client], sent[client], limit)
            asked = again

    def _turns_summed(
        self, carrier: SumCarrier, visits: Sequence[Visit], server: Message, ledger: Ledger, remembered: dict[int, Message]
    ) -> Iterator[tuple[Turn, Message, Message]]:
        """Turns whose updates come as one, for :meth:`together`. Who is lost is not asked again: there would be a second sum, of few."""
        if not visits:
            return
        sent, chain = {visit.client: Sent() for visit in visits}, self._trainees.own.chain
        weighing = Weighing(self._settings, chain, self._data.client_sizes(), [visit.client for visit in visits])
        blank: Any = weighing.aggregate(self._trainees.travels(visits))
        requests = [
            self._request(visit, server, ledger, remembered, sent[visit.client])._replace(weight=weighing.of(visit.client))
            for visit in visits
        ]
        replies, self._sum = carrier.summed(requests, len(blank.whole()))
        wrong = ""
        if self._sum is not None:
            try:
                blank.add_whole(self._sum)
            except ValueError as error:
                wrong, self._sum = str(error), None
        for reply in replies:
            turn, own = reply.turn, sent[reply.turn.client]
            turn.cost.bytes_down, turn.cost.bytes_up, turn.server = own.length, len(reply.payload), None
            turn.kept = own.keeps if turn.steps else {}
            if reply.lost:
                ledger.visited(turn.client, {})
                self._forgotten.add(turn.client)
                turn.reject("it has not what it was to keep: it is sent everything the next time", "no_reply")
            if wrong and turn.counts:
                turn.reject(wrong)
            if turn.counts:
                self._forgotten.discard(turn.client)
            yield turn, {}, {"round": torch.tensor(visits[0].round)} if turn.counts and chain.remembers else {}

    def _request(self, visit: Visit, server: Message, ledger: Ledger, memories: Mapping[int, Message], sent: Sent) -> Request:
        trainee = self._trainees.of(visit)
        holds = ledger.held(visit.client)
        offer = self._serving.offer(trainee, trainee.plan(visit), visit, server, ledger)
        sent.length, sent.keeps = sent.length + len(offer.payload), offer.kept
        memory = int(memories[visit.client]["round"]) if visit.client in memories else NONE_YET
        progress = absent(self._settings, self.cohort(visit.round), visit.round).get(visit.client)
        return Request(visit, offer.payload, holds, offer.kept, memory, progress, self._trainees.own.chain.tell())

    def _arrived(self, reply: Reply, visit: Visit, sent: Sent, limit: int) -> tuple[Turn, Message, Message]:
        turn, payload = reply.turn, reply.payload
        turn.cost.bytes_down, turn.cost.bytes_up, turn.server = sent.length, len(payload), None
        turn.kept = sent.keeps if turn.steps else {}  # of a turn that failed nobody knows what the client has
        if not (turn.dropped_out or math.isfinite(turn.loss)):
            turn.reject("loss is not finite", "not_finite")
        if turn.dropped_out or turn.rejected:
            return turn, {}, {}
        trainee = self._trainees.of(visit)
        plan = trainee.plan(visit)  # others have had their turns since
        update = self._serving.read(payload, limit, trainee, plan, visit, turn)
        return turn, update, {"round": torch.tensor(visit.round)} if self._trainees.own.chain.remembers else {}

    def together(self, round: int, turns: list[Turn], server: Message, mean: Aggregate) -> None:
        """What came as one sum is added."""
        if self._sum is not None:
            mean.add_whole(self._sum)  # type: ignore[attr-defined]
        self._sum = None

    def settle(self, round: int, everybody: Sequence[Turn]) -> None:
        """Nothing is kept."""
