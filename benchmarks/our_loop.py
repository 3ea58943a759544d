"""Our federated loop as the benchmarks of speed call it, and how they compare it with the bare loop."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from small_models import LR, ReadyData, Work, bare, check, make
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from featherlight.fed_loop import Federation

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Way = Callable[[nn.Module, Work], Sequence[Tensor]]


class Net(LightningModule):
    """A model, its loss and its optimizer."""

    def __init__(self, model: nn.Module, lr: float = LR) -> None:
        super().__init__()
        self.net, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Clocked(Logger):
    """Notes when each round's row came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock, self.at = clock, [clock()]

    name = version = "clock"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not asked for."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.at.append(self.clock())


class Ours:
    """A run with costs, checks, a folder with a line a round, a logger; keeps what a visit took in rounds after the first, in ms.

    Args:
        clock: of :data:`CLOCKS`.
        settings: of the federation.
    """

    def __init__(self, clock: str = "wall", **settings: Any) -> None:
        self._clock = CLOCKS[clock]
        self._settings = {"checkpoint_every": 0, "accelerator": "cpu", "progress": False, **settings}
        self.later: list[float] = []

    def __call__(self, model: nn.Module, work: Work) -> list[Tensor]:
        logger = Clocked(self._clock)
        with tempfile.TemporaryDirectory() as folder:
            Federation(work.rounds, folder=folder, **self._settings).run(Net(model), ReadyData(work), loggers=[logger])
        rounds = [after - before for before, after in zip(logger.at[1:], logger.at[2:])]
        self.later.append(1e3 * statistics.median(rounds) / len(work.batches) if rounds else float("nan"))
        return list(model.parameters())


def compare(ways: Mapping[str, Way], name: str, work: Work, runs: int, clock: str, tolerance: float = 1e-4) -> dict[str, list[float]]:
    """Milliseconds a visit of the bare loop (``"bare"``) and of each way, in turns; a first turn of all is checked and not counted."""
    took: dict[str, list[float]] = {}
    wanted: list[Tensor] = []
    for run in range(runs + 1):
        for way, act in {"bare": bare, **ways}.items():
            model = make(name)
            started = CLOCKS[clock]()
            weights = act(model, work)
            milliseconds = 1e3 * (CLOCKS[clock]() - started) / work.visits
            if run:
                took.setdefault(way, []).append(milliseconds)
            elif way == "bare":
                wanted = [value.detach().clone() for value in weights]
            else:
                check(way, [value.detach() for value in weights], wanted, tolerance)
    return took


def quiet() -> None:
    """One thread, and no word of Lightning's."""
    torch.set_num_threads(1)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
