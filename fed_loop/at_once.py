"""Turns of several clients at once on one device: the same turns as one after the other, to rounding, in fewer and larger operations."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import Precision
from torch import Tensor

from featherlight.fed_loop.here import Clients, Given
from featherlight.fed_loop.lanes import Flat, Lanes, why_not
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import refusal_told
from featherlight.fed_loop.plan import Plan
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.turn import NOT_FINITE, Turn, model_seed
from featherlight.plugins import Clock, Message, Visit
from featherlight.plugins.step_cost import count_samples


def check_at_once(size: int, trainee: Trainee, precision: Precision) -> None:
    """Refuse what several clients cannot be trained at once with.

    Raises:
        ValueError: says why, and what to do.
    """
    target = next(iter(trainee.targets), None)
    why = trainee.chain.why_alone() or why_not(trainee.module, trainee.optimizer, precision)
    if target is not None:
        why = f'"{target}" follows each client\'s own weights'
    if why:
        raise ValueError(f"client_batch={size} trains clients at once, but {why}: set client_batch=1, or leave it out")


class _Waiting(NamedTuple):
    """A client that is to train beside others, its batches read and the first two ready."""

    given: Given
    plan: Plan
    first: list[Any]

    @property
    def steps(self) -> int:
        return len(self.given.batches)  # type: ignore[arg-type]


class ClientsAtOnce:
    """Trains several clients at once. One whose turn begins as none has before trains alone, and is metered; others cost what it did.

    Args:
        clients: trains one after the other.
        size: how many at once, at most.
        clip: largest gradient norm of a client's step.
    """

    def __init__(self, clients: Clients, size: int, clip: float | None) -> None:
        self._clients, self._size, self._clip = clients, size, clip
        self._taking = clients.taking
        self._lanes: Lanes | None = None

    def turns(self, stream: Iterable[Given], server: Message, ledger: Ledger) -> Iterator[tuple[Turn, Message, Message]]:
        """As :meth:`Clients.train` for each client of ``stream``."""
        waiting: list[_Waiting] = []
        for given in stream:
            given = given._replace(batches=list(given.batches))  # who reads on to the next client has these no more
            plan = self._clients.trainees.own.plan(given.visit)
            first = [self._taking.training.ready(raw) for raw in islice(given.batches, 2)]
            if not self._taking.meters.knows(plan.structure, [count_samples(batch) for batch in first]):
                yield self._clients.train(given, server, ledger)
                continue
            waiting.append(_Waiting(given, plan, first))
            if len(waiting) == self._size:
                yield from self._together(waiting, server, ledger)
                waiting = []
        if waiting:
            yield from self._together(waiting, server, ledger)

    def _together(self, waiting: Sequence[_Waiting], server: Message, ledger: Ledger) -> Iterator[tuple[Turn, Message, Message]]:
        """Turns of clients that train the same entries."""
        started = time.perf_counter()
        trainee, plan, visits = self._clients.trainees.own, waiting[0].plan, [one.given.visit for one in waiting]
        lanes = self._lanes_of(plan, len(waiting))
        begun = [self._clients.begun(one.given, trainee, plan, server, ledger) for one in waiting]
        turns = [turn for turn, _ in begun]
        self._load(lanes, plan, [values for _, values in begun], visits)
        first = slice(0, len(waiting))
        before = {name: value.detach()[first].clone() for name, value in lanes.values.items()} if trainee.chain.by_differences else {}
        samples = self._train(lanes, trainee, waiting, turns)
        seconds = time.perf_counter() - started
        for lane, (one, turn) in enumerate(zip(waiting, turns, strict=True)):
            started = time.perf_counter()
            sent = {name: value[lane] for name, value in lanes.values.items()}
            self._taking.recall(trainee.chain, one.given.memory, one.given.visit)
            payload, kept = self._taking.end(
                trainee.chain, sent, {name: value[lane] for name, value in before.items()}, one.given.visit, turn
            )
            self._taking.meters.knows(plan.structure, [count_samples(batch) for batch in one.first])
            turn.cost = self._taking.meters.turn_cost(plan, samples[lane], turn.cost.bytes_down, len(payload))
            update = self._clients.serving.read(payload, len(payload), trainee, plan, one.given.visit, turn) if one.given.arrives else {}
            turn.cost.seconds = seconds * samples[lane] / sum(samples) + time.perf_counter() - started
            yield turn, update, kept

    def _lanes_of(self, plan: Plan, count: int) -> Lanes:
        """For so many clients or more that train what ``plan`` says: of a stage the largest so far, the first ones of which fewer take."""
        if self._lanes is None or self._lanes.size < count or self._lanes.values.keys() != plan.sent.keys():
            own = self._clients.trainees.own
            self._lanes = None  # its memory goes first
            self._lanes = Lanes(own.module, own.optimizer, plan, count, self._taking.fabric.strategy.precision, self._clip)
        return self._lanes

    def _load(self, lanes: Lanes, plan: Plan, values: Sequence[Mapping[str, Tensor]], visits: Sequence[Visit]) -> None:
        """What each client has into its lane; what does not train and is the same for all into the module."""
        apart: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, live in plan.received.items():
                given = [own[name] for own in values]
                lane = lanes.values[name][: len(given)] if name in lanes.values else None
                same = all(value is given[0] for value in given)
                if lane is not None and same:
                    lane.copy_(given[0].expand_as(lane))
                elif lane is not None:
                    torch._foreach_copy_(list(lane.unbind()), given)
                elif same:
                    live.copy_(given[0])
                else:
                    apart[name] = torch.stack([value.to(live) for value in given])
        lanes.begin(apart, [model_seed(visit) for visit in visits])

    def _train(self, lanes: Lanes, trainee: Trainee, waiting: Sequence[_Waiting], turns: Sequence[Turn]) -> list[int]:
        """All steps; puts losses and numbers of steps down, and returns each client's number of samples."""
        losses = torch.zeros(len(waiting), device=self._taking.fabric.device)
        samples = [0] * len(waiting)
        for number in range(max(one.steps for one in waiting)):
            batches = [self._batch(one, number) for one in waiting]
            flat = [None if batch is None else Flat.of(batch) for batch in batches]
            for at in _alike(flat):
                sizes = [count_samples(batch) for batch in batches[at]]
                losses[at] += self._step(
                    lanes, trainee, at, flat[at], sizes[0], Clock(waiting[0].given.visit.round, number), turns[at.start].client
                )
                for lane, size in zip(range(at.start, at.stop), sizes, strict=True):
                    samples[lane] += size
                    turns[lane].steps += 1
        for turn, loss in zip(turns, losses.tolist(), strict=True):
            turn.loss = loss / max(turn.steps, 1)
            if not math.isfinite(loss):
                turn.reject(NOT_FINITE, "not_finite")
        return samples

    def _batch(self, one: _Waiting, number: int) -> Any:
        """As the model takes it; None where the client has no more."""
        if number < len(one.first):
            return one.first[number]
        return self._taking.training.ready(one.given.batches[number]) if number < one.steps else None  # type: ignore[index]

    def _step(self, lanes: Lanes, trainee: Trainee, at: slice, batches: Sequence[Any], size: int, clock: Clock, client: int) -> Tensor:
        """One step of some lanes, ``client``'s the first of them, on batches of ``size`` samples.

        Raises:
            ValueError: the model does what cannot be done for several clients at once.
        """
        trainee.chain.before_forward(clock)
        try:
            with refusal_told(trainee.module, client, size):
                return lanes.step(at, batches, clock.step)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"client_batch={self._size}: {type(trainee.module).__name__}.training_step does what cannot be done for several clients at "
                f"once ({why}): set client_batch=1"
            ) from error
        finally:
            trainee.chain.after_step(clock)


def in_order(visits: Sequence[Visit], sizes: Sequence[int]) -> list[Visit]:
    """Clients of much data first, so that those beside each other have batches of one size for as long as may be."""
    return sorted(visits, key=lambda visit: (-sizes[visit.client], visit.client))


def _alike(batches: Sequence[Flat | None]) -> list[slice]:
    """Neighbouring lanes whose batches are of one kind."""
    kinds = [None if batch is None else batch.kind for batch in batches]
    found, start = [], 0
    for kind, same in groupby(kinds):
        stop = start + len(list(same))
        if kind is not None:
            found.append(slice(start, stop))
        start = stop
    return found
