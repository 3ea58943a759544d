"""Which gain and learning rate train in a random subspace: test accuracy of a small network on scikit-learn's digits, under a Trainer.

    python benchmarks/intrinsic_gain.py            about two minutes on one core

Rows are gains, columns learning rates of SGD with momentum 0.9; the last row is the full model. d = 300 of D = 55,210 parameters, 5
epochs of 1,500 pictures, 297 for the test, one seed.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featherlight.callbacks import IntrinsicProjection

GAINS = {"projection": "d/D", 0.03: "0.03", "length": "√(d/D)", 0.3: "0.3", "unbiased": "1"}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
TRAINING = 1500


class Digits(pl.LightningModule):
    """Two hidden layers of 200."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rate = rate
        self.layers = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


def accuracy(x: Tensor, y: Tensor, rate: float, callbacks: list[pl.Callback], epochs: int) -> float:
    """Share of test pictures that are right after training."""
    module = Digits(rate)
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(x[:TRAINING], y[:TRAINING]), 64, shuffle=True)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **silent).fit(module, loader)  # type: ignore[arg-type]
    return float((module.layers(x[TRAINING:]).argmax(1) == y[TRAINING:]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    table = Table(title=f"test accuracy, %, d = {arguments.dim}")
    for heading in ("gain", *(f"lr {rate:g}" for rate in RATES)):
        table.add_column(heading, justify="right")
    for gain, name in {**GAINS, None: "full model"}.items():
        row = []
        for rate in RATES:
            callbacks = [] if gain is None else [IntrinsicProjection(dim=arguments.dim, gain=gain, seed=0)]  # type: ignore[arg-type]
            row.append(f"{100 * accuracy(x, y, rate, list(callbacks), arguments.epochs):.1f}")
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
