"""pfl-research over a job (`pfl[pytorch]`): its FederatedAveraging on its SimulatedBackend, users weighted alike."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import chain
from typing import Any

from peers.job import Laps, arguments
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy


class Classifier(nn.Module):
    """What pfl asks of a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        from pfl.metrics import Weighted

        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


def others(processes: int) -> list[subprocess.Popen[bytes]]:
    """Start the other processes, and tell this one that it is the first."""
    if processes == 1 or "PFL_WORKER_RANK" in os.environ:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["PFL_WORKER_ADDRESSES"] = ",".join(f"127.0.0.1:{port + rank}" for rank in range(processes))
    started = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "PFL_WORKER_RANK": str(rank)}) for rank in range(1, processes)
    ]
    os.environ["PFL_WORKER_RANK"] = "0"
    return started


def main() -> None:
    job, answer = arguments()
    started = others(job.settings.processes)

    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    laps = Laps(job.settings)

    class Lapped(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
            laps.lap()
            return False, Metrics()

    net = job.model()
    model = PyTorchModel(Classifier(net), local_optimizer_create=optim.SGD, central_optimizer=optim.SGD(net.parameters(), lr=1.0))
    rounds, cohort = job.cohorts.shape
    users = chain.from_iterable(job.cohorts.tolist())
    data = FederatedDataset(lambda user: Dataset(job.client(user), user_id=str(user)), lambda: next(users))
    # evaluation cannot be kept from the first round, which nobody times
    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=cohort, val_cohort_size=0),
        SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=job.settings.lr, local_batch_size=job.settings.batch),
        NNEvalHyperParams(local_batch_size=job.settings.batch),
        callbacks=[Lapped()],
        send_metrics_to_platform=False,
    )
    if os.environ.get("PFL_WORKER_RANK", "0") == "0":
        laps.write(answer, net.state_dict())
    for process in started:
        if process.wait():
            raise SystemExit(f"another process of pfl's ended with {process.returncode}")


if __name__ == "__main__":
    main()
