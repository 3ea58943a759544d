"""A cohort trained at once (``client_batch=k``) against the bare loop that trains one client after the other.

    python benchmarks/client_batch.py                       k = 1, 10 and the whole cohort; some minutes
    python benchmarks/client_batch.py --models CNN --k 50   the network of pfl-research's CIFAR-10 benchmark alone
    python benchmarks/client_batch.py --clock cpu           by processor time: on a machine that has other work to do

Linear model (30,730 parameters) and perceptron (1.6 M): cohorts of 50 clients with 4 steps on batches of 32. CNN: the two convolutions
of pfl-research's CIFAR-10 benchmark (1,626,442 parameters), cohorts of 50 clients with 50 images in batches of 10; without its dropout,
since each client's own draws are not the bare loop's. That loop (small_models.py) does the same work on one thread; final weights are
compared. Beside k stands how many times as fast as the bare loop a visit is, its time in rounds after the first.

What is to be had on one core: matrix products of several clients are no less work than one after the other, only fewer calls; each client's
weights are its own and are read and written in every step. At once pays where calls are what takes time. Several clients' convolutions
become one in groups, which this processor does no faster; what helps the CNN is another layout, that of
``model.to(memory_format=torch.channels_last)``, which the loop keeps: it has a row of its own, as has the bare loop with it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from our_loop import CLOCKS, Ours, Way, compare, quiet
from small_models import Work, bare, spread
from torch import Tensor, nn

WORK = {
    "linear": {"steps": 4, "batch": 32},
    "MLP": {"steps": 4, "batch": 32},
    "CNN": {"steps": 5, "batch": 10},
}


class ChannelsLast(Ours):
    """convolutions' weights laid out with channels last, by one line of the model's owner."""

    def __call__(self, model: nn.Module, work: Work) -> list[Tensor]:
        return super().__call__(model.to(memory_format=torch.channels_last), work)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--k", nargs="+", type=int, default=[1, 10, 50], help="clients at once")
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3, help="medians of so many")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    quiet()
    for name in arguments.models:
        work = Work.random(arguments.rounds, arguments.cohort, **WORK[name])
        ours: dict[str, Ours] = {f"client_batch={k}": Ours(arguments.clock, client_batch=k) for k in arguments.k}
        ways: dict[str, Way] = {}
        if name == "CNN":
            ours["one by one, channels last"] = ChannelsLast(arguments.clock)
            ways["bare loop, channels last"] = lambda model, work: bare(model.to(memory_format=torch.channels_last), work)
        took = compare({**ways, **ours}, name, work, arguments.runs, arguments.clock)
        plain = took["bare"]
        print(f"{name}: bare loop {spread(plain)} ms a visit ({arguments.clock} time, {len(plain)} repetitions, torch {torch.__version__})")
        for way in ways:
            print(f"    {way:27s} {spread(took[way])} ms; {statistics.median(plain) / statistics.median(took[way]):.2f} times as fast")
        for way, run in ours.items():
            later = run.later[1:]
            print(f"    {way:27s} {spread(later)} ms; {statistics.median(plain) / statistics.median(later):.2f} times as fast")


if __name__ == "__main__":
    main()
