"""Federated training of a LightningModule on Fabric: rounds of a cohort's turns, an exact mean, a server step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning.pytorch.loggers import Logger
from torch import nn

from featherlight.fed_loop.aggregate import MOST_CLIENTS
from featherlight.fed_loop.away import Carrier, SumCarrier, check_settings
from featherlight.fed_loop.report import Report
from featherlight.fed_loop.result import Evaluator, Result
from featherlight.fed_loop.robust import Median
from featherlight.fed_loop.run import Run
from featherlight.fed_loop.server import Average
from featherlight.plugins import Chain, Plugin, Visit


class FederatedData(Protocol):
    """What the loop needs of data; :class:`featherlight.ssl_models.ImageData` is one."""

    num_clients: int

    def client_sizes(self) -> Sequence[int]:
        """Training samples of each client."""

    def steps_per_visit(self, client: int, epochs: int) -> int:
        """Steps of one turn."""

    def client_batches(self, visits: Sequence[Visit], epochs: int) -> Any:
        """``(index into visits, batch)`` for all visits, in their order, as one stream."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Batch on the device → batch for ``training_step``."""


class ServerData(FederatedData, Protocol):
    """What the loop needs besides, where the server trains on data of its own."""

    def server_batch_sizes(self, epochs: int) -> Sequence[int]:
        """Samples of each batch; none where the server has no data."""

    def server_batches(self, visit: Visit, epochs: int) -> Any:
        """The batches of a round's visit, whose client is :data:`featherlight.plugins.SERVER`.

        Data may have ``check_server_labels()``, too, which raises where samples have none that a model could learn from.
        """


class Federation:
    """Trains one LightningModule over many clients.

    Args:
        rounds: how many rounds to run.
        cohort: clients drawn for each round; all of them if left out.
        local_epochs: passes over its own data that a client makes in a round.
        over_select: ask so many times as many clients as ``cohort`` says, and take the first ``cohort`` that return, in an order drawn
            from the seed; the others end, like those that drop out, where they are then.
        deadline: the round ends after so long, in units of the median turn, whoever is not back; one client is always awaited. How long
            each takes is drawn from the seed, a factor of 1.6 being one standard deviation.
        dropout: share of each round's clients that drop out: they receive the model and take some of their steps, which count as their
            cost, and their update never arrives. The mean is over the others, by their samples; at least one is left. How many drop out
            (the share of the cohort, on average over rounds), who, and when, is drawn from the seed.
        min_clients: a round of which fewer updates can be used changes nothing, and the next one draws others; after three such rounds in a
            row the run stops with what was wrong with them. 0: a round counts however few come.
        aggregate: in place of the exact mean by samples, which one hostile client moves as far as it likes: Median or TrimmedMean, over
            which each client counts alike.
        sampling: ``"fixed"``: as many clients each time; ``"poisson"``: every client with probability ``cohort`` / clients, by itself, so
            that rounds differ in size and one may have nobody. Of such rounds a far smaller ε is counted.
        server: server optimizer: Average (FedAvg), Momentum (FedAvgM) or Adam (FedAdam).
        seed: every random number of the run comes from it.
        resend: send a client all it needs in every round, in place of only what changed since it last took part.
        clip: largest gradient norm of a step, a client's or one of the server's own training.
        client_batch: train so many clients at once on one device, in fewer and larger operations; weights, gradients and optimizer state
            are there as many times. The result is the same to rounding, which then depends on who trains beside whom, and so on the
            number of processes. What cannot be trained so is refused.
        evaluate_every: evaluate the server's model every so many rounds; 0 for the end only.
        evaluate_clients: evaluate the global model on every client's own held-out part, too.
        folder: where metrics, costs and checkpoints go; nothing is written if left out.
        checkpoint_every: write a checkpoint every so many rounds; 0 for none.
        accelerator, devices, num_nodes, precision: as for Lightning; the cohort is spread over the devices' processes, and the result
            is the same, bit for bit, whatever their number.
        threads: CPU threads of each process; part of what a run is, since matrix products round differently over more threads. To use
            more cores, raise ``devices`` first: clients in parallel gain more than threads within a step.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        rounds: int,
        cohort: int | None = None,
        local_epochs: int = 1,
        over_select: float = 1.0,
        deadline: float | None = None,
        dropout: float = 0.0,
        min_clients: int = 0,
        aggregate: Median | None = None,
        sampling: Literal["fixed", "poisson"] = "fixed",
        server: Average | None = None,
        seed: int = 0,
        resend: bool = False,
        clip: float | None = None,
        client_batch: int = 1,
        evaluate_every: int = 0,
        evaluate_clients: bool = False,
        folder: str | Path | None = None,
        checkpoint_every: int = 1,
        accelerator: str = "auto",
        devices: int | str = 1,
        num_nodes: int = 1,
        precision: str | int | None = None,
        threads: int = 1,
        progress: bool = True,
    ) -> None:
        for name, value, least in (
            ("rounds", rounds, 1),
            ("cohort", cohort, 1),
            ("local_epochs", local_epochs, 1),
            ("client_batch", client_batch, 1),
            ("evaluate_every", evaluate_every, 0),
            ("checkpoint_every", checkpoint_every, 0),
            ("min_clients", min_clients, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give {least} or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give the share of clients that drop out, at least 0 and below 1")
        if not 1 <= over_select < float("inf") or (over_select > 1 and cohort is None):
            raise ValueError(
                f"over_select={over_select}, cohort={cohort}: give how many times as many clients as cohort says are asked, 1 or more"
            )
        if sampling not in ("fixed", "poisson"):
            raise ValueError(f"sampling={sampling!r} is not known; use 'fixed' or 'poisson'")
        if sampling == "poisson" and (cohort is None or over_select > 1):
            raise ValueError(
                f"sampling='poisson' with cohort={cohort}, over_select={over_select}: give the number of clients that a round has on "
                "average as cohort, and leave over_select out"
            )
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline={deadline}: give a time above 0, in units of the median turn, or leave it out")
        if cohort is not None and min_clients > cohort:
            raise ValueError(f"min_clients={min_clients}, but cohort={cohort} take part in a round: give that many or fewer")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip}: give a largest norm above 0, or leave it out")
        if cohort is not None and cohort > MOST_CLIENTS:
            raise ValueError(f"cohort={cohort}: exact sums hold up to {MOST_CLIENTS} clients a round")
        self.rounds = rounds
        self.cohort = cohort
        self.local_epochs = local_epochs
        self.over_select = over_select
        self.deadline = deadline
        self.dropout = dropout
        self.min_clients = min_clients
        self.aggregate = aggregate
        self.sampling = sampling
        self.server = Average() if server is None else server
        self.seed = seed
        self.resend = resend
        self.clip = clip
        self.client_batch = client_batch
        self.evaluate_every = evaluate_every
        self.evaluate_clients = evaluate_clients
        self.folder = Path(folder) if folder is not None else None
        self.checkpoint_every = checkpoint_every
        self.progress = progress
        self.is_first = True
        self.compute: dict[str, Any] = {
            "accelerator": accelerator,
            "devices": devices,
            "num_nodes": num_nodes,
            "precision": precision,
            "threads": threads,
        }

    @property
    def loses_clients(self) -> bool:
        """Whether some who are asked may not count."""
        return self.dropout > 0 or self.over_select > 1 or self.deadline is not None

    def run(
        self,
        module: nn.Module,
        data: FederatedData,
        plugins: Sequence[Plugin] = (),
        evaluators: Sequence[Evaluator] = (),
        loggers: Sequence[Logger] = (),
        resume: bool = False,
        configuration: Mapping[str, Any] | None = None,
        carrier: Carrier | SumCarrier | None = None,
    ) -> Result:
        """Train ``module`` in place: it ends with the server's final weights, as an ordinary module.

        Args:
            module: a LightningModule.
            data: who has which samples.
            plugins: methods, in the order in which they encode.
            evaluators: ``(module, data) → {name: figure}``, run on the server's model.
            loggers: Lightning loggers; they get a row of metrics each round, and once, by ``log_hyperparams``, the configuration.
            resume: go on from the newest checkpoint in ``folder`` that can be read, if there is one.
            configuration: what loggers are told that the run is; by default settings, plugins and the model's ``hparams``.
            carrier: takes clients' turns to where each client lives (:class:`~featherlight.fed_loop.away_client.AwayClient`). Of ``data``
                nothing is then looked at but sizes and what the server itself trains or evaluates on. Without one, turns are taken here.

        Raises:
            ValueError: model, plugins, data and settings do not fit together, or a checkpoint is of another run.
        """
        if carrier is not None:
            check_settings(self)
        run = Run(self, module, data, Chain(plugins), evaluators, Report(self, loggers, configuration), carrier)
        self.is_first = run.processes.rank == 0  # who tells, where several processes share the run
        try:
            run.begin()
            return run.go(resume)
        finally:
            run.close()
