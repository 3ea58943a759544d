"""Which images are in which batch, and the seed of everything drawn for it.

A batch depends on (seed, round, client, epoch, place in the epoch) and on nothing else: not on the number of workers, the order of
clients, or the process that makes it. Under a Trainer all images are client 0's and the epoch is the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from featherlight.plugins.base import Visit
from featherlight.plugins.seeds import derive, generator


class Draw(NamedTuple):
    """One batch before its images are fetched.

    Args:
        indices: which images, (B,).
        places: their places in the whole batch, (B,): every other one, where two processes share a batch.
        total: size of the whole batch.
        seed: what its augmentation is drawn from.
    """

    indices: Tensor
    places: Tensor
    total: int
    seed: int


class Batch(NamedTuple):
    """One training batch as the loader gives it, before augmentation on the device.

    Args:
        views: the images, once as they are or once per view that the loader made: uint8 (B, C, H, W) each.
        labels: (B,), -1 where an image has none.
        places: as in :class:`Draw`.
        total: as in :class:`Draw`.
        seed: as in :class:`Draw`.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    places: Tensor
    total: int
    seed: int


class Images(Protocol):
    """Anything that gives images by index."""

    def take(self, indices: Tensor) -> Tensor:
        """uint8 (B, C, H, W)."""
        ...

    def at(self, places: Tensor) -> Images:
        """Some of the images."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """How an epoch over some images is cut into batches.

    Args:
        batch_size: images of a batch.
        drop_last: leave out a last batch that is not full, unless it would be the only one; None: only one of a single image.
        at_least: images a batch must have to be of use: 2 for contrastive losses.
    """

    batch_size: int
    drop_last: bool | None
    at_least: int = 1

    def steps(self, size: int) -> int:
        """Batches of one epoch over ``size`` images."""
        full, rest = divmod(size, self.batch_size)
        drop_rest = rest == 1 if self.drop_last is None else self.drop_last
        keep_rest = rest >= self.at_least and not (drop_rest and full)
        return full + keep_rest

    def sizes(self, size: int) -> list[int]:
        """Images of each of them."""
        return [min(self.batch_size, size - first * self.batch_size) for first in range(self.steps(size))]

    def draws(self, indices: Tensor, visit: Visit, epochs: int) -> Iterator[Draw]:
        """The batches of one visit to a client that holds ``indices``."""
        for epoch in range(epochs):
            parts = (visit.seed, visit.round, visit.client, epoch)
            order = indices[torch.randperm(len(indices), generator=generator(*parts, "shuffle"))]
            for step in range(self.steps(len(indices))):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield Draw(chosen, torch.arange(len(chosen)), len(chosen), derive(*parts, step, "augment"))


class VisitSampler(DistributedSampler[Draw]):
    """Batches of a list of visits, in order; under a Trainer, of the visit that its epoch stands for.

    It is a DistributedSampler so that Lightning leaves it as it is: each batch is already split over processes here. All get
    equally many images: where a batch does not divide, its first images are seen twice.

    Args:
        clients: for each client the indices of its images.
        plan: how they are cut into batches.
        seed: of the Trainer's visits.
        rank: which process this is.
        processes: how many share each batch.
    """

    def __init__(self, clients: Sequence[Tensor], plan: Plan, seed: int, rank: int = 0, processes: int = 1) -> None:
        super().__init__(clients, num_replicas=processes, rank=rank)  # type: ignore[arg-type]
        self.clients, self.plan, self.seed = clients, plan, seed
        self.visits: Sequence[Visit] = [Visit(0, 0, seed)]
        self.epochs = 1
        self.skip = 0  # batches that the next iteration leaves out

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.visits, self.epochs = [Visit(epoch, 0, self.seed)], 1

    def __len__(self) -> int:
        return sum(self.plan.steps(len(self.clients[visit.client])) * self.epochs for visit in self.visits)

    def __iter__(self) -> Iterator[Draw]:
        skip, self.skip = self.skip, 0
        return islice(self._draws(self.visits, self.epochs), skip, None)

    def _draws(self, visits: Sequence[Visit], epochs: int) -> Iterator[Draw]:
        for visit in visits:
            for draw in self.plan.draws(self.clients[visit.client], visit, epochs):
                yield self._share(draw)

    def _share(self, draw: Draw) -> Draw:
        if self.num_replicas == 1:
            return draw
        each = -(-draw.total // self.num_replicas)
        places = torch.arange(self.rank, each * self.num_replicas, self.num_replicas) % draw.total
        return draw._replace(indices=draw.indices[places], places=places)


class BatchDataset(Dataset[Any]):
    """Whole batches by their :class:`Draw`.

    Args:
        images: where images are taken from.
        labels: (N,).
        transform: makes a batch's views in the loader, from its images and its draw; None leaves them as they are.
    """

    def __init__(self, images: Images, labels: Tensor, transform: Callable[[Tensor, Draw], tuple[Tensor, ...]] | None = None) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Batch | Exception:
        if not isinstance(draw, Draw):
            raise TypeError(
                "featherlight's batches are drawn by its own sampler, which overfit_batches replaces; to train on few images "
                "use ImageData(limit_train=...)"
            )
        try:
            images = self.images.take(draw.indices)
            views = (images,) if self.transform is None else self.transform(images, draw)
        except ValueError as error:
            return error  # a worker would bury its one line in a traceback: BatchLoader raises it where it is read
        return Batch(views, self.labels[draw.indices], draw.places, draw.total, draw.seed)


class BatchLoader(DataLoader[Batch]):
    """A DataLoader over whole batches that raises a worker's errors as they are, and can go on in the middle of an epoch.

    Lightning keeps :meth:`state_dict` in its checkpoints.
    """

    _given = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so that nothing is drawn before the first batch is asked for: Lightning calls iter() before set_epoch().
        sampler: Any = self.sampler
        self._given = sampler.skip
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                self._iterator = None  # ends the workers now: left to the garbage collector, that takes 5 seconds
                raise batch
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the running epoch have been given."""
        return {"given": self._given % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out, in the next epoch asked for, the batches that had been given."""
        sampler: Any = self.sampler
        sampler.skip = state["given"]


class EvaluationDataset(Dataset[Any]):
    """Normalised images with labels, fetched a whole batch at a time.

    Args:
        images: where images are taken from.
        labels: (N,).
        mean: (C, 1, 1), of values in [0, 1].
        std: (C, 1, 1).
        indices: which images; None: all.
    """

    def __init__(self, images: Images, labels: Tensor, mean: Tensor, std: Tensor, indices: Tensor | None = None) -> None:
        self.images, self.labels, self.mean, self.std = images, labels, mean, std
        self.indices = torch.arange(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([place])
        return images[0], labels[0]

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        chosen = self.indices[places]
        return (self.images.take(chosen).float() / 255 - self.mean) / self.std, self.labels[chosen]


def as_is(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch
