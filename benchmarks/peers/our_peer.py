"""Our federation over a job, with all on that a run has: costs counted, updates checked, exact sums, a folder with a line a round.

The last argument is the federation's further settings, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from our_loop import Net, quiet
from peers.job import Job, Laps, arguments

from featherlight.fed_loop import Federation
from featherlight.fed_loop.cohort import sample


class JobData:
    """A job as a federation takes data."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.num_clients = job.num_clients

    def client_sizes(self) -> list[int]:
        return [self._job.settings.samples] * self.num_clients

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return self._job.steps * epochs

    def client_batches(self, visits: Sequence[Any], epochs: int) -> Iterator[tuple[int, Any]]:
        for index, visit in enumerate(visits):
            for batch in self._job.batches(visit.client) * epochs:
                yield index, batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Lapped(Logger):
    """Ends a lap with each round's row."""

    name = version = "laps"

    def __init__(self, laps: Laps) -> None:
        super().__init__()
        self._laps = laps

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not asked for."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._laps.lap()


def main() -> None:
    job, answer = arguments()
    quiet()
    rounds, cohort = job.cohorts.shape
    drawn = [sample(job.num_clients, cohort, 0, round) for round in range(rounds)]
    assert drawn == job.cohorts.tolist(), "the job's cohorts are not those that our federation draws from seed 0"
    net, laps = Net(job.model(), job.settings.lr), Laps(job.settings)
    own = {"checkpoint_every": 0, "progress": False, "accelerator": "cpu", "devices": job.settings.processes, **json.loads(sys.argv[3])}
    federation = Federation(rounds, cohort=cohort, folder=f"{answer}.run", **own)
    federation.run(net, JobData(job), loggers=[Lapped(laps)])
    if federation.is_first:
        laps.write(answer, net.net.state_dict())


if __name__ == "__main__":
    main()
