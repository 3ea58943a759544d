"""Accuracy against ε: noise on all D numbers of an update, or on the d that intrinsic projection sends of it.

    python benchmarks/private_training.py                       digits, two networks, 200 clients of 7 images: an hour of one core
    python benchmarks/private_training.py --data FOLDER         a ResNet-9; FOLDER has train/CLASS/*.jpg and test/CLASS/*.jpg (hours)

Clients come by Poisson sampling; ε is of any one client, added or removed (where all come: zeroed), at δ = 1 / (10 · clients), after all
rounds. For each ε the noise multiplier is the least that ends there. C bounds what is sent, D numbers or d (which are about as long, since
E[A·Aᵀ] = I). It and the clients' rate are each way's own at each ε, the best of --clips and --lrs for a seed that is not among those told
(choosing them looked at the same data, which ε does not count). A cell is the accuracy in percent on held-out images after the last round,
mean ± deviation over --seeds, and in brackets C and the rate. A way is ``all``, or d, and behind commas ``new`` where each round has a
subspace of its own, and ``clients=N`` where rounds have another number of clients.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from featherlight.fed_loop import Federation, noise_for
from featherlight.fed_loop.whole_files import write_text
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


class Way(NamedTuple):
    """What is sent, and by how many.

    Args:
        dim: d, or 0 for all D; new: a subspace for each round; cohort: clients of a round, on average.
    """

    dim: int
    new: bool
    cohort: int

    @classmethod
    def of(cls, text: str, cohort: int) -> Way:
        """As the command line names it.

        Raises:
            ValueError: it does not.
        """
        first, *more = text.split(",")
        own = dict(part.partition("=")[::2] for part in more)
        if unknown := own.keys() - {"new", "clients"}:
            raise ValueError(f"way {text!r}: {unknown.pop()!r} is not known; give all or d, then ,new and ,clients=N where wanted")
        return cls(0 if first == "all" else int(first), "new" in own, int(own.get("clients", cohort)))

    def told(self, size: int, cohort: int) -> str:
        name = f"d = {self.dim:,}" if self.dim else f"all D = {size:,}"
        name += ", new each round" if self.new else ""
        return name + (f", {self.cohort} clients a round" if self.cohort != cohort else "")


def setting(options: argparse.Namespace, hidden: int, lr: float, seed: int) -> tuple[nn.Module, Any, Any]:
    """A model, clients' data, and who judges the model."""
    if options.data is None:
        return Net(seed, lr, hidden), Digits(options.clients), of_digits
    torch.manual_seed(seed)
    data = ImageData("folder", options.data, image_size=16, views=1, augment="none", batch_size=50, num_clients=options.clients)
    own = {"width": 16, "norm": "group"}
    return Classifier("resnet9", image_size=16, backbone_options=own, optimizer="sgd", lr=lr), data, Accuracy()


def federation(options: argparse.Namespace, cohort: int, seed: int = 0) -> Federation:
    own: dict[str, Any] = {"accelerator": "auto" if options.data else "cpu", "progress": False}
    sampling = "poisson" if cohort < options.clients else "fixed"
    return Federation(options.rounds, cohort, options.local_epochs, sampling=sampling, seed=seed, **own)


class Runs:
    """Percents of runs, each run once, and noise multipliers, each looked for once: in a file."""

    def __init__(self, options: argparse.Namespace, tell: Callable[[str], None]) -> None:
        self._options, self._tell, self._path = options, tell, options.out / "runs.json"
        of_all = ("data", "clients", "rounds", "local_epochs")
        self._of_all = " ".join(f"{name}={getattr(options, name)}" for name in of_all)
        self._kept: dict[str, float] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def _once(self, key: str, make: Callable[[], float]) -> float:
        key = f"{self._of_all} {key}"
        if key not in self._kept:
            started = time.perf_counter()
            self._kept[key] = make()
            write_text(self._path, json.dumps(self._kept, indent=1))
            self._tell(f"{key}: {self._kept[key]:.4g}, {time.perf_counter() - started:.0f} s")
        return self._kept[key]

    def sigma(self, epsilon: float, cohort: int) -> float:
        options = self._options
        if math.isinf(epsilon):
            return 0.0
        return self._once(
            f"sigma {epsilon} {cohort}", lambda: noise_for(epsilon, federation(options, cohort), options.clients, 0.1 / options.clients)
        )

    def percent(self, way: Way, hidden: int, epsilon: float, clip: float, lr: float, seed: int) -> float:
        def run() -> float:
            module, data, judge = setting(self._options, hidden, lr, seed)
            span = 1 if way.new else None
            plugins: list[Plugin] = [IntrinsicProjection(way.dim, gain=1.0, periods_per_span=span)] if way.dim else []
            plugins.append(ClientPrivacy(clip, self.sigma(epsilon, way.cohort), delta=0.1 / self._options.clients))
            result = federation(self._options, way.cohort, seed).run(module, data, plugins, [judge])
            return 100 * next(iter(result.metrics.values()))

        told = f"{way.dim}{',new' if way.new else ''} {way.cohort} {hidden} {epsilon} {clip} {lr} {seed}"
        return self._once(told, run)

    def best(self, way: Way, hidden: int, epsilon: float) -> tuple[float, float, list[float]]:
        """The bound and the rate that do best on the first seed, and percents on the others."""
        options = self._options
        tried = [(clip, lr) for clip in options.clips for lr in options.lrs]
        clip, lr = max(tried, key=lambda own: self.percent(way, hidden, epsilon, *own, 0))
        return clip, lr, [self.percent(way, hidden, epsilon, clip, lr, seed) for seed in range(1, options.seeds + 1)]


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


Lines = dict[str, dict[float, list[float]]]
"""Percents by ε, of each way."""


def draw(panels: Mapping[str, Lines], options: argparse.Namespace) -> None:
    """Lines of accuracy over ε; infinite ε at the right. A panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(1, len(panels), figsize=(1.6 + 4 * len(panels), 3.9), layout="constrained", sharey=True, squeeze=False)
    colours = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
    for axes, (title, ways) in zip(every[0], panels.items()):
        for number, ((name, own), colour) in enumerate(zip(ways.items(), colours)):
            places = [place + 0.03 * number for place in range(len(own))]
            means, deviations = [statistics.mean(values) for values in own.values()], [spread(values) for values in own.values()]
            axes.errorbar(places, means, deviations, label=name, color=colour, marker="o", markersize=4, capsize=3)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(options.epsilons)), ["∞, no noise" if math.isinf(value) else f"{value:g}" for value in options.epsilons])
        axes.set_xlabel(f"ε of any one of {options.clients} clients, δ = {0.1 / options.clients:.1g}")
        axes.grid(alpha=0.3)
        axes.legend(title="noise on", fontsize="small")
    every[0][0].set_ylabel("accuracy, %")
    figure.savefig(options.out / "private_training.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="a folder of images, in place of digits")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 4096], help="widths of the digits' networks")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--cohort", type=int, default=20, help="clients of a round, on average")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local_epochs", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["all", "400", "400,new", "400,clients=200"])
    parser.add_argument("--clips", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0, 8.0, math.inf])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/private_training"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    console = Console(width=170)
    runs = Runs(options, lambda told: console.print(told, highlight=False))
    panels: dict[str, Lines] = {}
    for hidden in options.hidden if options.data is None else [0]:
        size = sum(value.numel() for value in setting(options, hidden, 0.1, 0)[0].parameters())
        network = f"{hidden} hidden units" if hidden else "ResNet-9 of width 16"
        lines = panels.setdefault(f"{network}, D = {size:,}", {})
        named = ["noise on", *("∞" if math.isinf(epsilon) else f"ε = {epsilon:g}" for epsilon in options.epsilons)]
        table = Table(*named, title=next(reversed(panels)), box=box.MARKDOWN)
        for way in (Way.of(text, options.cohort) for text in options.ways):
            cells, name = [], way.told(size, options.cohort)
            for epsilon in options.epsilons:
                clip, lr, own = runs.best(way, hidden, epsilon)
                lines.setdefault(name, {})[epsilon] = own
                cells.append(f"{statistics.mean(own):.1f} ± {spread(own):.1f} ({clip:g}, {lr:g})")
            table.add_row(name, *cells)
        console.print(table)
    draw(panels, options)


if __name__ == "__main__":
    main()
