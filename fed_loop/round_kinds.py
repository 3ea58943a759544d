"""The kinds of rounds there are: clients train all that they hold, or a device and the server each have a part of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from featherlight.fed_loop.aggregate import Aggregate
from featherlight.fed_loop.at_once import ClientsAtOnce, check_at_once, in_order
from featherlight.fed_loop.away import AwayRounds, Carrier, SumCarrier, check_sums
from featherlight.fed_loop.cohort import absent, asked, steps_done
from featherlight.fed_loop.here import Clients, Given
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.lockstep_rounds import LockstepRounds
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.stored_rounds import StoredRounds, replay_cohort
from featherlight.fed_loop.trainees import Trainees
from featherlight.fed_loop.turn import Turn
from featherlight.plugins import Chain, Clock, Message, Partition, Visit

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation


class RoundKind(Protocol):
    """What differs from one kind of round to another."""

    def cohort(self, round: int) -> list[int]:
        """Who takes part, ascending."""

    def turns(
        self, visits: Sequence[Visit], server: Message, ledger: Ledger, memories: Mapping[int, Message]
    ) -> Iterator[tuple[Turn, Message, Message]]:
        """For each of this process's clients its turn's report, its update as it arrived at the server, and what it remembers.

        Args:
            memories: by client, what those remember who had a turn.
        """

    def together(self, round: int, turns: list[Turn], server: Message, mean: Aggregate) -> None:
        """What is trained once all turns of this process are over."""

    def settle(self, round: int, everybody: Sequence[Turn]) -> None:
        """The round has come to its end: from here on it counts.

        Args:
            everybody: all processes' turns, as they ended.
        """


class RoundKinds:
    """Finds the kind of a round."""

    def __init__(
        self, settings: Federation, processes: Processes, trainees: Trainees, data: Any, carrier: Carrier | SumCarrier | None = None
    ) -> None:
        self._settings, self._processes, self._trainees, self._data = settings, processes, trainees, data
        self._carrier = carrier

    def of(self, clock: Clock) -> RoundKind:
        """The kind of the round at ``clock``."""
        partition = self._trainees.own.chain.partition(clock)
        if partition is None:
            return self._whole
        return _Divided(self._settings, partition, self._lockstep if partition.buffer is None else self._stored, self._data)

    def check(self) -> None:
        """What would fail in the first round is better found now.

        Raises:
            ValueError: settings that do not go with the kind.
        """
        own, partition = self._trainees.own, self._trainees.own.chain.partition(Clock(0, 0))
        check_partition(self._settings, partition, own.module, self._data)
        check_robust(self._settings, partition, own.chain)
        if self._settings.client_batch > 1:
            check_at_once(self._settings.client_batch, own, self._processes.fabric.strategy.precision)
        if self._carrier is not None:
            check_away(partition, own.chain)
        if isinstance(self._carrier, SumCarrier):
            check_sums(self._settings, own.chain)

    @cached_property
    def _whole(self) -> RoundKind:
        if self._carrier is not None:
            return AwayRounds(self._settings, self._trainees, self._data, self._carrier)
        return _Whole(self._settings, Clients(self._processes.fabric, self._trainees, self._data), self._data)

    @cached_property
    def _lockstep(self) -> LockstepRounds:
        return LockstepRounds(self._processes, self._trainees.own, self._data, self._settings.local_epochs)

    @cached_property
    def _stored(self) -> StoredRounds:
        return StoredRounds(self._processes, self._trainees.own, self._data, self._settings.local_epochs)


def check_partition(settings: Federation, partition: Partition | None, module: nn.Module, data: Any) -> None:
    """Refuse settings that a divided model cannot have, and a model whose queues several trainers would fill.

    Raises:
        ValueError: gradients are to be clipped whose norm nobody has; a mean would be taken of what has none.
    """
    if partition is not None and partition.buffer is None and settings.clip is not None:
        raise ValueError(f"clip={settings.clip} needs the norm of all gradients, of which device and server each have a part: leave it out")
    if partition is not None and settings.sampling == "poisson":
        raise ValueError("sampling='poisson': rounds of a model that is divided have cohorts of a fixed size: leave it out")
    queues = getattr(module, "queues", ())
    if queues and data.num_clients > 1 and not (partition is not None and partition.joint):
        raise ValueError(
            f'{type(module).__name__} pushes to "{queues[0]}" in every step, and of several clients\' queues there is no mean: have one '
            "server part train on all clients' activations (a divided model with joint=True), or make the model without (queue_size=0)"
        )


def check_robust(settings: Federation, partition: Partition | None, chain: Chain) -> None:
    """Refuse a median of what has none.

    Raises:
        ValueError: it is asked for.
    """
    if settings.aggregate is None:
        return
    asked = f"aggregate={type(settings.aggregate).__name__} takes each coordinate of clients' updates by itself"
    for plugin in chain.plugins:
        if plugin.only_adds:
            raise ValueError(
                f"{asked}, and with {type(plugin).__name__} {plugin.only_adds}: leave one of them out, or bound updates by NormClipping"
            )
    if partition is not None and partition.joint:
        raise ValueError(
            f"{asked}, and with joint=True one rear trains on all clients' activations, of which there is one update: leave one out"
        )


def gone_of(partition: Partition, settings: Federation, cohort: Sequence[int], round: int) -> dict[int, float]:
    """Who drops out of a round of a divided model, and how far each gets; nobody where devices rest."""
    return absent(settings, cohort, round) if partition.devices_work else {}


def check_away(partition: Partition | None, chain: Chain) -> None:
    """Refuse methods that clients in processes of their own cannot follow.

    Raises:
        ValueError: it is asked for.
    """
    for plugin in chain.plugins:
        if plugin.stays_here:
            raise ValueError(f"{type(plugin).__name__} does not run with clients in processes of their own: {plugin.stays_here}")
    if partition is not None:
        raise ValueError(
            "a model divided between device and server does not run with clients in processes of their own: both step through a batch "
            "together, and what they exchange has no road there yet; use the built-in loop"
        )
    moving = [type(plugin).__name__ for plugin in chain.plugins if plugin.moves]
    summed = [type(plugin).__name__ for plugin in chain.plugins if not plugin.ordinary_server]
    if moving and summed:
        raise ValueError(
            f"{moving[0]} begins stages with other weights, which clients in processes of their own cannot work out of {summed[0]}'s sums: "
            "have it leave weights as they are, or use the built-in loop"
        )


class _Whole:
    """Clients train all that they hold."""

    def __init__(self, settings: Federation, clients: Clients, data: Any) -> None:
        self._settings, self._clients, self._data = settings, clients, data
        self._at_once = ClientsAtOnce(clients, settings.client_batch, settings.clip) if settings.client_batch > 1 else None

    def cohort(self, round: int) -> list[int]:
        return asked(self._settings, self._data.num_clients, round)

    def turns(
        self, visits: Sequence[Visit], server: Message, ledger: Ledger, memories: Mapping[int, Message]
    ) -> Iterator[tuple[Turn, Message, Message]]:
        self._clients.begin_round()
        if self._at_once is not None:
            yield from self._at_once.turns(self._given(in_order(visits, self._sizes), memories), server, ledger)
            return
        for given in self._given(visits, memories):
            yield self._clients.train(given, server, ledger)

    @cached_property
    def _sizes(self) -> Sequence[int]:
        return self._data.client_sizes()

    def _given(self, visits: Sequence[Visit], memories: Mapping[int, Message]) -> Iterator[Given]:
        """The turns to be taken, in one stream of batches."""
        epochs = self._settings.local_epochs
        for index, stream in groupby(self._data.client_batches(visits, epochs), key=itemgetter(0)):
            visit = visits[index]
            batches: Iterable[Any] = (batch for _, batch in stream)
            gone = self._gone(visit)
            if gone is not None:  # groupby reads on to the next client
                batches = islice(batches, steps_done(gone, self._data.steps_per_visit(visit.client, epochs)))
            yield Given(visit, batches, memories.get(visit.client, {}), arrives=gone is None)

    def _gone(self, visit: Visit) -> float | None:
        """How far a client gets that drops out."""
        return absent(self._settings, self.cohort(visit.round), visit.round).get(visit.client)

    def together(self, round: int, turns: list[Turn], server: Message, mean: Aggregate) -> None:
        """Every client has trained alone."""

    def settle(self, round: int, everybody: Sequence[Turn]) -> None:
        """Nothing is kept."""


class _Divided:
    """Device and server each have a part."""

    def __init__(self, settings: Federation, partition: Partition, work: LockstepRounds | StoredRounds, data: Any) -> None:
        self._settings, self._partition, self._work, self._data = settings, partition, work, data

    def cohort(self, round: int) -> list[int]:
        if not self._partition.devices_work and self._partition.buffer is not None:
            return replay_cohort(self._partition, self._settings.cohort, self._settings.seed, round)
        return asked(self._settings, self._data.num_clients, round)

    def turns(
        self, visits: Sequence[Visit], server: Message, ledger: Ledger, memories: Mapping[int, Message]
    ) -> Iterator[tuple[Turn, Message, Message]]:
        gone = gone_of(self._partition, self._settings, self.cohort(visits[0].round), visits[0].round) if visits else {}
        for turn, update in self._work.turns(self._partition, visits, server, ledger, gone):
            yield turn, update, {}

    def together(self, round: int, turns: list[Turn], server: Message, mean: Aggregate) -> None:
        self._work.together(self._partition, turns, round, self._settings.seed, server, mean)

    def settle(self, round: int, everybody: Sequence[Turn]) -> None:
        self._work.settle(self._partition, everybody, round)
