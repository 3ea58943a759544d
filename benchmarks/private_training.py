"""Accuracy against ε: noise on all D numbers of an update, or on the d that intrinsic projection sends of it.

    python benchmarks/private_training.py                       digits, a small network, 200 clients of 7 images: some minutes of one core
    python benchmarks/private_training.py --data FOLDER         a ResNet-9; FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg (hours)

Clients come by Poisson sampling; ε is of any one client, added or removed, at δ = 1 / (10 · clients), after all rounds. For each ε the
noise multiplier is the least that ends there, the same for every way; the bound C, of the change of all parameters that is made of what is
sent, is each way's own, the best of --clips for the mean over all ε that are finite (choosing it looked at the same data, which is not
counted). A cell is the accuracy in percent on held-out images after the last round, mean ± deviation over --seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from featherlight.fed_loop import Federation, noise_for
from featherlight.plugins import ClientPrivacy, IntrinsicProjection, Plugin
from featherlight.ssl_models import Accuracy, Classifier, ImageData


class Net(pl.LightningModule):
    """(N, 64) to (N, 10), one hidden layer."""

    def __init__(self, seed: int, lr: float, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Digits:
    """scikit-learn's digits over clients, each with nearly as many; every fifth is held out."""

    def __init__(self, clients: int) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        held = torch.arange(len(x)) % 5 == 0
        self.held_out, self.num_clients = (x[held], y[held]), clients
        order = torch.randperm(int((~held).sum()), generator=torch.Generator().manual_seed(0))
        self._clients = [(x[~held][part], y[~held][part]) for part in order.tensor_split(clients)]

    def client_sizes(self) -> list[int]:
        return [len(y) for _, y in self._clients]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return epochs

    def client_batches(self, visits: Sequence[Any], epochs: int) -> Iterator[Any]:
        for index, visit in enumerate(visits):
            yield from ((index, self._clients[visit.client]) for _ in range(epochs))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def of_digits(module: nn.Module, data: Digits) -> dict[str, float]:
    """Share of held-out images that are told right."""
    x, y = data.held_out
    with torch.no_grad():
        return {"accuracy": float((module(x).argmax(1) == y).double().mean())}


def setting(options: argparse.Namespace, seed: int) -> tuple[nn.Module, Any, Any]:
    """A model, clients' data, and who judges the model."""
    if options.data is None:
        return Net(seed, options.lr, options.hidden), Digits(options.clients), of_digits
    torch.manual_seed(seed)
    data = ImageData("folder", options.data, image_size=16, views=1, augment="none", batch_size=50, num_clients=options.clients)
    own = {"width": 16, "norm": "group"}
    return Classifier("resnet9", image_size=16, backbone_options=own, optimizer="sgd", lr=options.lr), data, Accuracy()


def run(dim: int, clip: float, sigma: float, seed: int, options: argparse.Namespace) -> float:
    """Percent. ``dim``: d, or 0 for all D."""
    module, data, judge = setting(options, seed)
    plugins: list[Plugin] = [IntrinsicProjection(dim, gain=options.gain)] if dim else []
    size = sum(value.numel() for value in module.parameters())
    bound = clip * math.sqrt((dim or size) / size)  # of the d numbers, whose lifted change is √(D / d) times as long
    plugins.append(ClientPrivacy(bound, sigma, delta=0.1 / options.clients))
    result = federation(options, seed).run(module, data, plugins, [judge])
    return 100 * next(iter(result.metrics.values()))


def federation(options: argparse.Namespace, seed: int = 0) -> Federation:
    """As all ways have it."""
    own: dict[str, Any] = {"accelerator": "auto" if options.data else "cpu", "progress": False}
    return Federation(options.rounds, options.cohort, options.local_epochs, sampling="poisson", seed=seed, **own)


def best(
    dim: int, noise: dict[float, float], options: argparse.Namespace, kept: dict[str, float], save: Any
) -> tuple[float, dict[float, Any]]:
    """The bound that does best, and percents by ε with it."""
    found = {}
    for clip in options.clips:
        for epsilon, sigma in noise.items():
            for seed in range(options.seeds):
                key = f"{dim} {clip} {epsilon} {seed}"
                if key not in kept:
                    started = time.perf_counter()
                    kept[key] = run(dim, clip, sigma, seed, options)
                    save(f"{key}: {kept[key]:.1f} %, {time.perf_counter() - started:.0f} s")
        found[clip] = {epsilon: [kept[f"{dim} {clip} {epsilon} {seed}"] for seed in range(options.seeds)] for epsilon in noise}
    clip = max(found, key=lambda clip: sum(statistics.mean(own) for epsilon, own in found[clip].items() if math.isfinite(epsilon)))
    return clip, found[clip]


def draw(ways: dict[str, dict[float, list[float]]], options: argparse.Namespace) -> None:
    """Lines of accuracy over ε; infinite ε at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    colours = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
    for (name, own), colour in zip(ways.items(), colours):
        places = range(len(own))
        means = [statistics.mean(values) for values in own.values()]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in own.values()]
        axes.errorbar(places, means, spread, label=name, color=colour, marker="o", capsize=3)
    shown = next(iter(ways.values()))
    axes.set_xticks(range(len(shown)), ["∞, no noise" if math.isinf(epsilon) else f"{epsilon:g}" for epsilon in shown])
    axes.set_xlabel(f"ε of any one of {options.clients} clients, δ = {0.1 / options.clients:.1g}")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(title="noise on")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "private_training.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="a folder of images, in place of digits")
    parser.add_argument("--hidden", type=int, default=512, help="width of the digits' network")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--cohort", type=int, default=20, help="clients of a round, on average")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local_epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--gain", type=float, default=1.0, help="of the projection; the bound sets the length of what is sent")
    parser.add_argument("--dims", type=int, nargs="*", default=[400, 1600])
    parser.add_argument("--clips", type=float, nargs="+", default=[1.0])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0, 4.0, 8.0, math.inf])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/private_training"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    console, path = Console(width=140), options.out / "runs.json"
    settings = " ".join(
        f"{name}={value}" for name, value in vars(options).items() if name not in ("out", "dims", "clips", "epsilons", "seeds")
    )
    every: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    kept = every.setdefault(settings, {})

    def save(told: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(every, indent=1))
        console.print(told)

    delta = 0.1 / options.clients
    noise = {
        epsilon: noise_for(epsilon, federation(options), options.clients, delta) if math.isfinite(epsilon) else 0.0
        for epsilon in options.epsilons
    }
    size = sum(value.numel() for value in setting(options, 0)[0].parameters())
    ways: dict[str, dict[float, list[float]]] = {}
    named = ["noise on", "C", *("∞" if math.isinf(epsilon) else f"ε {epsilon:g}, σ {sigma:g}" for epsilon, sigma in noise.items())]
    table = Table(*named, title=f"{options.clients} clients, {options.cohort} a round, {options.rounds} rounds, δ = {delta:.1g}")
    for dim in (0, *options.dims):
        clip, own = best(dim, noise, options, kept, save)
        name = f"d = {dim:,}" if dim else f"all D = {size:,}"
        ways[name] = own
        cells = (f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}" for values in own.values())
        table.add_row(name, f"{clip:g}", *cells)
    console.print(table)
    draw(ways, options)


if __name__ == "__main__":
    main()
