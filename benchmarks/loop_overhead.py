"""What the federated loop takes beside the clients' own arithmetic, in milliseconds of each client's turn.

    python benchmarks/loop_overhead.py                 about two minutes
    python benchmarks/loop_overhead.py --clock cpu     by processor time: on a machine that has other work to do

FedAvg: 10 rounds of 10 clients that take 4 steps each on batches of 32, plain SGD, one thread; a linear model (30,730 parameters) and a
perceptron (1.6 M). The bare loop (small_models.py) takes the same steps from the same weights in the same order. All take turns,
repetition by repetition; a figure is the median over repetitions of (time - the bare loop's) / visits, with quartiles, and the ratio of
medians. Where the final weights are not the bare loop's, to rounding, it stops.

Ours has all on that a run has: costs counted as they are (first steps metered, messages really serialised), updates checked, exact sums,
a line a round in metrics.jsonl and to a logger; checkpoints have a row of their own. "whole run" counts everything from the call of
``run`` on, the model's set-up and the metered steps among it; "later rounds" is a visit's median in rounds 2 and on.

What cannot go away (the floor), for D parameters: an update is serialised (D float32 read, D written) and read; magnitudes
are looked at as it is added (D read); exact sums of float64 are read and written (16 D bytes). Some 28 D bytes of memory's traffic a
visit, of which the bare loop's sum has 12 D. Where weights have many bits sums have two parts, and 16 D bytes more.
"""

from __future__ import annotations

import argparse
import statistics

from our_loop import CLOCKS, Ours, compare, quiet
from small_models import Work, bare, spread
from torch import Tensor, nn

WORK = {"clients": 10, "steps": 4, "batch": 32}


def on_fabric(model: nn.Module, work: Work) -> list[Tensor]:
    """The bare loop, its model and optimizer set up by Fabric once."""
    from lightning.fabric import Fabric

    return bare(model, work, fabric=Fabric(accelerator="cpu", devices=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["linear", "MLP"], choices=["linear", "MLP"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=7, help="medians of so many")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    quiet()
    work = Work.random(arguments.rounds, **WORK)
    for name in arguments.models:
        ours = Ours(arguments.clock)
        ways = {"Fabric, set up once": on_fabric, "ours, whole run": ours}
        ways["ours, whole run, a checkpoint a round"] = Ours(arguments.clock, checkpoint_every=1)
        took = compare(ways, name, work, arguments.runs, arguments.clock)
        took["ours, later rounds"] = ours.later[1:]
        bare = took.pop("bare")
        print(f"{name}: bare loop {spread(bare)} ms a visit ({arguments.clock} time, {len(bare)} repetitions); above it:")
        for way, values in took.items():
            above = [one - other for one, other in zip(values, bare, strict=True)]
            print(f"    {way:40s} {spread(above)} ms; {statistics.median(values) / statistics.median(bare):.2f} times as long")


if __name__ == "__main__":
    main()
