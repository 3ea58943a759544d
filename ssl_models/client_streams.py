"""What any data set that is shared out gives a federation: its clients' sizes, steps and batches, and the server's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from featherlight.plugins.base import Visit
from featherlight.ssl_models.batches import Batch, BatchLoader, Plan
from featherlight.ssl_models.partitions import Parts


class ClientStreams:
    """Mixed into a data module that has a ``plan``, ``_clients`` (each one's samples) and ``_client_loader`` over them."""

    plan: Plan

    @property
    def _clients(self) -> Parts:
        raise NotImplementedError(f"{type(self).__name__} must say which samples are each client's")

    @property
    def _client_loader(self) -> BatchLoader:
        raise NotImplementedError(f"{type(self).__name__} must give a loader over its clients' samples")

    @property
    def _server_size(self) -> int:
        """Samples that the server has for itself, and no client."""
        return 0

    @property
    def _server_loader(self) -> BatchLoader:
        raise NotImplementedError(f"{type(self).__name__} has no samples of the server's own")

    @property
    def num_clients(self) -> int:
        """Clients that the data are shared out to."""
        return len(self._clients)

    def client_sizes(self) -> list[int]:
        """Samples of each client's training part."""
        return list(self._clients.sizes)

    def steps_per_visit(self, client: int, epochs: int) -> int:
        """Batches that one visit to ``client`` takes."""
        return epochs * self.plan.steps(self._clients.sizes[client])

    def batch_sizes(self, client: int, epochs: int) -> list[int]:
        """Samples of each batch of one visit to ``client``."""
        return self.plan.sizes(self._clients.sizes[client]) * epochs

    def client_batches(self, visits: Sequence[Visit], epochs: int) -> Iterator[tuple[int, Batch]]:
        """The batches of ``visits`` in the order given, each with the number of its visit, in one stream.

        Give every batch to :meth:`on_after_batch_transfer` on its device. A new call ends an earlier stream.
        """
        sampler: Any = self._client_loader.sampler
        sampler.visits, sampler.epochs = visits, epochs
        turns = (turn for turn, visit in enumerate(visits) for _ in range(self.steps_per_visit(visit.client, epochs)))
        yield from zip(turns, self._client_loader, strict=True)

    def server_batch_sizes(self, epochs: int) -> list[int]:
        """Samples of each batch of ``epochs`` passes over the server's own; none where it has none."""
        return self.plan.sizes(self._server_size) * epochs

    def server_batches(self, visit: Visit, epochs: int) -> Iterator[Batch]:
        """The batches of the server's own turn, ``Visit(round, SERVER, seed)``; to be treated as those of clients."""
        sampler: Any = self._server_loader.sampler
        sampler.visits, sampler.epochs = [visit], epochs
        yield from self._server_loader
