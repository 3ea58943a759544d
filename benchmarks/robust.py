"""What robust aggregates and norm clipping cost where nobody attacks, and what they save where a fifth of the clients does.

    python benchmarks/robust.py                    ten clients, a small network on digits, 20 rounds: a minute or two of one core
    python benchmarks/robust.py --rounds 40 --alpha 0.3

Two of ten clients send, in place of what they learned, its opposite, ``--times`` times as long (sign flipping). A cell is the accuracy in
percent on held-out digits after the last round; clients' labels are split by a Dirichlet distribution. Seconds are a run's.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from featherlight.fed_loop import Federation, Median, TrimmedMean
from featherlight.plugins import Message, NormClipping, Plugin, Visit
from featherlight.ssl_models import Dirichlet

WAYS: dict[str, tuple[Any, list[Plugin]]] = {
    "mean": (None, []),
    "mean, norms clipped": (None, [NormClipping(0.5, tolerance=float("inf"))]),
    "trimmed mean, 0.2": (TrimmedMean(0.2), []),
    "trimmed mean, 0.3": (TrimmedMean(0.3), []),
    "median": (Median(), []),
    "median, norms clipped": (Median(), [NormClipping(0.5, tolerance=float("inf"))]),
}


class Flip(Plugin):
    """Hostile clients send −times · what they learned; it stands last, so that no other plugin's client side sees it."""

    def __init__(self, hostile: tuple[int, ...], times: float) -> None:
        self.hostile = hostile
        self.times = times

    def encode(self, message: Message, visit: Visit) -> Message:
        return {name: -self.times * value for name, value in message.items()} if visit.client in self.hostile else message


class Net(pl.LightningModule):
    """(N, 64) to (N, 10), one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Digits:
    """scikit-learn's digits over ten clients; every fifth is held out."""

    def __init__(self, alpha: float) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        held = torch.arange(len(x)) % 5 == 0
        self.held_out = x[held], y[held]
        x, y = x[~held], y[~held]
        parts = Dirichlet(alpha)(y, self.num_clients)
        self._clients = [(x[part], y[part]) for part in parts]

    num_clients = 10

    def client_sizes(self) -> list[int]:
        return [len(y) for _, y in self._clients]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return -(-len(self._clients[client][1]) // 32) * epochs

    def client_batches(self, visits: Any, epochs: int) -> Any:
        for index, visit in enumerate(visits):
            x, y = self._clients[visit.client]
            for _ in range(epochs):
                yield from ((index, batch) for batch in zip(x.split(32), y.split(32)))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def accuracy(way: str, hostile: tuple[int, ...], data: Digits, options: argparse.Namespace) -> tuple[float, float, int]:
    """Percent, seconds, updates rejected."""
    aggregate, plugins = WAYS[way]
    started, module = time.perf_counter(), Net()
    settings: dict[str, Any] = {"accelerator": "cpu", "progress": False, "aggregate": aggregate}
    result = Federation(options.rounds, local_epochs=2, **settings).run(module, data, [*plugins, Flip(hostile, options.times)])
    seconds = time.perf_counter() - started
    x, y = data.held_out
    with torch.no_grad():
        return 100 * float((module(x).argmax(1) == y).double().mean()), seconds, result.rejected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet distribution: below 1, clients have few labels each")
    parser.add_argument("--times", type=float, default=5.0, help="how many times as long a hostile update is")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    data = Digits(options.alpha)
    table = Table(
        "aggregate",
        "nobody hostile, %",
        "2 of 10 flip, %",
        "rejected",
        "seconds",
        title=f"digits, α {options.alpha}, {options.rounds} rounds",
    )
    for way in WAYS:
        calm, seconds, _ = accuracy(way, (), data, options)
        attacked, _, rejected = accuracy(way, (3, 7), data, options)
        table.add_row(way, f"{calm:.1f}", f"{attacked:.1f}", str(rejected), f"{seconds:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
