"""Small models, data and Trainers that the tests of the callbacks share."""

import copy
import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class Encoder(nn.Module):
    """Stem, residual blocks of one width, and features (N, width) of images (N, 1, 6, 6)."""

    def __init__(self, blocks=3, width=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(blocks)])

    def forward(self, x):
        return self.blocks(self.stem(x)).mean(dim=(2, 3))


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1)


class Toy(pl.LightningModule):
    """A module that nobody prepared for plugins."""

    def __init__(self, optimizer=sgd, blocks=3, encoder=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.encoder = encoder() if encoder else Encoder(blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.dropout(self.encoder(x)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Byol(Toy):
    """Online encoder and predictor, and a target that is a deep copy."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.predictor = nn.Linear(4, 4)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        online = self.predictor(self.encoder(batch[0]))
        with torch.no_grad():
            target = self.target(batch[0].flip(-1))
        return -nn.functional.cosine_similarity(online, target).mean()

    def on_before_zero_grad(self, optimizer):
        with torch.no_grad():
            for target, online in zip(self.target.parameters(), self.encoder.parameters()):
                target.lerp_(online, 0.1)


def tensors(samples=12):
    random = torch.Generator().manual_seed(1)
    return torch.randn(samples, 1, 6, 6, generator=random), torch.randint(0, 3, (samples,), generator=random)


class Positioned:
    """Batches of four in a fixed order; knows where it is, as torchdata's StatefulDataLoader does."""

    def __init__(self, loader):
        self.batches, self.position = list(loader), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.position = self.position % len(self), self.position % len(self)
        for batch in self.batches[start:]:
            self.position += 1
            yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.fixture
def positioned(loader):
    """A loader anew."""
    return lambda: Positioned(loader)


@pytest.fixture
def loader():
    """Three batches of four, always in the same order."""
    return DataLoader(TensorDataset(*tensors()), 4)


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **arguments):
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        defaults = {"accelerator": "cpu", "max_epochs": 3, "default_root_dir": tmp_path, **silent}
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})

    return make


@pytest.fixture
def toy():
    return Toy


@pytest.fixture
def byol():
    return Byol


class Snapshots(pl.Callback):
    """State of the model and names with optimizer state at each epoch's end."""

    def __init__(self):
        self.states, self.with_state = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        known = {id(p) for optimizer in trainer.optimizers for p in optimizer.state}
        self.with_state.append({name for name, p in pl_module.named_parameters() if id(p) in known})


@pytest.fixture
def snapshots():
    return Snapshots()


@pytest.fixture
def same_state():
    def same(one, other):
        assert one.keys() == other.keys()
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, different

    return same


@pytest.fixture
def grouped(toy):
    from group_normed import GroupNormed  # not where this file is read by a script

    return lambda **arguments: toy(encoder=GroupNormed, **arguments)
