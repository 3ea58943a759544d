"""PriSM's accuracy on CIFAR-10 beside FedAvg of the full model and of a narrower one, by partition and seed, in one run.

    python benchmarks/prism_accuracy.py --data FOLDER                       supervised: FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python benchmarks/prism_accuracy.py --data FOLDER --method simclr       self-supervised: kNN and linear probe of the features
    python benchmarks/prism_accuracy.py --data FOLDER --backbone resnet18_cifar --width 64 --size 32 --images 50000 --clients 100 \\
        --cohort 20 --rounds 2400 --epochs 3 --batch 32 --lr 0.1                  the paper's size, which wants a GPU

The paper (arXiv 2208.13141): about 2 points below the full model, ResNet-18, κ = 0.2, 2,400 rounds of 30,000 images. Width
slicing is HeteroFL's fixed prefix of every layer's channels (arXiv 2010.01264), here at half the width, so a quarter of the parameters: no
less than PriSM holds at 0.2. Where all clients are small, nobody trains the rest of its model: "slice" figures are of the part that
was trained, which is FedAvg of a narrower network. Group norm throughout: with batch norm, running statistics of sub-models are not
those of the model they make up. "untrained" is what random weights are worth, by the same judges. Finished runs are
kept in --out and not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from featherlight.fed_loop import Federation
from featherlight.plugins import Message, Plugin, PrismSampling, Visit
from featherlight.ssl_models import KNN, Classifier, ImageData, LinearProbe, SimCLR, accuracy
from featherlight.ssl_models.partitions import IID, Dirichlet

WAYS = ("full model", "PriSM 0.2", "PriSM 0.2, rows", "PriSM 0.2, random start", "width slicing", "untrained")


class WidthSlicing(Plugin):
    """Clients train the first channels of every layer: the same architecture, made narrower (the baseline of the comparison).

    Args:
        make: builds the narrower module; its entries have the names of the full one's.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make
        self._small: nn.Module | None = None

    def attach(self, model: nn.Module) -> None:
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}

    def narrow(self, visit: Visit) -> nn.Module:
        if self._small is None:
            self._small = self.make()
            self._cuts = {name: tuple(map(slice, value.shape)) for name, value in self._small.state_dict().items()}
        return self._small

    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        return {name: value[self._cuts[name]].contiguous() for name, value in message.items()}

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        placed = {}
        for name, part in message.items():
            value, weight = part.new_zeros(self._shapes[name]), torch.zeros(self._shapes[name])
            value[self._cuts[name]], weight[self._cuts[name]] = part, 1.0
            placed[name] = value, weight
        return placed

    def trained(self, server: nn.Module) -> nn.Module:
        """The part of ``server`` that clients trained."""
        small = self.make()
        whole = server.state_dict()
        small.load_state_dict({name: whole[name][tuple(map(slice, value.shape))] for name, value in small.state_dict().items()})
        return small.eval()

    def __deepcopy__(self, memo: Any) -> WidthSlicing:
        return WidthSlicing(self.make)


def run(arguments: argparse.Namespace, way: str, alpha: float | None, seed: int) -> dict[str, Any]:
    """One federation; its figures and its cost."""
    supervised = arguments.method == "supervised"

    def make(width: int) -> Any:
        torch.manual_seed(seed)
        options: dict[str, Any] = {
            "backbone": arguments.backbone,
            "backbone_options": {"width": width, "norm": "group"},
            "image_size": arguments.size,
            "optimizer": "sgd",
            "lr": arguments.lr,
            "optimizer_momentum": arguments.momentum,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "periods": arguments.rounds,
        }
        if supervised:
            return Classifier(num_classes=10, **options)
        return SimCLR(temperature=0.2, hidden_dim=8 * width, output_dim=2 * width, **options)

    data = ImageData(
        "folder", root=arguments.data, image_size=arguments.size, views=1 if supervised else 2, batch_size=arguments.batch,
        num_clients=arguments.clients, partition=IID() if alpha is None else Dirichlet(alpha), limit_train=arguments.images, seed=seed,
        drop_last=True,
    )  # fmt: skip
    data.setup("fit")
    sampling: dict[str, Any] = {"keep": 0.2, "power": 2.5 if alpha is None else 4.0, "rows": False, "principal_start": True}
    plugins: dict[str, list[Plugin]] = {
        "full model": [],
        "PriSM 0.2": [PrismSampling(**sampling)],
        "PriSM 0.2, rows": [PrismSampling(**sampling | {"rows": True})],
        "PriSM 0.2, random start": [PrismSampling(**sampling | {"principal_start": False})],
        "width slicing": [WidthSlicing(lambda: make(arguments.width // 2))],
    }
    evaluators: list[Any] = [accuracy] if supervised else [KNN(), LinearProbe()]
    model = make(arguments.width)
    if way == "untrained":
        figures = {name: value for one in evaluators for name, value in one(model.eval(), data).items()}
        return {"metrics": figures, "held": 0, "saved": 0, "bytes": 0, "coverage": None}
    federation = Federation(
        arguments.rounds, arguments.cohort, arguments.epochs, seed=seed, clip=5.0, accelerator=arguments.accelerator, checkpoint_every=0
    )
    result = federation.run(model, data, plugins[way], evaluators)
    total = result.cost.total()
    figures = dict(result.metrics)
    for slicing in (plugin for plugin in plugins[way] if isinstance(plugin, WidthSlicing)):
        figures |= {f"{name} of the slice": value for one in evaluators for name, value in one(slicing.trained(model), data).items()}
    coverage = [row["kernel_coverage"] for row in result.history if "kernel_coverage" in row]
    return {
        "metrics": figures,
        "held": total["params_held"],
        "saved": total["saved_bytes"],
        "bytes": total["bytes_down"] + total["bytes_up"],
        "coverage": statistics.mean(coverage) if coverage else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--method", choices=("supervised", "simclr"), default="supervised")
    parser.add_argument("--partition", choices=("both", "iid", "dirichlet"), default="both")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=("full model", "PriSM 0.2", "width slicing"),
        help="the first is what others are compared with",
    )
    parser.add_argument("--backbone", choices=("resnet9", "resnet18_cifar"), default="resnet9")
    parser.add_argument("--out", type=Path, default=Path("runs/prism_accuracy.jsonl"))
    sizes = {"width": 16, "size": 16, "images": 10000, "clients": 20, "cohort": 4, "rounds": 40, "epochs": 1, "batch": 20, "seeds": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--momentum", type=float, default=0.9, help="of clients' SGD")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet partition")
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("data", "out", "seeds", "partition", "accelerator", "ways")
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    console = Console(width=150)
    table = Table(title=f"{arguments.method}: " + ", ".join(f"{name} {value}" for name, value in settings.items() if name != "method"))
    for heading in ("partition", "way", "held", "traffic", "saved", "coverage", "figure", "mean ± sd", "to full model"):
        table.add_column(heading, justify="right")
    for partition, alpha in (("iid", None), ("dirichlet", arguments.alpha)):
        if arguments.partition not in ("both", partition):
            continue
        whole: list[dict[str, Any]] = []
        for way in arguments.ways:
            rows = []
            for seed in range(arguments.seeds):
                key = {"settings": settings, "partition": partition, "way": way, "seed": seed}
                row = next((row for row in done if row["key"] == key), None)
                if row is None:
                    row = {"key": key, **run(arguments, way, alpha, seed)}
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    console.print(f"{partition}, {way}, seed {seed}: {row['metrics']}", highlight=False)
                rows.append(row)
            whole = whole or rows
            for figure in rows[0]["metrics"]:
                values = [100 * row["metrics"][figure] for row in rows]
                reference = [100 * row["metrics"][figure.removesuffix(" of the slice")] for row in whole]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                table.add_row(
                    partition, way,
                    *(f"{rows[0][name] / whole[0][name]:.2f}" for name in ("held", "bytes", "saved")),
                    f"{rows[0]['coverage']:.2f}" if rows[0]["coverage"] else "",
                    figure, f"{statistics.mean(values):.1f}{spread}", f"{statistics.mean(values) - statistics.mean(reference):+.1f}",
                )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
