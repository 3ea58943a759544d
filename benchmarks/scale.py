"""Memory and seconds per round as a federation grows: 10² to 10⁵ clients with cohorts of 10, and cohorts of 10 to 1,000 of 10⁴ clients.

    python benchmarks/scale.py                  some minutes; every size in a process of its own
    python benchmarks/scale.py --clock cpu      by processor time: on a machine that has other work to do

Clients have 5 small images each (`ImageData` of noise, IID) and train a linear model for one step. "start" is all from making the data to
the first round: pictures divided over clients, checks, the model's set-up. "round" is the median of rounds after the first. "MiB" is the
process's peak above what imports take; beside it stand pictures and labels alone, which grow with the clients as they must. Ratios are to
the row above.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

import torch
from our_loop import CLOCKS, Clocked, Net, quiet
from torch import nn

from featherlight.fed_loop import Federation
from featherlight.ssl_models import ImageData
from featherlight.ssl_models.pictures import Tensors
from featherlight.ssl_models.sources import Loaded, Source

IMAGES, SIDE = 5, 4


def peak_mib() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def noise(clients: int) -> ImageData:
    """Data of so many clients."""
    count = clients * IMAGES
    pixels = torch.randint(256, (count, 1, SIDE, SIDE), dtype=torch.uint8)
    data = ImageData(views=1, augment="none", batch_size=IMAGES, num_clients=clients)
    source = Source(Tensors(pixels), torch.arange(count) % 10)
    data._loaded = Loaded(source, source.at(torch.arange(10)), tuple(map(str, range(10))))
    return data


def measure(clients: int, cohort: int, rounds: int, clock: str) -> dict[str, float]:
    """In this process: seconds to start and of a round, MiB."""
    quiet()
    noise(10)
    before, logger = peak_mib(), Clocked(CLOCKS[clock])
    data = noise(clients)
    model = Net(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 10)))
    Federation(rounds, cohort=cohort, accelerator="cpu", progress=False).run(model, data, loggers=[logger])
    took = [after - before for before, after in zip(logger.at, logger.at[1:])]
    round = statistics.median(took[1:])
    own = data._loaded.train
    held = own.images.pixels.nbytes + own.labels.nbytes  # type: ignore[attr-defined]
    return {"start": took[0] - round, "round": round, "MiB": peak_mib() - before, "pictures": held / 2**20}


def elsewhere(clients: int, cohort: int, rounds: int, clock: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--clock", clock, "--rounds", str(rounds), "--one", str(clients), str(cohort)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="*", type=int, default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--cohorts", nargs="*", type=int, default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.rounds, arguments.clock)))
        return
    rows = {
        "clients": [(clients, min(10, clients)) for clients in arguments.clients],
        "cohort": [(10_000, cohort) for cohort in arguments.cohorts],
    }
    for what, sizes in rows.items():
        above: dict[str, float] = {}
        for clients, cohort in sizes:
            row = elsewhere(clients, cohort, arguments.rounds, arguments.clock)
            ratio = (
                f"; {row['round'] / above['round']:.2f} times the seconds, {row['MiB'] / above['MiB']:.2f} times the MiB" if above else ""
            )
            print(
                f"{what} grow: {clients:7,d} clients, cohort {cohort:5,d}: start {row['start']:.2f} s, round {row['round']:.4f} s, "
                f"{row['MiB']:.1f} MiB ({row['pictures']:.1f} of pictures and labels){ratio}",
                flush=True,
            )
            above = row


if __name__ == "__main__":
    main()
