"""A long run of a small federation: does it need more memory, more open files, more disk as it goes on?

    python benchmarks/long_run.py                           10,000 rounds of two clients: some minutes of one core
    python benchmarks/long_run.py --rounds 1000 --method top-k

It prints, every tenth of the way, resident memory, live tensors, open files, the newest checkpoint's bytes and those of a round in the
log; then slopes per 1,000 rounds, fitted to the second half. The history that a run returns and keeps in its checkpoints has one row a
round, which is what is left of a slope.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from featherlight.fed_loop import Federation, checkpoint
from featherlight.plugins import DepthDropout, FetchSGD, IntrinsicProjection, PartitionedTraining, Plugin, PrismSampling, TopK

METHODS: dict[str, Any] = {
    "averaging": list,
    "depth dropout": lambda: [DepthDropout("blocks.*")],
    "PriSM": lambda: [PrismSampling(0.5, layers="blocks.*")],
    "intrinsic": lambda: [IntrinsicProjection(10, subspaces=2, periods_per_span=500)],
    "EcoFed": lambda: [PartitionedTraining("blocks.0", replay_period=2)],
    "top-k": lambda: [TopK(10)],
    "FetchSGD": lambda: [FetchSGD(20, 3, 10)],
}


class Net(pl.LightningModule):
    """(N, 4) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Points:
    """Two clients of one batch each."""

    num_clients = 2

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batches = [(torch.randn(4, 4, generator=generator), torch.arange(4) % 2) for _ in range(2)]

    def client_sizes(self) -> list[int]:
        return [4, 4]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return epochs

    def client_batches(self, visits: Any, epochs: int) -> Any:
        return ((index, self._batches[visit.client]) for index, visit in enumerate(visits) for _ in range(epochs))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Watch(Plugin):
    """Looks at this process from time to time."""

    def __init__(self, every: int, folder: Path) -> None:
        self.every = every
        self._folder, self._rows, self._started = folder, [], time.perf_counter()

    @property
    def rows(self) -> list[dict[str, float]]:
        return self._rows

    def __deepcopy__(self, memo: Any) -> Watch:
        return self

    def settle(self, server: nn.Module, clock: Any) -> None:
        if (clock.period + 1) % self.every == 0:
            self._rows.append(self._look(clock.period + 1))

    def _look(self, round: int) -> dict[str, float]:
        gc.collect()
        log, newest = self._folder / "metrics.jsonl", checkpoint.newest(self._folder)
        return {
            "round": round,
            "memory, MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
            "open files": len(os.listdir("/proc/self/fd")),
            "checkpoint, KiB": newest.stat().st_size / 2**10 if newest else 0.0,
            "log, bytes a round": log.stat().st_size / max(round - 1, 1) if log.exists() else 0.0,
            "files in the folder": len(list(self._folder.iterdir())),
            "seconds": time.perf_counter() - self._started,
        }


def slope(rows: list[dict[str, float]], name: str) -> float:
    """Per 1,000 rounds, by least squares over the second half."""
    later = rows[len(rows) // 2 :]
    x = torch.tensor([row["round"] / 1000 for row in later], dtype=torch.float64)
    y = torch.tensor([row[name] for row in later], dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def measure(method: str, rounds: int, folder: Path, looks: int = 10) -> list[dict[str, float]]:
    """What a run of so many rounds needs, ``looks`` times on its way."""
    watch = Watch(max(rounds // looks, 1), folder)
    settings: dict[str, Any] = {"accelerator": "cpu", "progress": False}
    Federation(rounds, folder=folder, checkpoint_every=max(rounds // 100, 1), **settings).run(Net(), Points(), [*METHODS[method](), watch])
    return watch.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--method", default="averaging", choices=[*METHODS])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.method, options.rounds, Path(folder))
    table = Table(*rows[0], title=f"{options.method}, {options.rounds} rounds")
    for row in rows:
        table.add_row(*(f"{value:,.1f}" if value % 1 else f"{value:,.0f}" for value in row.values()))
    table.add_section()
    table.add_row("per 1,000", *(f"{slope(rows, name):+,.2f}" for name in list(rows[0])[1:]))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
