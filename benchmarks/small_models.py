"""The work that the benchmarks of speed share: small classifiers, clients whose batches lie ready, and the bare loop over them.

It needs torch alone, so that peers run the same work from environments of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LR = 0.05
CLASSES = 10


def linear() -> nn.Module:
    """30,730 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES))


def mlp() -> nn.Module:
    """1,578,506 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def cnn() -> nn.Module:
    """The two-convolution network of pfl-research's CIFAR-10 benchmark (arXiv 2404.06430): 1,626,442 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {"linear": linear, "MLP": mlp, "CNN": cnn}


def make(name: str) -> nn.Module:
    """A model from its first weights, always the same."""
    torch.manual_seed(0)
    return MODELS[name]()


@dataclass(frozen=True)
class Work:
    """Rounds in which every client takes every step of its own, batches in a fixed order.

    Args:
        batches: of each client.
    """

    rounds: int
    batches: Sequence[Sequence[tuple[Tensor, Tensor]]]

    @classmethod
    def random(cls, rounds: int, clients: int, steps: int, batch: int) -> Work:
        """Images (N, 3, 32, 32) of noise, labels at random."""
        draw = torch.Generator().manual_seed(1)

        def one() -> tuple[Tensor, Tensor]:
            return torch.randn(batch, 3, 32, 32, generator=draw), torch.randint(CLASSES, (batch,), generator=draw)

        return cls(rounds, [[one() for _ in range(steps)] for _ in range(clients)])

    @property
    def visits(self) -> int:
        """Turns of clients, over all rounds."""
        return self.rounds * len(self.batches)


Turn = Callable[[Sequence[tuple[Tensor, Tensor]]], object]
"""A client's batches → its steps, taken on the model."""


def bare(model: nn.Module, work: Work, device: str = "cpu", fabric: Fabric | None = None, turn: Turn | None = None) -> list[Tensor]:
    """FedAvg as a notebook writes it, and no more: weights in, steps, a running sum. Clients have equally many samples. With ``fabric``
    that sets model and optimizer up, once; with ``turn`` in place of the plain steps."""
    model = model.to(device)
    parameters = list(model.parameters())
    optimizer: Any = torch.optim.SGD(parameters, LR)
    call, backward = (model, Tensor.backward) if fabric is None else (fabric.setup_module(model), fabric.backward)
    optimizer = optimizer if fabric is None else fabric.setup_optimizers(optimizer)

    def steps(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            backward(cross_entropy(call(x), y))
            optimizer.step()

    server = [value.detach().clone() for value in parameters]
    for _ in range(work.rounds):
        total = [torch.zeros_like(value) for value in server]
        for batches in work.batches:
            with torch.no_grad():
                torch._foreach_copy_(parameters, server)
            (turn or steps)(batches)
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=1 / len(work.batches))
        server = total
    return server


class ReadyData:
    """:class:`Work` as a federation takes data."""

    def __init__(self, work: Work) -> None:
        self._batches = work.batches
        self.num_clients = len(work.batches)

    def client_sizes(self) -> list[int]:
        return [sum(len(y) for _, y in batches) for batches in self._batches]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        return len(self._batches[client]) * epochs

    def client_batches(self, visits: Sequence[Any], epochs: int) -> Iterator[tuple[int, Any]]:
        for index, visit in enumerate(visits):
            for batch in self._batches[visit.client] * epochs:
                yield index, batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def check(name: str, weights: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-4) -> float:
    """How far two runs' final weights are apart, as a share of how far they are from 0.

    Raises:
        SystemExit: too far to have done the same work.
    """
    apart = sum(float((one - other).double().square().sum()) for one, other in zip(weights, wanted, strict=True)) ** 0.5
    share = apart / sum(float(other.double().square().sum()) for other in wanted) ** 0.5
    if not share < tolerance:
        raise SystemExit(f"{name} ends {share:.1e} of the weights away from the bare loop: it did not do the same work")
    return share


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"
