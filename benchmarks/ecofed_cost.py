"""What an EcoFed device sends, computes and waits for, beside three other ways: derived, predicted and measured, in one run.

    python benchmarks/ecofed_cost.py            MB of a device and round: derived, predicted by `featherlight cost`, really serialised;
                                                then with fewer bits and longer replay periods
    python benchmarks/ecofed_cost.py --time     besides, measured seconds of a device, and of a round at the speeds that it states

The paper (arXiv 2304.05495): up to 133× less communication and 21× faster than classic, 16× less and 2.86× faster than vanilla. Derived
are the bytes of numbers alone: 500 images, activations of 128×8×8 in float32 (and as many bytes of gradients), a front of 76,032
parameters. Serialised, labels and headers come on top, and in EcoFed the front, once a client: it is shown apart. Images are noise, since
bytes and seconds do not depend on them. Seconds are those of one CPU core here, on two of whose steps meters ran; --device-slowdown
says how much slower a device is, --server-speedup how much faster a server, --mbit what its link carries each way. Devices and links work
side by side; the server trains a rear for each device, and the last columns have one server do that for --cohort of them in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from featherlight.commands.cost import predict_config
from featherlight.fed_loop import Federation, Result
from featherlight.fed_loop.divided_batch import DividedBatch, encoded, heading
from featherlight.fed_loop.wire import pack
from featherlight.plugins import Clock, Message, PartitionedTraining, Plugin, Visit
from featherlight.ssl_models import Classifier

PAPERS = Path(__file__).parent.parent / "configs" / "papers"
WAYS = {"classic": "_classic", "vanilla split": "_vanilla", "local loss": "_local_loss", "EcoFed": ""}
NETS = {"vgg11": ("vgg11", {"fully_connected": True}), "resnet9": ("resnet9_basic", {})}
IMAGES, ACTIVATION, FRONT = 500, 128 * 8 * 8, 76_032
CUT = "backbone.blocks.1"


class Noise:
    """One client of 500 images."""

    num_clients = 1

    def __init__(self, batch: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(len(part), 3, 32, 32, generator=random), torch.randint(10, (len(part),), generator=random))
            for part in torch.arange(IMAGES).split(batch)
        ]

    def client_sizes(self) -> list[int]:
        return [IMAGES]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return len(self.batches) * epochs

    def client_batches(self, visits: Sequence[Visit], epochs: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for index, _ in enumerate(visits):
            for batch in self.batches * epochs:
                yield index, batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch


def derived(net: str, way: str) -> float:
    """Bytes of a device and round, from the method alone."""
    up, front = 4 * IMAGES * ACTIVATION, 2 * 4 * FRONT
    with torch.device("meta"):
        model = Classifier(NETS[net][0], backbone_options=NETS[net][1])
    whole = 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    return {"classic": whole, "vanilla split": 2 * up + front, "local loss": up + front, "EcoFed": up / 4 / 2}[way]


def predicted(net: str, way: str, rounds: int, *options: str) -> dict[str, float]:
    """A client's figures in one round, by `featherlight cost`."""
    return predict_config(str(PAPERS / f"ecofed_{net}{WAYS[way]}.yaml"), [f"--federation.rounds={rounds}", *options]).rows()[0]


def measured(net: str, way: str) -> Result:
    """Rounds of one client."""
    torch.manual_seed(0)
    backbone, options = NETS[net]
    model = Classifier(backbone, backbone_options=options, optimizer="sgd", lr=0.01, weight_decay=0.0)
    plugins: dict[str, list[Plugin]] = {
        "classic": [],
        "vanilla split": [PartitionedTraining(CUT, way="split")],
        "local loss": [PartitionedTraining(CUT, way="local_loss")],
        "EcoFed": [PartitionedTraining(CUT)],
    }
    rounds = 4 if way == "EcoFed" else 1  # the others' rounds are all alike
    return Federation(rounds, accelerator="cpu", progress=False, checkpoint_every=0).run(model, Noise(10), plugins[way])


def traffic_of(run: Result, way: str) -> float:
    """Bytes of a round, both ways; of EcoFed when the client has its front."""
    later = run.history[2:] if way == "EcoFed" else run.history
    return sum(row["bytes_up"] + row["bytes_down"] for row in later) / len(later)


def traffic(console: Console, rounds: int) -> dict[tuple[str, str], Result]:
    table = Table(title=f"MB of a device and round (1 MB = 10⁶ bytes); predicted over {rounds} rounds, 20 of 100 clients in each")
    for column in (
        "network",
        "way",
        "derived",
        "predicted",
        "serialised",
        "of it in the first round only",
        "less than classic",
        "than vanilla",
    ):
        table.add_column(column, justify="right")
    runs = {}
    for net, way in track([(net, way) for net in NETS for way in WAYS], "traffic", console=Console(stderr=True), transient=True):
        row = predicted(net, way, rounds)
        runs[net, way] = measured(net, way)
        history = runs[net, way].history
        mean = traffic_of(runs[net, way], way)
        first = history[0]["bytes_down"] if way == "EcoFed" else 0
        table.add_row(
            net, way,
            f"{derived(net, way) / 1e6:.2f}", f"{(row['bytes_up'] + row['bytes_down']) / 1e6:.2f}", f"{mean / 1e6:.2f}",
            f"{first / 1e6:.2f}" if first else "",
            *(f"{derived(net, other) / derived(net, way):.1f} ×" for other in ("classic", "vanilla split")),
        )  # fmt: skip
    console.print(table)
    return runs


def serialised(bits: int) -> int:
    """Bytes of the message that a device with 500 images sends once, made and packed as in a run."""
    torch.manual_seed(0)
    model = Classifier("resnet9_basic")  # VGG11's front puts out as much
    plugin = PartitionedTraining(CUT, bits=bits, signed=False)
    plugin.attach(model)
    plugin.advance(Clock(0))
    partition = plugin.partition(Clock(0))
    assert partition is not None
    message: Message = {}
    with torch.no_grad():
        for step, batch in enumerate(Noise(10).batches):
            divided = DividedBatch.of(batch)
            activations = [partition.cut.run(view) for view in divided.views]
            message |= encoded(f"0.{step}", activations, divided.labels(None), partition.codec)
    return len(pack(message | heading(divided, activations)))


def below(console: Console) -> None:
    """Fewer bits, longer periods: the up-link of one update round, spread over the period."""
    table = Table(title="EcoFed with fewer bits and longer replay periods: MB up of a device; times less than vanilla, both ways")
    for column in ("bits", "once, derived", "predicted", "serialised"):
        table.add_column(column, justify="right")
    periods = (1, 2, 4, 8)
    for period in periods:
        table.add_column(f"a round, period {period}", justify="right")
    vanilla = derived("resnet9", "vanilla split")
    for bits in (8, 6, 4):
        options = f"--plugins.init_args.bits={bits}", "--plugins.init_args.signed=false"
        up = serialised(bits)
        sizes = IMAGES * ACTIVATION * bits / 8, predicted("resnet9", "EcoFed", 1, *options)["bytes_up"], up
        cells = [f"{up / period / 1e6:.2f} ({vanilla * period / up:.0f} ×)" for period in periods]
        table.add_row(str(bits), *(f"{size / 1e6:.3f}" for size in sizes), *cells)
    console.print(table)


def times(console: Console, runs: dict[tuple[str, str], Result], arguments: argparse.Namespace) -> None:
    """Seconds of a round: device, link and server, one after the other; with a server for each device, and with one for all."""
    table = Table(
        title=f"seconds of a device's round of 500 images: this CPU core × {arguments.device_slowdown:g}, "
        f"{arguments.mbit:g} Mbit/s each way, server = this core / {arguments.server_speedup:g}"
    )
    for column in (
        "network",
        "way",
        "GFLOP",
        "core, measured",
        "device",
        "link",
        "server",
        "round",
        "times faster",
        f"round of {arguments.cohort}",
        "faster",
    ):
        table.add_column(column, justify="right")
    for net in NETS:
        slowest: list[float] | None = None
        for way in WAYS:
            cost = runs[net, way].cost
            device = cost.rows()[0]["seconds"]
            server = cost.server.rows()[0]["seconds"] if cost.server is not None else 0.0
            link = 8 * traffic_of(runs[net, way], way) / arguments.mbit / 1e6
            totals = [device * arguments.device_slowdown + link + n * server / arguments.server_speedup for n in (1, arguments.cohort)]
            slowest = slowest or totals
            flops = cost.rows()[0]["flops_forward"] + cost.rows()[0]["flops_backward"]
            table.add_row(
                net, way, f"{flops / 1e9:.1f}", f"{device:.2f}",
                f"{device * arguments.device_slowdown:.1f}", f"{link:.1f}", f"{server / arguments.server_speedup:.2f}",
                *(cell for first, total in zip(slowest, totals) for cell in (f"{total:.1f}", f"{first / total:.2f}")),
            )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of the prediction; the paper trains for 500")
    parser.add_argument("--time", action="store_true", help="say how long rounds take, too")
    parser.add_argument("--device-slowdown", type=float, default=4.0)
    parser.add_argument("--server-speedup", type=float, default=20.0)
    parser.add_argument("--cohort", type=int, default=20, help="devices of a round, whose rears one server trains one after the other")
    parser.add_argument("--mbit", type=float, default=50.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    runs = traffic(console, arguments.rounds)
    below(console)
    if arguments.time:
        times(console, runs, arguments)


if __name__ == "__main__":
    main()
