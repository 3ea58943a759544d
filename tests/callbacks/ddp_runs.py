"""Two processes (gloo) and one, on the same data: writes each run's final weights per rank into the folder given."""

import copy
import logging
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from featherlight.callbacks import (
    CostMonitor,
    DepthDropout,
    FreshStart,
    IntrinsicProjection,
    LayerFreezing,
    PrismSampling,
    ProgressiveGrowth,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv = norm(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(x)))


class Model(pl.LightningModule):
    """With group norm, two half batches give one whole batch's gradient; batch norm has statistics of each half."""

    def __init__(self, norm=lambda: nn.GroupNorm(2, 4), momentum_copy=False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *[Residual(norm) for _ in range(3)])
        self.head = nn.Linear(4, 3)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False) if momentum_copy else None

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.encoder(batch[0]).mean(dim=(2, 3))), batch[1])
        if self.target is not None:
            loss = loss + (self.encoder(batch[0]) - self.target(batch[0])).square().mean()
        return loss

    def train_dataloader(self):
        """Batches of eight in all: every process takes its share of each."""
        images = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        own = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return DataLoader(TensorDataset(images[own], (torch.arange(24) % 3)[own]), 8 // self.trainer.world_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


STAGES = {"blocks": ["encoder.1", "encoder.2", "encoder.3"], "periods_per_stage": 1}
BLOCKS = {"blocks": STAGES["blocks"]}
RUNS = {
    "freezing": (Model, lambda: [LayerFreezing(**STAGES), CostMonitor(show=False)], {}),
    "growth": (Model, lambda: [ProgressiveGrowth(**STAGES, warmup_periods=1), DepthDropout(**BLOCKS)], {"max_epochs": 6}),
    "accumulation": (Model, lambda: [LayerFreezing(**STAGES)], {"accumulate_grad_batches": 2}),
    "subspace": (Model, lambda: [IntrinsicProjection(dim=60)], {"accumulate_grad_batches": 2}),
    "subspaces of stages": (Model, lambda: [IntrinsicProjection(dim=20, projection="sparse_signs"), LayerFreezing(**STAGES)], {}),
    "sampling": (Model, lambda: [PrismSampling(keep=0.5)], {}),
    "every batch": (Model, lambda: [DepthDropout(**BLOCKS, every="batch")], {"strategy": "ddp_fork_find_unused_parameters_true"}),
    "batch norm and target": (
        lambda: Model(lambda: nn.BatchNorm2d(4), momentum_copy=True),
        lambda: [LayerFreezing(**STAGES), FreshStart()],
        {},
    ),
}


class Save(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        monitor = next((callback for callback in trainer.callbacks if isinstance(callback, CostMonitor)), None)
        rows = monitor.table.rows() if monitor else []
        torch.save((pl_module.state_dict(), rows), f"{self.path}-{trainer.world_size}-{trainer.global_rank}.pt")


def fit(model, callbacks, devices, **arguments):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    ddp = arguments.pop("strategy", "ddp_fork")
    arguments = {"max_epochs": 3, "accelerator": "cpu", **silent, **arguments}
    trainer = pl.Trainer(
        use_distributed_sampler=False, devices=devices, strategy=ddp if devices == 2 else "auto", callbacks=callbacks, **arguments
    )
    trainer.fit(model)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, (model, callbacks, arguments) in RUNS.items():
        for devices in (2, 1):
            fit(model(), [*callbacks(), Save(folder / name)], devices, **arguments)
    try:
        fit(Model(), [DepthDropout(**BLOCKS, every="batch")], 2)
    except Exception as error:
        (folder / "refused.txt").write_text(str(error))
