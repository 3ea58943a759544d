"""Flower's simulation over a job (`flwr[simulation]`): its FedAvg on its Ray backend, one actor a process, the server beside them.

Actors keep data and model from message to message, which Flower leaves to its user.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable
from functools import lru_cache

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")  # on a machine with other work to do

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peers.job import Job, Laps
from torch import nn
from torch.nn.functional import cross_entropy

client_app = ClientApp()


@lru_cache(maxsize=1)
def known(path: str) -> tuple[Job, nn.Module]:
    """Of this process."""
    torch.set_num_threads(1)
    job = Job.load(path)
    return job, job.model()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    told = message.content["config"]
    job, model = known(told["job"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), job.settings.lr)
    for x, y in job.batches(told["client"]):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    update = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": job.settings.samples})}
    return Message(content=RecordDict(update), reply_to=message)


class Told(FedAvg):
    """Flower draws the nodes; whose data each of them has is said in its message, so that the cohort is everybody's."""

    def __init__(self, job: Job, path: str) -> None:
        self._job, self._path = job, path
        share, cohort = job.cohorts.shape[1] / job.num_clients, job.cohorts.shape[1]
        super().__init__(share, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=job.num_clients)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        cohort = self._job.cohorts[server_round - 1].tolist()
        assert len(messages) == len(cohort), f"Flower asks {len(messages)} nodes, not {len(cohort)}"
        for message, client in zip(messages, cohort):
            message.content = RecordDict({"arrays": arrays, "config": ConfigRecord({"client": client, "job": self._path})})
        return messages


def main(path: str, answer: str) -> None:
    from flwr.simulation import run_simulation

    torch.set_num_threads(1)
    job = Job.load(path)
    laps = Laps(job.settings)
    server_app = ServerApp()

    def lap(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            laps.lap()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy, first = Told(job, path), ArrayRecord(dict(job.weights))
        result = strategy.start(grid=grid, initial_arrays=first, num_rounds=len(job.cohorts), evaluate_fn=lap)
        last = result.arrays.to_torch_state_dict()
        laps.write(answer, {name: last[name] for name in job.weights})

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": job.settings.processes}}
    try:
        run_simulation(server_app, client_app, num_supernodes=job.num_clients, backend_config=resources)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the server's thread waits for nodes that will not come


if __name__ == "__main__":
    from peers.flower_peer import main as by_name  # what travels to actors is named by its module, and so stays there

    by_name(sys.argv[1], sys.argv[2])
