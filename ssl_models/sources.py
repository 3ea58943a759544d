"""Where images come from: each data set as uint8 pictures with labels, in a training and a test part."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featherlight.ssl_models.batches import Images
from featherlight.ssl_models.pictures import Files, Tensors, decode, first_size, resized

log = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass
class Source:
    """One part of a data set.

    Args:
        images: its pictures.
        labels: (N,), -1 where a picture has none.
        owners: to whom each picture belongs, where the data say so.
    """

    images: Images
    labels: Tensor
    owners: Sequence[str] | None = None

    def at(self, places: Tensor) -> Source:
        """Some of the pictures."""
        owners = None if self.owners is None else [self.owners[place] for place in places.tolist()]
        return Source(self.images.at(places), self.labels[places], owners)


@dataclass(frozen=True)
class Loaded:
    """A data set.

    Args:
        train: its training part, or all of it.
        test: its test part, None where it has none of its own.
        classes: names of its labels.
        mirrored: whether a mirrored picture is still a picture of the same kind.
        clients: names of all clients, those who own no picture among them, where the data say so.
    """

    train: Source
    test: Source | None
    classes: tuple[str, ...]
    mirrored: bool = True
    clients: tuple[str, ...] = ()


def digits(root: str, download: bool, by_client: bool) -> Loaded:
    """The 1,797 handwritten digits that ship inside scikit-learn: grey, 8×8, values 0 to 16."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return Loaded(Source(Tensors(pixels), labels), None, tuple(map(str, range(10))), mirrored=False)


def cifar(name: str) -> Callable[[str, bool, bool], Loaded]:
    """Loader of torchvision's ``CIFAR10`` or ``CIFAR100``: colour, 32×32, 50,000 and 10,000 images."""

    def load(root: str, download: bool, by_client: bool) -> Loaded:
        from torchvision import datasets

        parts = []
        for train in (True, False):
            try:
                part = getattr(datasets, name)(root, train=train, download=download)
            except (RuntimeError, OSError) as error:
                raise ValueError(
                    f"{name} is not in root={root} or is incomplete ({str(error).splitlines()[0]}); set download=true, or root to "
                    "the folder that holds it"
                ) from None
            pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            parts.append(Source(Tensors(pixels), torch.tensor(part.targets)))
        return Loaded(parts[0], parts[1], tuple(part.classes))

    return load


def folder(root: str, download: bool, by_client: bool, called: str = "root") -> Loaded:
    """Any folder of images: train/CLASS/* and test/CLASS/*, or CLASS/*; a picture's class is the folder that holds it.

    ``by_client``: the training part's first level is a folder per client, and CLASS below it may be missing. ``called``: what errors call
    the folder.
    """
    base = Path(root)
    if not base.is_dir():
        raise ValueError(f"{called}={root} is not a folder; give the folder that holds train/CLASS/*, or CLASS/*")
    held = base / "train" if (base / "train").is_dir() else base
    train = _files(held)
    test = _files(base / "test") if (base / "test").is_dir() else None
    if not train or test == []:
        empty = base / ("test" if train else "train")
        raise ValueError(f"{called}={root}: no images ({', '.join(SUFFIXES)}) in {empty if empty.is_dir() else base}")
    kinds = [_kind(parts, by_client) for _, parts in train], [_kind(parts, False) for _, parts in test or ()]
    classes = sorted({kind for part in kinds for kind in part if kind is not None})
    number: dict[str | None, int] = {None: -1, **{name: at for at, name in enumerate(classes)}}
    owners = [parts[0] for _, parts in train] if by_client and all(len(parts) > 1 for _, parts in train) else None
    parts = [
        Source(Files([path for path, _ in found]), torch.tensor([number[kind] for kind in named]), owner)
        for found, named, owner in ((train, kinds[0], owners), (test, kinds[1], None))
        if found is not None
    ]
    folders = sorted(entry.name for entry in held.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return Loaded(parts[0], parts[1] if len(parts) > 1 else None, tuple(classes), clients=() if owners is None else tuple(folders))


def _files(base: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Images under ``base`` with their path's parts below it, in the order of their names."""
    found = []
    for place, below, names in os.walk(base, followlinks=True):
        below.sort()
        parts = Path(place).relative_to(base).parts
        found += [(os.path.join(place, name), (*parts, name)) for name in sorted(names) if name.lower().endswith(SUFFIXES)]
    return found


def _kind(parts: tuple[str, ...], by_client: bool) -> str | None:
    return parts[-2] if len(parts) > (2 if by_client else 1) else None


LOADERS: dict[str, Callable[[str, bool, bool], Loaded]] = {
    "digits": digits,
    "cifar10": cifar("CIFAR10"),
    "cifar100": cifar("CIFAR100"),
    "folder": folder,
}


PUBLISHED = {"cifar10": (50_000, 10_000, 10), "cifar100": (50_000, 10_000, 100)}
"""Training images, test images and classes of data sets that have to be fetched."""


def blank(name: str) -> Loaded:
    """As many blank pictures and evenly spread labels as data set ``name`` has, in no memory: for counting costs without the data."""

    def part(size: int, classes: int) -> Source:
        pixels = torch.zeros((), dtype=torch.uint8).expand(size, 3, 32, 32)
        return Source(Tensors(pixels), torch.arange(size) % classes)

    train, test, classes = PUBLISHED[name]
    return Loaded(part(train, classes), part(test, classes), tuple(map(str, range(classes))))


def read(source: Source, image_size: int | None, limit: int, skip_unreadable: bool) -> Source:
    """``source`` with its pictures resized, and decoded where they take no more than ``limit`` bytes.

    Raises:
        UnreadableImage: naming the first that cannot be read; with ``skip_unreadable`` those are left out and counted instead.
        ValueError: where none is left, or sizes differ and ``image_size`` is None.
    """
    images = source.images
    if isinstance(images, Tensors):
        return Source(Tensors(resized(images.pixels, image_size)), source.labels, source.owners)
    if not isinstance(images, Files) or not len(images):
        return source
    size = (image_size, image_size) if image_size else None
    images = Files(images.paths, size)
    size = size or first_size(images, skip_unreadable)
    keep = len(images) * 3 * size[0] * size[1] <= limit
    if not keep and not skip_unreadable:
        return Source(Files(images.paths, size), source.labels, source.owners)
    pixels = np.empty((len(images) if keep else 0, *size, 3), dtype=np.uint8)
    good = decode(images, size, pixels, skip_unreadable)
    if not good.all():
        log.warning("left out %d of %d images that cannot be read", int((~good).sum()), len(good))
        if not good.any():
            raise ValueError(f"none of {len(good)} images can be read, for example {images.paths[0]}")
    chosen = source.at(good.nonzero().flatten())
    if not keep:
        return Source(Files(images.paths[good.numpy()], size), chosen.labels, chosen.owners)
    held = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Source(Tensors(held if good.all() else held[good]), chosen.labels, chosen.owners)
