"""What a run cost, measured while it runs: parameters, bytes saved for backward, peak memory, FLOPs and seconds, per stage."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from featherlight.callbacks.epoch_counts import count_epoch
from featherlight.callbacks.host import copies_of, stage_of
from featherlight.plugins.cost_table import HEADINGS, CostTable, TurnCost, text_rows
from featherlight.plugins.present import count, held, trained
from featherlight.plugins.step_cost import StepCost, StepMeter, count_samples


@dataclass
class _Epoch:
    """The epoch under way: what was done, by whom and in what time."""

    number: int = -1
    form: str = ""
    params_held: int = 0
    params_trained: int = 0
    samples: int = 0
    metered_samples: int = 0
    seconds: float = 0.0
    metered_seconds: float = 0.0

    def time(self) -> float:
        """Seconds as if no step had been measured: the measured step takes as long a sample as the others."""
        plain = self.samples - self.metered_samples
        return self.seconds * self.samples / plain if plain else self.seconds + self.metered_seconds


@dataclass
class _Measured:
    """One step's cost and how many samples it had."""

    samples: int
    cost: list[int] = field(default_factory=list)


class CostMonitor(pl.Callback):
    """Measure what training costs; works with plugins, and without any.

    One step is measured for each form that the model takes, a form being what it holds and what of it trains: every stage, and every
    draw of blocks left out. It is the epoch's second batch (the optimizer's state is there then), or the only one; a step is a
    micro-batch under gradient accumulation. Its FLOPs times the samples that the epoch saw make the epoch's, and an epoch is a round of
    the table. Figures are this process's own under DDP; under manual optimization what comes before the first backward counts
    as forward. Seconds leave out validation and what measuring took.

    At the end of training the table is printed and written to ``cost.json`` in the logger's directory; each epoch's figures are
    logged as ``cost/…``.

    Args:
        show: print the table.

    Attributes:
        table: a :class:`~featherlight.plugins.cost_table.CostTable`.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self._reset()

    def _reset(self) -> None:
        self.table = CostTable()
        self._measured: dict[str, _Measured] = {}
        self._epoch = _Epoch()
        self._meter: StepMeter | None = None
        self._in_forward = False
        self._warm = False  # whether a step of this epoch was done in this process: gradients and optimizer state are there
        self._since = time.perf_counter()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    # -- one step -------------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        count_epoch(trainer)
        if trainer.current_epoch != self._epoch.number:
            self._open(trainer, pl_module)
        ready = self._warm or batch_idx + 1 == trainer.num_training_batches
        if ready and self._epoch.form not in self._measured:
            self._epoch.seconds += self._lap()
            self._meter = StepMeter(pl_module, trainer.optimizers, batch, copies_of(trainer))
            self._meter.__enter__()
            self._in_forward = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._meter is not None and self._in_forward:
            self._meter.forward_is_done()
            self._in_forward = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        samples = count_samples(batch)
        self._epoch.samples += samples
        self._warm = True
        if self._meter is None:
            return
        skipped, meter = self._in_forward, self._meter
        self._stop_meter()
        self._epoch.metered_samples += samples
        self._epoch.metered_seconds += self._lap()
        if not skipped:  # without a backward pass, a later step is measured
            self._measured[self._epoch.form] = _Measured(samples, list(meter.cost))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_meter()

    def _stop_meter(self) -> None:
        if self._meter is not None:
            self._meter.__exit__()
        self._meter = None

    # -- one epoch ------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch.seconds += self._lap()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_meter()
        self._epoch.seconds += self._lap()
        turn = self._close(trainer)
        if turn is not None:
            pl_module.log_dict({f"cost/{name}": float(value) for name, value in asdict(turn).items()}, rank_zero_only=True)

    def _open(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._warm = False
        self._close(trainer)  # the epoch before had no end where a run was resumed right after its last batch
        present, training = held(pl_module), trained(pl_module)
        names = "\n".join([*present, "", *training])
        form = blake2b(names.encode(), digest_size=8).hexdigest()
        params_held = count(present) + sum(value.numel() for value in copies_of(trainer))
        self._epoch = _Epoch(trainer.current_epoch, form, params_held, count(training), seconds=self._epoch.seconds)

    def _close(self, trainer: pl.Trainer) -> TurnCost | None:
        """Put the epoch into the table, once."""
        epoch, self._epoch = self._epoch, _Epoch()
        if not epoch.samples:
            self._epoch.seconds = epoch.seconds
            return None
        turn = TurnCost(epoch.params_held, epoch.params_trained, seconds=epoch.time())
        if epoch.form in self._measured:
            step, cost = self._measured[epoch.form].samples, StepCost(*self._measured[epoch.form].cost)
            turn.saved_bytes, turn.peak_bytes = cost.saved_bytes, cost.peak_bytes
            turn.flops_forward = cost.flops_forward * epoch.samples / step
            turn.flops_backward = cost.flops_backward * epoch.samples / step
        self.table.add(stage_of(trainer, epoch.number), epoch.number, turn)
        return turn

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    # -- the run --------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)
        if trainer.loggers and (folder := trainer.log_dir):  # every process asks: the answer is a broadcast
            _write(Path(folder) / "cost.json", self.table.to_json())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.show:
            _print(self.table)

    def state_dict(self) -> dict[str, Any]:
        now = {**asdict(self._epoch), "seconds": self._epoch.seconds + time.perf_counter() - self._since}
        measured = {form: asdict(step) for form, step in self._measured.items()}
        return {"table": self.table.state_dict(), "epoch": now, "measured": measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.table.load_state_dict(state_dict["table"])
        self._epoch = _Epoch(**state_dict["epoch"])
        self._measured = {form: _Measured(**step) for form, step in state_dict["measured"].items()}


@rank_zero_only
def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(draft, path)


@rank_zero_only
def _print(table: CostTable) -> None:
    shown = Table(title="cost: figures per epoch of a stage, and over the run", box=SIMPLE_HEAD, pad_edge=False)
    heading, *rows = text_rows(table, [name for name in HEADINGS if name not in ("bytes_down", "bytes_up")])  # nothing travels here
    for name in heading:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
