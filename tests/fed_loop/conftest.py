"""Small models, data and plugins that the tests of the federated loop share."""

import copy
import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from featherlight.fed_loop import Federation
from featherlight.fed_loop.away import Belongings, Reply, Request
from featherlight.fed_loop.away_client import AwayClient
from featherlight.fed_loop.wire import unpack
from featherlight.plugins import Plugin, held
from featherlight.ssl_models import BYOL, ImageData, MoCoV3, SimCLR

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning").setLevel(logging.ERROR)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.linear(x)))


class Net(pl.LightningModule):
    """Stem, residual blocks with batch norm, dropout, head; inputs (N, 6), three classes."""

    def __init__(self, optimizer=None, blocks=3, dropout=0.0, seed=0):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9))
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*[Residual(8) for _ in range(blocks)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.dropout(self.blocks(self.stem(x))))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        right = (logits.argmax(1) == batch[1]).float().mean()
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "accuracy": right}

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Points:
    """Clients with the numbers of points given; batches in a fixed order, the last one not full."""

    def __init__(self, sizes, batch_size=4, held_out=0):
        random = torch.Generator().manual_seed(1)
        self.sizes, self.batch_size = list(sizes), batch_size
        self.clients = [(torch.randn(size, 6, generator=random), torch.randint(0, 3, (size,), generator=random)) for size in self.sizes]
        self.held_out = [
            (torch.randn(held_out + client, 6, generator=random), torch.randint(0, 3, (held_out + client,), generator=random))
            for client in range(len(self.sizes) if held_out else 0)
        ]

    @property
    def num_clients(self):
        return len(self.sizes)

    def client_sizes(self):
        return self.sizes

    def batches(self, client):
        x, y = self.clients[client]
        # cloned: a view would keep, and count as, the storage of all the client's points
        return [(one.clone(), other.clone()) for one, other in zip(x.split(self.batch_size), y.split(self.batch_size)) if len(one)]

    def steps_per_visit(self, client, epochs):
        return len(self.batches(client)) * epochs

    def batch_sizes(self, client, epochs):
        return [len(x) for x, _ in self.batches(client)] * epochs

    def example_batch(self, size):
        return torch.randn(size, 6), torch.zeros(size, dtype=torch.long)

    def client_batches(self, visits, epochs):
        for index, visit in enumerate(visits):
            for batch in self.batches(visit.client) * epochs:
                yield index, batch

    def client_val_batches(self, client):
        x, y = self.held_out[client]
        return zip(x.split(self.batch_size), y.split(self.batch_size))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


SSL = {"simclr": (SimCLR, {}), "byol": (BYOL, {"momentum": 0.9}), "mocov3": (MoCoV3, {"momentum": 0.9})}


def small_ssl(method, depth=3, **options):
    """A vision transformer of width 16 on the digits' 8 × 8 pixels."""
    make, own = SSL[method]
    torch.manual_seed(0)
    backbone = {"depth": depth, "width": 16, "heads": 2, "patch_size": 4, "mlp_ratio": 2.0}
    return make("vit", image_size=8, in_channels=1, backbone_options=backbone, hidden_dim=16, output_dim=8, **own, **options)


def small_digits(**options):
    return ImageData(**{"num_clients": 4, "limit_train": 100, "batch_size": 16, **options})


@pytest.fixture
def net():
    return Net


@pytest.fixture
def points():
    return Points


@pytest.fixture
def ssl():
    return small_ssl


@pytest.fixture
def digits():
    return small_digits


@pytest.fixture
def federation():
    """A Federation that shows nothing."""

    def make(rounds, **options):
        return Federation(rounds, **{"progress": False, "accelerator": "cpu", **options})

    return make


def state(module):
    return copy.deepcopy(module.state_dict())


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


@pytest.fixture
def same():
    """Asserts that two state_dicts are equal bit for bit."""
    return assert_same


def timeless(result):
    """History and cost without what a clock says."""
    history = [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in result.history]
    return history, untimed(result.cost)


def untimed(table):
    cost = table.to_json()
    for part in (cost, *([cost["server"]] if "server" in cost else [])):
        for row in (*part["rows"], part["total"]):
            row.pop("seconds")
    return cost


@pytest.fixture
def figures():
    return timeless


@pytest.fixture
def cost_of():
    return untimed


class Int8(Plugin):
    """Floats as whole multiples of their largest magnitude / 127."""

    def encode(self, message, visit):
        coded = {}
        for name, value in message.items():
            if value.is_floating_point():
                scale = value.abs().max().clamp_min(1e-30) / 127
                coded |= {name: (value / scale).round().to(torch.int8), f"{name}:scale": scale}
            else:
                coded[name] = value
        return coded

    def decode(self, message, visit):
        return {
            name: value * message[f"{name}:scale"] if f"{name}:scale" in message else value
            for name, value in message.items()
            if not name.endswith(":scale")
        }


@pytest.fixture
def int8():
    """A codec that quantises what clients send."""
    return Int8


class Mail:
    """Carries bytes to clients that are made anew for every turn, and of whom nothing but bytes is left behind it.

    Args:
        server: the module of the server, to see how far from it clients begin, at most (``off``).
        lose: (round, client) pairs before whose turn a client loses all that it has; refuse: those that never answer.
    """

    def __init__(self, settings, module, data, plugins, lose=(), refuse=(), server=None):
        self.settings, self.module, self.data, self.plugins = settings, module, data, plugins
        self.lose, self.refuse, self.kept, self.asked, self.sent = set(lose), set(refuse), {}, [], []
        self.server, self.off = server, 0.0

    def exchange(self, requests):
        for request in reversed(list(requests)):
            client, place = request.visit.client, (request.visit.round, request.visit.client)
            self.asked.append(place)
            if place in self.lose:
                self.lose.remove(place)
                self.kept.pop(client, None)
            if place in self.refuse:
                yield Reply.failed(client, "its host is down")
                continue
            self.sent.append(unpack(request.payload).keys())
            module = self.module()
            worker = AwayClient(self.settings, module, self.data, self.plugins())
            own = Belongings.unpacked(self.kept[client]) if client in self.kept else Belongings()
            reply, own = worker.take(Request.of(request.header(), request.payload), own)
            for name in held(module).keys() & dict(self.server.named_parameters()).keys() if self.server else ():
                self.off = max(self.off, float((self.server.get_parameter(name) - own.received[name]).detach().abs().max()))
            worker.close()
            self.kept[client] = own.packed()
            yield Reply.of(reply.header(), reply.payload)


@pytest.fixture
def mail():
    """A carrier to clients of whom, between their turns, nothing but bytes is left."""
    return Mail


@pytest.fixture
def same_but_for_the_peak():
    def same(predicted, measured):
        """The peak of these small batches is predicted only roughly, with or without a subspace."""
        for table in (predicted, measured):
            for row in (*table["rows"], table["total"]):
                row.pop("peak_bytes")
        assert predicted == measured

    return same


@pytest.fixture
def pictures(points):
    """Clients of images (N, 2, 5, 5)."""

    class Pictures(points):
        def __init__(self, sizes=(8, 11, 16), batch_size=4):
            super().__init__(sizes, batch_size)
            random = torch.Generator().manual_seed(3)
            self.clients = [(torch.randn(len(y), 2, 5, 5, generator=random), y) for _, y in self.clients]

        def example_batch(self, size):
            return torch.randn(size, 2, 5, 5), torch.zeros(size, dtype=torch.long)

    return Pictures
