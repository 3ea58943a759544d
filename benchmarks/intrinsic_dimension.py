"""The intrinsic dimension of a task: the smallest subspace that reaches nine tenths of the full model's accuracy, in one run.

    python benchmarks/intrinsic_dimension.py                       scikit-learn's digits (8 × 8): nothing is downloaded
    python benchmarks/intrinsic_dimension.py --mnist FOLDER        MNIST by torchvision, which downloads it where FOLDER has none

Two networks in anyone's LightningModule, with one callback: a fully connected one with two hidden layers of 200, and a LeNet. Every d is
trained with several learning rates, as many epochs as the full model; the best counts, and so does the full model's. Li et
al. (arXiv 1804.08838) found d₉₀ = 750 and 290 on MNIST. SGD with momentum, so that a step in the subspace is theirs: P·Pᵀ of the
gradient, P's columns of length 1 (gain="projection").
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from featherlight.callbacks import IntrinsicProjection

PAPER = {"fully connected": 750, "LeNet": 290}


def fully_connected(size: int) -> nn.Module:
    """Of images (N, 1, size, size)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def lenet(size: int) -> nn.Module:
    """Of images (N, 1, size, size): two convolutions, each halving them, and three linear layers."""
    flat = 16 * (size // 4) ** 2
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(flat, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


NETWORKS = {"fully connected": fully_connected, "LeNet": lenet}


class Recogniser(lightning.LightningModule):
    """A user's own module: it knows nothing of subspaces."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def load(mnist: str | None) -> tuple[TensorDataset, TensorDataset]:
    """Images, mean 0 and deviation 1, with labels: a training and a test part."""
    if mnist is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None], torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        parts = order[len(order) // 5 :], order[: len(order) // 5]
        images = (images - images[parts[0]].mean()) / images[parts[0]].std()
        return tuple(TensorDataset(images[part], labels[part]) for part in parts)  # type: ignore[return-value]
    from torchvision.datasets import MNIST

    sets = [MNIST(mnist, train=train, download=True) for train in (True, False)]
    first = sets[0].data.float()
    return tuple(TensorDataset((one.data.float()[:, None] - first.mean()) / first.std(), one.targets) for one in sets)  # type: ignore


def accuracy(arguments: argparse.Namespace, name: str, dim: int | None, lr: float, parts: tuple[TensorDataset, TensorDataset]) -> float:
    """Of one training run, on the test part; of a model that diverged, 0."""
    lightning.seed_everything(arguments.seed, verbose=False)
    module = Recogniser(NETWORKS[name](parts[0].tensors[0].shape[-1]), lr)
    callbacks = [] if dim is None else [IntrinsicProjection(dim=dim, gain="projection")]
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, callbacks=callbacks, accelerator=arguments.accelerator, devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(parts[0], arguments.batch, shuffle=True, drop_last=True))
    with torch.no_grad():
        right = module.eval().cpu().network(parts[1].tensors[0]).argmax(1) == parts[1].tensors[1]
    return float(right.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="folder of MNIST, in place of the digits")
    parser.add_argument("--dims", nargs="+", type=int, default=[20, 40, 80, 120, 160, 240, 320, 480])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 1.0, 3.0], help="of subspaces; the best counts")
    parser.add_argument("--full-rates", nargs="+", type=float, default=[0.003, 0.01, 0.03, 0.1], help="of the full model")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*val_dataloader")
    parts = load(arguments.mnist)
    console = Console(width=120)
    runs: list[tuple[str, int | None, float]] = []
    for name in NETWORKS:
        runs += [(name, None, lr) for lr in arguments.full_rates] + [(name, d, lr) for d in arguments.dims for lr in arguments.rates]
    found: dict[tuple[str, int | None], dict[float, float]] = {}
    for name, dim, lr in track(runs, "training", console=Console(stderr=True), transient=True):
        found.setdefault((name, dim), {})[lr] = accuracy(arguments, name, dim, lr, parts)
    for name, make in NETWORKS.items():
        whole = max(found[name, None].values())
        size = sum(value.numel() for value in make(parts[0].tensors[0].shape[-1]).parameters())
        table = Table(title=f"{name}, {size:,} parameters, {'MNIST' if arguments.mnist else 'digits'}: accuracy; full model {whole:.1%}")
        for heading in ("d", *(f"lr {lr:g}" for lr in arguments.rates), "best", "of the full model's"):
            table.add_column(heading, justify="right")
        for dim in arguments.dims:
            row = found[name, dim]
            best = max(row.values())
            table.add_row(f"{dim:,}", *(f"{row[lr]:.1%}" for lr in arguments.rates), f"{best:.1%}", f"{best / whole:.1%}")
        console.print(table)
        enough = [dim for dim in arguments.dims if max(found[name, dim].values()) >= 0.9 * whole]
        told = f"d₉₀ ≤ {min(enough)}" if enough else f"d₉₀ > {max(arguments.dims)}"
        console.print(f"{name}: {told} of {size:,}; on MNIST, Li et al.: {PAPER[name]}", highlight=False)


if __name__ == "__main__":
    main()
