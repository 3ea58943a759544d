"""The toy runs that kill_anywhere.py kills: small models under every method, in a federation or under a Trainer, always resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from featherlight import callbacks
from featherlight.commands.trainer_checkpoint import WholeFiles
from featherlight.commands.trainer_checkpoint import read_newest as read_newest_of_trainer
from featherlight.fed_loop import Adam, Federation, Median, Momentum
from featherlight.fed_loop.whole_files import write_whole
from featherlight.plugins import (
    MOON,
    ClientPrivacy,
    DepthDropout,
    FedEMA,
    FetchSGD,
    IntrinsicProjection,
    LayerFreezing,
    NormClipping,
    PartitionedTraining,
    PrismSampling,
    ProgressiveGrowth,
    Proximal,
    Quantization,
    RepresentationAlignment,
    ServerCalibration,
    TopK,
)

with suppress(ImportError):  # ClientPrivacy's runs import it, for seconds: here once, not in each process that is forked
    import dp_accounting.rdp  # noqa: F401

BLOCKS, THROUGH = "blocks.*", ("stem", "blocks", "dropout", "head")
FEDERATED: dict[str, Callable[[Path], tuple[list[Any], dict[str, Any]]]] = {
    "averaging": lambda _: ([], {"server": Adam(0.1)}),
    "layer-wise": lambda _: (
        [LayerFreezing(BLOCKS, periods_per_stage=2, init="copy_previous"), DepthDropout(BLOCKS)],
        {"server": Momentum()},
    ),
    "progressive": lambda _: ([ProgressiveGrowth(BLOCKS, periods_per_stage=2), DepthDropout(BLOCKS, every="batch")], {}),
    "PriSM": lambda _: ([PrismSampling({0.3: 0.5, 0.6: 0.5}, layers=BLOCKS)], {"server": Momentum()}),
    "intrinsic": lambda _: ([IntrinsicProjection(20, subspaces=2, periods_per_span=2), Quantization(6)], {}),
    "EcoFed": lambda _: ([PartitionedTraining("blocks.1", replay_period=3, draws=2)], {}),
    "EcoFed, disk": lambda folder: ([PartitionedTraining("blocks.1", replay_period=3, buffer=str(folder / "buffer"))], {}),
    "split": lambda _: ([PartitionedTraining("blocks.1", way="split")], {}),
    "top-k": lambda _: ([TopK(20)], {"server": Momentum()}),
    "FetchSGD": lambda _: ([LayerFreezing(BLOCKS, periods_per_stage=3), FetchSGD(40, 3, 15)], {}),
    "8 bits": lambda _: ([Quantization(down=True)], {}),
    "held near": lambda _: ([FedEMA(of="blocks"), RepresentationAlignment(through=THROUGH), MOON(through=THROUGH), Proximal(0.1)], {}),
    "calibrated": lambda _: ([LayerFreezing(BLOCKS, periods_per_stage=3), ServerCalibration()], {"server": Momentum()}),
    "private": lambda _: (
        [IntrinsicProjection(20), ClientPrivacy(0.1, 0.5, delta=0.01, statistics="stay", known_cohorts=True), Quantization()],
        {"cohort": 2, "sampling": "poisson", "dropout": 0.2},
    ),
    "private, shares": lambda _: (
        [ClientPrivacy(0.1, 0.5, delta=0.01, shares=3, statistics="stay", known_cohorts=True), LayerFreezing(BLOCKS)],
        {"server": Momentum()},
    ),
    "robust": lambda _: ([NormClipping(1.0)], {"aggregate": Median(), "over_select": 1.3, "dropout": 0.2, "min_clients": 1}),
}
TRAINED: dict[str, Callable[[], list[Any]]] = {
    "layer-wise": lambda: [callbacks.LayerFreezing(blocks=BLOCKS, periods_per_stage=2), callbacks.DepthDropout(blocks=BLOCKS)],
    "progressive": lambda: [callbacks.ProgressiveGrowth(blocks=BLOCKS, periods_per_stage=2)],
    "PriSM": lambda: [callbacks.PrismSampling(keep=0.5, layers=["blocks.*.linear"])],
    "intrinsic": lambda: [callbacks.IntrinsicProjection(20)],
    "held near": lambda: [callbacks.RepresentationAlignment(through=THROUGH)],
}
ROUNDS = 6


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.linear(x)))


class Net(pl.LightningModule):
    """(N, 6) to (N, 3): a stem, three residual blocks with batch norm and dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*[Residual(8) for _ in range(3)])
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.blocks(self.stem(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Points:
    """Four clients with 10, 14, 8 and 11 points, in batches of four in a fixed order; the server has the first client's, too."""

    num_clients = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._clients = [
            (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for size in self.client_sizes()
        ]

    def client_sizes(self) -> list[int]:
        return [10, 14, 8, 11]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return len(self.batches(client)) * epochs

    def batches(self, client: int) -> list[tuple[Tensor, Tensor]]:
        return [(x.clone(), y.clone()) for x, y in zip(*(part.split(4) for part in self._clients[client]))]

    def client_batches(self, visits: Any, epochs: int) -> Iterator[tuple[int, Any]]:
        for index, visit in enumerate(visits):
            for batch in self.batches(visit.client) * epochs:
                yield index, batch

    def server_batch_sizes(self, epochs: int) -> list[int]:
        return [len(y) for _, y in self.batches(0)] * epochs

    def server_batches(self, visit: Any, epochs: int) -> Iterator[Any]:
        yield from self.batches(0) * epochs

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Positioned:
    """A loader that knows where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.position %= len(self)
        for batch in self.batches[self.position :]:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


# -- runs, in the process that calls ----------------------------------------------------------------------------------------
def federate(name: str, folder: Path, processes: int = 1) -> None:
    """A federation to its end, from wherever ``folder`` says that it is."""
    plugins, options = FEDERATED[name](folder)
    settings: dict[str, Any] = {"cohort": 3, "seed": 4, "accelerator": "cpu", "progress": False, **options}
    federation = Federation(ROUNDS, folder=folder, devices=processes, **settings)
    module = Net()
    result = federation.run(module, Points(), plugins, resume=True)
    if federation.is_first:
        history = [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in result.history]
        done = {"weights": module.state_dict(), "history": history}
        write_whole(folder / "done.pt", lambda file: torch.save(done, file))


def fit(name: str, folder: Path, processes: int = 1) -> None:
    """A Trainer run likewise."""
    path, _ = read_newest_of_trainer(folder)
    saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=1)
    silent: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=ROUNDS, callbacks=[*TRAINED[name](), saving], plugins=[WholeFiles()], **silent)
    module, data = Net(), Points()
    batches = Positioned([batch for client in range(3) for batch in data.batches(client)[:2]])
    trainer.fit(module, batches, ckpt_path=path, weights_only=True)
    done = {"weights": module.state_dict(), "history": list[Any]()}
    write_whole(folder / "done.pt", lambda file: torch.save(done, file))
