"""Federations on as many processes as ``devices`` says. Arguments: folder, devices, then names of runs."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch

from featherlight.fed_loop import Federation, Median, Momentum
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
    Plugin,
    PrismSampling,
    ProgressiveGrowth,
    Proximal,
    Quantization,
    RepresentationAlignment,
    ServerCalibration,
    TopK,
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layerwise(toys, settings):
    """A cohort of 3 of 5 Dirichlet clients of a vision transformer, whose prefix freezes."""
    from featherlight.ssl_models import Dirichlet

    blocks = {"blocks": "backbone.blocks.*"}
    plugins = [LayerFreezing(**blocks, periods_per_stage=2, init="copy_previous"), DepthDropout(**blocks)]
    data = toys.small_digits(num_clients=5, partition=Dirichlet(1.0))
    return Federation(5, cohort=3, seed=2, **settings), toys.small_ssl("mocov3"), data, plugins


def growing(toys, settings):
    """All that may differ between processes: initial weights, clients left out, a client rejected, evaluation of clients."""
    blocks = {"blocks": "blocks.*"}
    plugins = [ProgressiveGrowth(**blocks), DepthDropout(**blocks)]
    rank = int(os.environ.get("LOCAL_RANK", 0))
    data = toys.Points([10, 3, 14, 6], held_out=3)
    data.clients[3][0][0, 0] = float("nan")
    federation = Federation(4, server=Momentum(), evaluate_clients=True, evaluate_every=1, **settings)
    return federation, toys.Net(dropout=0.3, seed=10 + rank), data, plugins


def sampled(toys, settings):
    """Clients in smaller modules of two sizes, blocks frozen besides."""
    plugins = [PrismSampling({0.3: 0.5, 0.6: 0.5}, layers="blocks.*"), LayerFreezing("blocks.*", periods_per_stage=2)]
    return Federation(4, cohort=3, clip=5.0, seed=3, **settings), toys.Net(), toys.Points([10, 3, 14, 6]), plugins


class Turned(PrismSampling):
    """A machine whose singular vectors have the other sign: nothing that they say is wrong, only another basis."""

    def _factorise(self):
        super()._factorise()
        if os.environ.get("LOCAL_RANK", "0") != "0":
            for layer in self._factors.values():
                layer.u.neg_()
                layer.v.neg_()


def turned(toys, settings):
    """The second process works in another basis of the same factors, until it is told the first one's."""
    plugins = [Turned({0.3: 0.5, 0.6: 0.5}, layers="blocks.*", principal_start=True)]
    return Federation(3, cohort=3, clip=5.0, seed=3, **settings), toys.Net(), toys.Points([10, 3, 14, 6]), plugins


def projected(toys, settings):
    """Two subspaces of which clients draw, anew every two rounds, blocks left out besides, a client rejected."""
    data = toys.Points([10, 3, 14, 6])
    data.clients[3][0][0, 0] = float("nan")
    plugins = [IntrinsicProjection(20, subspaces=2, periods_per_span=2), DepthDropout("blocks.*")]
    return Federation(4, seed=3, **settings), toys.Net(), data, plugins


def remembered(toys, settings):
    """Clients keep what they have not sent, blocks left out besides, a client rejected."""
    data = toys.Points([10, 3, 14, 6])
    data.clients[3][0][0, 0] = float("nan")
    plugins = [DepthDropout("blocks.*"), TopK(20), Quantization(4)]
    return Federation(4, cohort=3, seed=3, server=Momentum(), **settings), toys.Net(), data, plugins


def sketched(toys, settings):
    """Momentum and error in the server's sketches, which begin anew with each stage."""
    plugins = [LayerFreezing("blocks.*", periods_per_stage=2), FetchSGD(columns=20, rows=3, k=15)]
    return Federation(4, cohort=3, seed=3, **settings), toys.Net(), toys.Points([10, 3, 14, 6]), plugins


def replayed(toys, settings):
    """A rear for each client behind a frozen front, from what the server keeps (on disk where there is a folder) of four clients of five;
    one client rejected."""
    data = toys.Points([10, 3, 14, 6, 8])
    data.clients[3][0][0, 0] = float("nan")
    buffer = "memory" if settings["folder"] is None else str(settings["folder"] / "buffer")
    plugins = [PartitionedTraining("blocks.1", replay_period=2, buffer_bytes=3000, buffer=buffer)]
    return Federation(5, seed=3, **settings), toys.Net(dropout=0.3), data, plugins


class Slow(Plugin):
    """Time to be killed in."""

    def after_step(self, clock):
        time.sleep(0.02)


def slowly(toys, settings):
    federation, module, data, plugins = replayed(toys, settings)
    return federation, module, data, [*plugins, Slow()]


def medians(toys, settings):
    """Medians of what several processes have; bounded, slow and vanishing clients; one rejected."""
    data = toys.Points([10, 3, 14, 6, 8])
    data.clients[3][0][0, 0] = float("nan")
    plugins = [DepthDropout("blocks.*"), NormClipping(1.0), Quantization()]
    options = {"cohort": 4, "over_select": 1.2, "dropout": 0.2, "aggregate": Median(), "min_clients": 1}
    return Federation(4, seed=3, **options, **settings), toys.Net(), data, plugins


def voided(toys, settings):
    """Rounds for which a client too few is left, between others; clients that keep what they have not sent."""
    data = toys.Points([10, 3, 14, 6, 8])
    data.clients[3][0][0, 0] = float("nan")
    return Federation(5, cohort=3, min_clients=3, seed=9, server=Momentum(), **settings), toys.Net(), data, [TopK(20)]


def hopeless(toys, settings):
    """Rounds of which too few clients are left, each of them."""
    data = toys.Points([10, 3, 14, 6])
    for client in (0, 1, 2):
        data.clients[client][0][0, 0] = float("nan")
    return Federation(9, min_clients=2, **settings), toys.Net(), data, []


def private(toys, settings):
    """Noise on what clients' projections add up to, whose secret one process alone has made; cohorts that may be empty; one rejected."""
    data = toys.Points([10, 3, 14, 6])
    data.clients[3][0][0, 0] = float("nan")
    module = toys.Net()
    for block in module.blocks:
        block.norm = torch.nn.LayerNorm(8)
    plugins = [IntrinsicProjection(20), ClientPrivacy(0.1, 0.5), Quantization()]
    return Federation(4, cohort=2, sampling="poisson", seed=8, **settings), module, data, plugins


def jointly(toys, settings):
    """One rear for all, which one process trains; devices that vanish."""
    plugins = [PartitionedTraining("blocks.1", replay_period=2, joint=True, draws=2, bits=6)]
    federation = Federation(4, cohort=3, dropout=0.3, seed=3, **settings)
    return federation, toys.Net(dropout=0.3), toys.Points([10, 3, 14, 6]), plugins


def queued(toys, settings):
    """The same with keys of all clients in one queue."""
    plugins = [PartitionedTraining("backbone.blocks.0", joint=True)]
    module = toys.small_ssl("mocov3", depth=2, queue_size=50)
    return Federation(3, cohort=3, seed=3, **settings), module, toys.small_digits(), plugins


def lockstep(toys, settings):
    """Both parts train, step by step; devices that vanish."""
    plugins = [PartitionedTraining("blocks.1", way="local_loss", classes=3)]
    return Federation(2, dropout=0.3, seed=3, **settings), toys.Net(dropout=0.3), toys.Points([10, 3, 14, 6]), plugins


def calibrated(toys, settings):
    """The server trains on images of its own, which only one process does; clients that drop out."""
    blocks = {"blocks": "backbone.blocks.*"}
    plugins = [LayerFreezing(**blocks, periods_per_stage=2), DepthDropout(**blocks), ServerCalibration()]
    data = toys.small_digits(num_clients=5, server_fraction=0.3)
    return Federation(4, cohort=4, dropout=0.3, seed=2, **settings), toys.small_ssl("byol"), data, plugins


def held_near(toys, settings):
    """All that holds a client near the server's model or its own last one, behind a prefix that freezes; a client rejected."""
    through = ["stem", "blocks", "dropout", "head"]
    data = toys.Points([10, 3, 14, 6])
    data.clients[3][0][0, 0] = float("nan")
    plugins = [
        FedEMA(of="blocks"),
        LayerFreezing("blocks.*", periods_per_stage=2),
        RepresentationAlignment(through=through),
        MOON(through=through),
        Proximal(0.1),
    ]
    return Federation(5, cohort=3, seed=3, **settings), toys.Net(dropout=0.3), data, plugins


def run(name, folder=None, devices=1, resume=False):
    toys = load("conftest")
    settings = {"folder": folder, "devices": devices, "accelerator": "cpu", "progress": False}
    federation, module, data, plugins = globals()[name](toys, settings)
    result = federation.run(module, data, plugins, resume=resume)
    if folder is not None and federation.is_first:
        torch.save(module.state_dict(), folder / "done.pt")
        (folder / "figures.json").write_text(json.dumps(toys.timeless(result)))
    return module.state_dict(), toys.timeless(result)


if __name__ == "__main__":
    for name in sys.argv[3:]:
        run(name, Path(sys.argv[1]) / name, int(sys.argv[2]))
