"""Accuracy against total bytes on CIFAR-10: the four ways of intrinsic compression over d, and what they are compared with, in one run.

    python benchmarks/intrinsic_frontier.py --data FOLDER                    supervised; it has train/CLASS/*.jpg and test/CLASS/*.jpg
    python benchmarks/intrinsic_frontier.py --data FOLDER --method simclr    self-supervised: kNN and linear probe of the features
    python benchmarks/intrinsic_frontier.py --data FOLDER --width 64 --size 32 --images 50000 --clients 100 --cohort 10 --rounds 300

ResNet-9 with group norm. Every way is given budgets: total bytes, both ways and all clients, of about 1/10, 1/30, … of what uncompressed
FedAvg sends over as many rounds; what is drawn is what was really sent. RATES has each way's learning rate, and says how few were tried;
--rates tries others, and of several the table and the picture take the best. Finished runs are kept in --out and not run again.

Goal (arXiv 2112.02656 is the method's source): at 100× within 2 points of uncompressed, and ahead of FetchSGD and top-k at equal bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from featherlight.fed_loop import Federation
from featherlight.plugins import FetchSGD, IntrinsicProjection, Plugin, Quantization, TopK
from featherlight.ssl_models import KNN, Classifier, ImageData, LinearProbe, SimCLR, accuracy
from featherlight.ssl_models.partitions import IID, Dirichlet


class Setting(NamedTuple):
    """What a way's plugins are made from: D parameters, a compression of the total, clients, how many of them a round has."""

    size: int
    budget: float
    clients: int
    cohort: int
    gain: float

    @property
    def away(self) -> int:
        """Rounds from one visit of a client to its next."""
        return -(-self.clients // self.cohort)


def static(of: Setting) -> list[Plugin]:
    """d up, d down."""
    return [IntrinsicProjection(round(of.size / of.budget), gain=of.gain)]


def subspaces(of: Setting) -> list[Plugin]:
    """d up, K·d down, for K = 4."""
    return [IntrinsicProjection(round(2 * of.size / of.budget / 5), subspaces=4, gain=of.gain)]


def time_varying(of: Setting) -> list[Plugin]:
    """Another subspace for every span in which each client is there once: d up, d down where all always are, else 2d."""
    dim = 2 * of.size / of.budget / (2 if of.away == 1 else 3)
    return [IntrinsicProjection(round(dim), periods_per_span=of.away, gain=of.gain)]


def both(of: Setting) -> list[Plugin]:
    """K = 4, spans as above."""
    dim = 2 * of.size / of.budget / (5 if of.away == 1 else 9)
    return [IntrinsicProjection(round(dim), subspaces=4, periods_per_span=of.away, gain=of.gain)]


BITS = 4


def numbers(of: Setting, subspaces: int = 1) -> int:
    """How many numbers of BITS bits go up, and come down for each round away, up to the 32 of a whole one, in a way's share of bytes."""
    return round(64 * of.size / of.budget / (BITS + subspaces * min(BITS * of.away, 32)))


def static_4(of: Setting) -> list[Plugin]:
    """As static, eight times the dimensions in 4 bits each, both ways."""
    return [IntrinsicProjection(numbers(of), gain=of.gain, down_bits=BITS), Quantization(BITS)]


def subspaces_4(of: Setting) -> list[Plugin]:
    """As K-subspace, in 4 bits."""
    return [IntrinsicProjection(numbers(of, 4), subspaces=4, gain=of.gain, down_bits=BITS), Quantization(BITS)]


def time_varying_4(of: Setting) -> list[Plugin]:
    """As time-varying, in 4 bits."""
    return [IntrinsicProjection(numbers(of), periods_per_span=of.away, gain=of.gain, down_bits=BITS), Quantization(BITS)]


def both_4(of: Setting) -> list[Plugin]:
    """K = 4 and spans, in 4 bits."""
    return [
        IntrinsicProjection(numbers(of, 4), subspaces=4, periods_per_span=of.away, gain=of.gain, down_bits=BITS),
        Quantization(BITS),
    ]


def top_k(of: Setting) -> list[Plugin]:
    """8·k bytes up; down 8 for each element that anybody changed since the last visit: of k·cohort·(rounds away) about nine tenths are
    different ones."""
    return [TopK(max(1, round(of.size / of.budget / (1 + 0.9 * of.cohort * of.away))))]


def fetch_sgd(of: Setting) -> list[Plugin]:
    """Half of the bytes for sketches of five rows, half for what comes down."""
    share = of.size / of.budget
    return [FetchSGD(max(1, round(share / 5)), rows=5, k=max(1, round(share / 2 / of.away)))]


def quantised(of: Setting) -> list[Plugin]:
    """32 / budget bits, both ways."""
    return [Quantization(round(32 / of.budget), down=True)]


Make = Callable[[Setting], list[Plugin]]
WAYS: dict[str, Make] = {
    "FedAvg": lambda of: [],
    "quantised": quantised,
    "top-k": top_k,
    "FetchSGD": fetch_sgd,
    "static": static,
    "K-subspace": subspaces,
    "time-varying": time_varying,
    "both": both,
    "static, 4 bits": static_4,
    "K-subspace, 4 bits": subspaces_4,
    "time-varying, 4 bits": time_varying_4,
    "both, 4 bits": both_4,
}
BUDGETS = {"FedAvg": [1.0], "quantised": [4.0, 8.0]}
"""Of ways that have their own."""
RATES: dict[str, list[tuple[float, float]]] = {
    "FedAvg": [(0.01, 1.0)],
    "quantised": [(0.01, 1.0)],
    "top-k": [(0.01, 1.0)],
    "FetchSGD": [(0.03, 1.0)],
    "static": [(0.03, 1.0)],
    "K-subspace": [(0.03, 1.0)],
    "time-varying": [(0.01, 1.0)],
    "both": [(0.01, 1.0)],
    "static, 4 bits": [(0.03, 1.0)],
    "K-subspace, 4 bits": [(0.03, 1.0)],
    "time-varying, 4 bits": [(0.01, 1.0)],
    "both, 4 bits": [(0.01, 1.0)],
}
"""(learning rate, gain of a projection) by way: the best of 0.01, 0.03 and 0.1 (FedAvg, top-k, FetchSGD), of 0.03 and 0.1 (static) and of
0.01 and 0.03 (time-varying), at 1/100 of the bytes, 2,000 images of 8 × 8 pixels, 4 clients, 30 rounds, one seed; those of quantised,
K-subspace, both and all in 4 bits are their neighbours'. A gain of 1 (E[A·Aᵀ] = I) was better than 0.3 (static: 35.5 % against 31.5 %); the
plugin's default, √(d/D), lies between.
"""


def run(arguments: argparse.Namespace, way: str, budget: float, rate: tuple[float, float], seed: int) -> dict[str, Any]:
    """One federation; its figures and its bytes."""
    supervised = arguments.method == "supervised"
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "backbone": "resnet9",
        "backbone_options": {"width": arguments.width, "norm": "group"},
        "image_size": arguments.size,
        "optimizer": "sgd",
        "optimizer_momentum": arguments.momentum,
        "lr": rate[0],
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "periods": arguments.rounds,
    }
    width = arguments.width
    model: Any = (
        Classifier(num_classes=10, **options)
        if supervised
        else SimCLR(temperature=0.2, hidden_dim=8 * width, output_dim=2 * width, **options)
    )
    data = ImageData(
        "folder", root=arguments.data, image_size=arguments.size, views=1 if supervised else 2, batch_size=arguments.batch,
        num_clients=arguments.clients, partition=Dirichlet(arguments.alpha) if arguments.alpha else IID(), limit_train=arguments.images,
        seed=seed, drop_last=True,
    )  # fmt: skip
    data.setup("fit")
    size = sum(value.numel() for value in model.parameters())
    plugins = WAYS[way](Setting(size, budget, arguments.clients, arguments.cohort, rate[1]))
    federation = Federation(
        arguments.rounds, arguments.cohort, arguments.epochs, seed=seed, clip=5.0, accelerator=arguments.accelerator, checkpoint_every=0,
        evaluate_every=arguments.evaluate_every, progress=arguments.progress,
    )  # fmt: skip
    evaluators: list[Any] = [accuracy] if supervised else [KNN(), LinearProbe()]
    started = time.perf_counter()
    result = federation.run(model, data, plugins, evaluators)
    up, down = (sum(row[way] for row in result.history) for way in ("bytes_up", "bytes_down"))
    figures = {name: value for name, value in result.metrics.items() if not name.startswith("client_")}
    return {
        "metrics": figures,
        "size": size,
        "up": up,
        "down": down,
        "curve": [row["accuracy"] for row in result.history if "accuracy" in row],
        "loss": [round(row["loss"], 4) for row in result.history],
        "rejected": result.rejected,
        "seconds": time.perf_counter() - started,
    }


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A panel for each figure, a line for each way: total bytes against accuracy.

    Args:
        rows: way, budget, bytes, {figure: [values of seeds]}.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(rows[0]["figures"])
    figure, panels = pyplot.subplots(1, len(names), figsize=(7 * len(names), 5), squeeze=False, layout="constrained")
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for panel, name in zip(panels[0], names):
        for number, way in enumerate(ways):
            points = sorted((row["bytes"] / 2**20, row["figures"][name]) for row in rows if row["way"] == way)
            means = [100 * statistics.mean(values) for _, values in points]
            spread = [100 * statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            style = "o-" if WAYS[way] in OURS else "s--"
            panel.errorbar(
                [x for x, _ in points], means, spread, fmt=style, color=colours[2 * number % 20 + number // 10], label=way, capsize=2
            )
            if way == "FedAvg":
                panel.axhline(means[-1] - 2, color="grey", lw=0.8, ls=":")
                panel.axvline(points[-1][0] / 100, color="grey", lw=0.8, ls=":")
        panel.set_xscale("log")
        panel.set_xlabel("bytes sent in the whole run, both ways, all clients (MiB)")
        panel.set_ylabel(f"{name} (%)")
        panel.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    told = f"{title}; dotted: a hundredth of FedAvg's bytes, two points below it"
    figure.suptitle("\n".join(textwrap.wrap(told, 110 * len(names))), fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


OURS = (static, subspaces, time_varying, both, static_4, subspaces_4, time_varying_4, both_4)


def pair(text: str) -> tuple[float, float]:
    """``"0.1:3"``: a learning rate and a gain."""
    rate, _, gain = text.partition(":")
    return float(rate), float(gain or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--method", choices=("supervised", "simclr"), default="supervised")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[10, 30, 100, 300], help="of ways that have none of their own")
    parser.add_argument("--rates", nargs="+", type=pair, help="lr or lr:gain, in place of RATES; the best is shown")
    parser.add_argument("--out", type=Path, default=Path("runs/intrinsic_frontier.jsonl"), help="the picture lies beside it")
    sizes = {"width": 16, "size": 16, "images": 2500, "clients": 5, "cohort": 5, "rounds": 40, "epochs": 1, "batch": 32}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=0.0, help="of a Dirichlet partition; 0: IID")
    parser.add_argument("--momentum", type=float, default=0.9, help="of clients' SGD")
    parser.add_argument("--evaluate-every", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument(
        "--show", action="store_true", help="run nothing: the table and the picture of all that --out holds of the settings"
    )
    arguments = parser.parse_args()
    no_part = ("data", "out", "seeds", "accelerator", "ways", "budgets", "rates", "progress", "evaluate_every", "show")
    settings = {name: value for name, value in vars(arguments).items() if name not in no_part}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    console = Console(width=150)

    def runs(way: str, budget: float, rate: tuple[float, float]) -> list[dict[str, Any]]:
        """All seeds'."""
        found: list[dict[str, Any]] = []
        for seed in range(100 if arguments.show else arguments.seeds):
            key = {"settings": settings, "way": way, "budget": budget, "rate": list(rate), "seed": seed}
            row = next((row for row in done if row["key"] == key), None)
            if row is None and arguments.show:
                continue
            if row is None:
                row = {"key": key, **run(arguments, way, budget, rate, seed)}
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                told = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["metrics"].items())
                console.print(
                    f"{way} 1/{budget:g}, lr {rate[0]:g}, gain {rate[1]:g}, seed {seed}: {told} ({row['seconds']:.0f} s)", highlight=False
                )
            found.append(row)
        return found

    rows: list[dict[str, Any]] = []
    for way in arguments.ways:
        budgets, rates = BUDGETS.get(way, arguments.budgets), arguments.rates or RATES[way]
        if arguments.show:
            kept = [row["key"] for row in done if row["key"]["settings"] == settings and row["key"]["way"] == way]
            budgets = sorted({key["budget"] for key in kept})
            rates = sorted({(float(rate), float(gain)) for rate, gain in (key["rate"] for key in kept)})
        for budget in budgets:
            tried = {rate: found for rate in rates if (found := runs(way, budget, rate))}
            most = max(map(len, tried.values()), default=0)
            tried = {rate: found for rate, found in tried.items() if len(found) == most}
            first = next(iter(tried.values()))[0]["metrics"]
            figure = next(iter(first))
            best = max(tried, key=lambda rate: statistics.mean(row["metrics"][figure] for row in tried[rate]))
            chosen = tried[best]
            rows.append(
                {
                    "way": way, "budget": budget, "rate": best, "bytes": statistics.mean(row["up"] + row["down"] for row in chosen),
                    "up": chosen[0]["up"], "down": chosen[0]["down"],
                    "figures": {name: [row["metrics"][name] for row in chosen] for name in first},
                }
            )  # fmt: skip
    if not rows:
        raise SystemExit(f"{arguments.out} holds nothing of these settings")
    whole = next((row for row in rows if row["way"] == "FedAvg"), rows[0])
    title = f"{arguments.method}: " + ", ".join(f"{name} {value:g}" for name, value in settings.items() if name != "method")
    table = Table(title=title)
    for heading in (
        "way",
        "lr, gain",
        "seeds",
        "up",
        "down",
        "total compression",
        *(f"{name}, to {whole['way']}" for name in whole["figures"]),
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        told = []
        for name, values in row["figures"].items():
            mean, reference = (100 * statistics.mean(some) for some in (values, whole["figures"][name]))
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            told.append(f"{mean:.1f}{spread}, {mean - reference:+.1f}")
        ratios = (f"{whole[way] / row[way]:.1f}×" for way in ("up", "down", "bytes"))
        seeds = str(len(next(iter(row["figures"].values()))))
        table.add_row(row["way"], f"{row['rate'][0]:g}, {row['rate'][1]:g}", seeds, *ratios, *told)
    console.print(table)
    draw(rows, arguments.out.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
