"""One run of a federation: its state and its rounds."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from featherlight.fed_loop.accounting import account_of
from featherlight.fed_loop.aggregate import Aggregate
from featherlight.fed_loop.away import Carrier, SumCarrier
from featherlight.fed_loop.cohort import asked, balance
from featherlight.fed_loop.interrupts import Interrupts
from featherlight.fed_loop.ledger import Ledger
from featherlight.fed_loop.local_step import as_weights
from featherlight.fed_loop.processes import Processes
from featherlight.fed_loop.report import Report, added, of_server
from featherlight.fed_loop.result import Evaluator, Result
from featherlight.fed_loop.round_kinds import RoundKinds
from featherlight.fed_loop.saved_state import SavedState
from featherlight.fed_loop.server_training import ServerTraining
from featherlight.fed_loop.trainees import Trainees, local_steps
from featherlight.fed_loop.turn import LocalTraining, Turn, everybodys
from featherlight.fed_loop.weighing import Weighing
from featherlight.plugins import Chain, Clock, Message, Visit, find_targets
from featherlight.plugins.targets import follow

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation

VOID_ROUNDS = 3
"""So many rounds in a row of which fewer clients came than are needed end the run."""


class Run:
    """One run's state. ``server``, ``ledger``, ``memories``, ``result`` and the server optimizer are what a checkpoint holds."""

    def __init__(
        self,
        settings: Federation,
        module: nn.Module,
        data: Any,
        chain: Chain,
        evaluators: Sequence[Evaluator],
        report: Report,
        carrier: Carrier | SumCarrier | None = None,
    ) -> None:
        self.settings, self.module, self.data, self.chain, self.evaluators = settings, module, data, chain, evaluators
        self.carrier = carrier
        self.processes = Processes(**settings.compute)
        self.processes.launch()
        self.report = report
        self.targets = find_targets(module)
        self.blank = chain.anew()
        with self.processes.together():
            chain.attach(module)

    def begin(self) -> None:
        """Set the model up; from here on :meth:`close` leaves it an ordinary module."""
        with self.processes.together():
            self._set_up()
        self.processes.from_first(self.server.values())
        with self.processes.together():
            self._check()

    def _set_up(self) -> None:
        settings, module, data = self.settings, self.module, self.data
        fabric = self.processes.fabric
        self.trainees = Trainees.on(fabric, module, self.chain, self.blank, self.targets, settings.clip)
        self.own = self.trainees.own
        self.kinds = RoundKinds(settings, self.processes, self.trainees, data, self.carrier)
        self.on_server = ServerTraining(self.own, local_steps(fabric, settings.clip)(Chain()), data, settings.seed)
        self.live = self.own.live
        self.server = {name: value.detach().clone() for name, value in self.live.items()}
        self.optimizer_of_server = copy.deepcopy(settings.server)  # a run's state is not its settings'
        self.ledger = Ledger(settings.resend)
        self.memories: dict[int, Message] = {}
        self.result = Result()
        self.sizes = data.client_sizes()

    def _check(self) -> None:
        """What would fail later is better found now.

        Raises:
            ValueError: data, model and settings do not fit together.
        """
        settings, data = self.settings, self.data
        asked(settings, data.num_clients, 0)  # are there as many clients as are asked for?
        for client, samples in enumerate(self.sizes):
            if data.steps_per_visit(client, settings.local_epochs) < 1:
                raise ValueError(f"client {client} has {samples} training samples, which make no batch: give it more, or leave it out")
        self.kinds.check()
        self.on_server.check()
        self.chain.check(settings.rounds)
        self.account = account_of(settings, self.chain, data.num_clients)
        if settings.evaluate_clients:
            self._check_clients_can_be_evaluated()
        if self.evaluators and self.processes.rank == 0 and hasattr(data, "probe_data"):
            data.probe_data()  # an image that cannot be read is better found now than after the last round
            for evaluator in self.evaluators:  # plain functions have no check
                getattr(evaluator, "check", lambda _: None)(data)

    # -- rounds -----------------------------------------------------------------------------------------------------
    def go(self, resume: bool) -> Result:
        saved = SavedState(self)
        with self.processes.together():
            if not resume:
                saved.start_clean()
            done = saved.resume() if resume else None
            if done is None:
                self._start()
        if done is None:
            self.processes.from_first(self.server.values())
            done = 0
        self.report.configured({**saved.fingerprint(), "rounds": self.settings.rounds})
        self._tell_of_stages()
        with self.report.rounds(done, self.processes.rank == 0), Interrupts(listen=self.carrier is None) as self._interrupts:
            for round in range(done, self.settings.rounds):
                self._whole = True
                try:
                    self._round(round)
                except BaseException:
                    if self._interrupts.asked and self._whole:
                        saved.write(round, interrupted=True)
                    elif self._interrupts.asked:
                        self.report.lost(round)
                    raise
                with self.processes.together():
                    saved.write(round + 1)
                with self.processes.together():
                    self._check_enough()
        self._load_server()
        return self.result

    def _check_enough(self) -> None:
        """A run of which several rounds in a row come to nothing will not come to anything.

        Raises:
            ValueError: :data:`VOID_ROUNDS` of them.
        """
        last = self.result.history[-VOID_ROUNDS:]
        if len(last) < VOID_ROUNDS or not all(row.get("void") for row in last):
            return
        told = ", ".join(f"{name.removeprefix('rejected_')} {row}" for name, row in added(last).items()) or "nobody answered"
        raise ValueError(
            f"in {VOID_ROUNDS} rounds in a row, up to round {int(last[-1]['round'])}, fewer than min_clients={self.settings.min_clients} "
            f"updates could be used ({told}): see to the clients and go on with resume=True (--resume), or lower min_clients"
        )

    def _start(self) -> None:
        """No checkpoint has the weights: plugins bring in what comes from elsewhere."""
        self._load_server()
        self.chain.start()
        self._adopt(-1)

    def close(self) -> None:
        self.chain.detach()
        self.processes.close()
        if isinstance(self.module, LightningModule):  # what Fabric's setup left: a Trainer would log to it
            self.module._fabric, self.module._fabric_optimizers = None, []

    def _round(self, round: int) -> None:
        started = time.perf_counter()
        settings, processes = self.settings, self.processes
        clock = Clock(round, 0)
        self._advance(clock)
        kind = self.kinds.of(clock)
        cohort = kind.cohort(round)
        visits = [Visit(round, client, settings.seed) for client in balance(cohort, self.sizes, processes.size)[processes.rank]]
        like = self.trainees.travels(Visit(round, client, settings.seed) for client in cohort or [0])
        weighing = Weighing(settings, self.chain, self.sizes, cohort)
        mean = weighing.aggregate(like)
        turns: list[Turn] = []
        kept: Message = {}
        with processes.together():
            for turn, update, memory in kind.turns(visits, self.server, self.ledger, self.memories):
                self._admit(turn, update, weighing.of(turn.client) if not turn.stray else 0.0, mean)
                if turn.counts:  # what the server did not take counts as never done
                    kept |= {f"{turn.client}:{name}": value for name, value in memory.items()}
                turns.append(turn)
                self.report.client_is_done(len(turns), len(visits))
                self._interrupts.check()
        kind.together(round, turns, self.server, mean)
        mean.collect(processes)
        everybody = everybodys(turns, processes)
        kept = processes.share(kept) if self.chain.remembers else {}
        counted = sum(turn.counts for turn in everybody)
        if self.settings.min_clients and counted < self.settings.min_clients:  # as if nobody had come
            mean, kept, counted = weighing.aggregate(like), {}, 0
        weighing.done(counted)
        self._whole = False  # from here to the end of the round, state is half old and half new
        kind.settle(round, everybody)
        self._remember(kept)
        own_turn = self._update(mean, clock, counted > 0)
        self._record(round, everybody, own_turn, counted, time.perf_counter() - started)

    def _advance(self, clock: Clock) -> None:
        """Bring the model to this round's stage from the server's weights; what a stage's beginning changes is the server's, too."""
        self._load_server()
        self.own.begin(clock)
        self.on_server.begin(clock)
        if self.processes.size > 1:
            self.processes.from_first(self.chain.agree())
        self._adopt(clock.period - 1, self.chain.advances)

    def _adopt(self, period: int, touched: bool = True) -> None:
        """What plugins did to the server's model, if they ``touched`` it, becomes the server's state."""
        changed = [name for name, value in self.live.items() if not torch.equal(value, self.server[name])] if touched else []
        for name in changed:
            self.server[name].copy_(self.live[name].detach())
        self.ledger.changed(changed, period)

    def _admit(self, turn: Turn, update: Message, weight: float, mean: Aggregate) -> None:
        """Add an update, or note why it is rejected."""
        if turn.rejected:
            return
        try:
            mean.add(update, weight)
        except ValueError as error:
            turn.reject(error)

    def _remember(self, kept: Message) -> None:
        """What clients keep, by client; every process has it, since a client's next turn may be any's."""
        new: dict[int, Message] = {}
        for name, value in kept.items():
            client, _, own = name.partition(":")
            new.setdefault(int(client), {})[own] = value
        self.memories |= new

    def _update(self, mean: Aggregate, clock: Clock, arrived: bool) -> Turn | None:
        """The server's step: mean → lift → server optimizer → its own training → settle; returns what is told of its own training, which
        is left out where no client's update ``arrived``."""
        result: Mapping[str, Any] = mean.result()
        if self.chain.by_differences:
            self._load_server()  # the model holds the last client's weights
            result = self.chain.lift(result, clock)
        held_by_some = {name: entry[1] for name, entry in result.items() if isinstance(entry, tuple)}
        total = {name: entry[0] if isinstance(entry, tuple) else entry for name, entry in result.items()}
        if self.chain.by_differences:
            total = {name: self.server[name].double() + change for name, change in total.items()}
        for name, value in total.items():
            old = self.server[name]
            new = value  # of statistics and counts, which momentum would carry past what was measured (a variance below 0)
            if isinstance(self.live[name], nn.Parameter):
                new = self.optimizer_of_server.step(name, old, value)
            if name in held_by_some:
                new = new.where(held_by_some[name], old.double())
            old.copy_(new if old.is_floating_point() else new.round())
        self.ledger.changed(total, clock.period)
        self._load_server()
        own_turn = self._train_on_server(clock) if arrived else None
        self.chain.settle(self.module, clock)
        self._adopt(clock.period, own_turn is not None or self.chain.settles)
        return own_turn

    def _train_on_server(self, clock: Clock) -> Turn | None:
        """The first process trains, all take its weights: on GPUs, several need not come to the same bits."""
        if (plan := self.on_server.plan) is None:
            return None
        done = None
        self.report.doing("training on the server")
        with self.processes.together():
            if self.processes.rank == 0:
                # other processes wait for this one, and could not be told that it has stopped
                check = self._interrupts.check if self.processes.size == 1 else lambda: None
                done = self.on_server.train(clock.period, LocalTraining(self.processes.fabric, self.data), check).to_json()
        turn = Turn.from_json(self.processes.gather(done)[0])
        if turn.rejected:
            self._load_server()
            return turn
        self.processes.from_first(value.detach() for value in plan.sent.values())
        follow(self.module, self.targets)
        self.ledger.changed(plan.sent, clock.period)
        return turn

    def _load_server(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.live.values()), list(self.server.values()))
        follow(self.module, self.targets)

    # -- what is told -----------------------------------------------------------------------------------------------
    def _tell_of_stages(self) -> None:
        reached, (last, begins) = self.chain.stage(self.settings.rounds - 1), self.chain.last_stage()
        if reached < last and self.processes.rank == 0:
            self.report.say(
                f"[yellow]rounds={self.settings.rounds} ends in stage {reached + 1} of {last + 1}: what only later stages train is never "
                f"trained, and will be in the model; give rounds above {begins}, or stages fewer rounds"
            )

    def _record(self, round: int, turns: list[Turn], own_turn: Turn | None, counted: int, seconds: float) -> None:
        stage = self.chain.stage(round)
        for turn in turns:
            if turn.stray:
                continue
            self.ledger.visited(turn.client, turn.kept)
            self.result.cost.add(stage, round, turn.cost)
            if turn.server is not None:
                self.result.cost.add_server(stage, round, turn.server)
        if own_turn is not None:
            self.result.cost.add_server(stage, round, own_turn.cost)
        used = [turn for turn in turns if turn.counts]
        reasons = Counter(turn.reason for turn in turns if turn.rejected)
        samples = sum(self.sizes[turn.client] for turn in used)
        row: dict[str, float] = {
            "round": round,
            "stage": stage + 1,
            "loss": sum(turn.loss * self.sizes[turn.client] for turn in used) / samples if used else math.nan,
            "clients": counted,
            "rejected": reasons.total(),
            **{f"rejected_{reason}": number for reason, number in sorted(reasons.items())},
            **({"dropped_out": sum(turn.dropped_out for turn in turns)} if self.settings.loses_clients else {}),
            **({"void": int(len(used) > counted or not used)} if self.settings.min_clients else {}),
            "bytes_down": sum(turn.cost.bytes_down for turn in turns),
            "bytes_up": sum(turn.cost.bytes_up for turn in turns),
            "lr": self.own.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            **of_server(turns, own_turn),
            **({} if self.account is None else {"epsilon": self.account.epsilon(round + 1)}),
            **self.chain.figures(),
        }
        last = round + 1 == self.settings.rounds
        due = self.settings.evaluate_every and (round + 1) % self.settings.evaluate_every == 0
        if last or due:
            self.result.metrics = self._evaluate(round)
            row |= self.result.metrics
        self.result.history.append(row)
        self.result.rounds = round + 1
        self.result.privacy = None if self.account is None else self.account.told(round + 1)
        with self.processes.together():  # where one process alone writes, and its disk is full, the others are told
            self.report.round_is_done(row, [*turns, *([own_turn] if own_turn is not None else [])], self.result)

    def _evaluate(self, round: int) -> dict[str, float]:
        """Figures of the server's model, computed by the first process and told to all."""
        metrics: dict[str, float] = {}
        with self.processes.together():
            if self.processes.rank == 0:
                self.module.eval()
                for evaluator in self.evaluators:
                    self.report.doing(f"evaluating: {type(evaluator).__name__}")
                    metrics |= {name: float(value) for name, value in evaluator(self.module, self.data).items()}
        metrics = self.processes.gather(metrics)[0]
        if self.settings.evaluate_clients:
            metrics |= self._evaluate_clients()
        return metrics

    def _evaluate_clients(self) -> dict[str, float]:
        """The global model on every client's held-out part: mean over clients, weighted by samples."""
        mine = range(self.processes.rank, self.data.num_clients, self.processes.size)
        rows: list[Any] = [row for client in mine for row in self._evaluate_client(client)]
        rows = [row for share in self.processes.gather(rows) for row in share]
        rows.sort(key=itemgetter(0))  # floats add up the same in the same order, whoever made them
        total = sum(size for _, size, _ in rows)
        names = sorted({name for *_, figures in rows for name in figures})
        return {f"client_{name}": sum(figures.get(name, 0.0) * size for _, size, figures in rows) / total for name in names}

    def _evaluate_client(self, client: int) -> Iterator[list[Any]]:
        """For each batch of a client's held-out part: client, samples, figures."""
        precision = self.processes.fabric.strategy.precision
        self.module.eval()
        for raw in self.data.client_val_batches(client):
            batch = self.data.on_after_batch_transfer(self.processes.fabric.to_device(raw), 0)
            with torch.no_grad(), precision.forward_context():
                out = self.module.validation_step(as_weights(batch, precision), 0)  # type: ignore[operator]
            figures = {"loss": out} if isinstance(out, torch.Tensor) else out or {}
            yield [client, len(batch[-1]), {name: float(value) for name, value in figures.items()}]

    def _check_clients_can_be_evaluated(self) -> None:
        """Before the first round rather than never: the first batch that any client holds out must give a figure.

        Raises:
            ValueError: nobody holds anything out, or the model says nothing about it.
        """
        first = next((row for client in range(self.data.num_clients) for row in self._evaluate_client(client)), None)
        if first is None:
            raise ValueError(
                "evaluate_clients=True, but no client holds samples out for evaluation: set client_val_fraction, or leave it out"
            )
        if not first[-1]:
            raise ValueError(
                f"evaluate_clients=True, but {type(self.module).__name__}.validation_step gives no figure for clients' held-out samples "
                "(a model that learns from two views has none for single images): judge its features by probes, and leave it out"
            )
