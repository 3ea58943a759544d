"""Where images come from: each data set as uint8 pictures with labels, in a training and a test part."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from featherlight.ssl_models.batches import Images

log = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
BAR_AFTER = 2.0
"""Seconds of reading after which a progress bar appears."""


class UnreadableImage(ValueError):
    """An image file that cannot be decoded, by name."""


class Tensors:
    """Pictures held decoded in memory.

    Args:
        pixels: uint8 (N, C, H, W), in any order of memory.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        return self.pixels[indices].contiguous()

    def at(self, places: Tensor) -> Tensors:
        return Tensors(self.pixels[places])


class Files:
    """Pictures decoded when they are taken, as colour.

    Args:
        paths: their files.
        size: (H, W) they are cut and resized to; None where all must have the size of the first.
    """

    def __init__(self, paths: Sequence[str] | np.ndarray, size: tuple[int, int] | None = None) -> None:
        self.paths, self.size = np.array(paths, dtype=object), size

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Tensor:
        pictures = np.stack([np.asarray(self.one(index, self.size)) for index in indices.tolist()])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()

    def at(self, places: Tensor) -> Files:
        return Files(self.paths[places.numpy()], self.size)

    def one(self, index: int, size: tuple[int, int] | None) -> Image.Image:
        """One picture, which must be of ``size`` (H, W) where that is given."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if self.size is not None:
                    image.draft("RGB", (self.size[1], self.size[0]))  # lets JPEG decode at a fraction of its size
                picture = image.convert("RGB")
            if self.size is not None and picture.size != (self.size[1], self.size[0]):
                picture = ImageOps.fit(picture, (self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        except Exception as error:  # broken files make PIL raise nearly anything
            reason = type(error).__name__ if str(path) in str(error) else str(error)
            raise UnreadableImage(f"cannot read image {path} ({reason}); repair or remove it, or set skip_unreadable=true") from None
        if size is not None and picture.size != (size[1], size[0]):
            raise ValueError(
                f"image {path} is {picture.size[0]}x{picture.size[1]} pixels, the first is {size[1]}x{size[0]}; set image_size "
                "to bring all to one size"
            )
        return picture


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
    """

    train: Source
    test: Source | None
    classes: tuple[str, ...]
    mirrored: bool = True


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


def folder(root: str, download: bool, by_client: bool) -> Loaded:
    """Any folder of images: train/CLASS/* and test/CLASS/*, or CLASS/*; a picture's class is the folder that holds it.

    ``by_client``: the training part's first level is a folder per client, and CLASS below it may be missing.
    """
    base = Path(root)
    if not base.is_dir():
        raise ValueError(f"root={root} is not a folder; give the folder that holds train/CLASS/*, or CLASS/*")
    train = _files(base / "train" if (base / "train").is_dir() else base)
    test = _files(base / "test") if (base / "test").is_dir() else None
    if not train or test == []:
        empty = base / ("test" if train else "train")
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) in {empty if empty.is_dir() else base}")
    kinds = [_kind(parts, by_client) for _, parts in train], [_kind(parts, False) for _, parts in test or ()]
    classes = sorted({kind for part in kinds for kind in part if kind is not None})
    number: dict[str | None, int] = {None: -1, **{name: at for at, name in enumerate(classes)}}
    owners = [parts[0] for _, parts in train] if by_client and all(len(parts) > 1 for _, parts in train) else None
    parts = [
        Source(Files([path for path, _ in found]), torch.tensor([number[kind] for kind in named]), owner)
        for found, named, owner in ((train, kinds[0], owners), (test, kinds[1], None))
        if found is not None
    ]
    return Loaded(parts[0], parts[1] if len(parts) > 1 else None, tuple(classes))


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
        return Source(Tensors(_resized(images.pixels, image_size)), source.labels, source.owners)
    if not isinstance(images, Files) or not len(images):
        return source
    size = (image_size, image_size) if image_size else None
    images = Files(images.paths, size)
    size = size or _first_size(images, skip_unreadable)
    keep = len(images) * 3 * size[0] * size[1] <= limit
    if not keep and not skip_unreadable:
        return Source(Files(images.paths, size), source.labels, source.owners)
    pixels = np.empty((len(images) if keep else 0, *size, 3), dtype=np.uint8)
    good = _decode(images, size, pixels, skip_unreadable)
    if not good.all():
        log.warning("left out %d of %d images that cannot be read", int((~good).sum()), len(good))
        if not good.any():
            raise ValueError(f"none of {len(good)} images can be read, for example {images.paths[0]}")
    chosen = source.at(good.nonzero().flatten())
    if not keep:
        return Source(Files(images.paths[good.numpy()], size), chosen.labels, chosen.owners)
    held = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Source(Tensors(held if good.all() else held[good]), chosen.labels, chosen.owners)


def _first_size(images: Files, skip_unreadable: bool) -> tuple[int, int]:
    for index in range(len(images)):
        try:
            width, height = images.one(index, None).size
            return height, width
        except UnreadableImage:
            if not skip_unreadable:
                raise
    raise ValueError(f"none of {len(images)} images can be read, for example {images.paths[0]}")


def _decode(images: Files, size: tuple[int, int], pixels: np.ndarray, skip_unreadable: bool) -> Tensor:
    """Decode all into ``pixels`` (nowhere where that is empty); which of them could be read, bool (N,)."""
    from rich.console import Console
    from rich.progress import Progress

    good = torch.ones(len(images), dtype=torch.bool)

    def some(start: int) -> int:
        stop = min(start + 256, len(images))
        for index in range(start, stop):
            try:
                picture = images.one(index, size)
            except UnreadableImage:
                if not skip_unreadable:
                    raise
                good[index] = False
                continue
            if len(pixels):
                pixels[index] = picture
        return stop - start

    began, done = monotonic(), 0
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("reading images", total=len(images))
    # Tiny files spend their time in Python, where threads wait for each other (0.28 against 0.18 ms each, 32 pixels).
    threads = min(8, os.cpu_count() or 1) if os.path.getsize(images.paths[0]) > 2**14 else 1
    pool = ThreadPoolExecutor(threads)
    try:
        for count in pool.map(some, range(0, len(images), 256)):
            done += count
            bar.update(task, completed=done)
            if monotonic() - began > BAR_AFTER:
                bar.start()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.stop()
    return good


def _resized(pixels: Tensor, image_size: int | None) -> Tensor:
    if image_size is None or pixels.shape[-2:] == (image_size, image_size) or not len(pixels):
        return pixels
    return torch.cat([F.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True) for part in pixels.split(1024)])


def moments(images: Images, most: int = 50_000) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of values in [0, 1], float (C, 1, 1) each.

    They come from counts of the 256 values, so that they are the same on every machine; of evenly spaced images where
    there are more than ``most`` (2,000 where images are decoded as they are taken).
    """
    count = min(len(images), most if isinstance(images, Tensors) else 2000)
    places = torch.linspace(0, len(images) - 1, count).round().long()
    tally: Tensor | int = 0
    for some in places.split(1024):
        channels = images.take(some).transpose(0, 1).flatten(1).int()
        tally = tally + torch.stack([channel.bincount(minlength=256) for channel in channels])
    assert isinstance(tally, Tensor)
    share = tally.double() / tally.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=0).sqrt()
    return mean.float().view(-1, 1, 1), std.clamp(min=1e-3).float().view(-1, 1, 1)
