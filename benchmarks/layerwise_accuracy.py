"""Accuracy on CIFAR-10 of layer-wise and progressive federated pre-training, and of what is added to them, beside end to end, in one run.

    python benchmarks/layerwise_accuracy.py --data FOLDER                      FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python benchmarks/layerwise_accuracy.py --data FOLDER --partition many --images 5000      25 of 100 clients in each round
    python benchmarks/layerwise_accuracy.py --data FOLDER --partition iid --method moco_v3 --ways "end to end" "LW 2" Prog
    python benchmarks/layerwise_accuracy.py --data FOLDER --backbone vit --optimizer adamw --width 48 --lr 2e-3
    python benchmarks/layerwise_accuracy.py --data FOLDER --backbone vit --method moco_v3 --optimizer adamw \\
        --depth 12 --width 192 --heads 3 --size 32 --images 45000 --server 5000 --batch 512 --rounds 180 --epochs 3 --lr 3e-4 \\
        --temperature 0.05 --hidden 512 --output 256 --tune-epochs 40 --tune-batch 128 --test 10000
                                                                               the paper's size, which wants a GPU

A ResNet-18 in its four groups, or a ViT as in the paper (arXiv 2401.11647), learns without labels (SimCLR, or MoCo v3 as there) and is
judged by nearest neighbours, a linear probe and fine-tuning (crops and mirrored images). "LW n" trains n blocks a stage, "Prog" grows by
one a stage; of a ViT depth dropout keeps half of the blocks at most, of a ResNet it leaves out half of the earlier residual blocks that can
be left out; "LW-FedSSL" and "Prog-FedSSL" have alignment and server-side calibration, as the paper's versions 1 to 3. All ways have as many
rounds, divided evenly among their stages, the same clients with the same images and the same first weights; the server's own images are
no client's, and only calibration looks at them ("end to end, calibration" is what they are worth alone). A cosine schedule over all rounds
would leave the last blocks a fraction of the rate, so it is constant. "untrained" is what random weights are worth, by the same judges.

The paper's goals (ViT-Tiny, 180 rounds, single runs): 2 blocks a stage equal end to end at 36 % of its memory; progressive is above it;
with 25 of 100 clients layer-wise (57.4) and progressive (61.0) are above end to end (47.0). Of a ResNet's four groups two a stage are half
of the network, so only a ViT can show the first. Costs are a client's: largest peak and most bytes kept for backward in any stage, bytes
and FLOPs over the run, and the server's FLOPs over a client's end to end. Finished runs are kept in --out, with pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from featherlight.commands.picture import draw
from featherlight.fed_loop import Federation
from featherlight.plugins import (
    DepthDropout,
    LayerFreezing,
    Plugin,
    ProgressiveGrowth,
    RepresentationAlignment,
    ServerCalibration,
)
from featherlight.ssl_models import IID, KNN, Dirichlet, FineTune, ImageData, LinearProbe, MoCoV3, SimCLR
from featherlight.ssl_models.probes import Probe

BLOCKS = {"vit": "backbone.blocks.*", "resnet18_cifar": "backbone.layer*"}
GROUPS = 4
"""Of a ResNet-18's blocks: what a stage adds is two of them."""
ALL = ("calibration", "alignment")
WAYS: dict[str, tuple[type[LayerFreezing | ProgressiveGrowth] | None, int, tuple[str, ...]]] = {
    "end to end": (None, 0, ()),
    "end to end, calibration": (None, 0, ("calibration",)),
    "end to end, alignment": (None, 0, ("alignment",)),
    "LW 1": (LayerFreezing, 1, ()),
    "LW 2": (LayerFreezing, 2, ()),
    "LW 3": (LayerFreezing, 3, ()),
    "LW 1, calibration": (LayerFreezing, 1, ("calibration",)),
    "LW 1, alignment": (LayerFreezing, 1, ("alignment",)),
    "LW 1, depth dropout": (LayerFreezing, 1, ("depth dropout",)),
    "LW-FedSSL": (LayerFreezing, 1, ALL),
    "Prog": (ProgressiveGrowth, 1, ()),
    "Prog, calibration": (ProgressiveGrowth, 1, ("calibration",)),
    "Prog, alignment": (ProgressiveGrowth, 1, ("alignment",)),
    "Prog, depth dropout": (ProgressiveGrowth, 1, ("depth dropout",)),
    "Prog-FedSSL": (ProgressiveGrowth, 1, ALL),
    "untrained": (None, 0, ()),
}
"""How blocks come, how many a stage, and what is added."""
COSTS = ("peak", "saved", "traffic", "FLOPs", "server")
JUDGES = {"knn": "kNN", "linear": "linear probe", "finetune": "fine-tuned"}


def fewer(folder: str, test: int, out: Path) -> Path:
    """A folder of links to all training images and to ``test`` test images, as many of every class, so that no others are decoded."""
    root, target = Path(folder), out / f"test-{test}"
    linked = target / "train"
    if linked.is_symlink() and linked.readlink() != (root / "train").resolve():
        raise SystemExit(f"{target} has pictures of {linked.readlink()}: give another --out for those of {folder}")
    classes = sorted(path for path in (root / "test").iterdir() if path.is_dir())
    for one in classes:
        (target / "test" / one.name).mkdir(parents=True, exist_ok=True)
        for picture in sorted(one.iterdir())[: test // len(classes)]:
            link = target / "test" / one.name / picture.name
            if not link.exists():
                link.symlink_to(picture.resolve())
    if not linked.is_symlink():
        linked.symlink_to((root / "train").resolve())
    return target


def judges(arguments: argparse.Namespace) -> list[Probe]:
    tuning = FineTune(
        arguments.tune_epochs, arguments.tune_epochs // 4, lr=arguments.tune_lr, batch_size=arguments.tune_batch, labels=arguments.labels,
        augment="crop_flip",
    )  # fmt: skip
    return [KNN(), LinearProbe(), tuning]


def methods(arguments: argparse.Namespace, way: str) -> list[Plugin]:
    """The plugins of one way; stages share the rounds evenly, earlier ones getting no fewer."""
    growth, each, added = WAYS[way]
    blocks, depth = BLOCKS[arguments.backbone], arguments.depth if arguments.backbone == "vit" else GROUPS
    plugins: list[Plugin] = []
    if growth is not None:
        stages = -(-depth // each)
        starts = [-(-arguments.rounds * stage // stages) for stage in range(stages + 1)]
        plugins.append(growth(blocks, blocks_per_stage=each, periods_per_stage=[end - start for start, end in pairwise(starts)]))
    if "depth dropout" in added:
        vit = arguments.backbone == "vit"  # most of a ResNet's groups change the shape, and cannot be left out whole
        plugins.append(DepthDropout(blocks, rate=0.0, max_kept=depth // 2) if vit else DepthDropout(f"{blocks}.*", rate=0.5))
    if "alignment" in added:
        plugins.append(RepresentationAlignment(arguments.alignment))
    if "calibration" in added:
        plugins.append(ServerCalibration(arguments.calibration))
    return plugins


def run(arguments: argparse.Namespace, partition: str, way: str, seed: int) -> dict[str, Any]:
    """One federation; its figures and its cost."""
    torch.manual_seed(seed)
    vit = {"patch_size": arguments.patch, "pool": arguments.pool} | {name: vars(arguments)[name] for name in ("depth", "width", "heads")}
    options: dict[str, Any] = {
        "backbone": arguments.backbone,
        "backbone_options": {"width": arguments.width, "norm": "group"} if arguments.backbone != "vit" else vit,
        "image_size": arguments.size,
        "hidden_dim": arguments.hidden,
        "output_dim": arguments.output,
        "temperature": arguments.temperature,
        "optimizer": arguments.optimizer,
        "lr": arguments.lr,
        "schedule": arguments.schedule,
        "periods": arguments.rounds,
    }
    model = MoCoV3(momentum=0.99, **options) if arguments.method == "moco_v3" else SimCLR(**options)
    folder = fewer(arguments.data, arguments.test, arguments.out.parent)
    pictures = sum(1 for _ in Path(arguments.data, "train").glob("*/*"))
    both = arguments.images + arguments.server
    if both > pictures:
        raise ValueError(
            f"--images {arguments.images} and --server {arguments.server}, but there are {pictures} training images: ask for fewer"
        )
    data = ImageData(
        "folder", root=str(folder), image_size=arguments.size, batch_size=arguments.batch,
        num_clients=arguments.many if partition == "many" else arguments.clients,
        partition=Dirichlet(arguments.alpha) if partition == "dirichlet" else IID(),
        limit_train=both, server_fraction=arguments.server / both, seed=seed,
    )  # fmt: skip
    data.setup("fit")
    if way == "untrained":
        gpu = arguments.accelerator != "cpu" and torch.cuda.is_available()
        model.to("cuda" if gpu else "cpu").eval()
        return {"metrics": {name: value for one in judges(arguments) for name, value in one(model, data).items()}, "cost": {}, "server": {}}
    federation = Federation(
        arguments.rounds, arguments.cohort if partition == "many" else None, arguments.epochs, seed=seed,
        accelerator=arguments.accelerator, checkpoint_every=0, progress=False,
    )  # fmt: skip
    result = federation.run(model, data, methods(arguments, way), judges(arguments))
    server = result.cost.server
    return {"metrics": result.metrics, "cost": result.cost.total(), "server": {} if server is None else server.total()}


def paid(row: dict[str, Any]) -> dict[str, float]:
    """A client's bill in four figures; nothing for one that did nothing."""
    cost = row["cost"]
    if not cost:
        return dict.fromkeys(COSTS, 0.0)
    traffic, flops = cost["bytes_down"] + cost["bytes_up"], _flops(cost)
    return dict(zip(COSTS, (cost["peak_bytes"], cost["saved_bytes"], traffic, flops, _flops(row["server"]))))


def _flops(cost: dict[str, Any]) -> float:
    return cost.get("flops_forward", 0) + cost.get("flops_backward", 0)


def finished(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--method", choices=("simclr", "moco_v3"), default="simclr")
    parser.add_argument("--partition", nargs="+", choices=("iid", "dirichlet", "many"), default=("iid", "dirichlet", "many"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=tuple(WAYS), help="the first is what the others are compared with")
    parser.add_argument("--out", type=Path, default=Path("runs/layerwise_accuracy.jsonl"))
    parser.add_argument("--backbone", choices=tuple(BLOCKS), default="resnet18_cifar", help="a ResNet's blocks are its four groups")
    parser.add_argument("--optimizer", default="sgd", help="of clients: sgd (momentum 0.9), adamw, …")
    sizes = {"depth": 6, "width": 16, "heads": 2, "patch": 4, "size": 16, "hidden": 128, "output": 64}
    sizes |= {"images": 1500, "server": 200, "batch": 25, "clients": 10, "many": 100, "cohort": 25, "rounds": 16, "epochs": 1}
    sizes |= {"calibration": 1, "test": 2000, "tune-epochs": 8, "tune-batch": 32, "seeds": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    numbers = {"lr": 0.05, "temperature": 0.2, "alpha": 0.5, "alignment": 1.0, "tune-lr": 1e-3, "labels": 1.0}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--pool", choices=("token", "mean"), default="mean", help="what of the ViT's tokens the features are")
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    left_out = ("data", "out", "seeds", "partition", "accelerator", "ways")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    keys = [
        {"settings": settings, "partition": partition, "way": way, "seed": seed}
        for partition in arguments.partition
        for seed in range(arguments.seeds)  # so that what is finished early is comparable
        for way in arguments.ways
    ]
    for key in keys:
        if any(row["key"] == key for row in finished(arguments.out)):
            continue
        row = {"key": key, **run(arguments, key["partition"], key["way"], key["seed"])}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        figures = ", ".join(f"{JUDGES[name]} {value:.1%}" for name, value in row["metrics"].items())
        console.print(f"{key['partition']}, {key['way']}, seed {key['seed']}: {figures}", highlight=False)
    done = finished(arguments.out)
    for partition in arguments.partition:
        rows = {way: [row for row in done for key in keys if row["key"] == key and (key["partition"], key["way"]) == (partition, way)]
                for way in arguments.ways}  # fmt: skip
        report(console, f"{partition}: " + ", ".join(f"{name} {value}" for name, value in settings.items()), rows)
        means = {way: {name: statistics.mean(row["metrics"][name] for row in some) for name in JUDGES} for way, some in rows.items()}
        shown = [{"name": way, "metrics": means[way], "cost": some[0]["cost"]} for way, some in rows.items() if some[0]["cost"]]
        draw(shown, arguments.out.with_name(f"{arguments.out.stem}-{arguments.method}-{partition}.png"))


def report(console: Console, title: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A line a way: costs over those of the first way, figures in per cent with their deviation over seeds and the difference to its."""
    table = Table(title=title)
    for heading in ("way", *COSTS, *JUDGES.values()):
        table.add_column(heading, justify="right")
    first = next(iter(rows))
    reference = paid(rows[first][0])
    reference["server"] = reference["FLOPs"]
    for way, some in rows.items():
        costs = [statistics.mean(paid(row)[name] for row in some) / max(1.0, reference[name]) for name in COSTS]
        cells = []
        for name in JUDGES:
            values = [100 * row["metrics"][name] for row in some]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            change = statistics.mean(values) - 100 * statistics.mean(row["metrics"][name] for row in rows[first])
            cells.append(f"{statistics.mean(values):.1f}{spread}  {change:+.1f}")
        table.add_row(way, *(f"{cost:.2f}" if some[0]["cost"] else "" for cost in costs), *cells)
    console.print(table)
    peak, saved, traffic, flops, _ = reference.values()
    console.print(
        f"1.00 is, of a client: peak {peak / 2**20:.1f} MiB, saved {saved / 2**20:.1f} MiB, "
        f"traffic {traffic / 2**20:.1f} MiB, {flops / 1e9:.0f} GFLOPs",
        highlight=False,
    )


if __name__ == "__main__":
    main()
