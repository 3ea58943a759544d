"""Images for a Trainer and for a federation from one object, with the same batches bit for bit.

:class:`ImageData` loads a data set, divides it over clients, makes one or two views of each batch, and gives un-augmented images to
kNN and linear probes. Batches are drawn as :mod:`~featherlight.ssl_models.batches` says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from featherlight.plugins.seeds import generator
from featherlight.ssl_models.augment import Augmentation
from featherlight.ssl_models.batches import Batch, BatchDataset, BatchLoader, EvaluationDataset, Plan, VisitSampler, as_is
from featherlight.ssl_models.client_streams import ClientStreams
from featherlight.ssl_models.partitions import IID, Natural, Partition, Parts
from featherlight.ssl_models.pictures import Files, first_size, grey, moments
from featherlight.ssl_models.sources import LOADERS, PUBLISHED, Loaded, Source, blank, folder, read
from featherlight.ssl_models.views import Views

log = logging.getLogger(__name__)
EVALUATION_BATCH = 512


class ImageData(ClientStreams, LightningDataModule):
    """A data set of images, whole (under a Trainer) and divided over clients (in a federation).

    Training batches are ``((x0, x1), labels)`` with two views, ``(x, labels)`` with one; evaluation batches are ``(x, labels)``. Images are
    float (N, C, H, W), normalised by mean and standard deviation of the training images; labels are int64 (N,).

    Args:
        dataset: ``digits`` (scikit-learn's, no download), ``cifar10``, ``cifar100``, or ``folder``: any folder of images, laid out as
            ``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/CLASS/*``; for the natural partition
            ``root/train/CLIENT/CLASS/*`` or ``root/train/CLIENT/*``.
        root: folder of the data; not needed for digits.
        download: fetch cifar10 and cifar100 into root where they are not there.
        image_size: resize images to this many pixels each way; None keeps them as they are.
        views: 2 for contrastive training, 1 for supervised training.
        augment: ``batched``: whole batches on the device, fast; ``lightly``: lightly's transforms image by image in the loader, the
            reference; ``none``: images as they are.
        augmentation: what a view may look like; None takes what suits images of this size.
        second_view: what the second view may look like; None: the same as the first.
        batch_size: images of one step, over all processes.
        num_clients: clients of the federation; the natural partition counts its folders instead.
        partition: how training images are divided over clients: IID, Dirichlet, Shards or Natural; None: IID.
        client_val_fraction: part of each client's images that is kept from training, for evaluation at the client.
        val_fraction: part of the training images that is kept from training, for validation.
        server_fraction: part of the training images (of those within limit_train) that is set aside for the server's own training
            (calibration); no client has them.
        server_root: in its place, a folder of images for the server, labelled or not; brought to the clients' size and channels.
        test_fraction: part of all images used for testing, where the data set has no test part of its own; always the same images.
        limit_train: train on this many images only, the server's part among them; smaller limits are subsets of larger ones of the same
            seed.
        seed: what partition, limit and validation part are drawn from, and the Trainer's batches.
        num_workers: processes that prepare batches.
        skip_unreadable: leave out images that cannot be read, and say how many, instead of stopping.
        drop_last: leave out a client's last batch where it is not full and not the only one. None: with two views; with one view, where
            that batch has a single image, which batch norm cannot train on. False: train on every image.
        in_memory_bytes: data sets up to this size are decoded once and kept in memory; larger ones are decoded batch by batch.

    Raises:
        ValueError: for unknown names and numbers out of range; later, when data are read, for a folder or image that cannot be read
            and for clients with too few images.
    """

    def __init__(
        self,
        dataset: Literal["digits", "cifar10", "cifar100", "folder"] = "digits",
        root: str = "data",
        download: bool = False,
        image_size: int | None = None,
        views: Literal[1, 2] = 2,
        augment: Literal["batched", "lightly", "none"] = "batched",
        augmentation: Augmentation | None = None,
        second_view: Augmentation | None = None,
        batch_size: int = 256,
        num_clients: int = 1,
        partition: Partition | None = None,
        client_val_fraction: float = 0.0,
        val_fraction: float = 0.0,
        server_fraction: float = 0.0,
        server_root: str | None = None,
        test_fraction: float = 0.2,
        limit_train: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        skip_unreadable: bool = False,
        drop_last: bool | None = None,
        in_memory_bytes: int = 2 * 1024**3,
    ) -> None:
        super().__init__()
        _one_of("dataset", dataset, tuple(LOADERS))
        _one_of("views", views, (1, 2))
        _one_of("augment", augment, ("batched", "lightly", "none"))
        fractions = {"client_val_fraction": client_val_fraction, "val_fraction": val_fraction, "server_fraction": server_fraction}
        for name, fraction in fractions.items():
            if not 0 <= fraction < 1:
                raise ValueError(f"{name}={fraction}; it must be at least 0 and below 1")
        if val_fraction + server_fraction >= 1:
            raise ValueError(f"val_fraction={val_fraction} and server_fraction={server_fraction} leave no images to clients: lower them")
        if server_fraction and server_root is not None:
            raise ValueError(
                f"server_fraction={server_fraction} and server_root={server_root}: the server has one or the other; set server_fraction to "
                "0, or server_root to null"
            )
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction}; it must be above 0 and below 1")
        for name, number in (("batch_size", batch_size), ("num_clients", num_clients), ("limit_train", limit_train)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}; it must be at least 1")
        if views == 2 and batch_size < 2:
            raise ValueError(f"batch_size={batch_size}; two views are compared within a batch, which needs at least 2 images")
        self.dataset, self.root, self.download, self.image_size = dataset, root, download, image_size
        self.views, self.augment, self.augmentation, self.second_view = views, augment, augmentation, second_view
        self.batch_size, self.partition = batch_size, partition or IID()
        self.client_val_fraction, self.val_fraction, self.test_fraction = client_val_fraction, val_fraction, test_fraction
        self.server_fraction, self.server_root = server_fraction, server_root
        self.limit_train, self.seed, self.num_workers = limit_train, seed, num_workers
        self.skip_unreadable, self.in_memory_bytes = skip_unreadable, in_memory_bytes
        self.plan = Plan(batch_size, True if drop_last is None and views == 2 else drop_last, at_least=views)
        self._num_clients = num_clients

    # -- what the data are ----------------------------------------------------------------------------------------
    @property
    def num_classes(self) -> int:
        return len(self._loaded.classes)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), from one picture: the others are not read for it."""
        images = self._loaded.train.images
        if isinstance(images, Files):
            channels, size = 3, (self.image_size, self.image_size) if self.image_size else first_size(images, self.skip_unreadable)
        else:
            _, channels, height, width = images.take(torch.tensor([0])).shape
            size = self.image_size or height, self.image_size or width
        return channels, *size

    def client_label_counts(self) -> Tensor:
        """Images of each client's training part by label, int64 (num_clients, num_classes)."""
        owner = torch.arange(self.num_clients).repeat_interleave(torch.tensor(self.client_sizes()))
        labels = self._listed.labels[self._clients.flat]
        known = labels >= 0
        cells = owner[known] * self.num_classes + labels[known]
        return cells.bincount(minlength=self.num_clients * self.num_classes).view(self.num_clients, self.num_classes)

    def describe(self) -> dict[str, str]:
        """What decides which batches are drawn: a run goes on only with the same."""
        names = ["dataset", "image_size", "views", "augment", "augmentation", "second_view", "client_val_fraction", "val_fraction"]
        names += ["test_fraction", "limit_train", "seed", "plan"]
        names += [name for name in ("server_fraction", "server_root") if getattr(self, name)]  # not in checkpoints of earlier versions
        divided = {"partition": f"{type(self.partition).__name__}({vars(self.partition)})"}
        return {name: repr(getattr(self, name)) for name in names} | divided

    # -- for a federation -----------------------------------------------------------------------------------------
    def example_batch(self, size: int) -> Any:
        """A training batch of noise, shaped as ``training_step`` takes it: for counting costs."""
        views = [torch.rand(size, *self.image_shape) for _ in range(self.views)]
        return (tuple(views) if self.views == 2 else views[0]), torch.zeros(size, dtype=torch.long)

    def client_val_batches(self, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The client's images kept from training, normalised, with labels; none where client_val_fraction is 0."""
        return iter(self._evaluation(self._train, self._client_val[client]))

    def without_pictures(self) -> None:
        """Where the data set's size is published, take that in place of the pictures: for counting costs without fetching them.

        Sizes of clients are then exact for IID; a split by labels is drawn from labels spread evenly, so of the same
        distribution, but not the same.
        """
        if self.dataset in PUBLISHED:
            self._loaded = blank(self.dataset)

    def server_batch_sizes(self, epochs: int) -> list[int]:
        """Images of each batch of ``epochs`` passes over the server's own; ValueError where it has some, and too few for a batch."""
        sizes = super().server_batch_sizes(epochs)
        given = f"server_fraction={self.server_fraction}" if self.server_fraction else f"server_root={self.server_root}"
        if not sizes and (self.server_fraction or self.server_root is not None):
            raise ValueError(f"{given} gives the server {self._server_size} images, and it needs at least {self.plan.at_least}: give more")
        return sizes

    def check_server_labels(self) -> None:
        """For models that learn from labels; ValueError where some of the server's images have none that is one of the classes."""
        labels = (self._server if self.skip_unreadable else self._parts[3]).labels
        if unlabelled := int((labels < 0).sum()):
            named = ", ".join(self._loaded.classes[:10]) + (", …" if self.num_classes > 10 else "")
            raise ValueError(
                f"{unlabelled} of the server's {len(labels)} images have no label that clients know: lay server_root out as CLASS/*, with "
                f"the names of their classes ({named}), or set server_fraction in its place"
            )

    # -- for a Trainer --------------------------------------------------------------------------------------------
    def prepare_data(self) -> None:
        if self.download:
            LOADERS[self.dataset](self.root, True, False)

    def setup(self, stage: str | None = None) -> None:
        self._train, self._server, self._make_views  # noqa: B018

    def train_dataloader(self) -> DataLoader[Any]:
        everything = [torch.arange(len(self._train.labels))]
        _check_sizes([len(everything[0])], self.plan)
        trainer = self.trainer
        rank, processes = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return self._batches(VisitSampler(everything, self.plan, self.seed, rank, processes))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation(self._val) if len(self._val.labels) else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self._test)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Views, normalised, of a training batch that has reached its device; other batches are left as they are."""
        if not isinstance(batch, Batch):
            return batch
        mean, std = (value.to(batch.labels.device) for value in self._moments)
        made = batch.views
        if self.augment == "batched":
            made = self._make_views.batched(made[0], batch.places, batch.total, batch.seed)
        x = [((view.float() / 255 if view.dtype == torch.uint8 else view) - mean) / std for view in made]
        return ((x[0], x[-1]) if self.views == 2 else x[0]), batch.labels

    # -- for probes -----------------------------------------------------------------------------------------------
    def probe_data(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Loaders of un-augmented, normalised training and test images with labels."""
        if (self._listed.labels < 0).any():
            raise ValueError("probes need labels, and some training images have none; lay them out as root/train/CLASS/*")
        return self._evaluation(self._train), self._evaluation(self._test)

    # -- how it is made -------------------------------------------------------------------------------------------
    @cached_property
    def _loaded(self) -> Loaded:
        return LOADERS[self.dataset](self.root, self.download, isinstance(self.partition, Natural))

    @cached_property
    def _parts(self) -> tuple[Source, Source, Source, Source]:
        """Training, validation, test and server's images, whose files are not read yet."""
        source, test = self._loaded.train, self._loaded.test
        places = torch.arange(len(source.labels))
        if test is None:
            held, places = _stratified(source.labels, self.test_fraction)
            test = source.at(held)
        places = places[torch.randperm(len(places), generator=generator(self.seed, "train"))]
        kept = round(self.val_fraction * len(places))
        limited = places[kept:][: self.limit_train]
        servers = round(self.server_fraction * len(limited))
        val, server, train = (source.at(part.sort().values) for part in (places[:kept], limited[:servers], limited[servers:]))
        return train, val, test, server if self.server_root is None else self._elsewhere(self.server_root)

    def _elsewhere(self, root: str) -> Source:
        """The training images of another folder, or all where it has no such part; labels where its classes are called as ours."""
        other = folder(root, False, False, called="server_root")
        ours = torch.tensor([*(self._loaded.classes.index(name) if name in self._loaded.classes else -1 for name in other.classes), -1])
        return Source(other.train.images, ours[other.train.labels])

    def _read(self, part: int, image_size: int | None = None) -> Source:
        source = read(self._parts[part], image_size or self.image_size, self.in_memory_bytes, self.skip_unreadable)
        if self.image_shape[0] == 1:
            source.images = grey(source.images)
        if len(source.images) and (shape := tuple(source.images.take(torch.tensor([0])).shape[1:])) != self.image_shape:
            raise ValueError(
                f"there are images of shape {self.image_shape} and of shape {shape} (C, H, W); set image_size to bring all to one size"
            )
        return source

    @cached_property
    def _train(self) -> Source:
        return self._read(0)

    @cached_property
    def _val(self) -> Source:
        return self._read(1)

    @cached_property
    def _test(self) -> Source:
        return self._read(2)

    @cached_property
    def _server(self) -> Source:
        return self._read(3, None if self.server_root is None else self.image_shape[1])

    @property
    def _server_size(self) -> int:
        return len((self._server if self.skip_unreadable else self._parts[3]).labels)

    @cached_property
    def _server_loader(self) -> BatchLoader:
        return self._batches(VisitSampler([torch.arange(self._server_size)], self.plan, self.seed), self._server)

    @property
    def _listed(self) -> Source:
        """The training part as far as sizes and labels go: files are read only where some of them may be left out."""
        return self._train if self.skip_unreadable else self._parts[0]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return moments(self._train.images)

    @cached_property
    def _make_views(self) -> Views:
        return Views(self.image_shape, self.views, self._loaded.mirrored, self.augmentation, self.second_view)

    @cached_property
    def _divided(self) -> tuple[Parts, Parts]:
        """For each client the images it trains on, and those it keeps for evaluation."""
        labels, owners = self._listed.labels, self._listed.owners
        count = self._num_clients
        if isinstance(self.partition, Natural) and owners is not None:
            _tell_of_empty(self._loaded.clients, set(owners))
            count = len(set(owners)) if count == 1 else count
        if count == 1:
            parts = Parts(torch.arange(len(labels)), [len(labels)])
        else:
            parts = self.partition(labels, count, self.seed, owners)
        if not self.client_val_fraction:
            _check_sizes(parts.sizes, self.plan)
            return parts, Parts(torch.arange(0), [0] * len(parts))
        train, val = [], []
        for client, part in enumerate(parts):
            held = round(self.client_val_fraction * len(part))
            if held:
                order = torch.randperm(len(part), generator=generator(self.seed, "client_val", client))
                val.append(part[order[:held]].sort().values)
                part = part[order[held:]].sort().values
            else:
                val.append(part[:0])
            train.append(part)
        divided = Parts.of(train), Parts.of(val)
        _check_sizes(divided[0].sizes, self.plan)
        return divided

    @property
    def _clients(self) -> Parts:
        return self._divided[0]

    @property
    def _client_val(self) -> Parts:
        return self._divided[1]

    @cached_property
    def _client_loader(self) -> BatchLoader:
        return self._batches(VisitSampler(self._clients, self.plan, self.seed))

    def _batches(self, sampler: VisitSampler, source: Source | None = None) -> BatchLoader:
        source = self._train if source is None else source
        transform = self._make_views.in_loader if self.augment == "lightly" else None
        return BatchLoader(
            BatchDataset(source.images, source.labels, transform),
            batch_size=None,
            sampler=sampler,
            collate_fn=as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _evaluation(self, source: Source, indices: Tensor | None = None) -> DataLoader[Any]:
        dataset = EvaluationDataset(source.images, source.labels, *self._moments, indices)
        return DataLoader(dataset, batch_size=EVALUATION_BATCH, collate_fn=as_is)


def _stratified(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Places of a part with this fraction of every label, always the same, and of the rest; both in rising order."""
    order = torch.randperm(len(labels), generator=generator("test part"))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        mine = order[labels[order] == label]
        held[mine[: round(fraction * len(mine))]] = True
    return held.nonzero().flatten(), (~held).nonzero().flatten()


def _tell_of_empty(clients: Sequence[str], owners: set[str]) -> None:
    """Name the clients who own no training image, and so are not in the federation."""
    empty = [name for name in clients if name not in owners]
    if empty:
        named = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
        log.warning("%d of %d client folders have no training image and are left out: %s", len(empty), len(clients), named)


def _check_sizes(sizes: Sequence[int], plan: Plan) -> None:
    useless = {size for size in set(sizes) if plan.steps(size) == 0}
    for client, size in enumerate(sizes) if useless else ():
        if size in useless:
            raise ValueError(
                f"client {client} has {size} training images; with batch_size={plan.batch_size} it needs at least "
                f"{plan.at_least}: use fewer clients, a more even partition or more images"
            )


def _one_of(name: str, given: object, allowed: Sequence[object]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is unknown; choose from {', '.join(map(str, allowed))}")
