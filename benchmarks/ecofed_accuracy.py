"""Accuracy on CIFAR-10 of EcoFed beside classic, vanilla split and local-loss training, from one pre-trained front, in one run.

    python benchmarks/ecofed_accuracy.py --data FOLDER                     FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python benchmarks/ecofed_accuracy.py --data FOLDER --ways "vanilla split" EcoFed "EcoFed, 4 bits" "EcoFed, every 4th round"
    python benchmarks/ecofed_accuracy.py --data FOLDER --images 40000 --pretrain 10000 --clients 100 --cohort 20 --rounds 500 --size 32 \\
        --width 64 --batch 10 --lr 0.01                                    the paper's size, which wants a GPU

The front is trained by SimCLR on --pretrain images of the training part, without their labels; clients share --images others. All ways
start from it, classic and vanilla train it further. IID, and --shards of the images sorted by label for each client. The goal: EcoFed
within 1 point of vanilla split (arXiv 2304.05495). Finished runs, and fronts, are kept beside --out and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from featherlight.fed_loop import Federation
from featherlight.plugins import PartitionedTraining, Plugin
from featherlight.ssl_models import Classifier, ImageData, SimCLR, accuracy
from featherlight.ssl_models.partitions import IID, Shards

CUT = "backbone.blocks.1"
WAYS: dict[str, dict[str, Any] | None] = {
    "vanilla split": {"way": "split"},
    "classic": None,
    "local loss": {"way": "local_loss"},
    "EcoFed": {"signed": True},
    "EcoFed, unsigned": {"signed": False},
    "EcoFed, 6 bits": {"bits": 6, "signed": False},
    "EcoFed, 4 bits": {"bits": 4, "signed": False},
    "EcoFed, every 4th round": {"replay_period": 4, "signed": False},
    "EcoFed, joint": {"joint": True, "signed": False},
}
FOUR = ("vanilla split", "classic", "local loss", "EcoFed")


def halves(folder: str, images: int, pretrain: int, seed: int, out: Path) -> tuple[Path, Path]:
    """Two folders of links: images to train the front on, and others for the clients, as many of every class; the test part with both."""
    root = Path(folder)
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    pre, own = out / f"front-{pretrain}-{seed}", out / f"clients-{images}-{pretrain}-{seed}"
    for place, name in enumerate(classes):
        files = sorted((root / "train" / name).iterdir())
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(1000 * seed + place)).tolist()
        first, each = pretrain // len(classes), images // len(classes)
        if first + each > len(files):
            raise ValueError(f"{name} has {len(files)} images; --pretrain and --images ask for {first + each} of it")
        for target, chosen in ((pre, order[:first]), (own, order[first : first + each])):
            (target / "train" / name).mkdir(parents=True, exist_ok=True)
            for number in chosen:
                link = target / "train" / name / files[number].name
                if not link.exists():
                    link.symlink_to(files[number].resolve())
    for target in (pre, own):
        if not (target / "test").exists():
            (target / "test").symlink_to((root / "test").resolve())
    return pre, own


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the backbone is built with."""
    return {"width": arguments.width} if arguments.backbone == "vgg11" else {}


def front(arguments: argparse.Namespace, pre: Path, seed: int) -> Path:
    """A checkpoint of SimCLR on the images set aside for it; its labels are not looked at."""
    settings = (arguments.backbone, arguments.width, arguments.size, arguments.pretrain, arguments.pretrain_epochs, seed)
    path = arguments.out.parent / ("front-" + "-".join(map(str, settings)) + ".pt")
    if not path.exists():
        torch.manual_seed(seed)
        model = SimCLR(
            arguments.backbone, image_size=arguments.size, backbone_options=options(arguments), hidden_dim=256, output_dim=64,
            temperature=0.5, lr=1e-3,
        )  # fmt: skip
        data = ImageData("folder", root=str(pre), image_size=arguments.size, batch_size=128, seed=seed)
        data.setup("fit")
        Federation(arguments.pretrain_epochs, seed=seed, accelerator=arguments.accelerator, checkpoint_every=0).run(model, data)
        torch.save(model.state_dict(), path)
    return path


def run(arguments: argparse.Namespace, way: str, shards: int | None, seed: int) -> dict[str, Any]:
    """One federation; its accuracy and its cost."""
    pre, own = halves(arguments.data, arguments.images, arguments.pretrain, seed, arguments.out.parent)
    weights = front(arguments, pre, seed)
    torch.manual_seed(seed)
    model = Classifier(
        arguments.backbone,
        image_size=arguments.size,
        backbone_options=options(arguments),
        optimizer="sgd",
        lr=arguments.lr,
        weight_decay=0.0,
    )
    loading = PartitionedTraining(CUT, front_checkpoint=str(weights))  # whatever the way
    loading.attach(model)
    loading.start()
    loading.detach()
    data = ImageData(
        "folder", root=str(own), image_size=arguments.size, views=1, batch_size=arguments.batch, num_clients=arguments.clients,
        partition=IID() if shards is None else Shards(shards), seed=seed, drop_last=True,
    )  # fmt: skip
    data.setup("fit")
    split = WAYS[way]
    plugins: list[Plugin] = [] if split is None else [PartitionedTraining(CUT, **split)]
    federation = Federation(
        arguments.rounds, arguments.cohort, arguments.epochs, seed=seed, accelerator=arguments.accelerator, checkpoint_every=0
    )
    result = federation.run(model, data, plugins, [accuracy])
    total = result.cost.total()
    return {
        "accuracy": result.metrics["accuracy"],
        "bytes": (total["bytes_down"] + total["bytes_up"]) / arguments.rounds,
        "flops": (total["flops_forward"] + total["flops_backward"]) / arguments.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--partition", choices=("both", "iid", "shards"), default="both")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=FOUR, help="the first is what the others are compared with")
    parser.add_argument("--out", type=Path, default=Path("runs/ecofed_accuracy/runs.jsonl"))
    parser.add_argument("--backbone", choices=("vgg11", "resnet9_basic"), default="vgg11")
    sizes = {
        "width": 16,
        "size": 16,
        "images": 4000,
        "pretrain": 4000,
        "pretrain-epochs": 10,
        "clients": 20,
        "cohort": 5,
        "rounds": 40,
        "epochs": 1,
    }
    for name, value in {**sizes, "batch": 20, "shards": 5, "seeds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    left_out = ("data", "out", "seeds", "partition", "accelerator", "ways")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    console = Console(width=150)
    table = Table(title=", ".join(f"{name} {value}" for name, value in settings.items()))
    for heading in ("partition", "way", "MB a round", "GFLOP a round", "accuracy, mean ± sd", f"to {arguments.ways[0]}"):
        table.add_column(heading, justify="right")
    for partition, shards in (("iid", None), ("shards", arguments.shards)):
        if arguments.partition not in ("both", partition):
            continue
        first: list[float] = []
        for way in arguments.ways:
            rows = []
            for seed in range(arguments.seeds):
                key = {"settings": settings, "partition": partition, "way": way, "seed": seed}
                row = next((row for row in done if row["key"] == key), None)
                if row is None:
                    row = {"key": key, **run(arguments, way, shards, seed)}
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    console.print(f"{partition}, {way}, seed {seed}: {row['accuracy']:.1%}", highlight=False)
                rows.append(row)
            values = [100 * row["accuracy"] for row in rows]
            first = first or values
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            table.add_row(
                partition, way, f"{rows[0]['bytes'] / 1e6:.2f}", f"{rows[0]['flops'] / 1e9:.1f}",
                f"{statistics.mean(values):.1f}{spread}", f"{statistics.mean(values) - statistics.mean(first):+.1f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
